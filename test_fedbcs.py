"""Tests against oracles: golden vectors, float64, brute force, literal formulas, a killed run.

Golden vectors are read from golden/, or from the folder in the environment variable FEDBCS_GOLDEN.
"""

import copy
import csv
import errno
import gzip
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from torch import nn
from torch.nn import functional

import check_data
import datasets
import eval as evaluation
import federated
import prototypes
import train
from config import KEYS, PRESETS, BadInput, as_yaml, load_config, run_program
from datasets import Site, batches, load_sites, seeded, splits_of
from eval import load_checkpoint
from fft_style import StyleRecalibration, recalibrate, recalibrate_fourier
from prototypes import PATHS
from scoring import metrics
from scoring.norm_statistics import collect_statistics, site_statistics, with_statistics
from sites import demo_data, readers
from sites.readers import Sample
from unet import UNet, build_model

HERE = Path(__file__).parent
torch.set_num_threads(1)  # on tensors this small, threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and so in the programs that tests start
GOLDEN = Path(os.environ.get("FEDBCS_GOLDEN") or HERE / "tests" / "golden")
CPU = torch.device("cpu")


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

def literal_fused(path, maps, heads):
    """f (B, D, H, W) on the path's grid, as the equations say: up, concatenate, convolve, concatenate."""
    levels = sorted(int(k) for k in heads)
    grid = levels[0] if path == "encoder" else levels[-1]
    fused = []
    for k in levels if path == "encoder" else reversed(levels):
        deep = maps[3].repeat_interleave(2 ** (3 - k), 2).repeat_interleave(2 ** (3 - k), 3)
        f = heads[str(k)](torch.cat([maps[k], deep], 1))
        if k > grid:
            f = f.repeat_interleave(2 ** (k - grid), 2).repeat_interleave(2 ** (k - grid), 3)
        fused.append(f[:, :, ::2 ** max(0, grid - k), ::2 ** max(0, grid - k)])
    return torch.cat(fused, 1), grid


def literal_alignment(maps, fusion, labels, G, tau):
    """L_contra and L_consis, each the mean over the paths, pixel by pixel as the equations say."""
    contrast, consistency = [], []
    for path in PATHS:
        f, grid = literal_fused(path, maps[path], fusion[path])
        y = labels[:, ::2**grid, ::2**grid]
        contra, consis = [f.new_zeros(())], [f.new_zeros(())]
        present = [j for j in G[path] if j > 0 and (y == j).any()]
        for j in present:
            pixels = f.permute(0, 2, 3, 1)[y == j]
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
        f, grid = literal_fused(path, maps[path], fusion[path])
        y = labels[:, ::2**grid, ::2**grid]
        result[path] = {j: f.permute(0, 2, 3, 1)[y == j].mean(0) for j in range(classes)
                        if (y == j).any()}
    return result


def efficient_alignment(maps, fusion, labels, G, tau, clip=False):
    pixels = prototypes.aligned_pixels(labels, fusion, G)
    keep = prototypes.keep_rows(pixels, fusion)
    rows = {path: [keep(path, k, maps[path][k]) for k in range(4)] for path in PATHS}
    return prototypes.alignment_loss(rows, fusion, pixels, G, tau, clip)


def random_problem(width, levels, classes, batch=2, size=32, dtype=torch.double, missing=()):
    """Maps of a seeded network, labels in patches, and global prototypes of all classes but `missing`."""
    torch.manual_seed(width + 10 * len(levels) + 100 * classes)
    model = UNet(width, classes, "adaptive", levels).to(dtype)
    labels = torch.randint(classes, (batch, size // 4, size // 4))
    labels = labels.repeat_interleave(4, 1).repeat_interleave(4, 2).roll(3, 2)
    with torch.no_grad():
        _, maps, _ = model.features(torch.rand(batch, 3, size, size, dtype=dtype))
    maps = {path: [x.requires_grad_() for x in maps[path]] for path in PATHS}
    D = len(levels) * 8 * width
    G = {path: {j: 0.1 * torch.randn(1 + j % 3, D, dtype=dtype) for j in range(classes)
                if j not in missing} for path in PATHS}
    return model, maps, labels, G


SETTINGS = [(4, [0, 1, 2], 2), (4, [0], 2), (3, [1], 3), (2, [2], 2), (1, [0, 2], 4), (5, [1, 2], 1),
            (4, [0, 1], 5)]


@pytest.mark.parametrize("width, levels, classes", SETTINGS)
def test_alignment_equals_literal(width, levels, classes):
    model, maps, labels, G = random_problem(width, levels, classes)
    variables = [x for path in PATHS for k, x in enumerate(maps[path]) if k in (*levels, 3)]
    variables += list(model.fusion.parameters())
    results = []
    for form in (efficient_alignment, literal_alignment):
        contrast, consistency = form(maps, model.fusion, labels, G, 0.3)
        gradients = (torch.autograd.grad(contrast + 2 * consistency, variables)
                     if classes > 1 else [])
        results.append([contrast, consistency, *gradients])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_alignment_without_some_classes():
    """A class without prototype or without pixels is left out; a path without any counts as 0."""
    model, maps, whole, G = random_problem(2, [0, 1, 2], 4, missing=(2,))
    G["decoder"] = {0: G["decoder"][0]}
    for absent in (1, 3):
        labels = torch.where(whole == absent, 0, whole)
        for a, b in zip(efficient_alignment(maps, model.fusion, labels, G, 0.3),
                        literal_alignment(maps, model.fusion, labels, G, 0.3)):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
            assert a > 0
    terms = efficient_alignment(maps, model.fusion, torch.zeros_like(labels), G, 0.3)
    assert terms.tolist() == [0, 0]


@pytest.mark.parametrize("width, levels, classes", SETTINGS)
def test_prototypes_equal_literal_and_batches_equal_whole(width, levels, classes):
    model, maps, labels, _ = random_problem(width, levels, classes, batch=4)
    labels[:3][labels[:3] == classes - 1] = 0  # the last class is in the last image alone
    whole, fed = {}, {}
    prototypes.add_class_sums(whole, maps, model.fusion, labels, classes + 1)
    for part in (slice(0, 3), slice(3, 4)):
        cut = {path: [x[part] for x in maps[path]] for path in PATHS}
        prototypes.add_class_sums(fed, cut, model.fusion, labels[part], classes + 1)
    a, b = prototypes.local_prototypes(whole), prototypes.local_prototypes(fed)
    c = literal_prototypes(maps, model.fusion, labels, classes + 1)
    for path in PATHS:
        assert a[path].keys() == b[path].keys() == c[path].keys()
        assert classes not in a[path]  # a class that nobody has gives no prototype
        for j in a[path]:
            torch.testing.assert_close(a[path][j], b[path][j], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a[path][j], c[path][j].float(), rtol=1e-5, atol=1e-6)


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
        fusion = {"encoder": golden_fusion(v, "encoder", "enc", [0, 1, 2]),
                  "decoder": golden_fusion(v, "decoder", "dec", [2, 1, 0])}
        labels, short = tensor(v["labels"]), {"encoder": "enc", "decoder": "dec"}
        found = {path: {int(key.split("_")[-1]): tensor(v[key]) for key in v
                        if key.startswith(f"global_{short[path]}_")} for path in PATHS}
        total = {}
        prototypes.add_class_sums(total, maps, fusion, labels, int(labels.max()) + 1)
        local = prototypes.local_prototypes(total)
        for path in PATHS:
            for key in (key for key in v if key.startswith(f"local_{short[path]}_")):
                assert_close(local[path][int(key.split("_")[-1])], v[key])
        L_MP = efficient_alignment(maps, fusion, labels, found, float(v["tau"])).sum()
        assert_close(L_MP.detach(), v["L_MP"])
        L_MP.backward()
        for number, (x, y) in enumerate(zip(e, d)):
            assert_close(x.grad, v[f"grad_enc{number}"])
            assert_close(y.grad, v[f"grad_dec{number}"])
        assert_close(federated.segmentation_loss(tensor(v["logits"]), labels), v["L_seg"])


def loss_of_features(f, G, tau):
    """path_loss of given features f (N, D) of class 1, N <= 512: a fusion head that copies x_0."""
    N, D = f.shape
    heads = nn.ModuleDict({"0": nn.Conv2d(2 * D, D, 1)})
    heads["0"].weight.data = torch.eye(D, 2 * D)[:, :, None, None]
    heads["0"].bias.data.zero_()
    labels = (torch.arange(512) < N).long().view(1, 8, 64)
    x_0 = functional.pad(f, (0, 0, 0, 512 - N)).view(1, 8, 64, D).permute(0, 3, 1, 2)
    fusion = dict.fromkeys(PATHS, heads)
    pixels = prototypes.aligned_pixels(labels, fusion, dict.fromkeys(PATHS, G))
    keep = prototypes.keep_rows(pixels, fusion)
    rows = [keep("encoder", 0, x_0), None, None, keep("encoder", 3, torch.zeros(1, D, 1, 8))]
    return prototypes.path_loss("encoder", rows, heads, pixels["encoder"], G, tau).detach()


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
        cos = functional.cosine_similarity(f[:, None], g[None], dim=2)
        positive = (torch.arange(len(g)) < len(v["positives"])).expand(len(f), -1)
        loss = prototypes.contrastive_loss(cos, positive, float(v["tau"]), clip=True)
        loss.sum().backward()
        assert_close(loss.detach(), v["contrastive"])
        assert_close(f.grad, v["grad_features"])


def test_infonce_against_brute_force():
    torch.manual_seed(2)
    cos = (2 * torch.rand(50, 7, dtype=torch.double) - 1).requires_grad_()
    positive = torch.rand(50, 7) < 0.4
    positive[:, 0] = True
    loss = prototypes.contrastive_loss(cos, positive, 0.05)
    for row, is_positive, value in zip(cos.tolist(), positive.tolist(), loss.tolist()):
        top = [math.exp(c / 0.05) for c, is_own in zip(row, is_positive) if is_own]
        assert value == pytest.approx(-math.log(sum(top) / sum(math.exp(c / 0.05) for c in row)))
    assert torch.autograd.gradcheck(lambda c: prototypes.contrastive_loss(c, positive, 0.05), cos)


def test_infonce_has_a_gradient_where_the_clip_has_none():
    for clip, value in ((False, 132.0), (True, math.log(2))):
        cos = torch.tensor([[0.32, 0.98]], dtype=torch.double, requires_grad=True)
        loss = prototypes.contrastive_loss(cos, torch.tensor([[True, False]]), 0.005, clip)
        loss.sum().backward()
        assert loss.item() == pytest.approx(value, abs=1e-9)
        np.testing.assert_allclose(cos.grad, [[0, 0]] if clip else [[-200, 200]], atol=1e-9)


def test_cancellation_of_the_consistency_is_as_documented():
    """(f - Gbar)^2 is expanded in float32: features 1e-2 apart from Gbar lose up to 1e-3 of it."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        Gbar = torch.randn(1, 256, generator=generator)
        f = Gbar + 1e-2 * torch.randn(500, 256, generator=generator)
        exact = (f.double() - Gbar.double()).square().mean()
        error = abs(loss_of_features(f, {1: Gbar}, 1.0)[1].double() / exact - 1)
        assert 0 < error < 1e-3


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
    w = [{"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 6.0])}]
    assert torch.equal(federated.average_weights(w, [1, 3])["a"], torch.tensor([2.5, 5.0]))
    assert torch.equal(federated.average_weights(w, [1, 1])["a"], torch.tensor([2.0, 4.0]))
    assert torch.equal(federated.average_weights(w[:1], [7])["a"], w[0]["a"])


def test_aggregate_prototypes():
    """Always (K, D), also for one site and for a class that one site alone has; {} for nobody's."""
    site = {path: {0: torch.ones(6), 1: torch.arange(6.0)} for path in PATHS}
    other = {path: {0: -torch.ones(6)} for path in PATHS}
    one = federated.aggregate_prototypes([site])
    two = federated.aggregate_prototypes([site, other])
    for path in PATHS:
        assert {j: tuple(g.shape) for j, g in one[path].items()} == {0: (1, 6), 1: (1, 6)}
        assert {j: tuple(g.shape) for j, g in two[path].items()} == {0: (1, 6), 1: (1, 6)}
        torch.testing.assert_close(two[path][0], torch.zeros(1, 6))
        torch.testing.assert_close(two[path][1], torch.arange(6.0)[None])
    assert federated.aggregate_prototypes([{}, {}]) == {}


def test_golden_segmentation_loss():
    for v in golden("segmentation_loss"):
        for i in numbered(v, "logits"):
            loss = federated.segmentation_loss(tensor(v[f"logits{i}"]), tensor(v[f"labels{i}"]))
            assert_close(loss, v[f"loss{i}"])


# ---- The network ----

def test_unet_proper_is_the_same_for_one_seed():
    states = []
    for fsr, levels in (("none", []), ("adaptive", [0, 1, 2]), ("global", [1])):
        torch.manual_seed(5)
        states.append(UNet(4, fsr=fsr, levels=levels).state_dict())
    bare = states[0]
    assert not any(name.startswith(("fsr", "fusion")) for name in bare)
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in bare.items())


def test_state_dict_holds_no_statistics():
    model = UNet(4)
    model.features(torch.rand(2, 3, 32, 32))
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}
    assert not any("running" in name or "num_batches" in name for name in model.state_dict())


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


def write_prostate(folder, sites=("a", "b"), cases=3):
    """A data folder of volumes (4 slices, 2 with organ) for the prostate task; returns it."""
    rng = np.random.default_rng(0)
    for site in sites:
        (folder / site).mkdir(parents=True)
        for case in range(cases):
            mask = np.zeros((32, 32, 4), np.uint8)
            mask[8:20, 10:22, 1:3] = 1
            volume = (50 * mask + rng.integers(0, 30, mask.shape)).astype(np.int16)
            for name, array in ((f"Case{case}", volume), (f"Case{case}_segmentation", mask)):
                nibabel.save(nibabel.Nifti1Image(array, np.diag([-.5, -.5, 3, 1])),
                             folder / site / f"{name}.nii.gz")
    return folder


# ---- Data ----

def nuclei_config(folder, *overrides):
    return load_config({"task": "nuclei", "data": str(folder), "out": "unused", "image_size": 32}, overrides)


def prostate_config(folder, *overrides):
    return load_config({"task": "prostate", "data": str(folder), "out": "unused", "image_size": 32},
                       overrides)


def one_sample(folder, task="nuclei", size=32):
    """The first sample of the folder's only site, read alone."""
    entries, problems = datasets.list_files(folder, task)
    assert not problems
    (site, found), = entries.items()
    return readers.read_sample(found[0], site, task, size)


RAMP = np.arange(40 * 48, dtype=np.float64).reshape(40, 48) / (40 * 48 - 1)


@pytest.mark.parametrize("mode, name", [
    ("L", "x.png"), ("RGB", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("LA", "x.png"), ("I;16", "x.png"),
    ("L", "x.tif"), ("F", "x.tiff"), ("RGB", "x.BMP"), ("RGB", "x.jpg"), ("CMYK", "x.jpeg")])
def test_pixel_formats(tmp_path, mode, name):
    """Every format gives the same picture, scaled to [0, 1] over all its channels; alpha is dropped."""
    for kind in ("images", "masks"):
        (tmp_path / "a" / kind).mkdir(parents=True)
    byte = (255 * RAMP).round().astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray((60000 * RAMP + 100).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray((3 * RAMP - 1).astype(np.float32))
    else:
        image = Image.fromarray(byte).convert("RGB" if mode == "CMYK" else "L").convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(77)
    image.save(tmp_path / "a" / "images" / name)
    Image.fromarray(np.uint8(RAMP > 0.5)).convert("RGBA").save(tmp_path / "a" / "masks" / "X.png")
    sample = one_sample(tmp_path, size=48)
    assert sample.images.shape == (1, 3, 48, 48) and sample.images.dtype == torch.float32
    assert (sample.truth == (RAMP > 0.5)).all() and sample.spacing == (1, 1, 1)
    expected = functional.interpolate(torch.tensor(RAMP)[None, None].float(), (48, 48), mode="bilinear")
    lossy = 0.06 if name.endswith(("jpg", "jpeg")) else 0.012
    assert (sample.images - expected).abs().max() < lossy
    assert sample.images.min() >= 0 and sample.images.max() <= 1


def test_masks_are_above_zero_and_jpeg_masks_above_half(tmp_path):
    folder = write_nuclei(tmp_path, ("a",), cases=1)
    file = folder / "a" / "masks" / "0.png"
    disc = np.asarray(Image.open(file)) > 0
    labels = disc * np.uint8(1)
    labels[16:] *= 2  # labels 1 and 2 are merged
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 0, 9, 9, 9])  # label 1 is painted black
    palette.putdata(labels.ravel().tolist())
    for mask in (Image.fromarray(labels), palette):
        mask.save(file)
        assert (one_sample(folder).truth == disc).all()
    file.unlink()
    Image.fromarray(np.uint8(255) * disc).save(file.with_suffix(".jpg"), quality=30)
    assert (one_sample(folder).truth ^ disc).mean() < 0.01  # its noise above 0 is not foreground


def test_resizing_keeps_areas_and_does_not_alias(tmp_path):
    folder = write_nuclei(tmp_path, ("a",), cases=1, size=256)
    stripes = np.tile(np.uint8([[255], [0], [0], [0]]), (64, 256))
    Image.fromarray(stripes).save(folder / "a" / "images" / "0.png")
    mask = np.zeros((256, 256), np.uint8)
    mask[10:118, 16:200] = 255
    Image.fromarray(mask).save(folder / "a" / "masks" / "0.png")
    sample = one_sample(folder, size=64)
    assert (sample.images[:, :, 4:-4] - 0.25).abs().max() < 0.05  # stripes become grey
    assert sample.masks.float().mean() == pytest.approx((mask > 0).mean(), rel=0.02)
    rows = sample.masks[0].any(1).nonzero()
    assert (rows.min(), rows.max()) == (2, 28)  # rows 10, 14, .., 114


def test_a_constant_image_is_zero(tmp_path):
    folder = write_nuclei(tmp_path, ("a",), cases=1)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "a" / "images" / "0.png")
    assert not one_sample(folder).images.any()


def test_volumes_follow_their_header(tmp_path):
    """A volume stored in another axis order and direction gives the same sample and spacing."""
    rng, samples = np.random.default_rng(0), []
    volume = rng.integers(0, 1000, (20, 24, 6)).astype(np.int16)
    volume[0, 0, 0] = 30000  # above the 99 % quantile
    mask = np.zeros(volume.shape, np.uint8)
    mask[4:10, 5:20, 1:3], mask[5:8, 6:9, 2] = 1, 2  # two labels are merged
    for number, codes in enumerate(("LPS", "RAS", "SLA", "PIR")):
        site = tmp_path / str(number) / "a"
        site.mkdir(parents=True)
        for name, array in (("case00.NII.GZ", volume), ("Case00_Segmentation.nii.gz", mask)):
            image = nibabel.Nifti1Image(array, np.diag([-0.5, -0.6, 3.0, 1.0]))  # x to left, y to back
            turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
            (site / name).write_bytes(gzip.compress(image.as_reoriented(turn).to_bytes()))
        samples.append(one_sample(tmp_path / str(number), "prostate", 24))
    for sample in samples:
        assert sample.spacing == pytest.approx((3, 0.6, 0.5))
        assert (sample.truth == (mask > 0).transpose(2, 1, 0)).all()
        torch.testing.assert_close(sample.images, samples[0].images)
    clipped = np.minimum(volume, np.quantile(volume, 0.99)).transpose(2, 1, 0)
    own = functional.interpolate(torch.tensor(clipped / clipped.max()).float()[:, None], (24, 24),
                                 mode="bilinear", antialias=True)
    torch.testing.assert_close(samples[0].images[:, 1], own[:, 0], atol=1e-4, rtol=0)


def test_spacing_in_another_unit(tmp_path):
    folder = write_prostate(tmp_path / "d", ("a",), cases=1)
    for file in (folder / "a").iterdir():
        image = nibabel.load(file)
        image = nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([-5e-4, -5e-4, 3e-3, 1]))
        image.header.set_xyzt_units("meter")
        nibabel.save(image, file)
    assert one_sample(folder, "prostate").spacing == pytest.approx((3, 0.5, 0.5))


def test_three_slice_stacks_repeat_the_edge():
    slices = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 2)
    found = readers.three_slice_stacks(slices)
    assert found[:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    assert readers.three_slice_stacks(slices[:1])[:, :, 0, 0].tolist() == [[0, 0, 0]]
    assert found.untyped_storage().nbytes() == 6 * 4 * 4  # a view of six slices, not twelve


def test_training_takes_slices_with_foreground_and_scoring_whole_volumes(tmp_path):
    site = load_sites(prostate_config(write_prostate(tmp_path / "d")))[0]
    assert [(sample.name, s) for sample, s in site.train_slices] == [
        (site.train[0].name, 1), (site.train[0].name, 2)]
    assert all(len(sample.truth) == 4 for sample in site.test)


def test_layouts(tmp_path):
    """images/ + masks/, list.txt, and the TNBC download, whose slides are the cases."""
    plain = write_nuclei(tmp_path / "d", ("a",))
    listed = plain / "listed"
    listed.mkdir()
    (listed / "list.txt").write_text("# image mask\n\n" + "".join(
        f"../a/images/{i}.png ../a/masks/{i}.png\n" for i in range(5)))
    for slide in ("01", "02", "03"):
        for kind in ("Slide", "GT"):
            (plain / "tnbc" / f"{kind}_{slide}").mkdir(parents=True)
            for i in (1, 2):
                source = plain / "a" / ("images" if kind == "Slide" else "masks") / f"{i}.png"
                (plain / "tnbc" / f"{kind}_{slide}" / f"{i}.png").write_bytes(source.read_bytes())
    (plain / "a" / "images" / ".DS_Store").write_text("")
    (plain / ".hidden").mkdir()
    a, l, t = load_sites(nuclei_config(plain))
    assert [site.name for site in (a, l, t)] == ["a", "listed", "tnbc"]
    assert len(a.train) == len(l.train) == 3 and len(t.train) == 2  # one slide of two images
    assert {sample.case for sample in datasets.samples_of(t)} == {"Slide_01", "Slide_02", "Slide_03"}
    shutil.rmtree(plain / "tnbc" / "Slide_02")
    with pytest.raises(BadInput, match="tnbc/GT_02: has no Slide_02 beside it"):
        load_sites(nuclei_config(plain))


def cut(file, size=None):
    file.write_bytes(file.read_bytes()[:size or file.stat().st_size // 2])


def save_array(file, array):
    Image.fromarray(array).save(file)


NUCLEI_FAULTS = [
    (lambda a: cut(a / "images" / "1.png"), "images/1.png: cannot be read"),
    (lambda a: cut(a / "masks" / "1.png", 10), "masks/1.png: cannot be read"),
    (lambda a: (a / "images" / "1.png").write_text("no"), "images/1.png: cannot be read"),
    (lambda a: (a / "masks" / "1.png").unlink(), "images/1.png: has no mask"),
    (lambda a: (a / "images" / "1.png").unlink(), "masks/1.png: has no image"),
    (lambda a: save_array(a / "masks" / "1.png", np.zeros((31, 32), np.uint8)), "masks/1.png: .*31 x 32"),
    (lambda a: save_array(a / "images" / "1.jpg", np.zeros((32, 32), np.uint8)), "1.png: 1.jpg is a second"),
    (lambda a: [save_array(f, np.zeros((32, 32), np.uint8)) for f in (a / "masks").iterdir()],
     "masks: the masks of all of site a"),
    (lambda a: (a / "list.txt").write_text("images/0.png\n"), "list.txt: line 1: expected"),
    (lambda a: (a / "list.txt").write_text("\nimages/0.png masks/7.png\n"), "list.txt: line 2: .*7.png"),
    (lambda a: (a / "list.txt").write_text("images/0.png masks/0.png\n" * 2), "list.txt: line 2: .*second image"),
    (lambda a: (a / "list.txt").write_bytes(b"\xff\xfe\xff"), "list.txt: "),
    (lambda a: (a / "list.txt").write_text("images/0.png images/0.png\n"), "line 1: image and mask"),
    (lambda a: [(a / "masks" / "1.png").unlink(), Image.fromarray(
        np.full((32, 32), np.nan, np.float32)).save(a / "masks" / "1.tif")], "masks/1.tif: has NaN"),
    (lambda a: (a / "images").rename(a / "pictures"), "a/masks/0.png: has no image"),
    (lambda a: [shutil.rmtree(a / kind) for kind in ("images", "masks")], "a: has no images"),
    (lambda a: [f.unlink() for i in range(1, 5) for f in a.glob(f"*/{i}.png")], "a: has 1 case,"),
    (lambda a: [(a / "images" / "1.png").unlink(), Image.fromarray(
        np.full((32, 32), np.nan, np.float32)).save(a / "images" / "1.tif")], "images/1.tif: has NaN"),
    (lambda a: [(a / "images" / "1.png").unlink(), Image.new("L", (32, 32)).save(
        a / "images" / "1.tif", save_all=True, append_images=[Image.new("L", (32, 32))])],
     "images/1.tif: has 2 pages"),
]


@pytest.mark.parametrize("number", range(len(NUCLEI_FAULTS)))
def test_bad_images(tmp_path, number):
    spoil, words = NUCLEI_FAULTS[number]
    folder = write_nuclei(tmp_path / "d")
    spoil(folder / "a")
    with pytest.raises(BadInput, match=words) as problem:
        load_sites(nuclei_config(folder))
    assert "\n" not in str(problem.value) and str(problem.value).count(", ") + str(problem.value).count(
        ";") >= 1  # it says what to do


def save_volume(file, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-.5, -.5, 3, 1]) if affine is None else affine), file)


VOLUME = np.arange(32 * 32 * 4, dtype=np.float32).reshape(32, 32, 4)
MASK = np.ones((32, 32, 4), np.uint8)
PROSTATE_FAULTS = [
    (lambda a: cut(a / "Case0.nii.gz"), "Case0.nii.gz: cannot be read"),
    (lambda a: cut(a / "Case0_segmentation.nii.gz", 30), "Case0_segmentation.nii.gz: cannot be read"),
    (lambda a: (a / "Case0.nii.gz").write_text("no"), "Case0.nii.gz: cannot be read"),
    (lambda a: save_volume(a / "Case0.nii.gz", VOLUME.astype(np.complex64)), "Case0.nii.gz: .*complex"),
    (lambda a: save_volume(a / "Case0.nii.gz", VOLUME[..., None]), "Case0.nii.gz: is 4-D"),
    (lambda a: save_volume(a / "Case0.nii.gz", VOLUME[..., 0]), "Case0.nii.gz: is 2-D"),
    (lambda a: save_volume(a / "Case0.nii.gz", np.where(VOLUME == 5, np.nan, VOLUME)), "Case0.nii.gz: has NaN"),
    (lambda a: save_volume(a / "Case0.nii.gz", np.where(VOLUME == 5, np.inf, VOLUME)), "infinite"),
    (lambda a: save_volume(a / "Case0_segmentation.nii.gz", MASK[:-1]), "Case0_segmentation.nii.gz: its size"),
    (lambda a: save_volume(a / "Case0_segmentation.nii.gz", MASK, np.diag([.5, -.5, 3, 1])),
     "Case0_segmentation.nii.gz: its header"),
    (lambda a: (a / "Case0_segmentation.nii.gz").unlink(), "Case0.nii.gz: has no mask"),
    (lambda a: (a / "Case0.nii.gz").unlink(), "Case0_segmentation.nii.gz: has no image"),
    (lambda a: save_volume(a / "case0.nii", VOLUME), "case0.nii: Case0.nii.gz is a second image"),
    (lambda a: [save_volume(f, 0 * MASK) for f in a.glob("*_seg*")], "a: the masks of all of site a"),
]


@pytest.mark.parametrize("number", range(len(PROSTATE_FAULTS)))
def test_bad_volumes(tmp_path, number):
    spoil, words = PROSTATE_FAULTS[number]
    folder = write_prostate(tmp_path / "d")
    spoil(folder / "a")
    with pytest.raises(BadInput, match=words) as problem:
        load_sites(prostate_config(folder))
    assert "\n" not in str(problem.value)


def test_a_site_without_a_training_slice_is_an_error(tmp_path):
    folder = write_prostate(tmp_path / "d", ("a",))
    train_case, = splits_of(load_sites(prostate_config(folder)))["a"]["train"]
    save_volume(folder / "a" / f"{train_case}_segmentation.nii.gz", 0 * MASK)
    with pytest.raises(BadInput, match="no slice of site a's training cases has foreground"):
        load_sites(prostate_config(folder))


# ---- Splits ----

@pytest.mark.parametrize("n, counts", [(2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (7, (5, 1, 1)),
                                       (8, (4, 2, 2)), (12, (8, 2, 2)), (13, (7, 3, 3)), (50, (30, 10, 10))])
def test_split_counts(n, counts, capsys):
    cases = [f"c{i}" for i in range(n)]
    split = datasets.split_cases("a", cases, nuclei_config("unused"))
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == counts
    assert sorted(itertools.chain(*split.values())) == sorted(cases)  # nobody twice, nobody left out
    assert ("no validation" in capsys.readouterr().out) == (n == 2)
    assert split == datasets.split_cases("a", cases[::-1], nuclei_config("unused"))
    if n > 7:
        assert split != datasets.split_cases("a", cases, nuclei_config("unused", "seed=1"))
        assert split != datasets.split_cases("b", cases, nuclei_config("unused"))


@pytest.mark.parametrize("K, n", [(3, 3), (4, 11), (5, 20)])
def test_folds_partition_the_cases(K, n):
    cases = [f"c{i}" for i in range(n)]
    folds = [datasets.split_cases("a", cases, nuclei_config("unused", f"folds={K}", f"fold={k}"))
             for k in range(K)]
    assert sorted(itertools.chain(*(fold["test"] for fold in folds))) == sorted(cases)
    for k, fold in enumerate(folds):
        assert sorted(itertools.chain(*fold.values())) == sorted(cases)
        assert fold["val"] == folds[(k + 1) % K]["test"]
    with pytest.raises(BadInput, match=f"a: has {K - 1} cases"):
        datasets.split_cases("a", cases[:K - 1], nuclei_config("unused", f"folds={K}"))


def test_patients_stay_on_one_side(tmp_path):
    """Several files of a patient share a split; a file that does not match is an error."""
    folder = write_nuclei(tmp_path / "d", ("a",), cases=12)
    for kind in ("images", "masks"):
        for i in range(12):
            (folder / "a" / kind / f"{i}.png").rename(folder / "a" / kind / f"p{i // 3}_{i}.png")
    site, = load_sites(nuclei_config(folder, r"case_pattern=^(p\d+)_"))
    groups = [{sample.case for sample in part} for part in (site.train, site.val, site.test)]
    assert [len(group) for group in groups] == [2, 1, 1] and len(set.union(*groups)) == 4
    assert [len(part) for part in (site.train, site.val, site.test)] == [6, 3, 3]
    for kind in ("images", "masks"):
        (folder / "a" / kind / "p0_0.png").rename(folder / "a" / kind / "q.png")
    with pytest.raises(BadInput, match="q.png: its name does not match case_pattern"):
        load_sites(nuclei_config(folder, r"case_pattern=^(p\d+)_"))


def test_splits_file(tmp_path, capsys):
    folder, file = write_nuclei(tmp_path / "d"), tmp_path / "splits.json"
    splits = {site: {"train": ["0", "1"], "val": [], "test": ["3"]} for site in "ab"}

    def load(changed):
        file.write_text(json.dumps(changed))
        return load_sites(nuclei_config(folder, f"splits={file}"))

    assert splits_of(load(splits)) == splits
    assert "a: 2 cases in no split are not used: 2, 4" in capsys.readouterr().out
    a = splits["a"]
    for changed, words in (
            ({"a": a}, "does not mention the site b"), (splits | {"c": a}, "lacks the site c"),
            (splits | {"b": a | {"val": ["9"]}}, "case 9 of site b is not in the data"),
            (splits | {"b": a | {"val": ["3"]}}, "case 3 of site b is listed twice"),
            (splits | {"b": a | {"test": []}}, "site b has no test case"),
            ([1], "is not of the form"), ({"a": {"training": []}}, "is not of the form"),
            ({"a": {"train": [1]}}, "is not of the form")):
        with pytest.raises(BadInput, match=words):
            load(changed)
    file.write_text("{")
    with pytest.raises(BadInput, match="splits.json: cannot be read"):
        load_sites(nuclei_config(folder, f"splits={file}"))


def test_other_data_counts_as_test_unless_the_splits_know_it(tmp_path, capsys):
    folder = write_nuclei(tmp_path / "d", ("a", "new"))
    splits = {"a": {"train": ["0", "1"], "val": ["2"], "test": ["3", "gone"]}, "away": {"train": ["1"]}}
    a, new = load_sites(nuclei_config(folder), splits, strict=False)
    assert splits_of([a])["a"] == {"train": ["0", "1"], "val": ["2"], "test": ["3", "4"]}
    assert not new.train and not new.val and len(new.test) == 5
    assert "a: taken for the run's site of that name: 3 of its cases trained or validated, 1 are " \
        "new and test, 1 of the run's are missing" in capsys.readouterr().out


# ---- Batches ----

def test_augmentation_is_one_of_eight_symmetries_of_image_and_mask_alike():
    x = torch.arange(16.0).view(4, 4)
    seen = {tuple(datasets.turned(x, turn).flatten().tolist()) for turn in range(8)}
    assert len(seen) == 8
    sample = Sample("a", "c", "c.png", x.expand(1, 3, 4, 4), x[None].to(torch.uint8), None, (1, 1, 1))
    found, y = datasets.stack([(sample, 0)] * 200, seeded(0))
    assert torch.equal(found[:, 0], y.float()) and torch.equal(found[:, 0], found[:, 2])
    assert {tuple(image.flatten().tolist()) for image in found[:, 0]} == seen
    plain, _ = datasets.stack([(sample, 0)])
    assert torch.equal(plain[0, 0], x)


def test_batches_cover_every_slice_once_in_a_seeded_order():
    samples = [Sample("a", str(i), "", torch.full((1, 3, 2, 2), float(i)),
                      torch.zeros(1, 2, 2, dtype=torch.uint8), None, (1, 1, 1)) for i in range(11)]
    slices = [(sample, 0) for sample in samples]

    def order(*words):
        found = [x[:, 0, 0, 0].tolist() for x, _ in batches(slices, 4, seeded(*words))]
        assert [len(part) for part in found] == [4, 4, 3]
        return list(itertools.chain(*found))

    assert sorted(order(0, "a", 1)) == list(range(11)) != order(0, "a", 1)
    assert order(0, "a", 1) == order(0, "a", 1) != order(0, "a", 2)


# ---- Generated sites and the report ----

def test_demo_is_written_whole_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_data, "write_nuclei", lambda part: [part.mkdir(parents=True), 1 / 0])
    with pytest.raises(ZeroDivisionError):
        demo_data.ensure("nuclei")
    assert list((tmp_path / "data").iterdir()) == []  # nothing half-written
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for task, sites in (("nuclei", 4), ("prostate", 6)):
        folder = demo_data.ensure(task)
        entries, problems = datasets.list_files(folder, task)
        assert folder == Path("data") / f"demo_{task}" and len(entries) == sites and not problems
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
        demo_data.ensure(task)
        assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_report_names_everything_that_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_nuclei(tmp_path / "d")
    cut(folder / "a" / "images" / "1.png")
    (folder / "b" / "masks" / "2.png").unlink()
    save_array(folder / "b" / "masks" / "4.png", np.zeros((9, 9), np.uint8))
    (folder / "b" / "images" / "notes.txt").write_text("")
    assert check_data.check(nuclei_config(folder), "sheet.png") == 3
    out = capsys.readouterr().out
    for words in ("a/images/1.png: cannot", "b/images/2.png: has no mask", "b/masks/4.png: its size",
                  "3 problems", "32 x 32 (4)", "labels    0, 255", "train 3, val 1, test 1",
                  "1 pixel", "ignored   1 files"):
        assert words in out
    assert Image.open("sheet.png").width > 500
    done = subprocess.run([sys.executable, HERE / "check_data.py", "d", "--task", "nuclei", "image_size=64"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "" and "3 problems" in done.stdout
    done = subprocess.run([sys.executable, HERE / "check_data.py", "nowhere", "--task", "nuclei"],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.fullmatch("error: nowhere: .*\n", done.stderr)


def test_report_on_volumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check_data.check(prostate_config(write_prostate(tmp_path / "d")), "sheet.png") == 0
    out = capsys.readouterr().out
    assert "32 x 32 x 4 slices (3)" in out and "0.5 x 0.5 x 3 mm (3)" in out and "0 problems" in out


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
    one = {"dice": 0, "hd95": diagonal, "assd": diagonal, "miss": 1}
    assert metrics.score(empty, full, (3, .5, .5)) == metrics.score(full, empty, (3, .5, .5)) == one
    assert metrics.score(empty, empty, (3, .5, .5)) == {"dice": 1, "hd95": 0, "assd": 0, "miss": 0}
    fast = metrics.score(empty, full, (3, .5, .5), distances=False)
    assert fast == one | {"hd95": None, "assd": None}


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


def test_averages_over_cases_sites_and_missing():
    case = {"dice": .5, "hd95": 2., "assd": 1., "miss": 1}
    better = {"dice": 1., "hd95": 0., "assd": 0., "miss": 0}
    nothing = {"dice": None, "hd95": None, "assd": None, "misses": None}
    sites = {"a": metrics.site_scores([case, better]), "b": metrics.site_scores([case]),
             "none": metrics.site_scores([])}
    assert sites["a"] == {"dice": .75, "hd95": 1., "assd": .5, "misses": 1, "cases": 2}
    assert sites["none"] == nothing | {"cases": 0}
    assert metrics.mean_scores(sites) == {"dice": .625, "hd95": 1.5, "assd": .75, "misses": 2}
    assert metrics.mean_scores({"none": sites["none"]}) == nothing
    fast = metrics.site_scores([case | {"hd95": None, "assd": None}])
    assert (fast["dice"], fast["hd95"], fast["assd"], fast["misses"]) == (.5, None, None, 1)
    scores = {"sites": sites, "mean": metrics.mean_scores(sites)}
    lines = metrics.format_table(scores, "mm").split("\n")
    assert len({len(line) for line in lines}) == 1
    assert "HD95 mm" in lines[0] and lines[-1].startswith("worst: b") and "0.6250" in lines[-2]
    assert metrics.format_table({"sites": {}, "mean": nothing}, "px").count("-") == 4


def test_definitions_say_what_was_done():
    volumes = SimpleNamespace(task="prostate", eval_slices="all", test_stats="site")
    slices = SimpleNamespace(task="prostate", eval_slices="foreground", test_stats="case")
    images = SimpleNamespace(task="nuclei", eval_slices="all", test_stats="site")
    assert [metrics.units(c)["hd95"] for c in (volumes, slices, images)] == ["mm", "mm", "px"]
    cases = [metrics.definitions(c)["case"] for c in (volumes, slices, images)]
    assert ["volume" in case for case in cases] == [True, False, False]
    assert ["slice" in case for case in cases] == [False, True, False]
    assert metrics.definitions(slices)["test_stats"].startswith("case")
    assert "foreign_sites" not in metrics.definitions(images)
    words = metrics.definitions(images, ["new_b", "new_a"])["foreign_sites"]
    assert "new_a" in words and "new_b" in words and "own unlabelled images" in words


# ---- Statistics and predictions ----

def a_sample(site, case, slices=1, size=32, own=(40, 50), shift=0., seed=0, spacing=(1., 1., 1.)):
    """A sample with some organ in about half of its slices."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(slices, 3, size, size, generator=random) * .5 + shift
    masks = torch.zeros(slices, size, size, dtype=torch.uint8)
    truth = np.zeros((slices, *own), bool)
    masks[::2, 8:20, 8:20] = 1
    truth[::2, 10:25, 12:30] = True
    return Sample(site, case, f"{case}.png", images, masks, truth, spacing)


def some_sites():
    """Two sites that differ in brightness: 3 cases train, 2 test; b has no validation."""
    sites = []
    for name, shift in (("a", 0.), ("b", .5)):
        samples = [a_sample(name, f"c{i}", shift=shift, seed=10 * i + len(sites)) for i in range(6)]
        sites.append(Site(name, train=samples[:3], val=samples[3:4] if name == "a" else [],
                          test=samples[4:]))
    return sites


def a_config(**keys):
    return load_config({"task": "nuclei", "data": "demo", "out": "unused", "width": 4,
                        "image_size": 32, "batch_size": 2, "device": "cpu"} | keys)


def a_model(config):
    """An untrained network whose predictions are neither empty nor full."""
    model = build_model(config)
    weight = torch.randn(model.head.weight[0].shape, generator=torch.Generator().manual_seed(1))
    weight -= weight.mean()
    model.head.weight.data = torch.stack([weight, -weight])
    model.head.bias.data.zero_()
    return model


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
    local = with_statistics(model, found)
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
    first = site_statistics(model, sites[0], config, CPU)
    again = site_statistics(model, sites[0], config, CPU)
    assert all(torch.equal(first[name], again[name]) for name in first)
    bare = Site("a", train=sites[0].train, val=[], test=sites[1].test)
    other = site_statistics(model, bare, config, CPU)
    assert all(torch.equal(first[name], other[name]) for name in first)
    foreign = Site("b", train=[], val=[], test=sites[1].test)
    foreign = site_statistics(model, foreign, config, CPU)
    name = next(iter(first))
    assert not torch.allclose(first[name], foreign[name])
    seen = []
    monkeypatch.setattr("scoring.norm_statistics.collect_statistics", lambda model, x: seen.append(list(x)))
    many = Site("a", train=[a_sample("a", f"c{i}", seed=i) for i in range(70)], val=[], test=[])
    volume = Site("v", train=[], val=[], test=[a_sample("v", "c", slices=80)])
    for site in (many, many, volume):
        site_statistics(model, site, a_config(batch_size=6), CPU)
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
        statistics = {site.name: site_statistics(model, site, config, CPU) for site in sites}
    local = with_statistics(model, statistics.get("a", {}))
    alone = evaluation.predict(local, sites[0].test[0], config, CPU)
    together = evaluation.evaluate(model, sites, "test", config, CPU, statistics)
    again = evaluation.predict(local, sites[0].test[0], config, CPU)
    assert .1 < alone.mean() < .9
    assert (alone == again).all() and alone.shape == (1, 40, 50) and alone.dtype == bool
    fewer = [Site("a", train=sites[0].train, val=[], test=sites[0].test[:1])]
    one = evaluation.evaluate(model, fewer, "test", config, CPU, statistics)["sites"]["a"]
    case = evaluation.score_sample(alone, sites[0].test[0], config)[0]
    assert one["dice"] == case["dice"] and one["hd95"] == case["hd95"]
    other = evaluation.score_sample(
        evaluation.predict(local, sites[0].test[1], config, CPU), sites[0].test[1], config)[0]
    assert together["sites"]["a"]["dice"] == pytest.approx((case["dice"] + other["dice"]) / 2)


def test_each_site_is_scored_with_its_own_statistics():
    config, sites, used = a_config(), some_sites(), []
    model = a_model(config)
    statistics = {site.name: site_statistics(model, site, config, CPU) for site in sites}
    original = evaluation.with_statistics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "with_statistics",
                      lambda model, values: used.append(values) or original(model, values))
        scores = evaluation.evaluate(model, sites, "test", config, CPU, statistics)
        quick = evaluation.evaluate(model, sites, "val", config, CPU, statistics, distances=False)
    assert [values is statistics[name] for values, name in zip(used, "aba")] == [True] * 3
    assert [scores["sites"][name]["cases"] for name in "ab"] == [2, 2]
    assert quick["sites"]["b"] == metrics.site_scores([])
    assert quick["mean"]["dice"] == quick["sites"]["a"]["dice"] and quick["mean"]["hd95"] is None


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


def test_cases_that_are_scored():
    sample = a_sample("v", "c", slices=6, spacing=(3., .5, .5))
    prediction = np.roll(sample.truth, 2, axis=2)
    volume = a_config(task="prostate")
    whole = evaluation.score_sample(prediction, sample, volume)
    assert whole == [metrics.score(prediction, sample.truth, (3., .5, .5))]
    foreground = a_config(task="prostate", eval_slices="foreground")
    slices = evaluation.score_sample(prediction, sample, foreground)
    assert slices == [metrics.score(prediction[s], sample.truth[s], (.5, .5)) for s in (0, 2, 4)]
    image = a_sample("a", "c")
    assert evaluation.score_sample(image.truth, image, a_config())[0]["dice"] == 1


# ---- Checkpoints, results and the program ----

def write_run(folder, config, sites):
    """A run folder as train.py leaves it, of the untrained network."""
    model = a_model(config)
    statistics = {site.name: site_statistics(model, site, config, CPU) for site in sites}
    for kind, t in (("best", 2), ("last", 3)):
        torch.save({"format": evaluation.FORMAT, "config": vars(config), "round": t,
                    "weights": model.state_dict(), "statistics": statistics}, folder / f"{kind}.pt")
    splits = {site.name: {split: [sample.case for sample in getattr(site, split)]
                          for split in ("train", "val", "test")} for site in sites}
    (folder / "splits.json").write_text(json.dumps(splits))
    return statistics


def test_stored_statistics_are_used_and_others_collected(tmp_path, capsys):
    config, sites = a_config(), some_sites()
    stored = write_run(tmp_path, config, sites)
    checkpoint = evaluation.load_checkpoint(tmp_path / "best.pt")
    assert checkpoint["config"] == vars(config)
    model = evaluation.model_of(checkpoint, "best.pt", CPU)
    new = Site("new", train=[], val=[], test=sites[0].test)
    found = evaluation.local_statistics(model, checkpoint, [sites[1], new], config, CPU)
    assert list(found) == ["b", "new"]
    assert all(torch.equal(found["b"][name], stored["b"][name]) for name in stored["b"])
    case = a_config(test_stats="case")
    assert evaluation.local_statistics(model, checkpoint, sites, case, CPU) == {}
    changed = copy.deepcopy(checkpoint)
    for value in changed["statistics"]["a"].values():
        value += .5
    torch.save(changed | {"round": 3}, tmp_path / "last.pt")
    result = evaluation.score_run(tmp_path, [*sites, new], config, CPU, 10.)
    best, last = result["best"]["test"]["sites"], result["last"]["test"]["sites"]
    assert best["a"] != last["a"] and best["b"] == last["b"]
    assert best["b"]["cases"] == 2 and result["best"]["val"]["sites"]["b"]["cases"] == 0
    assert list(result) == ["best", "last", "units", "definitions", "commit", "versions", "peak_mb",
                            "seconds"]
    assert list(result["best"]) == ["round", "val", "test"] and result["best"]["round"] == 2
    assert result["seconds"] >= 10 and result["peak_mb"] > 50
    assert set(result["versions"]) == {"python", "torch", "numpy", "nibabel", "pillow", "pyyaml"}
    assert result["definitions"]["foreign_sites"].startswith("new took no part")
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert capsys.readouterr().out.count("mean of sites") == 4


def test_no_git_gives_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert evaluation.run_facts(1.)["commit"] is None


@pytest.mark.parametrize("spoil, words", [
    (lambda file: file.unlink(), "no such checkpoint"),
    (lambda file: file.write_bytes(file.read_bytes()[:3000]), "truncated"),
    (lambda file: file.write_bytes(b""), "truncated"),
    (lambda file: file.write_text("hello"), "truncated"),
    (lambda file: torch.save({"weights": {}}, file), "no checkpoint of this program"),
    (lambda file: torch.save(torch.load(file) | {"format": "other-1"}, file),
     "no checkpoint of this program"),
    (lambda file: torch.save({"format": "fedbcs-1"}, file), "no checkpoint of this program"),
    (lambda file: torch.save(nn.Linear(2, 2), file), "truncated or no checkpoint"),
    (lambda file: torch.save([1], file), "no checkpoint of this program")])
def test_bad_checkpoints(tmp_path, spoil, words):
    write_run(tmp_path, a_config(), some_sites())
    spoil(tmp_path / "best.pt")
    with pytest.raises(BadInput, match=words) as problem:
        evaluation.load_checkpoint(tmp_path / "best.pt")
    text = str(problem.value)
    assert text.startswith(str(tmp_path / "best.pt")) and "\n" not in text


def test_weights_that_do_not_fit_their_config(tmp_path):
    write_run(tmp_path, a_config(), some_sites())
    checkpoint = evaluation.load_checkpoint(tmp_path / "best.pt")
    for key, value in (("width", 8), ("prototype_weight", 0.), ("fsr", "none")):
        changed = checkpoint | {"config": checkpoint["config"] | {key: value}}
        with pytest.raises(BadInput, match=r"^best\.pt: .*do not fit"):
            evaluation.model_of(changed, "best.pt", CPU)
    with pytest.raises(BadInput, match="do not fit"):
        evaluation.model_of(checkpoint | {"config": {}}, "best.pt", CPU)


def test_picture_shows_two_cases_a_site_with_their_errors(tmp_path, monkeypatch):
    config, sites = a_config(), some_sites()
    write_run(tmp_path, config, sites)
    shown = []
    sheet = evaluation.contact_sheet
    monkeypatch.setattr(evaluation, "contact_sheet",
                        lambda rows, titles: shown.extend(rows) or sheet(rows, titles))
    sites[0].test.append(a_sample("a", "c9"))
    assert evaluation.draw_predictions(tmp_path, sites, config, CPU).width > 6 * 192
    assert [label for label, _ in shown] == ["a: c4, c5", "b: c4, c5"]
    for _, tiles in shown:
        assert len(tiles) == 6 and all(t.dtype == np.uint8 and t.shape == (192, 192, 3) for t in tiles)
        image, truth, both = (t.astype(int) for t in tiles[:3])
        assert ((image != truth).any(2) == (truth == (0, 255, 0)).all(2)).all()
        assert (truth == (0, 255, 0)).all(2).any() and (both == (255, 0, 0)).all(2).any()
    volume = a_sample("v", "c", slices=5)
    volume.truth[2, 2:38, 2:48] = True
    evaluation.draw_predictions(tmp_path, [Site("a", train=[], val=[], test=[volume])], config, CPU)
    assert (shown[-1][1][0] == check_data.image_tile(volume, 2)).all()
    assert evaluation.draw_predictions(tmp_path, [], config, CPU) is None


def run_here(monkeypatch, capsys, module, folder, *arguments):
    """Run a program in this process, in `folder`; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    capsys.readouterr()
    code = 0
    try:
        run_program(module.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture
def program(monkeypatch, capsys):
    """Return run(module, folder, *arguments), see run_here."""
    return partial(run_here, monkeypatch, capsys)


def run_eval(*arguments, folder):
    return subprocess.run([sys.executable, HERE / "eval.py", *map(str, arguments)], cwd=folder,
                          capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A folder with a finished run of two rounds in it, named run."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text("task: nuclei\ndata: demo\nrounds: 2\nimage_size: 32\n"
                                       "width: 4\ndevice: cpu\nout: run\n")
    done = subprocess.run([sys.executable, HERE / "train.py", "--config", "small.yaml"], cwd=folder,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_eval_repeats_trains_numbers(small_run):
    done = run_eval("--run", "run", folder=small_run)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)
    saved = json.loads((small_run / "run" / "result.json").read_text())
    assert list(told) == list(saved)
    for key in ("best", "last", "units", "definitions", "commit", "versions"):
        assert told[key] == saved[key]
    case = run_eval("--run", "run", "test_stats=case", folder=small_run)
    case = json.loads(case.stdout.splitlines()[-1])
    assert case["definitions"]["test_stats"].startswith("case")
    assert case["last"]["test"] != saved["last"]["test"]


@pytest.mark.parametrize("arguments, words", [
    (["--run", "nowhere"], "nowhere: "),
    (["--run", "run", "lr=1"], "lr: is fixed by the run"),
    (["--run", "run", "test_stat=case"], "test_stat: unknown key, the nearest is 'test_stats'"),
    (["--run", "run", "test_stats=none"], "test_stats: "),
    (["--run", "run", "device=cuda:99"], "device: "),
    (["--run", "run", "data=nowhere"], "nowhere: "),
    ([], "command line: ")])
def test_bad_arguments_of_eval(small_run, program, arguments, words):
    code, out, err = program(evaluation, small_run, *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .+\n", err) and err.startswith(f"error: {words}")


def test_half_a_run_and_an_edited_one(small_run, tmp_path, program):
    for name in ("config.yaml", "splits.json", "last.pt"):
        (tmp_path / name).write_bytes((small_run / "run" / name).read_bytes())
    code, _, err = program(evaluation, small_run, "--run", tmp_path)
    assert code == 2 and err.startswith(f"error: {tmp_path / 'best.pt'}: ")
    assert "resume=true" in err
    (tmp_path / "best.pt").write_bytes((small_run / "run" / "best.pt").read_bytes())
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("image_size: 32", "image_size: 64"))
    code, _, err = program(evaluation, small_run, "--run", tmp_path)
    assert code == 2 and "image_size (32, now 64)" in err



# ---- The round ----

def tiny_config(data, out, *overrides):
    """Settings of a run of about a second."""
    return load_config({"task": "nuclei", "data": str(data), "out": str(out), "rounds": 2, "width": 2,
                        "image_size": 32, "batch_size": 2, "device": "cpu"}, overrides)


def first_state(config):
    """The network, its sites, and the global weights before round 1."""
    model = build_model(config)
    return model, load_sites(config), {k: v.clone() for k, v in model.state_dict().items()}


def test_fedavg_is_the_loop_with_two_switches_off(tmp_path):
    """No heads, no prototypes, nothing computed for them; and the average is that of literal SGD."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "fsr=none", "prototype_weight=0",
                         "weights=samples")
    model, sites, w = first_state(config)
    assert not any(name.startswith(("fsr", "fusion")) for name in w)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("aligned_pixels", "keep_rows", "add_class_sums", "alignment_loss"):
            patch.setattr(federated, name, lambda *_: pytest.fail("computed for prototypes"))
        found, G, updates = federated.federated_round(model, sites, w, {}, {}, 1, config)
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


def test_weights_follow_the_number_of_training_images(tmp_path):
    folder = write_nuclei(tmp_path / "d", ("a",))
    write_nuclei(tmp_path / "e", ("b",), cases=10)
    (tmp_path / "e" / "b").rename(folder / "b")
    results = {}
    for kind, share in (("samples", (3 / 9, 6 / 9)), ("equal", (1 / 2, 1 / 2))):
        config = tiny_config(folder, "unused", f"weights={kind}")
        model, sites, w = first_state(config)
        w, _, updates = federated.federated_round(model, sites, w, {}, {}, 1, config)
        assert [update.n for update in updates] == [3, 6]
        results[kind] = w["head.weight"]
        torch.testing.assert_close(w["head.weight"], share[0] * updates[0].weights["head.weight"]
                                   + share[1] * updates[1].weights["head.weight"])
    assert not torch.equal(results["samples"], results["equal"])


def test_objective_terms(tmp_path):
    """L = L_dice + mu (L_contra + L_consis) + fedprox_mu / 2 |w_m - w|^2."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "prototype_weight=0.5",
                         "fedprox_mu=0.2")
    model, sites, w = first_state(config)
    G = federated.federated_round(model, sites, w, {}, {}, 1, config)[1]
    x, y = next(batches(sites[0].train_slices, 2, seeded(0)))
    once, half = (federated.site_losses(model, x, y, G, SimpleNamespace(
        **vars(config) | {"prototype_weight": mu})) for mu in (1.0, 0.5))
    assert half["dice"] == once["dice"]
    for name in ("contrast", "consistency"):  # terms are as they enter L: mu is in them
        assert half[name].item() == pytest.approx(0.5 * once[name].item()) and half[name] > 0
    w = {name: value - 0.1 for name, value in model.state_dict().items()}
    terms = dict(zip(("dice", "contrast", "consistency"), torch.tensor([1.0, 2.0, 4.0])))
    n = sum(p.numel() for p in model.parameters())
    found = federated.objective(terms, model, w, config).item()
    assert found == pytest.approx(1 + 2 + 4 + 0.1 * n * 0.01, rel=1e-4)
    off = tiny_config("unused", "unused")
    assert federated.objective(terms, model, w, off).item() == 7


def test_local_prototypes_come_from_the_last_local_epoch(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "local_epochs=3")
    model, sites, w = first_state(config)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federated, "add_class_sums", lambda total, maps, *_: calls.append(len(maps)))
        steps = []
        federated.local_update(model, sites[0], w, {}, None, 1, config,
                               lambda site, step, total: steps.append((step, total)))
    assert len(calls) == 2 and steps == [(i, 6) for i in range(1, 7)]


def test_a_site_sends_no_statistics_and_no_data(tmp_path):
    """What leaves a site: trained parameters, 2 classes x 2 paths of prototypes, counts, losses."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused")
    model, sites, w = first_state(config)
    names = {name for name, _ in model.named_parameters()}
    G = {}
    for t in (1, 2):
        w, G, updates = federated.federated_round(model, sites, w, G, {}, t, config)
        for update in updates:
            assert update.weights.keys() == names
            assert {p: sorted(c) for p, c in update.prototypes.items()} == {
                p: [0, 1] for p in PATHS}
            assert all(v.shape == (3 * 16,) for c in update.prototypes.values() for v in c.values())
            assert set(update.losses) == {"dice", "contrast", "consistency"}
            assert (update.losses["contrast"] > 0) == (t == 2)  # no L_MP without global prototypes
    assert w.keys() == names


@pytest.mark.parametrize("width, levels", [(1, [2]), (3, [0, 2]), (2, [1])])
def test_any_width_and_levels_train(tmp_path, width, levels):
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", f"width={width}", f"levels={levels}")
    model, sites, w = first_state(config)
    G = {}
    for t in (1, 2):
        w, G, updates = federated.federated_round(model, sites, w, G, {}, t, config)
    assert {g.shape[1] for path in PATHS for g in G[path].values()} == {8 * width * len(levels)}
    assert all(update.losses["contrast"] > 0 for update in updates)


def test_server_work_for_a_hundred_sites_is_under_a_second():
    torch.manual_seed(0)
    weights = [UNet(8).state_dict()] * 100
    vectors = [{path: {j: torch.randn(768) for j in (0, 1)} for path in PATHS} for _ in range(100)]
    start = time.perf_counter()
    federated.average_weights(weights, list(range(1, 101)))
    federated.aggregate_prototypes(vectors)
    assert time.perf_counter() - start < 1


def test_optimizer_state_stays_at_its_site(tmp_path):
    """Adam counts on over the rounds, for each site its own steps; only the weights come anew."""
    config = tiny_config(write_nuclei(tmp_path / "d"), "unused", "optimizer=adam", "lr=1e-3")
    model, sites, w = first_state(config)
    optimizers, G = {}, {}
    for t in (1, 2):
        before = optimizers.copy()
        w, G, updates = federated.federated_round(model, sites, w, G, optimizers, t, config)
        assert [optimizers[u.site]["state"][0]["step"].item() for u in updates] == [2 * t, 2 * t]
        assert all(optimizers[site] is not before.get(site) for site in optimizers)
    a, b = (optimizers[site]["state"][0]["exp_avg"] for site in "ab")
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
    ("raises", "the disk has gone"), ("nan weight", "not finite"), ("weight shape", "name or shape"),
    ("weight missing", "name or shape"), ("inf prototype", "not finite"),
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
        alone = federated.federated_round(model, [sites[0], sites[2]], w, {}, {}, 1, config)
        monkeypatch.setattr(federated, "local_update", update)
        if skip:
            optimizers = {}
            found = federated.federated_round(model, sites, w, {}, optimizers, 1, config)
            assert_same(found[0], alone[0])
            assert_same(found[1], alone[1])
            assert [u.site for u in found[2]] == ["a", "c"] and set(optimizers) == {"a", "c"}
            said = capsys.readouterr().err
            assert "site b failed in round 1" in said and words in said and "left out" in said
            config.min_sites = 3
            with pytest.raises(federated.SiteFailed, match="2 sites are left in round 1, min_sites: 3"):
                federated.federated_round(model, sites, w, {}, {}, 1, config)
        else:
            with pytest.raises(RuntimeError if how == "raises" else federated.SiteFailed, match=words) as it:
                federated.federated_round(model, sites, w, {}, {}, 1, config)
            assert "site b failed in round 1" in capsys.readouterr().err + str(it.value)
        monkeypatch.setattr(federated, "local_update", honest)


def test_one_site_and_a_class_of_one_site_alone(tmp_path):
    folder = write_nuclei(tmp_path / "d", ("a",))
    config = tiny_config(folder, tmp_path / "run", "rounds=2")
    train.train(config)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["last"]["round"] == 2


# ---- Runs ----

def rows_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_seconds(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_run_folder(tmp_path):
    config = tiny_config(write_nuclei(tmp_path / "d"), tmp_path / "run", "eval_every=2", "rounds=3")
    train.train(config)
    run = tmp_path / "run"
    assert sorted(file.name for file in run.iterdir()) == [
        "best.pt", "config.yaml", "last.pt", "metrics.csv", "predictions.png", "result.json",
        "splits.json"]
    assert vars(load_config(run / "config.yaml")) == vars(config)
    rows = rows_of(run)
    assert (run / "metrics.csv").read_text().splitlines()[0] == (
        "round,split,site,dice,loss_dice,loss_contrast,loss_consistency,seconds,weight_bytes,"
        "prototype_bytes")
    order = [(row["round"], row["split"], row["site"]) for row in rows]
    assert order == [("1", "train", "a"), ("1", "train", "b"), ("2", "train", "a"), ("2", "train", "b"),
                     ("2", "val", "a"), ("2", "val", "b"), ("3", "train", "a"), ("3", "train", "b"),
                     ("3", "val", "a"), ("3", "val", "b")]
    n = sum(p.numel() for p in build_model(config).parameters())
    assert {row["weight_bytes"] for row in rows if row["split"] == "train"} == {str(4 * n)}
    assert {row["prototype_bytes"] for row in rows if row["split"] == "train"} == {str(4 * 4 * 48)}
    assert rows[0]["dice"] == rows[4]["loss_dice"] == rows[4]["weight_bytes"] == "null"
    splits = json.loads((run / "splits.json").read_text())
    assert [[len(cases) for cases in split.values()] for split in splits.values()] == [[3, 1, 1]] * 2
    result = json.loads((run / "result.json").read_text())
    assert result["last"]["round"] == 3 and result["best"]["round"] in (2, 3)
    scores = {row["round"]: float(row["dice"]) for row in rows if row["split"] == "val"
              and row["site"] == "a"}
    assert result["last"]["val"]["sites"]["a"]["dice"] == pytest.approx(scores["3"])


def test_best_round_is_that_of_the_best_validation():
    state, kept = {"best": {"round": 0, "dice": None}}, []
    for t, dice in enumerate([0.1, 0.5, None, 0.4, 0.5, 0.6], 1):
        scores = {} if dice is None else {"mean": {"dice": dice}}
        state["round"] = t
        kept.append(train.note_best(state, scores))
    assert kept == [True, True, False, False, False, True]
    assert state["best"] == {"round": 6, "dice": 0.6}
    alone = {"round": 4, "best": {"round": 3, "dice": None}}
    assert train.note_best(alone, {"mean": {"dice": None}})  # nobody validates: the last round


def test_every_config_key_is_read(tmp_path):
    """Every key is looked up as an attribute somewhere in a run of either task."""
    seen = set()

    class Recorder(SimpleNamespace):
        def __getattribute__(self, name):
            seen.add(name)
            return super().__getattribute__(name)

    for task, write in (("nuclei", write_nuclei), ("prostate", write_prostate)):
        config = tiny_config(write(tmp_path / task), tmp_path / f"run_{task}", f"task={task}", "rounds=2",
                             "folds=3")
        train.train(Recorder(**vars(config)))
    for method in PRESETS:
        config = tiny_config(tmp_path / "nuclei", tmp_path / method, f"method={method}")
        train.train(Recorder(**vars(config)))
    assert set(KEYS) - seen == set()


def start_training(folder, *overrides):
    command = [sys.executable, HERE / "train.py", "--config", "c.yaml", *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    """Wait for a process and return (exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=170)
    return process.returncode, out, err


@pytest.fixture
def workplace(tmp_path):
    """A folder with data/ and a config of a short run in it."""
    write_nuclei(tmp_path / "data")
    config = tiny_config("data", "run", "optimizer=adam", "lr=1e-3", "rounds=5", "local_epochs=2")
    (tmp_path / "c.yaml").write_text(as_yaml(config))
    return tmp_path


def test_killed_and_resumed_equals_uninterrupted(workplace):
    whole = start_training(workplace, "out=whole")
    killed = start_training(workplace, "resume=true")
    for line in killed.stdout:
        if line.startswith("    2"):
            break
    time.sleep(0.05)  # somewhere in round 3
    killed.kill()
    finished(killed)
    assert not (workplace / "run" / "result.json").exists()
    code, out, err = finished(start_training(workplace, "resume=true"))
    assert code == 0 and "resuming after round" in out, err
    assert finished(whole)[0] == 0
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(workplace / run / name) for run in ("whole", "run"))
        assert a["round"] == b["round"]
        for key in ("weights", "statistics", "prototypes", "optimizers"):
            assert_same(a.get(key), b.get(key))
    a, b = (rows_of(workplace / run) for run in ("whole", "run"))
    assert without_seconds(a) == without_seconds(b)
    a, b = (json.loads((workplace / run / "result.json").read_text()) for run in ("whole", "run"))
    assert a["best"] == b["best"] and a["last"] == b["last"]


def assert_same(a, b):
    """Equal to the bit, through nested dictionaries and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (dict, list)):
        assert len(a) == len(b) and (isinstance(a, list) or list(a) == list(b))
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same(a[key], b[key])
    else:
        assert a == b


def test_training_repeats_to_the_bit(tmp_path):
    states = []
    for run, seed in (("one", 0), ("two", 0), ("other", 1)):
        config = tiny_config(tmp_path / "d", tmp_path / run, f"seed={seed}")
        if run == "one":
            write_nuclei(tmp_path / "d")
        train.train(config)
        states.append(load_checkpoint(tmp_path / run / "last.pt")["weights"])
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_resume_rules(workplace, program):
    """No silent overwrite; only rounds, out, device and resume may change; more rounds go on."""
    def run(*overrides):
        return program(train, workplace, "--config", "c.yaml", "optimizer=sgd", "local_epochs=1",
                       *overrides)

    assert run("rounds=1", "resume=true")[0] == 0  # without a checkpoint it starts at round 1
    code, out, err = run("rounds=1")
    assert (code, out) == (2, "") and "resume=true" in err and "out=FOLDER" in err
    code, _, err = run("rounds=1", "resume=true", "tau=0.3", "width=3")
    assert code == 2 and "tau (0.1, now 0.3)" in err and "width (2, now 3)" in err
    code, out, err = run("rounds=2", "resume=true")
    assert code == 0 and "resuming after round 1" in out, err
    assert [row["round"] for row in rows_of(workplace / "run") if row["split"] == "train"] == list("1122")
    code, _, err = run("rounds=1", "resume=true")
    assert code == 2 and err.startswith("error: rounds: ")
    extra = workplace / "data" / "a" / "images" / "9.png"
    extra.write_bytes((extra.parent / "0.png").read_bytes())
    (workplace / "data" / "a" / "masks" / "9.png").write_bytes(
        (workplace / "data" / "a" / "masks" / "0.png").read_bytes())
    code, _, err = run("rounds=3", "resume=true")
    assert code == 2 and "splits.json" in err
    for kind in ("images", "masks"):
        (workplace / "data" / "a" / kind / "9.png").unlink()
    for broken in (b"", (workplace / "run" / "best.pt").read_bytes(), b"x" * 1000):
        (workplace / "run" / "last.pt").write_bytes(broken)
        code, _, err = run("rounds=3", "resume=true")
        assert code == 2 and err.startswith("error: run/last.pt: ") and err.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run(workplace, program):
    code, _, err = program(train, workplace, "--config", "c.yaml", "lr=1e30", "optimizer=sgd")
    assert code == 3 and re.match(r"error: .*site a, round 1, step 2", err) and err.count("\n") == 1
    assert not (workplace / "run" / "last.pt").exists()


def test_divergence_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = tiny_config(write_nuclei(tmp_path / "d"), tmp_path / "run", "rounds=3")
    original = federated.site_losses

    def poisoned(model, x, y, G, *rest):
        terms = original(model, x, y, G, *rest)
        return terms | {"dice": terms["dice"] * math.inf} if G else terms  # from round 2 on

    monkeypatch.setattr(federated, "site_losses", poisoned)
    with pytest.raises(federated.Diverged, match="site a, round 2, step 1"):
        train.train(config)
    saved = load_checkpoint(tmp_path / "run" / "last.pt")
    assert saved["round"] == 1
    assert all(torch.isfinite(value).all() for value in saved["weights"].values())


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    train.save(file, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match="last.pt: .*No space left"):
            def full(*_):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(train.os, name, full)
            train.save(file, b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["last.pt"] and file.read_bytes() == b"old"


@pytest.mark.parametrize("optimizer, fsr", [("adam", "global"), ("sgd", "adaptive")])
def test_a_small_run_learns(tmp_path, monkeypatch, optimizer, fsr):
    """Generated sites, 10 rounds at 64 pixels: test Dice of the mean site at least 0.60."""
    monkeypatch.chdir(tmp_path)
    lr = {"adam": "3e-3", "sgd": "0.05"}[optimizer]
    config = load_config({"task": "nuclei", "data": "demo", "out": "run", "device": "cpu"}, [
        "image_size=64", "width=6", "rounds=10", "eval_every=5", f"optimizer={optimizer}", f"lr={lr}",
        f"fsr={fsr}"])
    train.train(config)
    result = json.loads(Path("run/result.json").read_text())
    assert result["best"]["test"]["mean"]["dice"] > 0.60


# ---- Settings and messages ----

@pytest.mark.parametrize("override, words", [
    ("tau=0", "tau: .*above 0"), ("tau=-1", "tau: .*above 0"), ("rounds=0", "rounds: .*at least 1"),
    ("image_size=40", "image_size: .*multiple of 16"), ("image_size=16", "image_size: .*at least 32"),
    ("learning_rate=1", "learning_rate: unknown key, the nearest is '"), ("taus=1", "taus: .*'tau'"),
    ("lr=fast", "lr: expected a number"), ("lr=nan", "lr: "), ("lr=true", "lr: "), ("seed=1.5", "seed: "),
    ("resume=1", "resume: expected true or false"), ("fsr=adaptative", "fsr: expected none or global"),
    ("levels=[]", "levels: "), ("levels=[0,3]", "levels: "), ("levels=[1,1]", "levels: "),
    ("levels=0", "levels: "), ("case_pattern=tnbc_.+", "case_pattern: .*group 1"),
    ("case_pattern=(", "case_pattern: .*regular expression"), ("amp=fp16", "amp: .*or none"),
    ("folds=2", "folds: "), ("device=gpu", "device: "), ("width", "width: not of the form key=value"),
    ("seed=2020-13-45", "seed: "), ("seed=9999999999999999999999", "seed: "), ("lr=1" + "0" * 400, "lr: "),
    ("eval_slices=foreground", "eval_slices: "), ("data=", "data: "),
])
def test_bad_settings(override, words):
    with pytest.raises(BadInput, match=f"^{words}"):
        config = tiny_config("unused", "unused", override)
        load_sites(config)


def test_settings_are_typed_and_written_back(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("task: nuclei\ndata: demo\nlr: 1e-3\nfolds: none\n")
    config = load_config(file, ["weight_decay=1e-4", "levels=[2, 0]", "case_pattern=^([a-z]+)_"])
    assert config.lr == 1e-3 and config.weight_decay == 1e-4 and config.levels == [0, 2]
    assert config.folds is None and config.case_pattern == "^([a-z]+)_"
    assert config.out == str(Path("runs") / "my")
    file.write_text(as_yaml(config))
    assert vars(load_config(file)) == vars(config)


@pytest.mark.parametrize("text, words", [
    ("data: demo", "task: missing"), ("- a", "c.yaml: holds no"), ("a: [", "c.yaml: is not YAML"),
    ("task: nuclei\ndata: demo\nfolds: 5\nfold: 5", "fold: "), ("task: nuclei\ndata: null", "data: "),
    ("task: nuclei\ndata: nowhere", "nowhere: "), ("task: nuclei\ndata: c.yaml", "c.yaml: "),
])
def test_messages_of_train_are_one_line(tmp_path, program, text, words):
    (tmp_path / "c.yaml").write_text(text)
    code, out, err = program(train, tmp_path, "--config", "c.yaml")
    assert (code, out) == (2, "") and re.fullmatch(rf"error: {words}.*\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]  # nothing half-written


def test_a_folder_that_is_no_run_is_left_alone(workplace, program):
    before = (workplace / "c.yaml").read_text()
    (workplace / "config.yaml").write_text("precious")
    code, _, err = program(train, workplace, "--config", "c.yaml", "out=.", "resume=true")
    assert code == 2 and err.startswith("error: .: is no run folder")
    assert (workplace / "config.yaml").read_text() == "precious"
    assert (workplace / "c.yaml").read_text() == before
    code, _, err = program(train, workplace, "--config", "c.yaml", "out=" + 300 * "x")
    assert code == 2 and err.count("\n") == 1 and "too long" in err
    splits = {site: {"test": ["0"]} for site in "ab"}
    (workplace / "splits.json").write_text(json.dumps(splits))
    code, _, err = program(train, workplace, "--config", "c.yaml", "splits=splits.json")
    assert code == 2 and "no site has a training case" in err


def test_a_new_term_stays_out_of_the_columns():
    """A forker's fourth loss term does not shift the columns of metrics.csv."""
    losses = {"dice": 1.0, "mine": 9.0, "contrast": 2.0, "consistency": 3.0}
    update = federated.Update("a", 1, {"w": torch.zeros(2)}, {}, losses, {}, 0.5)
    assert train.history_rows(1, [update], {}) == [(1, "train", "a", None, 1.0, 2.0, 3.0, 0.5, 8, 0)]


def test_unwritable_run_folder(workplace, program):
    (workplace / "file").write_text("")
    code, _, err = program(train, workplace, "--config", "c.yaml", "out=file/run")
    assert code == 2 and err.startswith("error: file/run: cannot be made")


@pytest.mark.parametrize("name", ["config", "nuclei", "prostate"])
def test_shipped_configs(name):
    config = load_config(HERE / ("config.yaml" if name == "config" else f"paper/{name}.yaml"))
    assert config.task == ("prostate" if name == "prostate" else "nuclei")
    assert (config.batch_size, config.local_epochs, config.weight_decay) == (6, 1, 1e-4)
    if name != "config":  # the paper's settings
        assert config.rounds == 400 and config.width == 32 and not config.contrast_clip
        assert (config.optimizer, config.lr, config.tau) == (
            ("sgd", 0.01, 0.005) if name == "nuclei" else ("adam", 1e-4, 0.4))
