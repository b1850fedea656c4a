"""Ask a finished run why it is as it is: python -m experiments.diagnose --run FOLDER

On training images of each site, with the weights and prototypes after the last round, it prints
  - the share that each term of the loss has in the gradient, and whether the terms agree;
  - the cosines of pixels and prototypes, and which pixels keep a gradient at a tau, with and
    without the clip;
  - what FSR does to its input, and how much of that the next convolution and batch norm leave.
On validation images it prints Dice and the marked over the true area at other thresholds than one half.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from config import load_config
from datasets import load_sites, read_splits, stack
from eval import logits_of, model_of, site_statistics
from experiments.reproduce import TAUS
from federated import Context
from fft_style import EPS
from fused_features import PATHS
from methods.find import find_method
from prototypes import aligned_features, contrastive_loss, cosines
from rounds.checkpoint import load_checkpoint
from rounds.run_folder import check_trust
from scoring.norm_statistics import own_network
from settings.program import Parser, run_program

IMAGES = 12  # of each site, at most
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def print_gradients(model, batches, context, method):
    """Print the norm of each term's gradient on the U-Net's own weights, summed over batches."""
    shared = [p for name, p in model.named_parameters() if not name.startswith("fusion")]
    total = {}
    for x, y in batches:
        for name, term in method.losses(model, x, y, context).items():
            if term.requires_grad:
                parts = torch.autograd.grad(term, shared, retain_graph=True, allow_unused=True,
                                            materialize_grads=True)
                total[name] = total.get(name, 0) + torch.cat([g.flatten() for g in parts])
    norms = {name: g.norm().item() for name, g in total.items()}
    for name, norm in norms.items():
        cosine = torch.cosine_similarity(total[name], total["dice"], dim=0).item()
        print(f"gradient of {name:12}{norm:11.3e}  share {norm / sum(norms.values()):6.1%}  "
              f"cosine with dice {cosine:+.2f}")


def print_cosines(model, batches, G):
    """Print per path the pixels' cosines with the nearest prototype of their own and of other
    classes, and the share of pixels whose contrastive loss has a gradient."""
    found = {path: [] for path in PATHS}
    for x, y in batches:
        with torch.no_grad():
            maps = model.features(x)[1]
            for path, f in aligned_features(y, model.fusion, G).items():
                found[path].append(cosines(f.complete(maps[path]), G[path]))
    for path in PATHS:
        cos, positive = (torch.cat(parts) for parts in zip(*found[path]))
        own = cos.masked_fill(~positive, -1).max(1)[0]
        other = cos.masked_fill(positive, -1).max(1)[0]
        print(f"{path}: cosine with own class {own.mean():.3f}, with others {other.mean():.3f}; "
              f"own is nearer at {(own > other).float().mean():.1%} of the foreground pixels")
        shares = [f"tau {tau}: {live(cos, positive, tau, False):6.1%}, clipped "
                  f"{live(cos, positive, tau, True):6.1%}" for tau in TAUS]
        print("  pixels with a gradient  " + "   ".join(shares))


def live(cos, positive, tau, clip):
    """Return the share of pixels at which tau |d loss / d cos| exceeds 1e-3 for some prototype."""
    cos = cos.clone().requires_grad_()
    contrastive_loss(cos, positive, tau, clip).sum().backward()
    return (tau * cos.grad.abs().max(1)[0] > 1e-3).float().mean().item()


@torch.no_grad()
def print_recalibration(model, batches):
    """Print each FSR layer's weights, its gain's variation, and what is left behind the next norm.

    The next convolution and batch norm can undo an affine map per channel. So the layer is compared
    with the map that has the batch's mean gain and shift per channel instead of each image's own:
    left = |next(FSR) - next(mean map)| / |next(FSR)|, next = pooling, convolution, batch norm.
    """
    rows = {k: [] for k in (1, 2, 3)}
    for x, _ in batches:
        for k in range(4):
            z = model.encoder[k](x)
            x = z
            if k > 0:
                layer = model.fsr[k - 1]
                x = layer(z)
                rows[k].append(effect(model, k, layer, z, x))
            x = functional.max_pool2d(x, 2)
    for k, values in rows.items():
        l_norm, l_org, spread, left = torch.tensor(values).mean(0).tolist()
        print(f"FSR at level {k}: l_norm {l_norm:.2f}, l_org {l_org:.2f}; its gain varies by "
              f"{spread:.1%} between images of a batch; left behind the next norm {left:.1%}")


def effect(model, k, layer, z, out):
    """Return mean l_norm, mean l_org, the gain's relative spread over images, and what is left."""
    l_norm, l_org = (l.expand(*z.shape[:2], 1, 1) for l in layer.weights(z))
    var, mean = torch.var_mean(z, (2, 3), correction=0, keepdim=True)
    gain = l_norm * torch.rsqrt(var + EPS) + l_org
    shift = -l_norm * torch.rsqrt(var + EPS) * mean
    common = layer.scale * (gain.mean(0) * z + shift.mean(0)) + layer.shift
    following = (model.encoder[k + 1] if k < 3 else model.bottleneck)[:2]
    a, b = (following(functional.max_pool2d(maps, 2)) for maps in (out, common))
    live = var.mean(0, keepdim=True) > 1e-4  # channels that are not dead
    spread = (gain.std(0, correction=0) / gain.mean(0))[live[0]].mean()
    left = (a - b).norm() / a.norm()
    return l_norm.mean().item(), l_org.mean().item(), spread.item(), left.item()


def thresholds_of(model, statistics, local, site, config):
    """Return Dice and marked over true area at each threshold of p(foreground), (2, thresholds): the mean
    over the site's validation samples with foreground; None without any."""
    network, found = own_network(model, statistics, local), []
    for sample in (sample for sample in site.val if sample.truth.any()):
        logits = torch.cat(list(logits_of(network, sample, config, torch.device("cpu"))))
        p, truth = 1 - logits.softmax(1)[:, 0].numpy(), sample.truth > 0
        marked = [p > threshold for threshold in THRESHOLDS]
        found.append([[2 * (P & truth).sum() / (P.sum() + truth.sum()) for P in marked],
                      [P.sum() / truth.sum() for P in marked]])
    return np.mean(found, 0) if found else None


def print_thresholds(model, checkpoint, sites, config):
    """Print the mean over sites of `thresholds_of`."""
    local = checkpoint["local"]
    statistics = site_statistics(model, checkpoint["statistics"], local, sites, config, torch.device("cpu"))
    found = [thresholds_of(model, statistics.get(site.name, {}), local.get(site.name, {}), site, config)
             for site in sites]
    dice, marked = np.mean([of_site for of_site in found if of_site is not None], 0)
    print("\nvalidation, mean of sites, foreground where p exceeds a threshold")
    for row in zip(THRESHOLDS, dice, marked):
        print("p > {}  Dice {:.3f}  marked / true {:.2f}".format(*row))


def main():
    """Print what the gradients and features of a run look like, site by site."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder of train.py")
    parser.add_argument("overrides", nargs="*", metavar="trust=true", help="run a method's own file")
    given = parser.parse_intermixed_args()
    folder = Path(given.run).expanduser()
    check_trust(folder, given.overrides)
    config, checkpoint = load_config(folder / "config.yaml"), load_checkpoint(folder / "last.pt")
    model = model_of(checkpoint, folder / "last.pt", torch.device("cpu")).train()
    sites = load_sites(config, read_splits(folder / "splits.json"))
    G, method = checkpoint["prototypes"], find_method(config)
    for site in (site for site in sites if site.train_slices):
        slices, B = site.train_slices[:IMAGES], config.batch_size
        batches = [stack(slices[i:i + B]) for i in range(0, len(slices), B)
                   if len(slices[i:i + B]) > 1 or len(slices) == 1]
        print(f"\n{site.name}")
        memory = checkpoint["kept"][site.name]["memory"]
        context = Context(site.name, checkpoint["round"], checkpoint["weights"], G, memory)
        print_gradients(model, batches, context, method)
        if model.fusion:
            print_cosines(model, batches, G)
        if model.fsr:
            print_recalibration(model, batches)
    if any(sample.truth.any() for site in sites for sample in site.val):
        print_thresholds(model, checkpoint, sites, config)


if __name__ == "__main__":
    run_program(main)
