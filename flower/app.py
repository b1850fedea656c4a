"""FedBCS across hospitals: the same round, on Flower, every site a SuperNode with its own data.

The server sends the global weights and prototypes, a site answers with what `local_update` made of
them, and `accept` and `aggregate` are those of the round in one process. Only its name, weights,
prototypes, counts and scalars leave a site; its images, splits, pictures and optimizer state stay in
its own folders, which its node-config names: site="NAME" data="FOLDER" out="FOLDER". Needs
flower/requirements.txt; README has the commands.
"""

import shlex
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import train as training
from config import BadInput, load_config
from datasets import load_own_site
from eval import (
    FORMAT,
    KINDS,
    SCORED,
    explained,
    load_checkpoint,
    local_statistics,
    pick_device,
    print_scores,
)
from federated import accept, aggregate, local_update, sit_out
from flower.messages import (
    answering,
    as_records,
    as_update,
    ask,
    pack,
    scores_of,
    tensors,
    unpack,
    with_scores,
)
from methods.baselines import method_of
from unet import build_model

client = ClientApp()
server = ServerApp()


def settings(context, *overrides):
    """Return the config that the server and all sites share, as the run's settings name it."""
    run = context.run_config
    return load_config(Path(__file__).parents[1] / str(run["config"]),
                       [*shlex.split(str(run["overrides"])), *overrides])


# ---- A site ----

def own_site(context):
    """Return (config, Site, Method, network) of this node, from its own folders."""
    node = context.node_config
    if lacks := [key for key in ("site", "data", "out") if not node.get(key)]:
        raise BadInput(f"node-config: lacks {lacks[0]}; give site, data and out")
    config = settings(context, f"data={node['data']}", f"out={node['out']}")
    site, method = load_own_site(str(node["site"]), config), method_of(config)
    return config, site, method, build_model(config, method.front).to(pick_device(config.device))


def train_site(content, context):
    """Answer with the site's update of the weights and prototypes that came."""
    config, site, method, model = own_site(context)
    if not site.train_slices:  # it is held out, or its splits train on nothing
        return {"scalars": MetricRecord({"n": 0})}
    t, last = content["round"]["t"], content["last"].get(site.name, 0)
    file, device = Path(config.out) / "optimizer.pt", pick_device(config.device)
    # {round: state}: the server says which round's update it took last, a later one does not count
    states = torch.load(file, "cpu", weights_only=True) if file.exists() else {}
    before = states.get(last)  # None before the first
    update = local_update(model, site, tensors(content["weights"], device),
                          unpack(content["prototypes"], device), before, t, config, method=method)
    file.parent.mkdir(parents=True, exist_ok=True)
    training.save(file, training.as_bytes({last: before, t: update.optimizer}))
    return {"weights": ArrayRecord(update.weights), "prototypes": pack(update.prototypes),
            "losses": MetricRecord(update.losses),
            "scalars": MetricRecord({"n": update.n, "seconds": update.seconds})}


def validate_site(content, context):
    """Answer with the site's validation scores of the weights that came."""
    config, site, _, model = own_site(context)
    state = {"weights": tensors(content["weights"]), "statistics": {}}
    device = pick_device(config.device)
    return as_records({"val": training.validate(model, state, [site], config, device)})


def finish_site(content, context):
    """Answer with the site's scores of the best and the last weights; leave a run folder there."""
    config, site, _, model = own_site(context)
    out, device = Path(config.out), pick_device(config.device)
    training.prepare_run_folder(out, [site], config)
    for kind in KINDS:
        checkpoint = {"format": FORMAT, "config": vars(config), "round": content["round"][kind],
                      "weights": tensors(content[kind]), "statistics": {}}
        model.load_state_dict(checkpoint["weights"])
        checkpoint["statistics"] = local_statistics(model, checkpoint, [site], config, device)
        training.save(out / f"{kind}.pt", training.as_bytes(checkpoint))
    result = training.finish(out, [site], config, device, 0.0)
    return as_records({f"{kind}.{split}": result[kind][split] for kind in KINDS for split in SCORED})


client.train()(answering(train_site))
client.evaluate()(answering(validate_site))
client.evaluate("finish")(answering(finish_site))


# ---- The server ----

@server.main()
def run_server(grid, context):
    """Run all rounds, then have every site score the best and the last weights on its test data."""
    config = settings(context)
    out, method = Path(config.out), method_of(config)
    training.check_run_folder(out, config, "config.yaml")
    model = build_model(config, method.front)
    state = training.start_or_resume(model, [], config, torch.device("cpu"))
    training.prepare_run_folder(out, [], config)
    ask_sites = partial(ask, grid, config, context.run_config, {})

    def run_round(t):
        w, G = state["weights"], state["prototypes"]
        answers = ask_sites("train", {"weights": ArrayRecord(w), "prototypes": pack(G),
                                      "round": ConfigRecord({"t": t}),
                                      "last": MetricRecord(state["optimizers"])})
        if config.hold_out not in (None, *answers):
            sit_out(f"hold_out: site {config.hold_out} is not there, only {', '.join(answers)}", config)
        results = {site: update for site, answer in answers.items()
                   if (update := as_update(site, answer)) is not None}
        updates = accept(results, w, G, config, t)
        state["optimizers"] |= {update.site: t for update in updates}
        return *aggregate(updates, config, method), updates

    def score():
        answers = ask_sites("evaluate", {"weights": ArrayRecord(state["weights"])})
        return scores_of(with_scores(answers, ("val",), config), "val")

    training.run_rounds(state, config, run_round, score)
    finish(ask_sites, out, config, state["seconds"])


def finish(ask_sites, out, config, seconds):
    """Have every site score the best and the last round; write and print result.json."""
    checkpoints = {kind: load_checkpoint(out / f"{kind}.pt") for kind in KINDS}
    rounds = {kind: checkpoints[kind]["round"] for kind in KINDS}
    answers = ask_sites("evaluate.finish", {"round": ConfigRecord(rounds)} | {
        kind: ArrayRecord(checkpoints[kind]["weights"]) for kind in KINDS})
    parts = [f"{kind}.{split}" for kind in KINDS for split in SCORED]
    answers, result = with_scores(answers, parts, config), {}
    for kind in KINDS:
        result[kind] = {"round": rounds[kind]} | {
            split: scores_of(answers, f"{kind}.{split}") for split in SCORED}
        print_scores(kind, result[kind], config)
    foreign = [site for site in answers if site not in checkpoints["last"]["optimizers"]]
    result = explained(result, config, foreign, seconds)
    training.save(out / "result.json", training.as_json(result))
    print(f"written to {out}: result.json, metrics.csv, best.pt, last.pt", flush=True)
