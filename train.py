"""Train: python train.py --config config.yaml [key=value ...]"""

import sys

from config import BadInput, all_keys, load_config, method_module
from datasets import load_sites, sites_of_round, store_on
from federated import Diverged, average_weights, local_update
from methods.find import find_step, method_and_model
from rounds.lock import locked
from rounds.run_folder import RunFolder, check_run_folder
from rounds.screen import RoundTable, show_step
from scoring.evaluate import finish, pick_device, validate
from settings.program import Parser, run_program


def train(config):
    """Run all rounds of `config`, leaving its run folder complete; raises BadInput, Diverged."""
    device = pick_device(config)
    check_run_folder(config)
    method, model = method_and_model(config)
    sites = store_on(load_sites(config), device)
    training_sites = sites_that_train(sites, config)
    model.to(device)
    take_step = find_step(config, device)
    table = RoundTable(config, [site.name for site in sites])
    with RunFolder(config, model.state_dict(), sites, device) as run:
        w, G, kept = run.w, run.G, run.kept
        for t in run.rounds_left():
            updates = [local_update(model, site, w, G, kept.get(site.name), t, config, method,
                                    show_step(t), take_step)
                       for site in sites_of_round(training_sites, config, t)]
            w = w | average_weights(updates, config.weights)                 # w = sum_m n_m / n w_m
            G = method.aggregate([update.prototypes for update in updates])  # means of FINCH's clusters
            kept |= {update.site: update.kept for update in updates}         # never leaves the site
            scores, statistics = (validate(model, w, kept, sites, config, device)
                                  if run.is_due(t) else (None, {}))
            run.save(t, w, G, updates, scores, statistics)
            table.add(t, updates, run.seconds(), scores)
            method.log(t, updates, scores)
    finish(run.out, run.checkpoints(), model, sites, config, device, run.state["seconds"])


def sites_that_train(sites, config):
    """Return the sites that have training images, with method: pooled as one; raises BadInput if none has."""
    if not (found := [site for site in sites if site.train_slices]):
        raise BadInput("hold_out: no other site has a training case, set it to none" if config.hold_out else
                       f"{config.splits or config.data}: no site has a training case, add some")
    is_bound = config.method in ("local", "pooled")
    return method_module(config.method)[0].training_sites(found, sites) if is_bound else found


def main():
    """Train by a config file and its overrides."""
    parser = Parser(description=__doc__, keys=all_keys)
    parser.add_argument("--config", required=True, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any of the keys below")
    given = parser.parse_intermixed_args()
    config = load_config(given.config, given.overrides)
    try:
        with locked(config):
            train(config)
    except Diverged as problem:
        print(f"error: {problem}; resume=true would end in the same way: lower lr and start again in "
              "another out=FOLDER", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    run_program(main)
