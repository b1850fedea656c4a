"""What travels between the server and the sites on Flower, as records, and what is wrong with it. A site
answers each request with named records and with its name; whatever goes wrong there travels as that."""

import sys
import traceback

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from config import BadInput
from federated import Diverged, Update
from flower.fit import Misfit, shared
from rounds.run_folder import size_in_bytes

HEAD = 1024  # bytes of an array's own header, at most


def pack(prototypes):
    """Return {path: {class: tensor}} as a record, its keys path/class."""
    return ArrayRecord({f"{path}/{j}": v for path in prototypes for j, v in prototypes[path].items()})


def pack_weights(w):
    """Return {name: tensor} as a record of one array of bytes, in the order of the names: Flower asks for
    every array by itself, several times over, and names, shapes and types are known to both."""
    parts = [w[name].detach().cpu().reshape(-1).view(torch.uint8) for name in sorted(w)]
    return ArrayRecord({"bytes": torch.cat(parts)})


def unpack_weights(record, like, device="cpu"):
    """Return the {name: tensor} of `pack_weights`. like: {name: tensor of its shape and type}."""
    names = sorted(like)
    parts = record.to_torch_state_dict()["bytes"].split([size_in_bytes(like[name]) for name in names])
    return {name: part.clone().view(like[name].dtype).reshape(like[name].shape).to(device)
            for name, part in zip(names, parts, strict=True)}


def unpack(record, device="cpu"):
    """Return the {path: {class: tensor}} of `pack`, on a device."""
    prototypes = {}
    for key, value in record.to_torch_state_dict().items():
        path, j = key.rsplit("/", 1)
        prototypes.setdefault(path, {})[int(j)] = value.to(device)
    return prototypes


# ---- A site ----

def received(record, model, method):
    """Return all weights of the network: those that came, and its own initial ones of the others."""
    w = dict(model.state_dict())
    return w | unpack_weights(record, shared(w, method), next(model.parameters()).device)


def as_answer(update):
    """Return the records of an Update, which `as_update` reads."""
    return {"weights": pack_weights(update.weights), "prototypes": pack(update.prototypes),
            "losses": MetricRecord(update.losses),
            "scalars": MetricRecord({"n": update.n, "seconds": update.seconds})}


def as_records(parts):
    """Return {part: scores of one site as `evaluate` gives them} as records of numbers. A number of one of
    several foreground classes has the name CLASS/NUMBER."""
    records = {}
    for part, scores in parts.items():
        row = dict(*scores["sites"].values())
        for j, of_class in row.pop("classes", {}).items():
            row |= {f"{j}/{name}": value for name, value in of_class.items()}
        records[part] = MetricRecord({name: value for name, value in row.items() if value is not None})
    return records


def describe_error(problem):
    """Return what the server is told of an exception: of most its kind alone, for the text may hold
    the name of a file or a patient. The site's own log has all of it."""
    text = str(problem) if isinstance(problem, Diverged) else "see the log of that site"
    return f"{type(problem).__name__}: {text}"


def answering(task):
    """Return task(content, context) -> {name: record} as a handler of messages that never raises."""
    def handler(message, context):
        try:
            records, site = task(message.content, context), {}
        except Exception as problem:  # noqa: BLE001
            print("error:", problem if isinstance(problem, BadInput) else traceback.format_exc(),
                  file=sys.stderr, flush=True)
            records, site = {}, {"problem": describe_error(problem)}
        node = context.node_config  # a partition of a simulation has its name since the task began
        site["name"] = str(node.get("site", node.get("partition-id", "without a name")))
        return Message(RecordDict(records | {"site": ConfigRecord(site)}), reply_to=message)
    return handler


# ---- The server ----

def check_weight_bytes(record, like):
    """Raise Misfit unless a record is one array of as many bytes as the tensors {name: tensor} have."""
    size, array = size_in_bytes(like), record.get("bytes")
    if set(record) != {"bytes"} or len(array.data) > size + HEAD \
            or (tuple(array.shape), array.dtype, array.stype) != ((size,), "uint8", "numpy.ndarray"):
        raise Misfit(f"its weights are not the {size} bytes of the network's")


def as_update(site, answer, t, fields):
    """Return a site's answer to round t as an Update, None if it has no training images; what went
    wrong there as it is. What the site keeps stays there, and is known here by its round."""
    if isinstance(answer, Exception):
        return answer
    try:
        scalars = answer["scalars"]
        if dict(scalars) == {"n": 0}:
            return None
        check_weight_bytes(answer["weights"], fields.weights)
        return Update(site, scalars["n"], unpack_weights(answer["weights"], fields.weights),
                      unpack(answer["prototypes"]), dict(answer["losses"]),
                      {"round": t, "n": scalars["n"], "local": {}}, scalars["seconds"])
    except Exception as problem:  # noqa: BLE001 - a foreign answer may be wrong in any way
        return Misfit(f"its answer cannot be read: {problem!r}")
