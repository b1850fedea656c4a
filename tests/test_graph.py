"""Tests of steps as one CUDA graph, on a CPU: a tape of operations stands for the graph, and is replayed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import federated
from config import METHODS
from methods.find import find_step, method_and_model
from rounds.graph import GraphSteps
from settings.kinds import BadInput
from test_fedbcs import tiny_config


class Tape(TorchDispatchMode):
    """Records operations on the tensors they had, as a CUDA graph does with its addresses; `replay` does them
    again, into the same tensors. Recording leaves no trace: what it changed is restored."""

    def __init__(self):
        super().__init__()
        self.calls, self.own, self.before = [], {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        changed = [value for argument, value in zip(function._schema.arguments, args)
                   if argument.alias_info and argument.alias_info.is_write]
        for tensor in tensors_of(changed):
            if tensor.untyped_storage().data_ptr() not in self.own and tensor not in self.before:
                self.before[tensor] = tensor.clone()
        result = function(*args, **(kwargs or {}))
        fresh = [] if changed or any(r.alias_info for r in function._schema.returns) else tensors_of(result)
        for tensor in fresh:
            self.own[tensor.untyped_storage().data_ptr()] = tensor
        self.calls.append((function, args, kwargs or {}, fresh))
        return result

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, fresh in self.calls:
                found = function(*args, **kwargs)
                for old, new in zip(fresh, tensors_of(found)):
                    old.copy_(new)


def tensors_of(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def record(step):
    tape = Tape()
    with tape:
        step()
    with torch.no_grad():
        for tensor, value in tape.before.items():
            tensor.copy_(value)
    return tape.replay


def updates(take_step, config, rounds=2):
    """The updates of two sites that take turns, each with a smaller last batch, over two rounds."""
    method, model = method_and_model(config)
    w, G, kept, found = {name: value.clone() for name, value in model.state_dict().items()}, {}, {}, []
    for t in range(1, rounds + 1):
        now = [federated.local_update(model, Pictures(name), w, G, kept.get(name), t, config, method,
                                      take_step=take_step) for name in "ab"]
        w = w | federated.average_weights(now, config.weights)
        G = method.aggregate([update.prototypes for update in now])
        kept |= {update.site: update.kept for update in now}
        found += now
    return found


class Pictures:
    """Seven images of noise and labels, in batches of two."""

    def __init__(self, name):
        self.name, self.train_slices = name, range(7)

    def steps(self, config):
        return 4

    def batches(self, config, t, epoch, device):
        random = torch.Generator().manual_seed(t * 10 + epoch + ord(self.name))
        x, y = torch.rand(7, 3, 32, 32, generator=random), torch.randint(3, (7, 32, 32), generator=random)
        yield from zip(x.split(2), (y * (y < config.classes)).split(2))


@pytest.mark.parametrize("method, overrides", [
    *((method, ("width=4",)) for method in METHODS if method not in ("fedbcs", "released", "fedbn")),
    ("fedbcs", ("width=4", "local_epochs=2", "fsr=adaptive", "classes=3")),
    ("fedbcs", ("norm=group", "width=8", "levels=[0]"))])
def test_replayed_steps_are_the_eager_ones(method, overrides):
    """Weights, prototypes and losses of every round agree within 1e-5. Adam is not shown: on a CPU it counts its
    steps in Python."""
    config = tiny_config("unused", "unused", f"method={method}", "image_size=32", *overrides)
    steps, taken = GraphSteps(record), []
    steps.record = lambda step: taken.append(1) or record(step)
    eager, replayed = updates(federated.take_step, config), updates(steps, config)
    assert bool(taken) == method_and_model(config)[0].graph and (method == "fedplvm") == (not taken)
    for a, b in zip(eager, replayed):
        torch.testing.assert_close(b.weights, a.weights, rtol=0, atol=1e-5)
        torch.testing.assert_close(b.prototypes, a.prototypes, rtol=1e-4, atol=1e-4)
        assert b.losses == pytest.approx(a.losses, abs=1e-5)


def test_a_graph_needs_a_gpu():
    config = tiny_config("unused", "unused", "graph=true")
    with pytest.raises(BadInput, match="graph: true needs a GPU"):
        find_step(config, torch.device("cpu"))
    assert find_step(tiny_config("unused", "unused"), torch.device("cpu")) is federated.take_step
