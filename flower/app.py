"""FedBCS across hospitals: the same round, on Flower, every site a SuperNode with its own data.

The server's loop is that of train.py, with the updates asked for over the network. Only a site's name,
weights, prototypes, counts and scalars leave it. All else stays in its own folders, which its node-config
names: site="NAME" data="FOLDER" out="FOLDER". flower/README.md has the commands."""

import os
import statistics
from pathlib import Path

from flwr.app import ConfigRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from config import BadInput
from datasets import sites_of_round
from federated import Update, average_weights, local_update
from flower import fit, messages
from flower.fit import Misfit, shared, sit_out
from flower.guards import settings
from flower.nodes import Nodes
from flower.site_rules import check_images, count_answer, keep, load_decoded, own_config, read
from methods.find import find_step, method_and_model
from rounds.checkpoint import FORMAT, as_bytes, save
from rounds.lock import locked
from rounds.run_folder import RunFolder, as_json, check_run_folder, prepare_run_folder
from rounds.screen import RoundTable
from scoring.evaluate import finish, pick_device, validate, with_weights
from scoring.metrics import mean_scores
from scoring.norms import batch_norms
from scoring.results import KINDS, SCORED, explained, print_result
from sites.files import warn

client = ClientApp()
server = ServerApp()


# ---- A site ----

def own_site(context):
    """Return (config, Site, Method, network) of this node, from its own folders."""
    config = own_config(context)
    site, (method, model) = load_decoded(str(context.node_config["site"]), config), method_and_model(config)
    return config, site, method, model.to(pick_device(config))


def train_site(content, context):
    """Answer with the site's update of what came, and with the scores of that if the server wants them."""
    config, site, method, model = own_site(context)
    check_images(site, context.node_config)
    t, last = content["round"]["t"], content["turn"]["last"]
    # {round: kept}: the server says which round's update it took last, a later one does not count
    kept = count_answer("training", t, config, context.node_config)
    before = kept.get(last)
    if last and not before:
        warn(site.name, [f"kept.pt holds nothing of round {last}; it goes on with a new optimizer"])
    w = messages.received(content["weights"], model, method)
    scores = scored(content, t - 1, w, before, config, site, model) if content["round"]["score"] else {}
    if not (site.train_slices and content["turn"]["train"]):  # nothing to train on, or not its turn
        keep(kept, config)
        return scores | {"scalars": MetricRecord({"n": 0})}
    device = pick_device(config)
    G, step = messages.unpack(content["prototypes"], device), find_step(config, device)
    update = local_update(model, site, w, G, before, t, config, method, take_step=step)
    if wrong := fit.check_prototypes(update, fit.expected_fields(model, config, method)):
        raise BadInput(f"method: {wrong}; declare in Method.vectors what it sends, see docs/fork.md")
    keep({last: before, t: update.kept, "answered": kept["answered"]}, config)
    return scores | messages.as_answer(update)


def scored(content, t, w, kept, config, site, model):
    """Return the record `val`: the site's validation scores of the weights w of round t. kept: what the site
    kept from its last update that was taken, or None; the weights that stay here are kept as they were in
    this round and in the best so far."""
    if kept and kept["local"]:
        file, best = Path(config.out) / "local.pt", content["round"]["best"]
        save(file, as_bytes({best: read(file).get(best, {}), t: kept["local"]}))
    all_kept = {site.name: kept} if kept else {}
    return messages.as_records({"val": validate(model, w, all_kept, [site], config, pick_device(config))[0]})


def count_site(content, context):
    """Answer with the number of the site's training images, 0 if it does not train."""
    return {"scalars": MetricRecord({"n": len(own_site(context)[1].train_slices)})}


def validate_site(content, context):
    """Answer with the site's validation scores of the last round's weights."""
    config, site, method, model = own_site(context)
    t, last = content["round"]["t"], content["turn"]["last"]
    kept = count_answer("validation", t, config, context.node_config)
    keep(kept, config)
    w = messages.received(content["weights"], model, method)
    return scored(content, t, w, kept.get(last), config, site, model)


def finish_site(content, context):
    """Answer with the site's scores of the best and the last weights; leave a run folder there."""
    config, site, method, model = own_site(context)
    out, device, found = Path(config.out), pick_device(config), {}
    keep(count_answer("end", content["round"]["last"], config, context.node_config), config)
    prepare_run_folder(out, [site], config)
    for kind in KINDS:
        t, w = content["round"][kind], messages.received(content[kind], model, method)
        found[kind] = {"format": FORMAT, "config": vars(config), "round": t, "weights": w, "statistics": {},
                       "local": {site.name: read(out / "local.pt").get(t, {})}}
        found[kind]["statistics"] = with_weights(model, found[kind], [site], config, device)[0]
        save(out / f"{kind}.pt", as_bytes(found[kind]))
    result = finish(out, found, model, [site], config, device, 0.0)
    return messages.as_records({f"{kind}.{split}": result[kind][split] for kind in KINDS for split in SCORED})


client.train()(messages.answering(train_site))
client.evaluate()(messages.answering(validate_site))
client.query()(messages.answering(count_site))
client.evaluate("finish")(messages.answering(finish_site))


# ---- The server ----

@server.main()
def run_server(grid, context):
    """Run all rounds, then have every site score the best and the last weights on its test data. FEDBCS_OUT
    in the server's environment is its run folder: the run's settings go to every site."""
    own = os.environ.get("FEDBCS_OUT")
    config, guards = settings(context, *([f"out={own}"] if own else []))
    with locked(config):
        run_rounds(Nodes(grid, guards, context.run_config, config.hold_out), config)


def run_rounds(nodes, config):
    """The rounds of train.py, with every update and score asked for. The weights travel once a round: with
    its update of round t a site sends the scores of round t - 1."""
    check_run_folder(config, "config.yaml")
    method, model = method_and_model(config)
    run, table = RunFolder(config, model.state_dict()), RoundTable(config)
    fields = fit.expected_fields(model, config, method)
    kept, line = run.kept, None
    nodes.last, nodes.before = kept, set(kept)

    def show(scores):  # of round t, once its scores are there
        if line:
            table.add(*line, scores)
            method.log(*line[:2], scores)

    for t in run.rounds_left():
        updates, scores = train_round(nodes, run, t, method, fields)
        show(scores)
        w = run.w | average_weights(updates, config.weights)             # w = sum_m n_m / n w_m
        G = method.aggregate([update.prototypes for update in updates])  # means of FINCH's clusters
        kept |= {update.site: update.kept for update in updates}         # here, its round alone
        run.save(t, w, G, updates)
        line = t, updates, run.seconds()
    answers = nodes.ask("evaluate", asked(run, method)) if lacks_scores(run) else None
    show(answers and note_scores(answers, run, nodes.guards))
    ask_results(nodes, run, method, bool(batch_norms(model)))


def lacks_scores(run):
    """Return whether the last saved round is due for validation and has no scores yet."""
    t = run.state["round"]
    return t > 0 and run.is_due(t) and not any(row[:2] == (t, "val") for row in run.state["history"])


def draw_sites(nodes, t, config):
    """Return the names of the sites that train in round t, drawn as train.py draws them; None for all."""
    if config.sites_per_round is None:
        return None
    images = {site: answer.get("scalars", {}).get("n") for site, answer in nodes.ask("query", {}).items()
              if not isinstance(answer, Exception)}
    training = sorted(site for site, n in images.items() if type(n) is int and n > 0)
    return sites_of_round(training, config, t)


def train_round(nodes, run, t, method, fields):
    """Return the fit updates of round t, and the scores of round t - 1 if it lacks them, else None."""
    chosen, wanted = draw_sites(nodes, t, run.config), lacks_scores(run)
    records = asked(run, method, t=t, score=wanted) | {"prototypes": messages.pack(run.G)}
    answers = nodes.ask("train", records, chosen)
    if nodes.hold_out not in (None, *answers):
        sit_out(f"hold_out: site {nodes.hold_out} is not there, only {', '.join(answers)}", nodes.guards)
    results = {site: messages.as_update(site, answer, t, fields) for site, answer in answers.items()}
    for site, update in results.items():
        if isinstance(update, Update) and not nodes.trains(site, chosen):
            results[site] = Misfit("it sent an update in a round that it was not drawn for")
    updates = fit.accept(results, run.w, fields, t, nodes.guards, run.kept)
    good = {site: answer for site, answer in answers.items() if not isinstance(answer, Exception)}
    return updates, note_scores(good, run, nodes.guards) if wanted else None


# ---- Scores ----

def asked(run, method, **more):
    """Return what sites need to score the last saved round: its weights and number, the best one's."""
    numbers = {"t": run.state["round"], "best": run.state["best"]["round"]} | more
    return {"weights": messages.pack_weights(shared(run.w, method)), "round": ConfigRecord(numbers)}


def note_scores(answers, run, guards):
    """Return the validation scores of the last saved round as `evaluate` gives them; note them in the run.
    The best round is that of the best median: nobody can check what a site says, and one alone hardly moves
    it."""
    scores = as_scores(scores_in(answers, ["val"], run.config, guards), "val")
    run.score(scores, median_dice)
    return scores


def median_dice(scores):
    """Return the median of the sites' Dice, or None."""
    dice = [site["dice"] for site in scores["sites"].values() if site["dice"] is not None]
    return statistics.median(dice) if dice else None


def ask_results(nodes, run, method, normed):
    """Have every site score the best and the last round; write and print result.json."""
    config, checkpoints = run.config, run.checkpoints()
    rounds = {kind: checkpoints[kind]["round"] for kind in KINDS}
    answers = nodes.ask("evaluate.finish", {"round": ConfigRecord(rounds)} | {
        kind: messages.pack_weights(shared(checkpoints[kind]["weights"], method)) for kind in KINDS})
    parts = [f"{kind}.{split}" for kind in KINDS for split in SCORED]
    found = scores_in(answers, parts, config, nodes.guards)
    foreign = [site for site in found if site not in run.kept]
    result = {kind: {"round": rounds[kind]} | {
        split: as_scores(found, f"{kind}.{split}", foreign) for split in SCORED} for kind in KINDS}
    print_result(result, config, normed, foreign)
    result = explained(result, config, normed, foreign, run.state["seconds"])
    save(run.out / "result.json", as_json(result))
    print(f"written to {run.out}: result.json, metrics.csv, best.pt, last.pt", flush=True)


def scores_in(answers, parts, config, guards):
    """Return {site: {part: its scores}} of the answers that hold all of `parts`; other sites are named."""
    found = {}
    for site, answer in sorted(answers.items()):
        try:
            if isinstance(answer, Exception):
                raise answer
            found[site] = {part: fit.read_scores(answer[part], config) for part in parts}
        except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
            words = f"its answer cannot be read: {problem!r}" if isinstance(problem, KeyError) else problem
            sit_out(f"site {site} sent no scores: {words}", guards)
    return found


def as_scores(found, part, foreign=()):
    """Return the sites' scores of a part, `val` or `best.test` and so on, as `evaluate` gives them."""
    sites = {site: of_site[part] for site, of_site in found.items()}
    return {"sites": sites, "mean": mean_scores(sites, foreign)}
