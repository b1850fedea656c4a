"""Tests of the other methods: every term against its formula written out, resuming, contradictions."""

import json
import math

import numpy as np
import pytest
import torch

import federated
import train
from config import BadInput, load_config
from datasets import batches, load_sites, seeded, splits_of
from federated import Context
from methods.find import find_method
from methods.input_norm import AmplitudeNorm
from methods.shared import LAST
from prototypes import finch
from test_fedbcs import one_round, tiny_config, write_nuclei
from tests.helpers import (
    eval_result,
    rows_of,
)
from unet import build_model


class OneMap:
    """Stands for a network: its last decoder map and its logits are given."""

    def __init__(self, f, logits):
        self.f, self.logits, self.classes = f, logits, logits.shape[1]

    def features(self, x):
        return self.logits, {"encoder": [], "decoder": [self.f]}


def problem(seed=0):
    """A last decoder map (2, 5, 4, 4), logits, labels, and prototypes of which class 1 has three."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.rand(2, 5, 4, 4, generator=generator, requires_grad=True)
    logits = torch.randn(2, 2, 4, 4, generator=generator, requires_grad=True)
    y = (torch.rand(2, 4, 4, generator=generator) > 0.6).long()
    G = {LAST: {0: torch.rand(2, 5, generator=generator), 1: torch.rand(3, 5, generator=generator)}}
    return f, logits, y, G


def losses_of(name, f, logits, y, G, *overrides, total=None):
    config = load_config({"task": "nuclei", "data": "demo", "out": "unused"},
                         [f"method={name}", *overrides])
    context = Context("a", 2, {}, G, {}, total)
    return find_method(config).losses(OneMap(f, logits), torch.zeros(2, 3, 4, 4), y, context)


def foreground(f, y, j=1):
    """Each image's mean over its pixels of class j."""
    pixels = [[f[b, :, h, w] for h, w in (y[b] == j).nonzero().tolist()] for b in range(len(y))]
    return [sum(of_image) / len(of_image) for of_image in pixels if of_image]


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def test_fpl_losses_equal_literal():
    f, logits, y, G = problem()
    terms = losses_of("fpl", f, logits, y, G, "fpl_tau=0.3")
    contrast, consistency = [], []
    for v in foreground(f, y):
        e = {j: sum(math.exp(cosine(v, g) / 0.3) for g in P) for j, P in G[LAST].items()}
        contrast.append(-math.log(e[1] / (e[0] + e[1])))
        consistency.append(((v - G[LAST][1].mean(0)) ** 2).mean().item())
    assert terms["contrast"].item() == pytest.approx(np.mean(contrast), rel=1e-5)
    assert terms["consistency"].item() == pytest.approx(np.mean(consistency), rel=1e-5)
    assert terms["dice"] == federated.segmentation_loss(logits, y)
    assert load_config({"task": "nuclei", "data": "demo", "out": "x"}, ["method=fpl"]).fpl_tau == 0.02


def test_fedplvm_losses_equal_literal():
    f, logits, y, G = problem(1)
    G[LAST][1] = -G[LAST][1]  # a cosine below 0 counts as 1e-6
    terms = losses_of("fedplvm", f, logits, y, G)
    contrast, consistency = [], []
    for v in foreground(f, y):
        e = {j: sum(math.exp(max(cosine(v, g), 1e-6) ** 0.25 / 0.07) for g in P)
             for j, P in G[LAST].items()}
        contrast.append(-math.log(e[1] / (e[0] + e[1])))
        consistency.append(2 * (cosine(v, G[LAST][1].mean(0)) - 1) ** 2)
    assert terms["contrast"].item() == pytest.approx(100 * np.mean(contrast), rel=1e-4)
    assert terms["consistency"].item() == pytest.approx(100 * np.mean(consistency), rel=1e-4)
    terms["contrast"].backward()
    assert torch.isfinite(f.grad).all() and f.grad.abs().sum() > 0
    other = losses_of("fedplvm", f, logits, y, G, "fedplvm_weight=1", "fedplvm_power=1",
                      "fedplvm_tau=0.5")
    v = foreground(f, y)[-1]
    e = {j: sum(math.exp(max(cosine(v, g), 1e-6) / 0.5) for g in P) for j, P in G[LAST].items()}
    one = losses_of("fedplvm", f, logits, only(y), G, "fedplvm_weight=1", "fedplvm_power=1",
                    "fedplvm_tau=0.5")
    assert one["contrast"].item() == pytest.approx(-math.log(e[1] / (e[0] + e[1])), rel=1e-4)
    assert other["consistency"].item() == pytest.approx(np.mean(consistency), rel=1e-4)


def only(y):
    """Labels with the foreground of the last image alone."""
    return torch.cat([torch.zeros_like(y[:1]), y[1:]])


def test_losses_without_prototypes_or_foreground():
    f, logits, y, G = problem()
    for name in ("fpl", "fedplvm"):
        for labels, given in ((y, {}), (torch.zeros_like(y), G), (y, {LAST: {0: G[LAST][0]}})):
            terms = losses_of(name, f, logits, labels, given)
            assert terms["contrast"] == 0 and terms["consistency"] == 0
            assert set(terms) == {"dice", "contrast", "consistency"}


def test_three_classes_count_alike():
    """The mean is over a class's images first, then over the classes."""
    f, logits, y, G = problem(2)
    y[0, 0, :2] = 2
    G = {LAST: G[LAST] | {2: torch.rand(1, 5)}}
    logits = torch.cat([logits, logits[:, :1]], 1)
    consistency = losses_of("fpl", f, logits, y, G)["consistency"].item()
    errors = {j: [((v - G[LAST][j].mean(0)) ** 2).mean().item() for v in foreground(f, y, j)]
              for j in (1, 2)}
    assert len(errors[1]) == 2 and len(errors[2]) == 1
    assert consistency == pytest.approx((np.mean(errors[1]) + np.mean(errors[2])) / 2, rel=1e-5)


def test_feduv_equals_literal():
    f, logits, y, _ = problem(3)
    terms = losses_of("feduv", f, logits, y, {}, "feduv_pixels=8")
    chosen = []
    for j in (0, 1):
        pixels = (y == j).nonzero().tolist()
        chosen += [pixels[i * len(pixels) // 4] for i in range(4)]
    p = np.array([logits[b, :, h, w].softmax(0).tolist() for b, h, w in chosen])
    z = np.array([f[b, :, h, w].tolist() for b, h, w in chosen])
    V = np.mean([max(0.0, math.sqrt(0.5) - p[:, c].std(ddof=1)) for c in (0, 1)])
    d = [((z[a] - z[b]) ** 2).sum() for a in range(8) for b in range(a)]
    median = torch.tensor(d).median().item()
    assert terms["variance"].item() == pytest.approx(2.5 * V, rel=1e-4)
    assert terms["uniformity"].item() == pytest.approx(
        0.5 * np.mean(np.exp(-np.array(d) / median)), rel=1e-4)
    sum(terms.values()).backward()
    assert torch.isfinite(f.grad).all() and f.grad.abs().sum() > 0
    weighted = losses_of("feduv", f, logits, y, {}, "feduv_pixels=8", "feduv_variance=5",
                         "feduv_uniformity=2")
    assert weighted["variance"].item() == pytest.approx(5 * V, rel=1e-4)
    assert weighted["uniformity"].item() == pytest.approx(4 * terms["uniformity"].item(), rel=1e-5)


def test_feduv_of_one_class_and_of_equal_pixels():
    f, logits, y, _ = problem()
    flat = torch.ones_like(f).requires_grad_(), torch.zeros_like(logits).requires_grad_()
    for labels in (torch.zeros_like(y), y):
        sum(losses_of("feduv", *flat, labels, {}).values()).backward()
        assert all(torch.isfinite(a.grad).all() for a in flat)


def test_what_fpl_and_fedplvm_send():
    """FPL one exact mean a class over batches; FedPLVM FINCH means of the images' means."""
    parts = [problem(seed)[:3] for seed in range(4)]
    for name in ("fpl", "fedplvm"):
        total = {}
        for f, logits, y in parts:
            losses_of(name, f, logits, y, {}, total=total)
        config = load_config({"task": "nuclei", "data": "demo", "out": "x"}, [f"method={name}"])
        sent = find_method(config).send(None, Context("a", 1, {}, {}, {}, total))[LAST]
        assert set(sent) == {0, 1}
        for j in (0, 1):
            pixels = [[f[b][:, y[b] == j].T for b in range(2)] for f, _, y in parts]
            images = [image for pair in pixels for image in pair if len(image)]
            if name == "fpl":
                expected = torch.cat(images).mean(0)
            else:
                means = torch.stack([image.mean(0) for image in images])
                labels = finch(means)[-1]
                expected = torch.stack([means[labels == k].mean(0) for k in labels.unique()])
                assert 1 <= len(expected) < len(means)
            torch.testing.assert_close(sent[j], expected)
            assert not sent[j].requires_grad


def test_the_server_pools_what_sites_send():
    a, b = {LAST: {1: torch.eye(4)[:3] + 0.1}}, {LAST: {0: torch.eye(4)[:1], 1: torch.eye(4)[2:] + 0.1}}
    G = federated.aggregate_prototypes([a, b, {}])[LAST]
    pooled = torch.cat([a[LAST][1], b[LAST][1]])
    labels = finch(pooled)[-1]
    expected = torch.stack([pooled[labels == k].mean(0) for k in labels.unique()])
    torch.testing.assert_close(G[1], expected)
    assert torch.equal(G[0], torch.eye(4)[:1])


def test_amplitude_is_replaced_and_phase_kept():
    """Against numpy's full transform, in float64."""
    front = AmplitudeNorm(8).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.double)
    assert torch.equal(front(x), x)  # round 1: no amplitude is known
    other = np.abs(np.fft.fft2(np.random.default_rng(0).random((3, 8, 8))))
    front.amplitude = torch.tensor(other[..., :5])
    phase = np.angle(np.fft.fft2(x.numpy()))
    expected = np.fft.ifft2(other * np.exp(1j * phase))
    assert np.abs(expected.imag).max() < 1e-12
    torch.testing.assert_close(front(x), torch.tensor(expected.real))


@pytest.mark.parametrize("method, share", [("input_norm", (3 / 9, 6 / 9)), ("harmofl", (1 / 2, 1 / 2))])
def test_the_sites_mean_amplitude_is_learned(tmp_path, method, share):
    folder = write_nuclei(tmp_path / "d", ("a",))
    write_nuclei(tmp_path / "e", ("b",), cases=10, seed=1)
    (tmp_path / "e" / "b").rename(folder / "b")
    config = tiny_config(folder, "unused", f"method={method}", "local_epochs=2")
    rules, sites = find_method(config), load_sites(config)
    model = build_model(config, rules)
    w = {name: value.clone() for name, value in model.state_dict().items()}
    w, _, updates = one_round(model, sites, w, {}, {}, 1, config, rules)
    means = []
    for site, update in zip(sites, updates):
        x = torch.cat([x for x, _ in batches(site.train_slices, 2, seeded(0, site.name, 1, 2))])
        means.append(torch.fft.rfft2(x).abs().mean(0))
        torch.testing.assert_close(update.weights["input_transform.amplitude"], means[-1])
    torch.testing.assert_close(w["input_transform.amplitude"], share[0] * means[0] + share[1] * means[1])
    model.load_state_dict(w)
    x = next(batches(sites[0].train_slices, 2, seeded(0)))[0]
    torch.testing.assert_close(torch.fft.rfft2(model.input_transform(x)).abs(),
                               w["input_transform.amplitude"].expand(len(x), -1, -1, -1), rtol=1e-4, atol=1e-3)


def test_harmofl_steps_with_the_gradient_at_the_perturbed_weights():
    """On L = a w^2 / 2 + b v^2 / 2 the gradient is linear, so the step has a closed form."""
    rules = find_method(load_config({"task": "nuclei", "data": "demo", "out": "x"}, ["method=harmofl"]))
    w, v, unused = (torch.nn.Parameter(torch.tensor([value])) for value in (3.0, -2.0, 7.0))
    optimizer = torch.optim.SGD([w, v, unused], lr=0.1)
    calls = []

    def closure():
        calls.append((w.item(), v.item()))
        optimizer.zero_grad()
        L = (2 * w.square() / 2 + 5 * v.square() / 2).sum()
        L.backward()
        return L
    rules.step(optimizer, closure)
    g = np.array([2 * 3.0, 5 * -2.0])
    there = np.array([3.0, -2.0]) + 0.05 * g / np.linalg.norm(g)
    assert len(calls) == 2
    assert calls[0] == (3.0, -2.0) and calls[1] == pytest.approx(tuple(there), rel=1e-6)
    assert w.item() == pytest.approx(3.0 - 0.1 * 2 * there[0], rel=1e-6)
    assert v.item() == pytest.approx(-2.0 - 0.1 * 5 * there[1], rel=1e-6) and unused.item() == 7


# ---- Leave one site out ----

def test_hold_out(tmp_path, monkeypatch):
    """A site that is held out never trains nor validates; all its cases test; eval repeats it."""
    write_nuclei(tmp_path / "d", ("a", "b", "c"))
    config = tiny_config(tmp_path / "d", tmp_path / "run", "hold_out=b")
    usual = splits_of(load_sites(tiny_config(tmp_path / "d", "unused")))
    held = splits_of(load_sites(config))
    assert held["b"] == {"train": [], "val": [], "test": list("01234")}
    assert {k: held[k] for k in "ac"} == {k: usual[k] for k in "ac"}
    trained = []
    update = federated.local_update
    monkeypatch.setattr(train, "local_update",
                        lambda model, site, *rest: trained.append(site.name) or update(model, site, *rest))
    train.train(config)
    assert trained == ["a", "c"] * 2
    rows = rows_of(tmp_path / "run")
    assert {row["site"] for row in rows} == {"a", "c"}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best"]["test"]["sites"]["b"]["images"] == 5
    assert result["best"]["val"]["sites"]["b"]["images"] == 0
    sites = result["best"]["test"]["sites"]
    middle = (sites["a"]["dice"] + sites["c"]["dice"]) / 2
    assert result["best"]["test"]["mean"]["dice"] == pytest.approx(middle)
    assert "unlabelled" in json.dumps(result["definitions"])
    again = eval_result(tmp_path, "trust=true")
    assert again["best"] == result["best"] and again["last"] == result["last"]
    train.train(tiny_config(tmp_path / "d", tmp_path / "run", "hold_out=b", "rounds=3", "resume=true"))


def test_hold_out_of_no_site_or_all(tmp_path):
    folder = write_nuclei(tmp_path / "d", ("a", "b"))
    with pytest.raises(BadInput, match="hold_out: .* has no site c, name one of a, b"):
        load_sites(tiny_config(folder, "unused", "hold_out=c"))
    write_nuclei(tmp_path / "e", ("a",))
    with pytest.raises(BadInput, match="hold_out: no other site has a training case"):
        train.train(tiny_config(tmp_path / "e", tmp_path / "run", "hold_out=a"))
