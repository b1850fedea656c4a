"""Tests of the scores: metrics against brute force, averages, statistics at test time, predictions."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from datasets import Site
from scoring import evaluate as evaluation
from scoring import metrics, norms, results
from scoring.norm_statistics import collect_statistics, norm_statistics
from scoring.norms import own_network
from test_fedbcs import golden
from tests.helpers import CPU, a_config, a_model, a_sample, some_sites
from unet import UNet

# ---- Metrics ----

def box(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*bound) for bound in bounds)] = True
    return mask


def brute_distance(at, to, spacing):
    a, b = np.argwhere(at) * np.array(spacing), np.argwhere(to) * np.array(spacing)
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min(1)


def literal_border(mask):
    """The definition, voxel by voxel: inside, with a direct neighbour that is not."""
    found = np.zeros_like(mask)
    for at in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            near = at.copy()
            near[axis] += step
            outside = not 0 <= near[axis] < mask.shape[axis]
            found[tuple(at)] |= outside or not mask[tuple(near)]
    return found


G = box((64, 64), (20, 40), (20, 40))
SPECK = G.copy()

SPECK[60, 60] = True
VECTORS = [
    (G, G, (1, 1), 1, 0, 0),
    (box((64, 64), (20, 40), (23, 43)), G, (1, 1), .85, 3, 1.5),
    (box((64, 64), (25, 35), (25, 35)), G, (1, 1), .4, 6.570110, 5.268128),
    (SPECK, G, (1, 1), .998752, 0, .194108),
    (box((64, 64), (20, 40), (23, 43)), G, (.625, .625), .85, 1.875, .9375),
    (box((64, 64), (0, 20), (3, 23)), box((64, 64), (0, 20), (0, 20)), (1, 1), .85, 3, 1.5),
    (box((20, 40, 40), (6, 15), (10, 30), (13, 30)), box((20, 40, 40), (5, 15), (10, 30), (10, 30)),
     (3, .6, .6), .866856, 3, .92590)]


@pytest.mark.parametrize("prediction, truth, spacing, dice, hd95, assd", VECTORS)
def test_metric_vectors(prediction, truth, spacing, dice, hd95, assd):
    found = metrics.score(prediction, truth, spacing)
    values = [found[name] for name in ("dice", "hd95", "assd")]
    assert values == pytest.approx([dice, hd95, assd], abs=1e-5)
    assert found["miss"] == 0
    swapped = metrics.score(truth, prediction, spacing)
    assert [swapped[name] for name in ("dice", "hd95", "assd")] == pytest.approx(values)


def test_golden_metrics():
    v, = golden("metrics_monai")
    for i, (p, t) in enumerate(zip(v["pred"] > 0, v["truth"] > 0)):
        spacing = (1,) * p.ndim
        found = metrics.score(p, t, spacing)
        if p.any() and t.any():
            for name in ("dice", "hd95", "assd"):
                assert found[name] == pytest.approx(float(v[name][i]), rel=1e-5, abs=2e-5)
            there = metrics.nearest_distance(metrics.border(p), metrics.border(t), spacing)
            assert there.mean() == pytest.approx(float(v["asd_one_way"][i]), rel=1e-5, abs=2e-5)
        else:  # nan or inf there; metric definitions of our own
            far = math.hypot(*p.shape) if p.any() or t.any() else 0
            assert (found["dice"], found["hd95"], found["assd"]) == (float(not far), far, far)
            assert found["miss"] == (far > 0)


def test_metrics_of_empty_masks():
    empty, full = np.zeros((20, 30, 40), bool), box((20, 30, 40), (1, 3), (1, 3), (1, 3))
    diagonal = math.sqrt(60**2 + 15**2 + 20**2)
    one = {"dice": 0, "precision": 0, "recall": 0, "hd95": diagonal, "assd": diagonal, "miss": 1}
    assert metrics.score(empty, full, (3, .5, .5)) == metrics.score(full, empty, (3, .5, .5)) == one
    assert metrics.score(empty, empty, (3, .5, .5)) == {
        "dice": 1, "precision": 1, "recall": 1, "hd95": 0, "assd": 0, "miss": 0}
    assert metrics.overlap_scores(0, 0, 8) == metrics.overlap_scores(0, 8, 0) == {
        "dice": 0, "precision": 0, "recall": 0, "miss": 1}
    assert metrics.overlap_scores(0, 0, 0) == {"dice": 1, "precision": 1, "recall": 1, "miss": 0}


def test_distance_and_border_against_brute_force():
    random = np.random.default_rng(0)
    for trial in range(300):
        shape = random.integers(1, 12, 2 + trial % 2)
        at, to = (random.random(shape) < random.choice([.03, .3, .8]) for _ in range(2))
        assert (metrics.border(at) == literal_border(at)).all()
        spacing = random.uniform(.2, 4, len(shape))
        if at.any() and to.any():
            found = metrics.nearest_distance(at, to, spacing)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, brute_distance(at, to, spacing), atol=1e-12)


def test_precision_and_recall():
    p, t = box((8, 8), (0, 4), (0, 4)), box((8, 8), (2, 4), (0, 8))
    none, found = np.zeros((8, 8), bool), []
    for pair in ((p, t), (p, p & t), (none, none), (p, none), (none, t)):
        scores = metrics.score(*pair, (1, 1))
        found.append((scores["precision"], scores["recall"]))
    assert found == [(8 / 16, 8 / 16), (8 / 16, 1), (1, 1), (0, 0), (0, 0)]


def test_averages_over_cases_sites_and_missing():
    case = {"dice": .5, "hd95": 2., "assd": 1., "miss": 1}
    better = {"dice": 1., "hd95": 0., "assd": 0., "miss": 0}
    nothing = {"dice": None, "hd95": None, "assd": None, "misses": None}
    sites = {"a": metrics.site_scores({"1": [case, better]}), "b": metrics.site_scores({"1": [case]}),
             "none": metrics.site_scores({"1": []})}
    assert sites["a"] == {"dice": .75, "hd95": 1., "assd": .5, "misses": 1, "images": 2}
    assert sites["none"] == nothing | {"images": 0}
    mean = {"dice": .625, "hd95": 1.5, "assd": .75, "misses": 2, "images": 3}
    assert metrics.mean_scores(sites) == metrics.mean_scores(sites, ["none"]) == mean
    assert metrics.mean_scores({"none": sites["none"]}) == nothing | {"images": 0}
    assert metrics.mean_scores(sites, ["b"]) == sites["a"]  # those that took no part stand apart,
    assert metrics.mean_scores(sites, ["a", "b"]) == mean   # unless there are no others
    fast = metrics.site_scores({"1": [case | {"hd95": None, "assd": None}]})
    assert (fast["dice"], fast["hd95"], fast["assd"], fast["misses"]) == (.5, None, None, 1)
    half = metrics.mean_scores({"a": fast, "b": sites["a"]})  # a distance that one site alone has
    assert half == {"dice": .625, "hd95": None, "assd": None, "misses": 2, "images": 3}
    scores = {"sites": sites, "mean": metrics.mean_scores(sites)}
    lines = results.format_table(scores, "mm").split("\n")
    assert len({len(line) for line in lines}) == 1
    assert "HD95 mm" in lines[0] and lines[-1].startswith("worst: b") and "0.6250" in lines[-2]
    scores["mean"] = metrics.mean_scores(sites, ["b"])
    assert results.format_table(scores, "mm", ["b"]).split("\n")[-2].startswith("mean without b       2  0.7500")
    assert "mean of sites" in results.format_table(scores, "mm", ["a", "b"])
    assert results.format_table({"sites": {}, "mean": nothing}, "px") == "no site has an image"


def test_definitions_say_what_was_done():
    volumes = SimpleNamespace(task="prostate", eval_slices="all", test_stats="site", classes=2, tiles=False, init=None,
                              keep_largest=False)
    slices = SimpleNamespace(task="prostate", eval_slices="foreground", test_stats="case", classes=2, tiles=False, init=None,
                              keep_largest=False)
    images = SimpleNamespace(task="nuclei", eval_slices="all", test_stats="site", classes=2, tiles=False, init=None,
                              keep_largest=False)
    assert [results.units(c)["hd95"] for c in (volumes, slices, images)] == ["mm", "mm", "px"]
    found = [results.definitions(c)["image"] for c in (volumes, slices, images)]
    assert ["volume" in image for image in found] == [True, False, False]
    assert ["slice" in image for image in found] == [False, True, False]
    assert results.definitions(slices)["test_stats"].startswith("case")
    images.tiles, images.test_stats = True, "case"
    assert results.definitions(images)["test_stats"].startswith("case: batch-norm mean and variance of up to 64 tiles")
    images.tiles, images.test_stats = False, "site"
    assert "foreign_sites" not in results.definitions(images)
    words = results.definitions(images, True, ["new_b", "new_a"])["foreign_sites"]
    assert "new_a" in words and "new_b" in words and "own unlabelled images" in words


# ---- Statistics and predictions ----

def norms_by_hook(model, x):
    """The (mean, variance) of every batch norm's input, as the norm itself would take them."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            def keep(_, inputs, name=name):
                z = inputs[0].transpose(0, 1).flatten(1)
                seen[name] = z.mean(1), z.var(1)
            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_collected_statistics_are_the_mean_over_batches():
    model = UNet(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x_batches = [torch.rand(2, 3, 32, 32), torch.rand(3, 3, 32, 32) + 1]
    found = collect_statistics(model, x_batches)
    seen = [norms_by_hook(model, x) for x in x_batches]
    assert len(found) == 2 * len(seen[0])
    for name in seen[0]:
        for k, kind in enumerate(("running_mean", "running_var")):
            expected = (seen[0][name][k] + seen[1][name][k]) / 2
            torch.testing.assert_close(found[f"{name}.{kind}"], expected)
    local = own_network(model, found)
    local(x_batches[0])
    x = x_batches[0]
    assert not torch.allclose(local(x), model(x))
    torch.testing.assert_close(local(x)[:1], local(x[:1]))  # nothing depends on batch mates
    assert not torch.allclose(model(x)[:1], model(x[:1]))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_site_statistics_take_the_sites_own_training_images(monkeypatch):
    config, model, sites = a_config(), UNet(4).eval(), some_sites()
    first = norm_statistics(model, sites[0], config, CPU)
    again = norm_statistics(model, sites[0], config, CPU)
    assert all(torch.equal(first[name], again[name]) for name in first)
    bare = Site("a", train=sites[0].train, val=[], test=sites[1].test)
    other = norm_statistics(model, bare, config, CPU)
    assert all(torch.equal(first[name], other[name]) for name in first)
    foreign = Site("b", train=[], val=[], test=sites[1].test)
    foreign = norm_statistics(model, foreign, config, CPU)
    name = next(iter(first))
    assert not torch.allclose(first[name], foreign[name])
    seen = []
    monkeypatch.setattr("scoring.norm_statistics.collect_statistics", lambda model, x: seen.append(list(x)))
    many = Site("a", train=[a_sample("a", f"c{i}", seed=i) for i in range(70)], val=[], test=[])
    volume = Site("v", train=[], val=[], test=[a_sample("v", "c", slices=80)])
    for site in (many, many, volume):
        norm_statistics(model, site, a_config(batch_size=6), CPU)
    assert [sum(len(x) for x in batches) for batches in seen] == [64, 64, 64]
    assert max(len(x) for x in seen[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1]))
    pool = {sample.images[0, 0, 0, 0].item() for sample in many.train}
    taken = [image[0, 0, 0].item() for x in seen[0] for image in x]
    assert len(set(taken)) == 64 and set(taken) <= pool  # no image twice, none augmented


@pytest.mark.parametrize("kind", ["site", "case"])
def test_prediction_depends_on_its_own_case_and_site_alone(kind):
    config, sites = a_config(test_stats=kind), some_sites()
    model = a_model(config)
    statistics = {}
    if kind == "site":
        statistics = {site.name: norm_statistics(model, site, config, CPU) for site in sites}
    local = own_network(model, statistics.get("a", {}))
    alone = evaluation.predict(local, sites[0].test[0], config, CPU)
    together = evaluation.evaluate(model, sites, "test", config, CPU, statistics, {})
    again = evaluation.predict(local, sites[0].test[0], config, CPU)
    assert .1 < alone.mean() < .9
    assert (alone == again).all() and alone.shape == (1, 40, 50) and alone.dtype == np.uint8
    fewer = [Site("a", train=sites[0].train, val=[], test=sites[0].test[:1])]
    one = evaluation.evaluate(model, fewer, "test", config, CPU, statistics, {})["sites"]["a"]
    case = evaluation.score_sample(alone, sites[0].test[0], config)[0][2]
    assert one["dice"] == case["dice"] and one["hd95"] == case["hd95"]
    other = evaluation.score_sample(
        evaluation.predict(local, sites[0].test[1], config, CPU), sites[0].test[1], config)[0][2]
    assert together["sites"]["a"]["dice"] == pytest.approx((case["dice"] + other["dice"]) / 2)


def test_what_a_site_has_of_its_own_stays_out_of_the_network():
    model, (name, *_) = a_model(a_config()), a_model(a_config()).state_dict()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    local = own_network(model, {}, {name: before[name] + 1})
    assert torch.equal(local.state_dict()[name], before[name] + 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    own_network(model, {}).train()
    assert model.training == a_model(a_config()).training


def test_each_site_is_scored_with_its_own_statistics():
    config, sites, used = a_config(), some_sites(), []
    model = a_model(config)
    statistics = {site.name: norm_statistics(model, site, config, CPU) for site in sites}
    original = norms.own_network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "own_network",
                      lambda model, values, local: used.append(values) or original(model, values, local))
        scores = evaluation.evaluate(model, sites, "test", config, CPU, statistics, {})
        patch.setattr(evaluation, "site_statistics", lambda *_: statistics)
        quick, _ = evaluation.validate(model, model.state_dict(), {}, sites, config, CPU)
    assert [values is statistics[name] for values, name in zip(used, "aba")] == [True] * 3
    assert [scores["sites"][name]["images"] for name in "ab"] == [2, 2]
    assert quick["sites"]["b"] == metrics.site_scores({"1": []})
    assert quick["mean"]["dice"] == quick["sites"]["a"]["dice"] and quick["mean"]["hd95"] is None


@pytest.mark.parametrize("keys", [
    {}, {"test_stats": "site"}, {"norm": "group", "test_stats": "none", "width": 8}, {"classes": 3},
    {"task": "volumes"}, {"task": "volumes", "eval_slices": "foreground"}])
def test_validation_has_the_dice_of_the_evaluation(keys):
    """Images of several sizes, passed through the network together and counted on the device, have the
    classes, Dice and misses that each has alone."""
    config = a_config(**keys)
    slices, sizes = (3 if config.task == "volumes" else 1), [(40, 50), (33, 33), (40, 50), (20, 90)] * 3
    samples = [a_sample("a", f"c{i}", slices, seed=i, shift=i / 9, own=own) for i, own in enumerate(sizes)]
    samples[2].truth[:] = 0
    samples[3].truth[:, :12] *= 2  # a second class
    site, model = Site("a", samples[:1], samples, samples), a_model(a_config(**keys | {"classes": 2}))
    if config.classes == 3:
        model.head = nn.Conv2d(4, 3, 1)
    found, statistics = evaluation.validate(model, model.state_dict(), {}, [site], config, CPU)
    expected = evaluation.evaluate(model, [site], "val", config, CPU, statistics, {})
    own = found["sites"]["a"]
    assert {name: own[name] for name in ("dice", "misses", "images")} == {
        name: expected["sites"]["a"][name] for name in ("dice", "misses", "images")}
    assert found["mean"]["dice"] == own["dice"] and own["hd95"] is None
    assert own["misses"] or config.eval_slices == "foreground"
    network = own_network(model, statistics.get("a", {}))
    together = evaluation.predictions(model, site, "val", config, CPU, statistics, {})
    for sample, prediction in together:
        assert (prediction.numpy() == evaluation.predict(network, sample, config, CPU)).all()


def test_predictions_take_at_most_32_slices_in_equal_parts():
    sizes = []

    class Logits(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return torch.stack([x[:, 0] * 0 + .5, x[:, 0]], 1)

    sample = a_sample("v", "c", slices=70, own=(32, 32))
    found = evaluation.predict(Logits(), sample, a_config(), CPU)
    assert sizes == [24, 23, 23]
    assert (found == (sample.images[:, 0] > .5).numpy()).all()


def test_logits_are_resized_before_the_argmax():
    class Corner(nn.Module):
        def forward(self, x):
            logits = torch.zeros(1, 2, 2, 2)
            logits[0, 1, 0, 0], logits[0, 0, 1, 1] = 3, 1  # resized labels would fill one quarter
            return logits

    sample = a_sample("a", "c", own=(4, 4))
    found = evaluation.predict(Corner(), sample, a_config(), CPU)[0]
    # bilinear weights of the corner on 4 rows: 1, .75, .25, 0; class 1 wins where 3 uv > (1-u)(1-v)
    u = np.array([1, .75, .25, 0])
    assert (found == (3 * np.outer(u, u) > np.outer(1 - u, 1 - u))).all()
    assert found.sum() > 4


def test_logits_are_resized_by_half_pixels():
    """Column c of n lies at (c + 1/2) w / n - 1/2 of the w logits; corners are not aligned."""
    class Ramp(nn.Module):
        def forward(self, x):
            logits = torch.zeros(1, 2, 1, 4)
            logits[0, 1] = torch.tensor([-1.0, 2.0, 0.5, -3.0])
            return logits

    for n in (6, 8, 11, 3):
        found = evaluation.predict(Ramp(), a_sample("a", "c", own=(1, n)), a_config(), CPU)[0, 0]
        at = np.clip((np.arange(n) + 0.5) * 4 / n - 0.5, 0, 3)
        assert found.tolist() == (np.interp(at, range(4), [-1.0, 2.0, 0.5, -3.0]) > 0).tolist()


def test_cases_that_are_scored():
    sample = a_sample("v", "c", slices=6, spacing=(3., .5, .5))
    prediction = np.roll(sample.truth, 2, axis=2)
    volume = a_config(task="prostate")
    whole = evaluation.score_sample(prediction, sample, volume)
    assert whole == [(None, 1, metrics.score(prediction == 1, sample.truth == 1, (3., .5, .5)))]
    foreground = a_config(task="prostate", eval_slices="foreground")
    slices = evaluation.score_sample(prediction, sample, foreground)
    assert slices == [(s, 1, metrics.score(prediction[s] == 1, sample.truth[s] == 1, (.5, .5)))
                      for s in (0, 2, 4)]
    image = a_sample("a", "c")
    assert evaluation.score_sample(image.truth, image, a_config())[0][2]["dice"] == 1
