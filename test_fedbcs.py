"""Tests against oracles: golden vectors, float64, brute force, literal formulas, a killed run.

Golden vectors are read from tests/golden/, or from the folder in the environment variable FEDBCS_GOLDEN.
"""

import copy
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import federated
import prototypes
import train
from config import load_config
from datasets import batches, load_sites, seeded
from fft_style import Moments, StyleRecalibration, recalibrate, recalibrate_fourier
from fused_features import Products, literal_features, on_grids, squares_and_dots
from methods.find import find_method
from unet import PATHS, UNet, build_model

HERE = Path(__file__).parent
torch.set_num_threads(1)  # on tensors this small, threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and so in the programs that tests start
GOLDEN = Path(os.environ.get("FEDBCS_GOLDEN") or HERE / "tests" / "golden")


def golden(name):
    """Return {key: array or float} of every golden file that the pattern names, at least one."""
    files = sorted(GOLDEN.glob(f"{name}.npz"))
    assert files, f"{GOLDEN} has no {name}.npz"
    return [dict(np.load(file)) for file in files]


def numbered(vectors, key):
    """Return the numbers i for which `key`i is among the vectors."""
    return [i for i in itertools.takewhile(lambda i: f"{key}{i}" in vectors, itertools.count())]


def tensor(array):
    t = torch.as_tensor(np.asarray(array))
    return t.float() if t.is_floating_point() else t


def assert_close(a, b):
    """The tolerance of the golden vectors: |a - b| <= 2e-5 + 1e-5 max|b|."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(np.asarray(b)).double()
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 2e-5 + 1e-5 * b.abs().max()


# ---- FSR ----

@pytest.mark.parametrize("form", [recalibrate, recalibrate_fourier])
def test_golden_fsr(form):
    for v in golden("fsr_global_*"):
        layer = StyleRecalibration(v["x"].shape[1], "global")
        layer.h.data = tensor(v["style_logits"])
        x = tensor(v["x"]).requires_grad_()
        assert float(v["temperature"]) == pytest.approx(0.1)
        scale, shift = tensor(v["scale"]).view(-1, 1, 1), tensor(v["shift"]).view(-1, 1, 1)
        if form is recalibrate:
            layer.scale.data, layer.shift.data = scale, shift
            y = layer(x)
        else:
            y = scale * form(x, *layer.weights(x)) + shift
        y.backward(tensor(v["grad_out"]))
        assert_close(y.detach(), v["y"])
        assert_close(x.grad, v["grad_x"])
        assert_close(layer.h.grad, v["grad_style_logits"])


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (12, 5), (2, 2), (1, 3)])
@pytest.mark.parametrize("kind", ["adaptive", "global"])
def test_fsr_fourier_equals_spatial(size, kind):
    torch.manual_seed(1)
    layer = StyleRecalibration(3, kind).double()
    for p in layer.parameters():
        p.data += 0.3 * torch.randn_like(p)
    z = (torch.randn(2, 3, *size, dtype=torch.double) - torch.tensor([0.0, 3.0, -3.0]).view(3, 1, 1)
         ).requires_grad_()
    out_gradient = torch.randn(2, 3, *size, dtype=torch.double)
    results = []
    for form in ("spatial", "fourier"):
        if form == "spatial":
            out = layer(z)
        else:
            out = layer.scale * recalibrate_fourier(z, *layer.weights(z)) + layer.shift
        variables = [z, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out, variables, out_gradient)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_fsr_zero_and_constant_channels():
    z = torch.zeros(2, 3, 6, 5)
    z[:, 1], z[:, 2] = 2.5, torch.randn(2, 6, 5)
    z.requires_grad_()
    out = recalibrate(z, 0.3, 0.7)
    torch.testing.assert_close(out, recalibrate_fourier(z, 0.3, 0.7).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, 0], torch.zeros(2, 6, 5))  # a zero channel stays zero
    out.square().sum().backward()
    assert torch.isfinite(z.grad).all()


def test_moments_of_fsr():
    """Against torch's own in value, in gradient by finite differences; in bfloat16 they are still float32."""
    z = torch.rand(2, 3, 6, 5, dtype=torch.double) + torch.tensor([0.0, 3.0, -30.0]).view(3, 1, 1)
    z.requires_grad_()
    assert torch.autograd.gradcheck(Moments.apply, z)
    for dtype, most in ((torch.double, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        x = z[:, :2].detach().to(dtype)
        mean, per_sigma = Moments.apply(x)
        var, exact = torch.var_mean(x.double(), (2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(mean.double(), exact, rtol=most, atol=0)
        torch.testing.assert_close(per_sigma.double(), (var + 1e-5).rsqrt(), rtol=most, atol=0)
        assert per_sigma.dtype == max(dtype, torch.float32, key=lambda kind: kind.itemsize)


def test_fsr_weights():
    layer = StyleRecalibration(4, "adaptive")
    z = torch.randn(2, 4, 5, 5)
    raw = torch.sigmoid(z.mean((2, 3)) @ layer.linear.weight.T + layer.linear.bias)
    l_norm, l_org = layer.weights(z)
    torch.testing.assert_close(l_norm[..., 0, 0], raw[:, :4])
    torch.testing.assert_close(l_org[..., 0, 0], raw[:, 4:])
    h = StyleRecalibration(4, "global")
    h.h.data = torch.tensor([0.05, -0.02])
    e = np.exp(np.array([0.5, -0.2]))
    np.testing.assert_allclose(h.weights(z).detach(), e / e.sum(), rtol=1e-6)


# ---- Prototypes and alignment: the literal form, which is the oracle ----

def literal(path, maps, fusion, labels):
    """f (B, h, w, D) and the labels (B, h, w) of a path."""
    f = literal_features(path, maps[path], fusion[path])
    return f, labels[:, ::labels.shape[1] // f.shape[1], ::labels.shape[2] // f.shape[2]]


def literal_alignment(maps, fusion, labels, G, tau):
    """L_contra and L_consis, each the mean over the paths, pixel by pixel as the equations say."""
    contrast, consistency = [], []
    for path in PATHS:
        f, y = literal(path, maps, fusion, labels)
        contra, consis = [f.new_zeros(())], [f.new_zeros(())]
        present = [j for j in G[path] if j > 0 and (y == j).any()]
        for j in present:
            pixels = f[y == j]
            ratio = {c: torch.exp(functional.cosine_similarity(pixels[:, None], g[None], dim=2) / tau)
                     for c, g in G[path].items()}
            total = sum(e.sum(1) for e in ratio.values())
            contra.append(-torch.log(ratio[j].sum(1) / total).mean())
            consis.append((pixels - G[path][j].mean(0)).square().mean())
        contrast.append(sum(contra) / max(1, len(present)))
        consistency.append(sum(consis) / max(1, len(present)))
    return sum(contrast) / 2, sum(consistency) / 2


def literal_prototypes(maps, fusion, labels, classes):
    result = {}
    for path in PATHS:
        f, y = literal(path, maps, fusion, labels)
        result[path] = {j: f[y == j].mean(0) for j in range(classes)
                        if (y == j).any()}
    return result


def alignment_loss(maps, fusion, labels, G, tau):
    classes = 1 + max(int(labels.max()), *(j for path in PATHS for j in G[path]))
    return prototypes.alignment_loss(on_grids(maps, fusion, labels, classes), G, tau)


def random_problem(width, levels, classes, batch=2, size=32, dtype=torch.double, missing=()):
    """Maps of a seeded network, labels in patches, and global prototypes of all classes but `missing`."""
    torch.manual_seed(width + 10 * len(levels) + 100 * classes)
    model = UNet(width, classes, "adaptive", levels).to(dtype)
    labels = torch.randint(classes, (batch, size // 4, size // 4))
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2).roll(3, 2)
    with torch.no_grad():
        maps = model.features(torch.rand(batch, 3, size, size, dtype=dtype))[1]
    maps = {path: [x.requires_grad_() for x in maps[path]] for path in PATHS}
    D = len(levels) * 8 * width
    G = {path: {j: 0.1 * torch.randn(1 + j % 3, D, dtype=dtype) for j in range(classes)
                if j not in missing} for path in PATHS}
    return model, maps, labels, G


LEVELS = [(4, [0, 1, 2], 2), (4, [0], 2), (3, [1], 3), (2, [2], 2), (1, [0, 2], 4), (5, [1, 2], 1),
            (4, [0, 1], 5)]


@pytest.mark.parametrize("width, levels, classes", LEVELS)
def test_literal_features_equal_the_equation(width, levels, classes):
    """f at each pixel of the grid, by hand: what lies over its top-left corner, concatenated, times W."""
    model, maps, labels, _ = random_problem(width, levels, classes)
    for path, order, grid in (("encoder", levels, levels[0]), ("decoder", levels[::-1], levels[-1])):
        f, y = literal(path, maps, model.fusion, labels)
        assert f.shape[1:3] == y.shape[1:] == (32 >> grid, 32 >> grid)
        for row, column in itertools.product(range(0, 32 >> grid, 3), repeat=2):
            top, left = row << grid, column << grid
            over = [maps[path][k][:, :, top >> k, left >> k] for k in range(4)]
            expected = [torch.cat([over[k], over[3]], 1) @ model.fusion[path][str(k)].weight[:, :, 0, 0].T
                        + model.fusion[path][str(k)].bias for k in order]
            torch.testing.assert_close(f[:, row, column], torch.cat(expected, 1))
            assert torch.equal(y[:, row, column], labels[:, top, left])


@pytest.mark.parametrize("width, levels, classes", LEVELS)
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_alignment_equals_literal(width, levels, classes, order):
    """In value and gradient, in whatever order the maps lie in memory."""
    model, maps, labels, G = random_problem(width, levels, classes)
    maps = {path: [x.detach().contiguous(memory_format=order).requires_grad_() for x in maps[path]]
            for path in PATHS}
    variables = [x for path in PATHS for k, x in enumerate(maps[path]) if k in (*levels, 3)]
    variables += list(model.fusion.parameters())
    results = []
    for form in (alignment_loss, literal_alignment):
        contrast, consistency = form(maps, model.fusion, labels, G, 0.3)
        gradients = (torch.autograd.grad(contrast + 2 * consistency, variables)
                     if classes > 1 else [])
        results.append([contrast, consistency, *gradients])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, check_dtype=classes > 1)


def test_alignment_on_a_gpu_has_the_same_numbers(monkeypatch):
    """There the products of pixels are no convolutions; the same lines on a CPU, in value and gradient."""
    model, maps, labels, G = random_problem(4, [0, 1, 2], 3)
    variables, found = [*maps["encoder"], *model.fusion.parameters()], []
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
        if on_gpu:
            monkeypatch.delattr(torch.nn.functional, "conv2d")
        loss = alignment_loss(maps, model.fusion, labels, G, 0.3)
        found.append([loss, *torch.autograd.grad(loss.sum(), variables)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_alignment_without_some_classes():
    """A class without prototype or without pixels is left out; a path without any counts as 0."""
    model, maps, whole, G = random_problem(2, [0, 1, 2], 4, missing=(2,))
    G["decoder"] = {0: G["decoder"][0]}
    for absent in (1, 3):
        labels = torch.where(whole == absent, 0, whole)
        for a, b in zip(alignment_loss(maps, model.fusion, labels, G, 0.3),
                        literal_alignment(maps, model.fusion, labels, G, 0.3)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
            assert a > 0
    terms = alignment_loss(maps, model.fusion, torch.zeros_like(labels), G, 0.3)
    assert terms.tolist() == [0, 0]


def test_paths_are_those_of_the_network():
    """One path alone is its own mean; a third one, here the encoder again, counts as the others do."""
    model, maps, labels, G = random_problem(2, [0, 1, 2], 3)
    heads = model.fusion

    def loss(**paths):  # name=the path whose maps, heads and prototypes it has
        x, h, g = ({name: of[path] for name, path in paths.items()} for of in (maps, heads, G))
        return prototypes.alignment_loss(on_grids(x, nn.ModuleDict(h), labels, 3), g, 0.3)

    e, d = loss(encoder="encoder"), loss(decoder="decoder")
    torch.testing.assert_close(loss(encoder="encoder", decoder="decoder"), (e + d) / 2)
    torch.testing.assert_close(loss(encoder="encoder", decoder="decoder", third="encoder"), (2 * e + d) / 3)


@pytest.mark.parametrize("width, levels, classes", LEVELS)
def test_prototypes_equal_literal(width, levels, classes):
    model, maps, labels, _ = random_problem(width, levels, classes, batch=4)
    labels[:3][labels[:3] == classes - 1] = 0  # the last class is in the last image alone
    whole, fed = {}, {}
    prototypes.add_class_sums(whole, on_grids(maps, model.fusion, labels, classes + 1))
    for part in (slice(0, 3), slice(3, 4)):
        cut = {path: [x[part] for x in maps[path]] for path in PATHS}
        prototypes.add_class_sums(fed, on_grids(cut, model.fusion, labels[part], classes + 1))
    a, b = prototypes.local_prototypes(whole), prototypes.local_prototypes(fed)
    c = literal_prototypes(maps, model.fusion, labels, classes + 1)
    for path in PATHS:
        assert a[path].keys() == b[path].keys() == c[path].keys()
        assert classes not in a[path]  # a class that nobody has gives no prototype
        for j in a[path]:
            torch.testing.assert_close(a[path][j], b[path][j], rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(a[path][j], c[path][j], rtol=1e-7, atol=1e-10)


def golden_fusion(v, path, prefix, levels):
    heads = nn.ModuleDict()
    for number, k in enumerate(levels):
        w, b = tensor(v[f"{prefix}_w{number}"]), tensor(v[f"{prefix}_b{number}"])
        heads[str(k)] = nn.Conv2d(w.shape[1], w.shape[0], 1)
        heads[str(k)].weight.data, heads[str(k)].bias.data = w[:, :, None, None], b
    return heads


def test_golden_dual_level():
    for v in golden("dual_level_*"):
        e = [tensor(v[f"enc{k}"]).requires_grad_() for k in numbered(v, "enc")]
        d = [tensor(v[f"dec{k}"]).requires_grad_() for k in numbered(v, "dec")]
        maps = {"encoder": e, "decoder": d[::-1]}
        fusion = nn.ModuleDict({"encoder": golden_fusion(v, "encoder", "enc", [0, 1, 2]),
                                "decoder": golden_fusion(v, "decoder", "dec", [2, 1, 0])})
        labels, short = tensor(v["labels"]), {"encoder": "enc", "decoder": "dec"}
        found = {path: {int(key.split("_")[-1]): tensor(v[key]) for key in v
                        if key.startswith(f"global_{short[path]}_")} for path in PATHS}
        total = {}
        prototypes.add_class_sums(total, on_grids(maps, fusion, labels, int(labels.max()) + 1))
        local = prototypes.local_prototypes(total)
        for path in PATHS:
            for key in (key for key in v if key.startswith(f"local_{short[path]}_")):
                assert_close(local[path][int(key.split("_")[-1])], v[key])
        L_MP = sum(alignment_loss(maps, fusion, labels, found, float(v["tau"])))
        assert_close(L_MP.detach(), v["L_MP"])
        L_MP.backward()
        for number, (x, y) in enumerate(zip(e, d)):
            assert_close(x.grad, v[f"grad_enc{number}"])
            assert_close(y.grad, v[f"grad_dec{number}"])
        assert_close(federated.segmentation_loss(tensor(v["logits"]), labels), v["L_seg"])


def loss_of_features(f, G, tau, bias=0.0):
    """L_contra and L_consis of given features f (N, D) of class 1, N <= 512.

    A fusion head that adds `bias` to x_0 makes them, the same on both paths.
    """
    N, D = f.shape
    heads = nn.ModuleDict({"0": nn.Conv2d(2 * D, D, 1)}).to(f.dtype)
    heads["0"].weight.data = torch.eye(D, 2 * D, dtype=f.dtype)[:, :, None, None]
    heads["0"].bias.data.fill_(bias)
    labels = (torch.arange(512) < N).long().view(1, 8, 64)
    x_0 = functional.pad(f - bias, (0, 0, 0, 512 - N)).view(1, 8, 64, D).permute(0, 3, 1, 2)
    maps = [x_0, None, None, x_0.new_zeros(1, D, 1, 8)]
    return alignment_loss(dict.fromkeys(PATHS, maps), nn.ModuleDict(dict.fromkeys(PATHS, heads)), labels,
                          dict.fromkeys(PATHS, G), tau)


def test_golden_alignment_loss():
    for v in golden("alignment_loss"):
        for i in numbered(v, "features"):
            f, p, q = (tensor(v[f"{name}{i}"]) for name in ("features", "positives", "negatives"))
            contrast, consistency = loss_of_features(f, {1: p, 0: q}, float(v[f"tau{i}"]))
            assert_close(contrast, v[f"contrastive{i}"])
            assert_close(consistency, v[f"consistency{i}"])


def test_golden_alignment_clip():
    for v in golden("alignment_clip"):
        f = tensor(v["features"]).requires_grad_()
        g = torch.cat([tensor(v["positives"]), tensor(v["negatives"])])
        cos = functional.cosine_similarity(f[None], g[:, None], dim=2)
        loss = prototypes.contrastive_loss(cos, slice(len(v["positives"])), float(v["tau"]), clip=True)
        loss.sum().backward()
        assert_close(loss.detach(), v["contrastive"])
        assert_close(f.grad, v["grad_features"])


@pytest.mark.parametrize("own", [[0], [1, 4], [0, 2, 3, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_infonce_against_brute_force(own):
    torch.manual_seed(2)
    cos = (2 * torch.rand(7, 50, dtype=torch.double) - 1).requires_grad_()
    loss = prototypes.contrastive_loss(cos, own, 0.05)
    for row, value in zip(cos.T.tolist(), loss.tolist()):
        e = [math.exp(c / 0.05) for c in row]
        assert value == pytest.approx(-math.log(sum(e[k] for k in own) / sum(e)), abs=1e-12)
    assert torch.autograd.gradcheck(lambda c: prototypes.contrastive_loss(c, own, 0.05), cos)


def test_infonce_has_a_gradient_where_the_clip_has_none():
    for clip, value in ((False, 132.0), (True, math.log(2))):
        cos = torch.tensor([[0.32], [0.98]], dtype=torch.double, requires_grad=True)
        loss = prototypes.contrastive_loss(cos, slice(1), 0.005, clip)
        loss.sum().backward()
        assert loss.item() == pytest.approx(value, abs=1e-9)
        np.testing.assert_allclose(cos.grad.T, [[0, 0]] if clip else [[-200, 200]], atol=1e-9)


@pytest.mark.parametrize("spread, most", [(1.0, 1e-5), (1e-1, 1e-4), (1e-2, 1e-2)])
def test_what_cancels_in_consistency(spread, most):
    """Features 1, 0.1 and 0.01 apart from a Gbar of numbers about 1: what float32 keeps of the distance."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        Gbar = torch.randn(1, 256, generator=generator)
        f = Gbar + spread * torch.randn(500, 256, generator=generator)
        exact = (f.double() - Gbar.double()).square().mean()
        assert abs(loss_of_features(f, {1: Gbar}, 1.0)[1].double() / exact - 1) < most


@pytest.mark.parametrize("bias, most", [(0.0, 2e-6), (10.0, 2e-6), (1e3, 2e-6)])
def test_squares_and_dots_in_float32(bias, most):
    """Against the literal form in float64, relative to the largest value: large biases hide what varies."""
    model, maps, labels, _ = random_problem(4, [0, 1, 2], 2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for path in PATHS:
        heads = model.fusion[path]
        with torch.no_grad():
            for conv in heads.values():
                conv.bias += bias * torch.linspace(-1, 1, len(conv.bias))
        X, W, _ = on_grids(maps, model.fusion, labels, 2)[path]
        exact_maps = [x_k.detach().double() for x_k in maps[path]]
        f = literal_features(path, exact_maps, copy.deepcopy(heads).double())
        g = f.mean((0, 1, 2)) + 0.1 * torch.randn(3, f.shape[3], generator=generator)
        square, dots = squares_and_dots(X, W, g.float())
        for exact, found in ((f.square().sum(3)[None], square), ((f @ g.T).movedim(3, 0), dots)):
            assert found.shape == exact.shape
            assert (found - exact).abs().max() < most * exact.abs().max()


def test_gradients_of_the_products():
    """What is written out by hand against finite differences, for blocks of 1, 2 and 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    for r in (1, 2, 4):
        x, z, s = (torch.randn(size, generator=generator, dtype=torch.double)
                   .to(memory_format=torch.channels_last).requires_grad_()
                   for size in ((2, 3, 4, 4), (2, 3, 4 // r, 4 // r), (3, 2, 2, 2)))
        half, U = (torch.randn(n, 3, generator=generator, dtype=torch.double).requires_grad_()
                   for n in (3, 2))
        assert torch.autograd.gradcheck(lambda x, half, U, z, s: Products.apply(x, half.T @ half, U, z, s),
                                        (x, half, U, z, s))


def test_consistency_is_never_negative():
    """Pixels that lie at their Gbar itself, far from 0, where rounding alone decides."""
    square, Gbar = torch.full((1, 1, 2, 2), 1e4), torch.full((2, 100), 10.0)
    dots = torch.tensor([1e4 + 0.01, 1e4 - 0.5]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    distance = prototypes.consistency_loss(square, dots, Gbar)
    assert torch.equal(distance[0], torch.zeros(1, 2, 2))
    torch.testing.assert_close(distance[1], torch.full((1, 2, 2), 0.01))


def test_features_that_vanish_have_a_finite_loss_and_gradient():
    f = torch.zeros(3, 16, requires_grad=True)
    loss = sum(loss_of_features(f, {0: torch.ones(1, 16), 1: -torch.ones(1, 16)}, 0.1))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(f.grad).all()


def test_a_class_of_a_single_pixel_has_a_prototype():
    model, maps, labels, _ = random_problem(2, [0, 1, 2], 2)
    labels[:] = 0
    labels[1, 8, 12] = 1
    total = {}
    prototypes.add_class_sums(total, on_grids(maps, model.fusion, labels, 2))
    local, literal = prototypes.local_prototypes(total), literal_prototypes(maps, model.fusion, labels, 2)
    for path in PATHS:
        torch.testing.assert_close(local[path][1], literal[path][1], rtol=1e-7, atol=1e-10)


# ---- FINCH ----

def test_golden_finch():
    for v in golden("finch"):
        for i in numbered(v, "x"):
            partitions = prototypes.finch(tensor(v[f"x{i}"]))
            assert [int(p.max()) + 1 for p in partitions] == v[f"partitions{i}"].tolist()
            assert same_partition(partitions[-1].tolist(), v[f"labels{i}"].tolist())


def same_partition(a, b):
    """Equal up to renaming: pairs of labels are as many as labels on either side."""
    return len(set(zip(a, b))) == len(set(a)) == len(set(b))


def directions(*degrees):
    angle = torch.tensor(degrees, dtype=torch.double).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("degrees, counts, last", [
    ([0], [1], [0]),
    ([0, 90], [1], [0, 0]),
    ([0, 10, 180, 190], [2], [0, 0, 1, 1]),
    ([0, 10, 25], [1], [0, 0, 0]),                          # 25's neighbour is 10, whose neighbour is 0
    ([0, 1, 100, 101, 130, 131], [3], [0, 0, 1, 1, 2, 2]),  # three would merge into one: stop
    ([0, 1, 20, 21, 180, 181, 200, 201], [4, 2], [0, 0, 0, 0, 1, 1, 1, 1]),
    ([7, 7, 7], [1], [0, 0, 0]),                            # equal vectors
])
def test_finch_on_hand_made_graphs(degrees, counts, last):
    partitions = prototypes.finch(directions(*degrees))
    assert [int(p.max()) + 1 for p in partitions] == counts
    assert same_partition(partitions[-1].tolist(), last)


def test_finch_tells_apart_what_float32_cannot():
    """Cosines of these directions are all 1 in float32."""
    angles = torch.tensor([0, 3e-5, 3.5e-5, 1e-4, 1.05e-4])
    vectors = torch.stack([torch.ones(5), angles], 1)
    assert same_partition(prototypes.finch(vectors)[-1].tolist(), [0, 0, 0, 1, 1])


def test_finch_uses_means_of_original_vectors():
    """Cluster {0, 1, 2} counts its three rows, not a mean of means."""
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    means = prototypes.cluster_means(x, labels)
    torch.testing.assert_close(means, torch.stack([x[:3].mean(0), x[3:5].mean(0), x[5:].mean(0)]))


def test_finch_permuted_and_rescaled():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    order = torch.randperm(40, generator=generator)
    a, b = prototypes.finch(x)[-1], prototypes.finch(3 * x[order])[-1]
    assert same_partition(a[order].tolist(), b.tolist())


# ---- Server ----

def test_average_weights():
    w = [federated.Update(str(n), n, {"a": torch.tensor(values)}, {}, {}, {}, 0.0)
         for n, values in ((1, [1.0, 2.0]), (3, [3.0, 6.0]))]
    assert torch.equal(federated.average_weights(w)["a"], torch.tensor([2.5, 5.0]))
    assert torch.equal(federated.average_weights(w, "equal")["a"], torch.tensor([2.0, 4.0]))
    assert torch.equal(federated.average_weights(w[:1])["a"], w[0].weights["a"])


def test_aggregate_prototypes():
    """Always (K, D), also for one site and for a class that one site alone has; {} for nobody's."""
    site = {path: {0: torch.ones(6), 1: torch.arange(6.0)} for path in PATHS}
    other = {path: {0: -torch.ones(6)} for path in PATHS}
    one = prototypes.aggregate_prototypes([site])
    two = prototypes.aggregate_prototypes([site, other])
    for path in PATHS:
        assert {j: tuple(g.shape) for j, g in one[path].items()} == {0: (1, 6), 1: (1, 6)}
        assert {j: tuple(g.shape) for j, g in two[path].items()} == {0: (1, 6), 1: (1, 6)}
        torch.testing.assert_close(two[path][0], torch.zeros(1, 6))
        torch.testing.assert_close(two[path][1], torch.arange(6.0)[None])
    assert prototypes.aggregate_prototypes([{}, {}]) == {}
    eight = directions(0, 1, 20, 21, 180, 181, 200, 201)  # FINCH: 4 clusters, then 2, the one to use
    many = prototypes.aggregate_prototypes([{"encoder": {1: x}} for x in eight])["encoder"][1]
    torch.testing.assert_close(many, torch.stack([eight[:4].mean(0), eight[4:].mean(0)]))


def test_golden_segmentation_loss():
    for v in golden("segmentation_loss"):
        for i in numbered(v, "logits"):
            loss = federated.segmentation_loss(tensor(v[f"logits{i}"]), tensor(v[f"labels{i}"]))
            assert_close(loss, v[f"loss{i}"])


def test_segmentation_loss_against_its_formula():
    """Also where a class is nearly absent, where the smoothing of 1e-5 decides."""
    torch.manual_seed(0)
    logits, y = torch.randn(2, 3, 4, 4, dtype=torch.double), torch.randint(2, (2, 4, 4))
    for rare in (0.0, -14.0):
        logits[:, 2] += rare
        p = logits.softmax(1)
        CE = -torch.log(p.gather(1, y[:, None])).mean()
        dice = [(2 * p[:, c][y == c].sum() + 1e-5) / (p[:, c].sum() + (y == c).sum() + 1e-5)
                for c in range(3)]
        expected = (CE + 1 - sum(dice) / 3) / 2
        assert federated.segmentation_loss(logits, y).item() == pytest.approx(expected.item(), rel=1e-9)


# ---- Folders of data to test with ----

def write_nuclei(folder, sites=("a", "b"), cases=5, size=32, seed=0):
    """A data folder of bright discs on noise, the sites of different brightness; returns it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    for number, site in enumerate(sites):
        for kind in ("images", "masks"):
            (folder / site / kind).mkdir(parents=True)
        for case in range(cases):
            cy, cx = rng.uniform(10, size - 10, 2)
            mask = (y - cy) ** 2 + (x - cx) ** 2 < 64
            image = 40 * number + 60 * mask[..., None] + rng.integers(0, 60, (size, size, 3))
            Image.fromarray(image.astype(np.uint8)).save(folder / site / "images" / f"{case}.png")
            Image.fromarray(np.uint8(255) * mask).save(folder / site / "masks" / f"{case}.png")
    return folder


# ---- The round ----

def tiny_config(data, out, *overrides):
    """Settings of a run of about a second."""
    return load_config({"task": "nuclei", "data": str(data), "out": str(out), "rounds": 2, "width": 2,
                        "image_size": 32, "batch_size": 2, "device": "cpu", "test_stats": "site"}, overrides)


def first_state(config):
    """The network, its sites, and the global weights before round 1."""
    model = build_model(config, find_method(config))
    return model, load_sites(config), {k: v.clone() for k, v in model.state_dict().items()}


def one_round(model, sites, w, G, kept, t, config, method=None):
    """Round t as train.py's loop has it; return w, G and the updates; `kept` is brought up to date."""
    method = method or find_method(config)
    updates = [federated.local_update(model, site, w, G, kept.get(site.name), t, config, method)
               for site in sites]
    kept |= {update.site: update.kept for update in updates}
    w = w | federated.average_weights(updates, config.weights)
    return w, method.aggregate([update.prototypes for update in updates]), updates


def test_objective_terms(tmp_path):
    """L = L_dice + mu (L_contra + L_consis); FedProx: L = L_dice + fedprox_mu / 2 |w_m - w|^2."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "prototype_weight=0.5")
    model, sites, w = first_state(config)
    G = one_round(model, sites, w, {}, {}, 1, config)[1]
    x, y = next(batches(sites[0].train_slices, 2, seeded(0)))
    context = federated.Context("a", 2, w, G, {})
    once, half = (federated.fedbcs_losses(model, x, y, context, SimpleNamespace(
        **vars(config) | {"prototype_weight": mu})) for mu in (1.0, 0.5))
    assert half["dice"] == once["dice"]
    for name in ("contrast", "consistency"):  # terms are as they enter L: mu is in them
        assert half[name].item() == pytest.approx(0.5 * once[name].item()) and half[name] > 0
    config = tiny_config("unused", "unused", "method=fedprox", "fedprox_mu=0.2")
    context.w = {name: value - 0.1 for name, value in model.state_dict().items()}
    terms = find_method(config).losses(model, x, y, context)
    n = sum(p.numel() for p in model.parameters())
    assert terms["proximal"].item() == pytest.approx(0.1 * n * 0.01, rel=1e-4)
    assert terms["dice"] == once["dice"]
    assert_gradient_of_the_sum(model, sites[0], w, config)


def assert_gradient_of_the_sum(model, site, w, config):
    """A step of SGD goes along the gradient of the sum of all terms."""
    method = federated.Method(lambda model, x, y, context: {
        "dice": (model.head.bias[0] - 1).square(), "mine": 3 * model.head.bias[0]})
    state = {name: value.clone() for name, value in w.items()}
    state["head.bias"] = torch.tensor([2.0, 2.0])
    config.weight_decay, config.batch_size = 0.0, 99
    update = federated.local_update(model, site, state, {}, None, 1, config, method)
    step = config.lr * (2 * (2 - 1) + 3)
    torch.testing.assert_close(update.weights["head.bias"], torch.tensor([2 - step, 2.0]))
    assert update.losses == pytest.approx({"dice": 1.0, "mine": 6.0})


# ---- Runs ----

@pytest.mark.parametrize("optimizer, fsr, amp", [("adam", "global", "none"), ("sgd", "adaptive", "none"),
                                                 ("adam", "global", "bf16")])
def test_a_small_run_learns(tmp_path, monkeypatch, optimizer, fsr, amp):
    """Generated sites, 10 rounds at 64 pixels: test Dice of the mean site at least 0.60."""
    monkeypatch.chdir(tmp_path)
    lr = {"adam": "3e-3", "sgd": "0.05"}[optimizer]
    config = load_config({"task": "nuclei", "data": "demo", "out": "run", "device": "cpu"}, [
        "image_size=64", "width=6", "rounds=10", "eval_every=5", f"optimizer={optimizer}", f"lr={lr}",
        f"fsr={fsr}", f"amp={amp}"])
    train.train(config)
    result = json.loads(Path("run/result.json").read_text())
    assert result["best"]["test"]["mean"]["dice"] > 0.60
