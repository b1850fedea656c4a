"""FedBCS across hospitals: the same round, on Flower, every site a SuperNode with its own data.

The server's loop is that of train.py, with the updates asked for over the network. Only a site's name,
weights, prototypes, counts and scalars leave it. Its images, splits, pictures and what it keeps from
round to round stay in its own folders, which its node-config names: site="NAME" data="FOLDER"
out="FOLDER". flower/README.md has the commands.
"""

import shlex
from functools import partial
from pathlib import Path

from flwr.app import ConfigRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from config import BadInput, load_config
from eval import finish, pick_device, site_statistics, validate
from federated import average_weights, local_update
from flower.fields import UPDATE
from flower.messages import (
    answering,
    as_records,
    as_update,
    ask,
    pack,
    pack_weights,
    scores_of,
    unpack,
    unpack_weights,
    with_scores,
)
from flower.own_files import load_decoded, read
from flower.simulation import name_partition
from flower.site_rules import check_bounds, check_images, check_server, own_overrides
from methods.find import build_model, find_method
from rounds.checkpoint import FORMAT, as_bytes, load_checkpoint, save
from rounds.faults import TooFewSites, accept, sit_out
from rounds.fit import expected_fields
from rounds.lock import locked
from rounds.rollback import go_back, note_trained
from rounds.run_folder import Run, as_json, check_run_folder, prepare_run_folder
from rounds.screen import RoundTable
from scoring.norm_statistics import batch_norms
from scoring.results import KINDS, SCORED, explained, print_result

client = ClientApp()
server = ServerApp()


def settings(context, *overrides):
    """Return the config that the server and all sites share, as the run's settings name it."""
    run = context.run_config
    return load_config(Path(__file__).parents[1] / str(run["config"]),
                       [*shlex.split(str(run["overrides"])), *overrides])


def shared(w, method):
    """Return the weights {name: tensor} that travel: all but those that the method keeps local."""
    return {name: value for name, value in w.items() if not method.local(name)}


# ---- A site ----

def own_site(context):
    """Return (config, Site, Method, network) of this node, from its own folders."""
    node = context.node_config
    if "partition-id" in node and "site" not in node:  # a simulation on one's own machine
        name_partition(node, settings(context))
    if lacks := [key for key in ("site", "data", "out") if not node.get(key)]:
        raise BadInput(f"node-config: lacks {lacks[0]}; give site, data and out")
    check_server(context)
    config = settings(context, *own_overrides(node))
    check_bounds(config, node)
    site, method = load_decoded(str(node["site"]), config), find_method(config)
    return config, site, method, build_model(config, method).to(pick_device(config.device))


def received(record, model, method, device):
    """Return all weights of the network: those that came, and its own initial ones of the others."""
    w = dict(model.state_dict())
    return w | unpack_weights(record, shared(w, method), device)


def train_site(content, context):
    """Answer with the site's update of the weights and prototypes that came, and with these weights'
    validation scores if the server wants them."""
    config, site, method, model = own_site(context)
    check_images(site, context.node_config)
    t, last = content["round"]["t"], content["last"].get(site.name, 0)
    file, device = Path(config.out) / "kept.pt", pick_device(config.device)
    # {round: kept}: the server says which round's update it took last, a later one does not count
    before = read(file).get(last)  # None before the first
    w = received(content["weights"], model, method, device)
    scores = scored(content, t - 1, w, before, config, site, model) if content["round"]["score"] else {}
    if not site.train_slices:  # it is held out, or its splits train on nothing
        return scores | {"scalars": MetricRecord({"n": 0})}
    G = unpack(content["prototypes"], device)
    update = local_update(model, site, w, G, before, t, config, method)
    file.parent.mkdir(parents=True, exist_ok=True)
    save(file, as_bytes({last: before, t: update.kept}))
    return scores | {"weights": pack_weights(update.weights), "prototypes": pack(update.prototypes),
                     "losses": MetricRecord(update.losses),
                     "scalars": MetricRecord({"n": update.n, "seconds": update.seconds})}


def scored(content, t, w, kept, config, site, model):
    """Return the record `val`: the site's validation scores of the weights w of round t that came.

    kept: what the site kept from its last update that was taken, or None. The weights that stay here
    are kept as they were in this round and in the best so far.
    """
    if kept and kept["local"]:
        file, best = Path(config.out) / "local.pt", content["round"]["best"]
        save(file, as_bytes({best: read(file).get(best, {}), t: kept["local"]}))
    all_kept = {site.name: kept} if kept else {}
    return as_records({"val": validate(model, w, all_kept, [site], config, pick_device(config.device))[0]})


def validate_site(content, context):
    """Answer with the site's validation scores of the last round's weights."""
    config, site, method, model = own_site(context)
    kept = read(Path(config.out) / "kept.pt").get(content["last"].get(site.name, 0))
    w = received(content["weights"], model, method, pick_device(config.device))
    return scored(content, content["round"]["t"], w, kept, config, site, model)


def finish_site(content, context):
    """Answer with the site's scores of the best and the last weights; leave a run folder there."""
    config, site, method, model = own_site(context)
    out, device = Path(config.out), pick_device(config.device)
    prepare_run_folder(out, [site], config)
    for kind in KINDS:
        t, w = content["round"][kind], received(content[kind], model, method, device)
        local = {site.name: read(out / "local.pt").get(t, {})}
        model.load_state_dict(w)
        statistics = site_statistics(model, {}, local, [site], config, device)
        checkpoint = {"format": FORMAT, "config": vars(config), "round": t, "weights": w,
                      "local": local, "statistics": statistics}
        save(out / f"{kind}.pt", as_bytes(checkpoint))
    result = finish(out, [site], config, device, 0.0)
    return as_records({f"{kind}.{split}": result[kind][split] for kind in KINDS for split in SCORED})


client.train()(answering(train_site))
client.evaluate()(answering(validate_site))
client.evaluate("finish")(answering(finish_site))


# ---- The server ----

@server.main()
def run_server(grid, context):
    """Run all rounds, then have every site score the best and the last weights on its test data."""
    config = settings(context)
    with locked(config):
        run_rounds(grid, context, config)


def run_rounds(grid, context, config):
    """The rounds of train.py, with every update and score asked for.

    The weights travel once a round: with its update of round t a site sends the scores of round t - 1.
    """
    check_run_folder(config, "config.yaml")
    method = find_method(config)
    model = build_model(config, method)
    run = Run(config, model.state_dict())
    table, ask_sites = RoundTable(config.rounds), partial(ask, grid, config, context.run_config, {})
    fields = expected_fields(model, config, method)
    w, G, kept, line = run.w, run.G, run.kept, None
    for t in run.rounds_left():
        w, G, updates, scores = train_round(ask_sites, t, w, G, run, config, method, fields)
        show(table, line, scores)
        w = w | average_weights(updates, config.weights)                 # w = sum_m n_m / n w_m
        G = method.aggregate([update.prototypes for update in updates])  # means of FINCH's clusters
        kept |= {update.site: update.kept for update in updates}         # here, its round alone
        run.save(t, w, G, updates)
        line = t, updates, run.seconds()
    show(table, line, ask_scores(ask_sites, run, method, config) if run.lacks_scores() else None)
    ask_results(ask_sites, run, config, method, bool(batch_norms(model)))


def show(table, line, scores):
    """Print a round's line of the table once its scores are there; line: None or (t, updates, seconds)."""
    if line:
        table.add(*line, scores)


def train_round(ask_sites, t, w, G, run, config, method, fields):
    """Return the fit updates of round t, what they started from, and the scores of round t - 1. They start
    from w and G, or with `skip`, if too few sites can train on these, from the last that most could."""
    counts = {site: kept["n"] for site, kept in run.kept.items() if "n" in kept}
    wanted, first = run.lacks_scores(), None
    while True:
        answers = ask_updates(ask_sites, t, w, G, run, config, method, wanted and first is None)
        first = first or answers
        beside = ("val",) if wanted and answers is first else ()
        updates = {site: as_update(site, answer, t, fields, beside) for site, answer in answers.items()}
        results = {site: update for site, update in updates.items() if update is not None}
        try:
            updates = accept(results, w, fields, t, config, counts)
            break
        except TooFewSites as problem:
            w, G = go_back(run.state, t, problem)
    if config.on_site_failure == "skip":
        note_trained(run.state, t, w, G, results, updates)
    return w, G, updates, note_scores(run, first, config, UPDATE) if wanted else None


def ask_updates(ask_sites, t, w, G, run, config, method, score):
    """Return {site: its answer in round t, or what is wrong}, with the scores of w if `score`."""
    answers = ask_sites("train", {
        "weights": pack_weights(shared(w, method)), "prototypes": pack(G), "last": last_taken(run.kept),
        "round": ConfigRecord({"t": t, "best": run.state["best"]["round"], "score": score})})
    if config.hold_out not in (None, *answers):
        sit_out(f"hold_out: site {config.hold_out} is not there, only {', '.join(answers)}", config)
    return answers


def last_taken(kept):
    """Return {site: the round of its last update that was taken} as a record."""
    return MetricRecord({site: of_site["round"] for site, of_site in kept.items()})


def ask_scores(ask_sites, run, method, config):
    """Return the sites' validation scores of the last round, noted in the run."""
    answers = ask_sites("evaluate", {
        "weights": pack_weights(shared(run.w, method)), "last": last_taken(run.kept),
        "round": ConfigRecord({"t": run.state["round"], "best": run.state["best"]["round"]})})
    return note_scores(run, answers, config)


def note_scores(run, answers, config, beside=()):
    """Return the validation scores of the last saved round as `evaluate` gives them; note them in the run.

    A site that failed altogether has been named; one whose scores are unfit is named here.
    """
    found = {site: answer for site, answer in answers.items()
             if not (beside and isinstance(answer, Exception))}
    scores = scores_of(with_scores(found, ("val",), config, beside), "val", config)
    run.score(scores)
    return scores


def ask_results(ask_sites, run, config, method, normed):
    """Have every site score the best and the last round; write and print result.json."""
    checkpoints = {kind: load_checkpoint(run.out / f"{kind}.pt") for kind in KINDS}
    rounds = {kind: checkpoints[kind]["round"] for kind in KINDS}
    answers = ask_sites("evaluate.finish", {"round": ConfigRecord(rounds)} | {
        kind: pack_weights(shared(checkpoints[kind]["weights"], method)) for kind in KINDS})
    parts = [f"{kind}.{split}" for kind in KINDS for split in SCORED]
    answers = with_scores(answers, parts, config)
    result = {kind: {"round": rounds[kind]} | {
        split: scores_of(answers, f"{kind}.{split}", config) for split in SCORED} for kind in KINDS}
    print_result(result, config, normed)
    foreign = [site for site in answers if site not in run.kept]
    result = explained(result, config, normed, foreign, run.state["seconds"])
    save(run.out / "result.json", as_json(result))
    print(f"written to {run.out}: result.json, metrics.csv, best.pt, last.pt", flush=True)
