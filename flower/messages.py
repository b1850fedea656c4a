"""What travels between the server and the sites on Flower, as records, and what is wrong with it.

A site answers each request with named records and with its name; whatever goes wrong there travels
as that. The server turns answers into Updates and scores, or into what is said of the site.
"""

import sys
import traceback

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from config import BadInput
from federated import Diverged, Update
from flower.faults import said, sit_out
from flower.fields import (
    UPDATE,
    Misfit,
    check_numbers,
    check_records,
    check_scores,
    check_vectors,
    check_weight_bytes,
    classes_of,
)
from flower.fit import are_terms
from rounds.run_folder import size_in_bytes
from scoring.metrics import MEASURES, mean_scores


def pack(prototypes):
    """Return {path: {class: tensor}} as a record, its keys path/class."""
    return ArrayRecord({f"{path}/{j}": v for path in prototypes for j, v in prototypes[path].items()})


def pack_weights(w):
    """Return {name: tensor} as a record of one array of bytes, the tensors in the order of their names.

    Flower asks for every array by itself, several times over; names, shapes and types are known at both ends.
    """
    parts = [w[name].detach().cpu().reshape(-1).view(torch.uint8) for name in sorted(w)]
    return ArrayRecord({"bytes": torch.cat(parts)})


def unpack_weights(record, like, device="cpu"):
    """Return the {name: tensor} of `pack_weights`. like: {name: tensor of its shape and type}."""
    names = sorted(like)
    parts = record.to_torch_state_dict()["bytes"].split([size_in_bytes(like[name]) for name in names])
    return {name: part.clone().view(like[name].dtype).reshape(like[name].shape).to(device)
            for name, part in zip(names, parts, strict=True)}


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

def as_records(parts):
    """Return {part: scores of one site as `evaluate` gives them} as records of numbers.

    A number of one of several foreground classes has the name CLASS/NUMBER.
    """
    records = {}
    for part, scores in parts.items():
        row, = scores["sites"].values()
        flat = {name: value for name, value in row.items() if name != "classes"}
        flat |= {f"{j}/{name}": value for j, of_class in row.get("classes", {}).items()
                 for name, value in of_class.items()}
        records[part] = MetricRecord({name: value for name, value in flat.items() if value is not None})
    return records


def describe_error(problem):
    """Return what the server is told of an exception: of most its kind alone, for the text may hold
    the name of a file or a patient. The site's own log has all of it."""
    text = str(problem) if isinstance(problem, Diverged) else "see the log of that site"
    return f"{type(problem).__name__}: {text}"


def answering(task):
    """Return task(content, context) -> {name: record} as a handler of messages that never raises."""
    def handler(message, context):
        site = {}
        try:
            records = task(message.content, context)
        except Exception as problem:  # noqa: BLE001
            print("error:", problem if isinstance(problem, BadInput) else traceback.format_exc(),
                  file=sys.stderr, flush=True)
            records, site["problem"] = {}, describe_error(problem)
        node = context.node_config  # a partition of a simulation has its name since the task began
        site["name"] = str(node.get("site", node.get("partition-id", "without a name")))
        return Message(RecordDict(records | {"site": ConfigRecord(site)}), reply_to=message)
    return handler


# ---- The server ----

def as_update(site, answer, t, fields, beside=()):
    """Return a site's answer to round t as an Update, None if it has no training images; what went
    wrong there as it is. What the site keeps stays there, and is known here by its round.

    beside: names of the records that an answer has for another purpose.
    """
    if isinstance(answer, Exception):
        return answer
    try:
        scalars = answer.get("scalars")
        if isinstance(scalars, MetricRecord) and dict(scalars) == {"n": 0}:
            return None
        check_records(answer, UPDATE, beside)
        check_numbers(scalars, {"n", "seconds"}, "scalars")
        if not are_terms(set(answer["losses"]), fields):
            raise Misfit(f"its losses have other names than {', '.join(sorted(fields.losses))}")
        check_numbers(answer["losses"], set(answer["losses"]), "losses")
        check_weight_bytes(answer["weights"], fields.weights)
        check_vectors(answer["prototypes"], fields, scalars["n"])
        weights = unpack_weights(answer["weights"], fields.weights)
        return Update(site, scalars["n"], weights, unpack(answer["prototypes"]), dict(answer["losses"]),
                      {"round": t, "n": scalars["n"], "local": {}}, scalars["seconds"])
    except Misfit as problem:
        return problem
    except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
        return Misfit(f"its answer cannot be read: {problem!r}")


def with_scores(answers, parts, config, guards, beside=()):
    """Return the answers that hold the scores `parts`; a site that sent none is named.

    beside: names of the records that an answer has for another purpose.
    """
    kept = {}
    for site, answer in sorted(answers.items()):
        try:
            if isinstance(answer, Exception):
                raise answer
            check_records(answer, dict.fromkeys(parts, MetricRecord), beside)
            for part in parts:
                check_scores(answer[part], config)
            kept[site] = answer
        except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
            sit_out(f"site {said(site)} sent no scores: {said(problem)}", guards)
    return kept


def scores_of(answers, part, config):
    """Return the sites' scores of a part, `val` or `best.test` and so on, as `evaluate` gives them."""
    sites = {}
    for site in sorted(answers):
        scores = answers[site][part]
        sites[site] = {name: scores.get(name) for name in MEASURES}
        if classes := {j: {name: scores.get(f"{j}/{name}") for name in MEASURES} for j in classes_of(config)}:
            sites[site]["classes"] = classes
    return {"sites": sites, "mean": mean_scores(sites)}
