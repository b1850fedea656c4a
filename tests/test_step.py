"""Tests of a training step of every method: it waits for nothing, its shapes are known, its operations counted."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import federated
from config import METHODS
from experiments import bench
from methods.find import method_and_model
from scoring.evaluate import pick_device
from test_fedbcs import tiny_config

# what a host with a GPU has to wait for, or what has a shape that the data decide
WAITS = {"_local_scalar_dense", "nonzero", "nonzero_static", "is_nonzero", "equal", "masked_select", "item", "bincount",
         "_unique", "_unique2", "unique_dim", "unique_consecutive", "histc", "repeat_interleave"}
VIEWS = {"view", "_unsafe_view", "as_strided", "slice", "select", "t", "transpose", "permute", "expand", "unsqueeze",
         "squeeze", "split", "split_with_sizes", "detach", "alias", "unbind", "narrow", "diagonal", "unfold",
         "empty", "empty_strided", "new_empty", "new_empty_strided"}  # and what only reserves memory


class Watched(TorchDispatchMode):
    """Notes every operation and the shapes of its results; raises AssertionError for one that waits."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] if name == "index" else []
        waits = name in WAITS and function.__name__ != "repeat_interleave.self_int"
        assert not (waits or masks), f"{name} waits for the device"
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.found.append((name, [tuple(r.shape) for r in results if isinstance(r, torch.Tensor)]))
        return result

    def count(self):
        return sum(name not in VIEWS and not name.startswith("_record_function") for name, _ in self.found)


@pytest.fixture
def python_watched(monkeypatch):
    """Within it a tensor that becomes a number, a list, an array or a tensor on the host is an error."""
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits"))


def last_step(method, *overrides):
    """Return step(x, y), of a last local epoch in round 3, batch 1, and labels in which half is foreground."""
    config = tiny_config("unused", "unused", f"method={method}", "width=8", "image_size=64", *overrides)
    rules, model = method_and_model(config)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(1, 3, 64, 64, generator=generator), torch.zeros(1, 64, 64, dtype=torch.long)
    y[:, :, 32:] = 1
    w = {name: value.clone() for name, value in model.state_dict().items()}
    context, G = federated.Context("a", 2, w, {}, {}, {}), None
    rules.losses(model, x, y, context)
    sent = rules.send(model, context)
    G = rules.aggregate([sent, sent]) if sent else {}
    context = federated.Context("a", 3, w, G, context.memory, {})
    optimizer = rules.optimizer(model, config, 3)

    def step(x, y):
        return federated.take_step(rules, model, optimizer, x, y, context)
    step(x, y)  # so that gradients and gathered sums are there
    return step, x, y


@pytest.mark.parametrize("method, overrides", [(method, ()) for method in METHODS] + [
    ("fedbcs", ("fsr=adaptive",)), ("fedbcs", ("norm=group", "test_stats=none")),
    ("fedbcs", ("classes=4",)), ("fpl", ("classes=4",)), ("feduv", ("classes=4",)), ("fedbcs", ("levels=[1]",))])
def test_a_step_waits_for_nothing_and_knows_its_shapes(request, method, overrides):
    """The same operations with the same shapes, whatever the labels are: half foreground, none, all, one pixel."""
    step, x, y = last_step(method, *overrides)
    request.getfixturevalue("python_watched")
    one = torch.zeros_like(y)
    one[0, 5, 7] = 1
    found = []
    for labels in (y, torch.zeros_like(y), torch.ones_like(y), one):
        with Watched() as watched:
            step(x, labels)
        found.append(watched.found)
    assert all(other == found[0] for other in found[1:])


def test_the_watch_sees_what_it_should(request):
    """Each of these is an operation that waits, or a shape that the data decide."""
    t = torch.tensor([0, 1, 2])
    request.getfixturevalue("python_watched")
    for waits in (lambda: t[t > 0], lambda: t.nonzero(), lambda: t.unique(), lambda: t.bincount(),
                  lambda: torch.masked_select(t, t > 1), lambda: torch.equal(t, t), lambda: t.repeat_interleave(t)):
        with pytest.raises(AssertionError, match="waits"), Watched():
            waits()
    for waits in (t.tolist, t[0].item, t.cpu, lambda: bool(t[0]), lambda: int(t[0]), lambda: float(t[0])):
        with pytest.raises(pytest.fail.Exception, match="waits"):
            waits()


def test_operations_of_a_step():
    """At most so many times FedAvg's: FedBCS 3.0 (clipped 3.2), HarmoFL with its two passes 2.5, any other 2.0."""
    counts = {}
    for method in METHODS:
        step, x, y = last_step(method)
        with Watched() as watched:
            step(x, y)
        counts[method] = watched.count()
    most = dict.fromkeys(METHODS, 2.0) | {"fedbcs": 3.0, "released": 3.2, "harmofl": 2.5}
    print("\n", {method: round(n / counts["fedavg"], 2) for method, n in counts.items()})
    assert {method: n for method, n in counts.items() if n > most[method] * counts["fedavg"]} == {}


def test_deterministic_is_what_torch_is_told(monkeypatch):
    """The key reaches torch, with the workspace that cuBLAS needs; no method's step has an operation that torch
    knows as one that does not repeat, as the two-dimensional cross-entropy is on a GPU."""
    told, tell = [], torch.use_deterministic_algorithms
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on, **how: tell(on, **how) or told.append(on))
    for value in ("false", "true", "true", "false"):  # a run that needs nothing does not wait for it
        pick_device(tiny_config("unused", "unused", f"deterministic={value}"))
        assert torch.are_deterministic_algorithms_enabled() == (value == "true")
    assert told == [True, False] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    for method in METHODS:
        step, x, y = last_step(method)
        with Watched() as watched:
            step(x, y)
        assert not {"nll_loss2d_forward", "put_", "put", "upsample_bilinear2d_backward", "cumsum_backward",
                    "_adaptive_avg_pool2d_backward"} & {name for name, _ in watched.found}


def test_bench_has_a_row_for_every_method_and_on_a_gpu_for_graphs(monkeypatch):
    assert bench.rows_of_table().keys() == {*METHODS, "fedavg bf16", "fedbcs bf16"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    rows = bench.rows_of_table()
    assert rows["fedbcs bf16 graph"] == ["method=fedbcs", "amp=bf16", "graph=true"]
    assert rows.keys() == {*METHODS, *(f"{name}{kind}" for name in ("fedavg", "fedbcs")
                                       for kind in (" bf16", " graph", " bf16 graph"))}
