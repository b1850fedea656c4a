"""FedBCS across hospitals: the same round, on Flower, every site a SuperNode with its own data.

The server sends the global weights and prototypes, a site answers with what `local_update` made of
them, and `accept` and `aggregate` are those of the round in one process. Only weights, prototypes,
counts and scalars leave a site; its images, splits, pictures and optimizer state stay in its own
folders, which its node-config names: site="NAME" data="FOLDER" out="FOLDER". Needs
requirements-flower.txt; README has the commands.
"""

import math
import shlex
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import train as training
from baselines import method_of
from config import BadInput, load_config
from datasets import load_own_site
from eval import FORMAT, load_checkpoint, pick_device, run_facts
from federated import Diverged, SiteFailed, Update, accept, aggregate, local_update, sit_out
from metrics import definitions, format_table, mean_scores, units
from site_statistics import site_statistics
from unet import build_model

client = ClientApp()
server = ServerApp()
KINDS, MEASURES = ("best", "last"), ("dice", "hd95", "assd", "misses", "cases")
SPLITS = {"val": "validation", "test": "test"}


def settings(context, *overrides):
    """Return the config that the server and all sites share, as the run's settings name it."""
    run = context.run_config
    return load_config(Path(__file__).parent / str(run["config"]),
                       [*shlex.split(str(run["overrides"])), *overrides])


def pack(prototypes):
    """Return {path: {class: tensor}} as a record, its keys path/class."""
    return ArrayRecord({f"{path}/{j}": v for path in prototypes for j, v in prototypes[path].items()})


def tensors(record, device="cpu"):
    """Return {name: tensor} of a record, on a device."""
    return {name: value.to(device) for name, value in record.to_torch_state_dict().items()}


def unpack(record, device="cpu"):
    """Return the {path: {class: tensor}} of `pack`, on a device."""
    prototypes = {}
    for key, value in tensors(record, device).items():
        path, j = key.rsplit("/", 1)
        prototypes.setdefault(path, {})[int(j)] = value
    return prototypes


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
    before = states.get(last) if last else None
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
        model.load_state_dict(w := tensors(content[kind]))
        statistics = {site.name: site_statistics(model, site, config, device)} \
            if config.test_stats == "site" else {}
        checkpoint = {"format": FORMAT, "config": vars(config), "round": content["round"][kind],
                      "weights": w, "statistics": statistics}
        training.save(out / f"{kind}.pt", training.as_bytes(checkpoint))
    result = training.finish(out, [site], config, device, 0.0)
    return as_records({f"{kind}.{split}": result[kind][split] for kind in KINDS for split in SPLITS})


def as_records(parts):
    """Return {part: scores of one site as `evaluate` gives them} as records of numbers."""
    return {part: MetricRecord({name: value for row in scores["sites"].values()
                                for name, value in row.items() if value is not None})
            for part, scores in parts.items()}


def told(problem):
    """Return what the server is told of an exception: of most its kind alone, for the text may hold
    the name of a file or a patient. The site's own log has all of it."""
    text = str(problem) if isinstance(problem, Diverged) else "see the log of that site"
    return f"{type(problem).__name__}: {text}"


def answering(task):
    """Return task(content, context) -> {name: record} as a handler of messages that never raises."""
    def handler(message, context):
        site = {"name": str(context.node_config.get("site", "without a name"))}
        try:
            records = task(message.content, context)
        except Exception as problem:  # noqa: BLE001
            print("error:", problem if isinstance(problem, BadInput) else traceback.format_exc(),
                  file=sys.stderr, flush=True)
            records, site["problem"] = {}, told(problem)
        return Message(RecordDict(records | {"site": ConfigRecord(site)}), reply_to=message)
    return handler


client.train()(answering(train_site))
client.evaluate()(answering(validate_site))
client.evaluate("finish")(answering(finish_site))


# ---- The server ----

def ask(grid, config, run, names, kind, records):
    """Send records {name: record} to every node; return {site: its records, or what is wrong}.

    Waits for the run's `sites` nodes to be there (with `skip`, once the run goes on, for min_sites),
    then for their answers, each `timeout` seconds at most. names: {node: site} of all so far,
    brought up to date here. Raises SiteFailed if a node is missing and may not be.
    """
    stop, end = config.on_site_failure == "stop", time.monotonic() + run["timeout"]
    wanted = run["sites"] if stop or not names else config.min_sites
    while len(nodes := list(grid.get_node_ids())) < wanted and time.monotonic() < end:
        time.sleep(1)
    lifetime = run["timeout"] + 60  # a node that comes back later is spared what nobody waits for
    messages = [Message(RecordDict(dict(records)), node, kind, ttl=lifetime) for node in nodes]
    replies = list(grid.send_and_receive(messages, timeout=run["timeout"]))
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
    replies = {asked[reply.metadata.reply_to_message_id]: reply for reply in replies}
    here = {node: str(reply.content["site"]["name"]) for node, reply in replies.items()
            if not reply.has_error()}
    if len(set(here.values())) < len(here):
        raise SiteFailed(f"two nodes answer as one site, give each its own name: "
                         f"{', '.join(sorted(here.values()))}")
    names |= here
    answers = {site: RuntimeError("its node is gone") for site in names.values()}
    for node in sorted(nodes, key=here.__contains__):  # a lost node before its replacement
        answers[names.get(node, f"of node {node}")] = content_of(replies.get(node), run["timeout"])
    if len(nodes) < (wanted if stop else config.min_sites):
        raise SiteFailed(f"{len(nodes)} of {wanted} sites are there after {run['timeout']} s: "
                         f"{', '.join(answers)}")
    return answers


def content_of(reply, timeout):
    """Return the records of a reply, or what is wrong with it."""
    if reply is None:
        return TimeoutError(f"no answer within {timeout} s")
    if reply.has_error():
        return RuntimeError(reply.error.reason)
    problem = reply.content["site"].get("problem")
    return RuntimeError(problem) if problem else reply.content


def as_update(site, answer):
    """Return a site's answer as an Update, None if it has no training images; what went wrong there
    as it is."""
    if isinstance(answer, Exception):
        return answer
    try:
        scalars = answer["scalars"]
        if scalars["n"] == 0:
            return None
        losses = {name: float(value) for name, value in answer["losses"].items()}
        return Update(site, scalars["n"], tensors(answer["weights"]), unpack(answer["prototypes"]),
                      losses, {}, float(scalars["seconds"]))
    except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
        return ValueError(f"its answer cannot be read: {problem!r}")


def with_scores(answers, parts, config):
    """Return the answers that hold the scores `parts`; a site that sent none is named."""
    kept = {}
    for site, answer in sorted(answers.items()):
        if not isinstance(answer, Exception) and not all(is_fit(answer.get(part)) for part in parts):
            answer = ValueError("they cannot be read or are not finite")
        if isinstance(answer, Exception):
            sit_out(f"site {site} sent no scores: {answer}", config)
        else:
            kept[site] = answer
    return kept


def is_fit(scores):
    """Return whether a record of scores can be averaged."""
    try:
        needed = {"dice", "misses"} if scores["cases"] else set()
        return needed <= scores.keys() and math.isfinite(sum(scores.values()))
    except (KeyError, TypeError):
        return False


def scores_of(answers, part):
    """Return the sites' scores of a part, `val` or `best.test` and so on, as `evaluate` gives them."""
    sites = {site: {name: answers[site][part].get(name) for name in MEASURES}
             for site in sorted(answers)}
    return {"sites": sites, "mean": mean_scores(sites)}


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
    answers = with_scores(answers, [f"{kind}.{split}" for kind in KINDS for split in SPLITS], config)
    result = {kind: {"round": rounds[kind]} for kind in KINDS}
    for kind in KINDS:
        for split, title in SPLITS.items():
            result[kind][split] = scores_of(answers, f"{kind}.{split}")
            print(f"\n{kind} round {rounds[kind]}, {title}, statistics of the {config.test_stats}")
            print(format_table(result[kind][split], units(config)["hd95"]), flush=True)
    foreign = [site for site in answers if site not in checkpoints["last"]["optimizers"]]
    result |= {"units": units(config), "definitions": definitions(config, foreign)}
    result |= run_facts(seconds)
    training.save(out / "result.json", training.as_json(result))
    print(f"written to {out}: result.json, metrics.csv, best.pt, last.pt", flush=True)
