"""FedBCS across hospitals: the same round, on Flower, every site a SuperNode with its own data.

The server (`run_server`) sends the global weights and prototypes; a site (`train_site`) answers with
what `local_update` made of them; `accept` and `aggregate` are those of the round in one process. A
site keeps its images, splits, pictures and optimizer state in its own folders, which its node-config
names: site="NAME" data="FOLDER" out="FOLDER". Only weights, prototypes, counts and scalars travel.
With requirements-flower.txt installed, one server and a site on one machine, without TLS:

    export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
    export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
    flower-superlink --insecure --host 127.0.0.1 --port 18000
    flower-supernode --insecure --superlink 127.0.0.1:18000 --host 127.0.0.1 --port 18011 \\
        --node-config 'site="north" data="/data/north" out="/data/out_north"'
    flwr run . loop --stream --run-config "overrides='out=/data/server rounds=10'"

where $FLWR_HOME/config.toml has [superlink.loop] with address = "127.0.0.1:18000", insecure = true.
"""

import json
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

import eval as evaluation
import train as training
from baselines import method_of
from config import as_yaml, load_config
from datasets import load_own_site
from federated import Diverged, SiteFailed, Update, accept, aggregate, local_update
from metrics import definitions, format_table, mean_scores, units
from site_statistics import site_statistics
from unet import build_model

client = ClientApp()
server = ServerApp()
HERE = Path(__file__).parent
MEASURES = ("dice", "hd95", "assd", "misses", "cases")


def settings(context, *overrides):
    """Return the config that all sites and the server share, as the run's settings name it."""
    run = context.run_config
    return load_config(HERE / str(run["config"]), [*str(run["overrides"]).split(), *overrides])


def pack(prototypes):
    """Return {path: {class: tensor}} as a record, its keys path/class."""
    return ArrayRecord({f"{path}/{j}": v for path in prototypes for j, v in prototypes[path].items()})


def unpack(record):
    """Return the {path: {class: tensor}} of `pack`."""
    prototypes = {}
    for key, value in record.to_torch_state_dict().items():
        path, j = key.rsplit("/", 1)
        prototypes.setdefault(path, {})[int(j)] = value
    return prototypes


# ---- A site ----

def own_site(context):
    """Return (config, Site, Method, network) of this node, from its own folders."""
    node = context.node_config
    config = settings(context, f"data={node['data']}", f"out={node['out']}")
    site = load_own_site(str(node["site"]), config)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    method, device = method_of(config), evaluation.pick_device(config.device)
    return config, site, method, build_model(config, method.front).to(device)


def name_site(content, context):
    """Answer with the site's name and its number of training images."""
    _, site, _, _ = own_site(context)
    return {"site": ConfigRecord({"name": site.name}),
            "scalars": MetricRecord({"n": len(site.train_slices)})}


def train_site(content, context):
    """Answer with the site's update of the weights and prototypes that came."""
    config, site, method, model = own_site(context)
    t, file = content["round"]["t"], Path(config.out) / "optimizer.pt"
    # a round that is repeated starts from the state before it, as its first try did
    kept = torch.load(file, weights_only=True) if file.exists() else {"t": 0, "after": None}
    before = kept["before"] if kept["t"] == t else kept["after"] if t > 1 else None
    update = local_update(model, site, content["weights"].to_torch_state_dict(),
                          unpack(content["prototypes"]), before, t, config, method=method)
    training.save(file, training.as_bytes({"t": t, "before": before, "after": update.optimizer}))
    scalars = {"n": update.n, "seconds": update.seconds}
    return {"site": ConfigRecord({"name": site.name}), "weights": ArrayRecord(update.weights),
            "prototypes": pack(update.prototypes), "losses": MetricRecord(update.losses),
            "scalars": MetricRecord(scalars)}


def score_site(content, context):
    """Answer with the site's scores of the weights that came; pictures stay in its folder."""
    config, site, _, model = own_site(context)
    kind, device = content["round"]["kind"], evaluation.pick_device(config.device)
    model.load_state_dict(content["weights"].to_torch_state_dict())
    statistics = {}
    if config.test_stats == "site":
        statistics = {site.name: site_statistics(model, site, config, device)}
    scalars = {}
    for split in ("val",) if kind == "round" else ("val", "test"):
        found = evaluation.evaluate(model, [site], split, config, device, statistics,
                                    distances=kind != "round")["sites"][site.name]
        scalars |= {f"{split}.{name}": v for name, v in found.items() if v is not None}
    if kind != "round":
        keep_at_site(config, site, content, statistics, kind)
    return {"site": ConfigRecord({"name": site.name}), "scalars": MetricRecord(scalars)}


def keep_at_site(config, site, content, statistics, kind):
    """Write the site's checkpoint, split and picture to its own folder."""
    out = Path(config.out)
    checkpoint = {"format": evaluation.FORMAT, "config": vars(config), "round": content["round"]["t"],
                  "weights": content["weights"].to_torch_state_dict(), "statistics": statistics}
    training.save(out / f"{kind}.pt", training.as_bytes(checkpoint))
    training.prepare_run_folder(out, [site], config)
    if kind == "best":
        picture = evaluation.draw_predictions(out, [site], config, evaluation.pick_device("cpu"))
        if picture:
            picture.save(out / "predictions.png")


def told(problem):
    """Return what the server is told of an exception: of most its kind alone, for the text may hold
    the name of a file or a patient. The site's own log has all of it."""
    text = str(problem) if isinstance(problem, Diverged) else "see the log of that site"
    return f"{type(problem).__name__}: {text}"


def answering(task):
    """Return task(content, context) -> {name: record} as a handler of messages."""
    def handler(message, context):
        try:
            return Message(RecordDict(task(message.content, context)), reply_to=message)
        except Exception as problem:  # noqa: BLE001
            traceback.print_exc()
            return Message(Error(0, told(problem)), reply_to=message)
    return handler


client.query()(answering(name_site))
client.train()(answering(train_site))
client.evaluate()(answering(score_site))


# ---- The server ----

def ask(grid, nodes, kind, records, timeout):
    """Send records {name: record} to nodes {site: node id}; return {site: reply, or what is wrong}.

    Waits at most `timeout` seconds, whatever becomes of a node.
    """
    messages = [Message(RecordDict(dict(records)), node, kind) for node in nodes.values()]
    replies = {reply.metadata.src_node_id: reply
               for reply in grid.send_and_receive(messages, timeout=timeout)}
    found = {}
    for site, node in nodes.items():
        reply = replies.get(node)
        if reply is None:
            found[site] = TimeoutError(f"no answer within {timeout:g} s")
        elif reply.has_error():
            found[site] = RuntimeError(reply.error.reason)
        elif str(reply.content.get("site", {"name": site})["name"]) != site and kind != "query":
            found[site] = RuntimeError("it answers under another name")
        else:
            found[site] = reply.content
    return found


def find_sites(grid, nodes, wanted, timeout):
    """Return {site: (node id, training images)} of the nodes that are there, once `wanted` are.

    nodes: those known so far. After `timeout` seconds it returns those that there are.
    """
    end = time.monotonic() + timeout
    while True:
        present = set(grid.get_node_ids())
        nodes = {site: known for site, known in nodes.items() if known[0] in present}
        new = {str(node): node for node in present - {node for node, _ in nodes.values()}}
        for answer, node in zip(ask(grid, new, "query", {}, timeout).values(), new.values()):
            if isinstance(answer, Exception):
                print(f"node {node} cannot join: {answer}", file=sys.stderr, flush=True)
                continue
            name = str(answer["site"]["name"])
            if name in nodes:  # its former node has gone and was not yet missed
                print(f"site {name} is another node now", flush=True)
            nodes[name] = node, int(answer["scalars"]["n"])
        if len(nodes) >= wanted or time.monotonic() > end:
            return dict(sorted(nodes.items()))
        time.sleep(1)


def as_update(site, answer):
    """Return a site's answer as an Update; what went wrong there as it is."""
    if isinstance(answer, Exception):
        return answer
    scalars = answer["scalars"]
    return Update(site, int(scalars["n"]), dict(answer["weights"].to_torch_state_dict()),
                  unpack(answer["prototypes"]), dict(answer["losses"]), {}, scalars["seconds"])


def scores_of(answers, split, config, t):
    """Return the sites' scores of one split as `evaluate` gives them, under `on_site_failure`."""
    sites = {}
    for site, answer in answers.items():
        if isinstance(answer, Exception):
            message = f"site {site} sent no scores in round {t}: {answer}"
            if config.on_site_failure == "stop":
                raise SiteFailed(message)
            print(f"{message}; it is left out", file=sys.stderr, flush=True)
            continue
        found = {name: answer["scalars"].get(f"{split}.{name}") for name in MEASURES}
        sites[site] = found | {"cases": int(found["cases"] or 0)}
    return {"sites": sites, "mean": mean_scores(sites)}


def check_present(nodes, wanted, config, t):
    """Raise SiteFailed if too few sites are there, as `on_site_failure` and `min_sites` have it."""
    needed = wanted if config.on_site_failure == "stop" else config.min_sites
    if len(nodes) < needed:
        raise SiteFailed(f"{len(nodes)} sites are there in round {t} ({', '.join(nodes) or 'none'}), "
                         f"{needed} are needed")


@server.main()
def run_server(grid, context):
    """Run all rounds, then have every site score the best and the last weights on its test data."""
    run, config = context.run_config, settings(context)
    wanted, timeout, out = int(run["sites"]), float(run["timeout"]), Path(config.out)
    method = method_of(config)
    training.check_run_folder(out, config, "config.yaml")
    model = build_model(config, method.front)
    state = training.start_or_resume(model, [], config, torch.device("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    training.save(out / "config.yaml", as_yaml(config).encode())
    nodes = {}
    for t in range(state["round"] + 1, config.rounds + 1):
        start = time.perf_counter()
        nodes = find_sites(grid, nodes, wanted, timeout)
        check_present(nodes, wanted, config, t)
        trains = {site: node for site, (node, n) in nodes.items() if n}
        answers = ask(grid, trains, "train", message_of(state, t, "round"), timeout)
        updates = accept({site: as_update(site, answer) for site, answer in answers.items()},
                         state["weights"], state["prototypes"], config, t)
        w, G = aggregate(updates, config, method)
        state |= {"round": t, "weights": w, "prototypes": G}
        scores = {}
        if t % config.eval_every == 0 or t == config.rounds:
            everyone = {site: node for site, (node, _) in nodes.items()}
            scores = scores_of(ask(grid, everyone, "evaluate", message_of(state, t, "round"), timeout),
                               "val", config, t)
        state["seconds"] += time.perf_counter() - start
        state["history"] += training.history_rows(t, updates, scores)
        training.save_round(out, state, is_best=training.note_best(state, scores))
        sites = [SimpleNamespace(name=site) for site in (scores["sites"] if scores else nodes)]
        print(training.header(sites) if t == 1 else "", training.round_line(
            t, updates, scores, sites, config.rounds, time.perf_counter() - start), sep="\n", flush=True)
    finish(grid, find_sites(grid, nodes, wanted, timeout), out, config, timeout, state["seconds"])


def message_of(state, t, kind):
    """Return the records of a message: global weights, global prototypes, round and its kind."""
    return {"weights": ArrayRecord(state["weights"]), "prototypes": pack(state.get("prototypes", {})),
            "round": ConfigRecord({"t": t, "kind": kind})}


def finish(grid, nodes, out, config, timeout, seconds):
    """Write result.json: every site's scores of the best and the last round."""
    result, everyone = {}, {site: node for site, (node, _) in nodes.items()}
    for kind in ("best", "last"):
        checkpoint = evaluation.load_checkpoint(out / f"{kind}.pt")
        t = checkpoint["round"]
        answers = ask(grid, everyone, "evaluate", message_of(checkpoint, t, kind), timeout)
        result[kind] = {"round": t} | {split: scores_of(answers, split, config, t)
                                       for split in ("val", "test")}
        for split, title in (("val", "validation"), ("test", "test")):
            print(f"\n{kind} round {t}, {title}, statistics of the {config.test_stats}")
            print(format_table(result[kind][split], units(config)["hd95"]), flush=True)
    result |= {"units": units(config), "definitions": definitions(config, [])}
    result |= evaluation.run_facts(seconds)
    training.save(out / "result.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"written to {out}: result.json, metrics.csv, best.pt, last.pt", flush=True)
