"""Tests of a round: what is trained, averaged and sent, and sites that fail."""

import copy
import json
import math
import time

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import federated
import prototypes
import train
from datasets import batches, seeded
from fused_features import PATHS
from methods.find import find_method
from rounds import faults, fit
from rounds.diverged import Diverged
from test_fedbcs import first_state, one_round, tiny_config, write_nuclei
from tests.helpers import assert_same
from unet import UNet

# ---- The round ----

def test_local_prototypes_come_from_the_last_local_epoch(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "local_epochs=3")
    model, sites, w = first_state(config)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federated, "add_class_sums", lambda total, maps, *_: calls.append(len(maps)))
        steps = []
        federated.local_update(model, sites[0], w, {}, None, 1, config, find_method(config),
                               lambda site, step, total: steps.append((step, total)))
    assert len(calls) == 2 and steps == [(i, 6) for i in range(1, 7)]


def test_a_site_sends_no_statistics_and_no_data(tmp_path):
    """What leaves a site: trained parameters, 2 classes x 2 paths of prototypes, counts, losses."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused")
    model, sites, w = first_state(config)
    names = {name for name, _ in model.named_parameters()}
    G = {}
    for t in (1, 2):
        w, G, updates = one_round(model, sites, w, G, {}, t, config)
        for update in updates:
            assert update.weights.keys() == names
            assert {p: sorted(c) for p, c in update.prototypes.items()} == {
                p: [0, 1] for p in PATHS}
            assert all(v.shape == (3 * 16,) for c in update.prototypes.values() for v in c.values())
            assert set(update.losses) == {"dice", "contrast", "consistency"}
            assert (update.losses["contrast"] > 0) == (t == 2)  # no L_MP without global prototypes
    assert w.keys() == names


def constant_loss(value):
    """A method whose one term is `value`, without a gradient of its own."""
    return federated.Method(lambda model, x, y, context: {"dice": value + 0 * model.head.bias.sum()})


def test_losses_are_means_over_all_steps(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "local_epochs=3", "weight_decay=0")
    model, sites, w = first_state(config)
    update = federated.local_update(model, sites[0], w, {}, None, 1, config, constant_loss(2.5))
    assert update.losses == pytest.approx({"dice": 2.5})


def test_the_loss_of_a_step_is_that_before_it(tmp_path):
    """A step that asks again at other weights does not change what is reported of it."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "batch_size=99", "weight_decay=0")
    model, sites, w = first_state(config)
    model.eval()  # as scoring leaves it
    asked = []

    def losses(model, x, y, context):
        assert model.training
        asked.append(len(asked))
        return {"dice": asked[-1] + 0 * model.head.bias.sum()}
    method = federated.Method(losses, step=lambda optimizer, closure: (closure(), closure()))
    assert federated.local_update(model, sites[0], w, {}, None, 1, config, method).losses == {"dice": 0}
    assert asked == [0, 1]


def test_a_round_starts_from_the_global_and_the_sites_own_weights(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "weight_decay=0")
    model, sites, w = first_state(config)
    method = constant_loss(1.0)._replace(local=lambda name: name.startswith("head."))
    own = {"head.weight": torch.full_like(w["head.weight"], 7), "head.bias": torch.full_like(w["head.bias"], 8)}
    kept = {"optimizer": None, "memory": {}, "local": own}
    update = federated.local_update(model, sites[0], w, {}, kept, 2, config, method)
    assert_same(update.kept["local"], own)
    assert_same(update.weights, {name: value for name, value in w.items() if name not in own})
    fresh = federated.local_update(model, sites[0], w, {}, None, 1, config, method)
    assert_same(fresh.kept["local"], {name: w[name] for name in own})


def test_mixed_precision_runs_the_network_alone(tmp_path):
    """Maps are bfloat16, logits and losses float32."""
    config = tiny_config("unused", "unused", "amp=bf16")
    model, x, y = UNet(2), torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
    for amp, kind in (("bf16", torch.bfloat16), (None, torch.float32)):
        config.amp = amp
        logits, maps = federated.run_network(model, x, config)
        assert logits.dtype == torch.float32 and maps["decoder"][0].dtype == kind
        assert logits.shape == (2, 2, 32, 32)
    config.amp = "bf16"
    total = {}
    context = federated.Context("a", 1, {}, {}, {}, total)
    federated.fedbcs_losses(model, x, y, context, config)
    context.G = prototypes.aggregate_prototypes([prototypes.local_prototypes(total)])
    terms = federated.fedbcs_losses(model, x, y, context, config)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim", "item")


class Waits(TorchDispatchMode):
    """Counts the operations whose result a host with a GPU has to wait for; a mask as an index is one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITS or by_mask:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method, t, most", [("fedavg", 1, 0), ("fedprox", 2, 0), ("fedbcs", 1, 0),
                                             ("fedbcs", 2, 10)])
def test_what_a_step_waits_for(tmp_path, monkeypatch, method, t, most):
    """FedAvg's steps wait for nothing. FedBCS has to learn how many pixels are aligned, once a path, and how many
    rows of each of its four maps they need: these numbers are the sizes of what comes next.

    The losses are read once a local epoch, whatever the number of steps.
    """
    # on a CPU one_hot looks at its labels; on a GPU it does not
    monkeypatch.setattr(functional, "one_hot", lambda y, n=2: (y[..., None] == torch.arange(n)).long())
    config = tiny_config(write_nuclei(tmp_path / "d", cases=16), "unused", f"method={method}", "batch_size=2")
    model, sites, w = first_state(config)
    rules, x, y = find_method(config), torch.rand(2, 3, 32, 32), torch.randint(2, (2, 32, 32))
    context = federated.Context("a", t, w, {}, {}, {})
    rules.losses(model, x, y, context)
    context.G = rules.aggregate([rules.send(model, context)]) if t > 1 else {}
    optimizer = federated.make_optimizer(model, config)
    with Waits() as waits:
        sum(rules.losses(model, x, y, context).values()).backward()
        optimizer.step()
    assert len(waits.found) == most, waits.found
    counted = []
    for slices in (sites[0].train_slices[:4], sites[0].train_slices[:8]):
        sites[0].train_slices = slices
        with Waits() as waits:
            federated.local_update(model, sites[0], w, {}, None, 1, config, constant_loss(1.0))
        counted.append(waits.found)
    assert counted[0] == counted[1]


def test_weights_that_are_not_finite_after_the_last_step_are_named(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "batch_size=99")
    model, sites, w = first_state(config)

    def step(optimizer, closure):
        closure()
        model.head.bias.data.fill_(float("inf"))
    with pytest.raises(Diverged, match="weights are not finite at site a, round 1, after step 1"):
        federated.local_update(model, sites[0], w, {}, None, 1, config, constant_loss(1.0)._replace(step=step))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_a_site_keeps_is_not_changed_by_its_next_round(tmp_path, optimizer):
    """An update that is not taken must leave no trace: the same call gives the same bits again."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", f"optimizer={optimizer}")
    model, sites, w = first_state(config)

    def losses(model, x, y, context):
        context.memory.setdefault("seen", []).append(len(context.memory.get("seen", [])))
        return find_method(config).losses(model, x, y, context)
    method = federated.Method(losses)
    kept = federated.local_update(model, sites[0], w, {}, None, 1, config, method).kept
    before = copy.deepcopy(kept)
    first, second = (federated.local_update(model, sites[0], w, {}, kept, 2, config, method)
                     for _ in range(2))
    assert_same(kept, before)
    assert_same(first.weights, second.weights)
    assert_same(first.kept, second.kept)
    assert len(first.kept["memory"]["seen"]) == 2 * len(kept["memory"]["seen"])


@pytest.mark.parametrize("P", [torch.zeros(0), torch.zeros(0, 48), torch.zeros(2, 2, 48),
                               torch.zeros(47), torch.tensor(1.0)])
def test_a_prototype_of_another_shape_is_refused(P):
    update = federated.Update("a", 1, {"w": torch.zeros(2)}, {"encoder": {1: P}}, {"dice": 1.0}, {}, 0.0)
    fields = fit.Fields({"w": torch.zeros(2)}, {"encoder": (48, False)}, 2, {"dice"})
    assert fit.check_update(update, fields) == "its prototypes of the encoder are not vectors of 48 numbers"
    good = update._replace(prototypes={"encoder": {1: torch.zeros(48)}})
    assert fit.check_update(good, fields) is None
    several = fields._replace(prototypes={"encoder": (48, True)})
    assert fit.check_update(good, several) and fit.check_update(update, several)
    assert fit.check_update(good._replace(prototypes={"encoder": {1: torch.zeros(1, 48)}}), several) is None


@pytest.mark.parametrize("width, levels", [(1, [2]), (3, [0, 2]), (2, [1])])
def test_any_width_and_levels_train(tmp_path, width, levels):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", f"width={width}", f"levels={levels}")
    model, sites, w = first_state(config)
    G = {}
    for t in (1, 2):
        w, G, updates = one_round(model, sites, w, G, {}, t, config)
    assert {g.shape[1] for path in PATHS for g in G[path].values()} == {8 * width * len(levels)}
    assert all(update.losses["contrast"] > 0 for update in updates)


def test_server_work_for_a_hundred_sites_is_under_a_second():
    torch.manual_seed(0)
    updates = [federated.Update("a", n, UNet(8).state_dict(), {}, {}, {}, 0.0) for n in range(1, 101)]
    vectors = [{path: {j: torch.randn(768) for j in (0, 1)} for path in PATHS} for _ in range(100)]
    start = time.perf_counter()
    federated.average_weights(updates)
    prototypes.aggregate_prototypes(vectors)
    assert time.perf_counter() - start < 1


def test_optimizer_state_stays_at_its_site(tmp_path):
    """Adam counts on over the rounds, for each site its own steps; only the weights come anew."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "optimizer=adam", "lr=1e-3")
    model, sites, w = first_state(config)
    optimizers, G = {}, {}
    for t in (1, 2):
        before = optimizers.copy()
        w, G, updates = one_round(model, sites, w, G, optimizers, t, config)
        assert [optimizers[u.site]["optimizer"]["state"][0]["step"].item() for u in updates] == [2 * t, 2 * t]
        assert all(optimizers[site] is not before.get(site) for site in optimizers)
    a, b = (optimizers[site]["optimizer"]["state"][0]["exp_avg"] for site in "ab")
    assert not torch.equal(a, b)


def spoiled(update, how):
    """An update that something is wrong with."""
    w, c = dict(update.weights), {p: dict(v) for p, v in update.prototypes.items()}
    if how == "nan weight":
        w["head.weight"] = w["head.weight"] * math.nan
    elif how == "weight shape":
        w["head.weight"] = w["head.weight"][:1]
    elif how == "weight missing":
        del w["head.weight"]
    elif how == "inf prototype":
        c["encoder"][1] = c["encoder"][1] / 0
    elif how == "prototype shape":
        c["encoder"][1] = c["encoder"][1][:-1]
    elif how == "no images":
        return update._replace(n=0)
    return update._replace(weights=w, prototypes=c)


@pytest.mark.parametrize("how, words", [
    ("raises", "the disk has gone"), ("nan weight", "not finite"), ("weight shape", "name, shape or type"),
    ("weight missing", "name, shape or type"), ("inf prototype", "not finite"),
    ("prototype shape", "prototypes of the encoder are not vectors of 48 numbers"),
    ("no images", "0 training images")])
def test_a_site_that_fails_stops_the_run_or_sits_out(tmp_path, monkeypatch, capsys, how, words):
    folder, honest = write_nuclei(tmp_path / "d", ("a", "b", "c")), federated.local_update

    def update(model, site, *rest):
        if site.name != "b":
            return honest(model, site, *rest)
        if how == "raises":
            raise RuntimeError("the disk has gone")
        return spoiled(honest(model, site, *rest), how)
    for skip in (True, False):
        config = tiny_config(folder, "unused", *(["on_site_failure=skip", "min_sites=2"] * skip))
        model, sites, w = first_state(config)
        alone = one_round(model, [sites[0], sites[2]], w, {}, {}, 1, config)
        monkeypatch.setattr(federated, "local_update", update)
        if skip:
            optimizers = {}
            found = one_round(model, sites, w, {}, optimizers, 1, config)
            assert_same(found[0], alone[0])
            assert_same(found[1], alone[1])
            assert [u.site for u in found[2]] == ["a", "c"] and set(optimizers) == {"a", "c"}
            said = capsys.readouterr().err
            assert "site b failed in round 1" in said and words in said and "left out" in said
            config.min_sites = 3
            with pytest.raises(faults.SiteFailed, match="2 sites are left in round 1, min_sites: 3"):
                one_round(model, sites, w, {}, {}, 1, config)
        else:
            with pytest.raises(RuntimeError if how == "raises" else faults.SiteFailed, match=words) as it:
                one_round(model, sites, w, {}, {}, 1, config)
            assert "site b failed in round 1" in capsys.readouterr().err + str(it.value)
        monkeypatch.setattr(federated, "local_update", honest)


def test_one_site_and_a_class_of_one_site_alone(tmp_path):
    folder = write_nuclei(tmp_path / "d", ("a",))
    config = tiny_config(folder, tmp_path / "run", "rounds=2")
    train.train(config)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["last"]["round"] == 2


def test_weights_follow_the_number_of_training_images(tmp_path):
    folder = write_nuclei(tmp_path / "d", ("a",))
    write_nuclei(tmp_path / "e", ("b",), cases=10)
    (tmp_path / "e" / "b").rename(folder / "b")
    results = {}
    for kind, share in (("samples", (3 / 9, 6 / 9)), ("equal", (1 / 2, 1 / 2))):
        config = tiny_config(folder, "unused", f"weights={kind}")
        model, sites, w = first_state(config)
        w, _, updates = one_round(model, sites, w, {}, {}, 1, config)
        assert [update.n for update in updates] == [3, 6]
        results[kind] = w["head.weight"]
        torch.testing.assert_close(w["head.weight"], share[0] * updates[0].weights["head.weight"]
                                   + share[1] * updates[1].weights["head.weight"])
    assert not torch.equal(results["samples"], results["equal"])


def test_fedavg_is_the_loop_with_two_switches_off(tmp_path):
    """No heads, no prototypes, nothing computed for them; and the average is that of literal SGD."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "fsr=none", "prototype_weight=0",
                         "weights=samples")
    model, sites, w = first_state(config)
    assert not any(name.startswith(("fsr", "fusion")) for name in w)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("aligned_features", "add_class_sums", "alignment_loss"):
            patch.setattr(federated, name, lambda *_: pytest.fail("computed for prototypes"))
        found, G, updates = one_round(model, sites, w, {}, {}, 1, config)
    assert G == {} and all(update.prototypes == {} for update in updates)
    locals_ = []
    for site in sites:
        model.load_state_dict(w)
        for x, y in batches(site.train_slices, 2, seeded(config.seed, site.name, 1, 1)):
            loss = federated.segmentation_loss(model(x), y)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients):
                    p -= config.lr * (g + config.weight_decay * p)
        locals_.append([p.detach().clone() for p in model.parameters()])
    for name, *values in zip(w, *locals_):
        torch.testing.assert_close(found[name], sum(values) / 2)
