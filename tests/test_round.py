"""Tests of a round: what is trained, averaged and sent, and sites that fail."""

import copy
import json
import time

import pytest
import torch

import federated
import prototypes
import train
from datasets import batches, seeded, sites_of_round
from federated import Diverged
from methods.find import find_method
from rounds.reading import load_checkpoint
from test_fedbcs import first_state, one_round, tiny_config, write_nuclei
from tests.helpers import assert_same
from unet import PATHS, UNet

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
    own = {"head.weight": torch.full_like(w["head.weight"], 7),
           "head.bias": torch.full_like(w["head.bias"], 8)}
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


def test_weights_that_are_not_finite_after_the_last_step_are_named(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "batch_size=99")
    model, sites, w = first_state(config)

    def step(optimizer, closure):
        closure()
        model.head.bias.data.fill_(float("inf"))
    with pytest.raises(Diverged, match="weights are not finite at site a, round 1, after step 1"):
        method = constant_loss(1.0)._replace(step=step)
        federated.local_update(model, sites[0], w, {}, None, 1, config, method)


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
        for name in ("add_class_sums", "alignment_loss"):
            patch.setattr(federated, name, lambda *_, **__: pytest.fail("computed for prototypes"))
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


# ---- Some sites a round ----

def test_sites_are_drawn_by_seed_and_round():
    config, names = tiny_config("unused", "unused", "sites_per_round=2", "seed=3"), list("abcdef")
    drawn = [sites_of_round(names, config, t) for t in range(1, 30)]
    assert drawn == [sites_of_round(names, config, t) for t in range(1, 30)]
    assert all(len(set(part)) == 2 and part == sorted(part) for part in drawn)
    assert {name for part in drawn for name in part} == set(names) and len(set(map(tuple, drawn))) > 8
    config.seed = 4
    assert drawn != [sites_of_round(names, config, t) for t in range(1, 30)]
    for config.sites_per_round in (6, 7, None):
        assert sites_of_round(names, config, 1) == names


def test_a_run_with_some_sites_a_round_resumes_to_the_bit(tmp_path):
    """Only the drawn ones train; who sits out keeps its optimizer."""
    data = write_nuclei(tmp_path / "d", ("a", "b", "c"))
    settings = ("sites_per_round=1", "optimizer=adam", "lr=1e-3")
    train.train(tiny_config(data, tmp_path / "whole", *settings, "rounds=4"))
    train.train(tiny_config(data, tmp_path / "cut", *settings, "rounds=2"))
    train.train(tiny_config(data, tmp_path / "cut", *settings, "rounds=4", "resume=true"))
    whole, cut = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    for part in ("weights", "prototypes", "kept"):
        assert_same(dict(cut[part]), dict(whole[part]))
    trained = [[row[2] for row in whole["history"] if row[:2] == (t, "train")] for t in (1, 2, 3, 4)]
    assert all(len(names) == 1 for names in trained) and len(set(map(tuple, trained))) > 1
    steps = {site: kept["optimizer"]["state"][0]["step"].item() for site, kept in whole["kept"].items()}
    assert steps == {site: 2 * sum(names == [site] for names in trained) for site in steps}
