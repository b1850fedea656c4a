"""Ask a finished run why it is as it is: python -m experiments.diagnose --run FOLDER

On training images of each site, with the weights and prototypes after the last round, it prints
  - the share that each term of the loss has in the gradient, and whether the terms agree;
  - the cosines of pixels and prototypes, and which pixels keep a gradient at a tau, clipped or not;
  - what FSR does to its input, and how much of that the next convolution and norm leave.
On validation images it prints Dice and the marked over the true area at other thresholds than one half.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from datasets import load_sites, stack
from experiments.reproduce import TAUS
from experiments.tour import around_fsr
from federated import Context
from fft_style import EPS
from fused_features import on_grids, squares_and_dots
from methods.find import find_method
from prototypes import columns, contrastive_loss, cosines
from rounds.finished import open_run
from scoring.evaluate import logits_of
from scoring.metrics import overlap_scores
from scoring.norms import network_of
from scoring.trained import load_run
from settings.program import Parser, run_program
from sites.given_splits import read_splits
from unet import PATHS, UNet

CPU = torch.device("cpu")
IMAGES_OF_SITE = 12  # at most
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def print_gradients(model, batches, context, method):
    """Print the norm of each term's gradient on the network's own weights, summed over batches."""
    shared = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("fusion")]
    total = {}
    for x, y in batches:
        for name, term in method.losses(model, x, y, context).items():
            if term.requires_grad:
                parts = torch.autograd.grad(term, shared, retain_graph=True, materialize_grads=True)
                total[name] = total.get(name, 0) + torch.cat([g.flatten() for g in parts])
    norms = {name: g.norm().item() for name, g in total.items()}
    for name, norm in norms.items():
        cosine = torch.cosine_similarity(total[name], total["dice"], dim=0).item()
        print(f"gradient of {name:12}{norm:11.3e}  share {norm / sum(norms.values()):6.1%}  "
              f"cosine with dice {cosine:+.2f}")


@torch.no_grad()
def print_cosines(model, batches, G):
    """Print per path the pixels' cosines with the nearest prototype of their own and of other classes, and
    the share of pixels whose contrastive loss has a gradient."""
    for path in PATHS:
        classes = columns(G[path])
        g = functional.normalize(torch.cat([*G[path].values()]))
        maps = (on_grids(model.features(x)[1], model.fusion, y, model.classes)[path] for x, y in batches)
        cosine = [(cosines(*squares_and_dots(X, W, g)), member) for X, W, member in maps]
        found = {j: torch.cat([cos[:, member[j] > 0] for cos, member in cosine], 1)  # (K, N)
                 for j in classes if j > 0}
        own = torch.cat([cos[classes[j]].amax(0) for j, cos in found.items()])
        other = torch.cat([cos.index_fill(0, torch.arange(len(cos))[classes[j]], -1).amax(0)
                           for j, cos in found.items()])
        print(f"{path}: cosine with own class {own.mean():.3f}, with others {other.mean():.3f}; "
              f"own is nearer at {(own > other).float().mean():.1%} of the foreground pixels")
        shares = [f"tau {tau}: {live(found, classes, tau, False):6.1%}, clipped "
                  f"{live(found, classes, tau, True):6.1%}" for tau in TAUS]
        print("  pixels with a gradient  " + "   ".join(shares))


@torch.enable_grad()
def live(found, classes, tau, clip):
    """Return the share of pixels at which tau |d loss / d cos| exceeds 1e-3 for some prototype."""
    large = []
    for j, cos in found.items():
        cos = cos.clone().requires_grad_()
        contrastive_loss(cos, classes[j], tau, clip).sum().backward()
        large.append(tau * cos.grad.abs().amax(0) > 1e-3)
    return torch.cat(large).float().mean().item()


@torch.no_grad()
def print_recalibration(model, batches):
    """Print each FSR layer's weights, its gain's variation, and what is left behind the next norm.

    The next convolution and batch norm can undo an affine map per channel. So the layer is compared
    with the map that has the batch's mean gain and shift per channel instead of each image's own:
    left = |next(FSR) - next(mean map)| / |next(FSR)|, next = pooling, convolution, batch norm."""
    found = [[effect(model, k, layer, *maps) for k, (layer, maps) in
              enumerate(zip(model.fsr, around_fsr(model, x)), 1)] for x, _ in batches]
    for k, (l_norm, l_org, spread, left) in enumerate(torch.tensor(found).mean(0).tolist(), 1):
        print(f"FSR at level {k}: l_norm {l_norm:.2f}, l_org {l_org:.2f}; its gain varies by "
              f"{spread:.1%} between images of a batch; left behind the next norm {left:.1%}")


def effect(model, k, layer, z, out):
    """Return mean l_norm, mean l_org, the gain's relative spread over images, and what is left; z: maps
    before the layer, out: behind it."""
    l_norm, l_org = layer.weights(z)
    var, mean = torch.var_mean(z, (2, 3), correction=0, keepdim=True)
    gain, shift = l_norm * torch.rsqrt(var + EPS) + l_org, -l_norm * torch.rsqrt(var + EPS) * mean
    common = layer.scale * (gain.mean(0) * z + shift.mean(0)) + layer.shift
    following = (model.encoder[k + 1] if k < 3 else model.bottleneck)[:2]
    a, b = (following(functional.max_pool2d(maps, 2)) for maps in (out, common))
    live = var.mean(0, keepdim=True) > 1e-4  # channels that are not dead
    spread = (gain.std(0, correction=0) / gain.mean(0))[live[0]].mean()
    return l_norm.mean().item(), l_org.mean().item(), spread.item(), ((a - b).norm() / a.norm()).item()


def print_thresholds(model, statistics, local, sites, config):
    """Print Dice and marked over true area at each threshold of p(foreground): the mean over sites of the
    mean over a site's validation samples with foreground."""
    of_sites = []
    for site in sites:
        network = network_of(site.name, model, statistics, local)
        found = []  # (Dice, marked / true) at each threshold of each sample
        for sample in (sample for sample in site.val if sample.truth.any()):
            logits = torch.cat(list(logits_of(network, sample, config, CPU)), 2 if config.tiles else 0)
            p, truth = 1 - logits.softmax(1)[:, 0].numpy(), sample.truth > 0
            areas = [(((p > t) & truth).sum(), (p > t).sum(), truth.sum()) for t in THRESHOLDS]
            found.append([(overlap_scores(*area)["dice"], area[1] / area[2]) for area in areas])
        of_sites += [np.mean(found, 0)] if found else []
    if of_sites:
        print("\nvalidation, mean of sites, foreground where p exceeds a threshold")
        for t, (d, marked) in zip(THRESHOLDS, np.mean(of_sites, 0)):
            print(f"p > {t}  Dice {d:.3f}  marked / true {marked:.2f}")


def main():
    """Print what the gradients and features of a run look like, site by site."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder of train.py")
    parser.add_argument("overrides", nargs="*", metavar="trust=true", help="run a method's own file")
    given = parser.parse_intermixed_args()
    folder = Path(given.run).expanduser()
    config, (checkpoint,) = open_run(folder, ["last"], given.overrides)
    sites = load_sites(config, read_splits(folder / "splits.json"))
    t, model, statistics, local = load_run(folder / "last.pt", sites, config, CPU)
    G, method, B = checkpoint["prototypes"], find_method(config), config.batch_size
    for site in (site for site in sites if site.train_slices):
        slices = site.train_slices[:IMAGES_OF_SITE]
        batches = [stack(slices[i:i + B]) for i in range(0, len(slices), B)
                   if len(slices[i:i + B]) > 1 or len(slices) == 1]
        print(f"\n{site.name}")
        network = network_of(site.name, model, {}, local).train()
        memory = checkpoint["kept"].get(site.name, {"memory": {}})["memory"]  # pooled: no site has its own
        print_gradients(network, batches, Context(site.name, t, checkpoint["weights"], G, memory), method)
        if model.fusion:
            print_cosines(network, batches, G)
        if isinstance(model, UNet) and model.fsr:
            print_recalibration(network, batches)
    print_thresholds(model, statistics, local, sites, config)


if __name__ == "__main__":
    run_program(main)
