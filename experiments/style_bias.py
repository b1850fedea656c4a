"""Does style bias accumulate over layers? How much of the features' variance is that of the sites.

The same generated scenes, rendered in every site's style, go through a trained network, each site's
in batches of their own, as in training. Whatever differs at a pixel of a scene is then style.
"""

from pathlib import Path

import numpy as np
import torch

from config import VOLUMES, load_config
from datasets import load_sites, stack
from sites import scenes

SCENES = 24              # images; of volumes a quarter as many
SPACING = (0.7, 0.7, 3.0)  # mm (x, y, z) of all sites
LEVELS = ("x", "e0", "e1", "e2", "e3", "b", "d3", "d2", "d1", "d0")


def write_scenes(folder, task):
    """Write the same scenes in every generated site's style; noise and thickness are alike too."""
    for site, style in scenes.TASKS[task][0].items():
        style = style._replace(spacing=SPACING) if task in VOLUMES else style
        for case in range(SCENES // 4 if task in VOLUMES else SCENES):
            of_scene, of_style = (np.random.default_rng([kind, case]) for kind in (3, 4))
            name = f"Case{case:02}" if task in VOLUMES else f"{case:02}"
            scenes.write_case(task, folder / site, name, style, of_scene, of_style)


def scene_batches(folder, config):
    """Write the scenes to a folder; return lists of the sites' batches x (B, 3, H, W), all of the same
    scenes. Of volumes they are the slices with organ."""
    write_scenes(Path(folder), config.task)
    own = load_config({"task": config.task, "data": str(folder), "out": "unused",
                       "image_size": config.image_size, "classes": 3 if config.task == "images" else 2})
    sites = load_sites(own, {}, strict=False)  # no case is in a split, so all of them test
    slices = [[(sample, s) for sample in site.test for s, mask in enumerate(sample.masks) if mask.any()]
              for site in sites]
    return [[stack(of_site[i:i + config.batch_size])[0] for of_site in slices]
            for i in range(0, len(slices[0]), config.batch_size)]


def level_maps(model, x):
    """Return {level: (before, after)} its normalisation, maps (B, C, h, w) of one forward pass.

    before: the second convolution of the block; after: batch norm, ReLU and FSR if there is one. For the
    level "x" they are the image, and what a method's `input_transform` makes of it."""
    blocks = {f"e{k}": block for k, block in enumerate(model.encoder)} | {"b": model.bottleneck}
    blocks |= {f"d{k}": block for k, block in enumerate(model.decoder)}
    before = {"x": x}
    hooks = [block[3].register_forward_hook(lambda _, inputs, out, level=level: before.update({level: out}))
             for level, block in blocks.items()]
    _, maps = model.features(x)
    for hook in hooks:
        hook.remove()
    after = {"x": model.input_transform(x), "b": maps["bottleneck"]}
    after |= {f"{path[0]}{k}": z for path in ("encoder", "decoder") for k, z in enumerate(maps[path])}
    return {level: (before[level], after[level]) for level in LEVELS}


class Variance:
    """Between-site over total variance of features at the same pixel, over many scenes.

        R = mean over channels of  sum_p E_i[ Var_m f ] / sum_p Var_{m,i} f

    m: site, i: scene, p: pixel; Var_{m,i} = E_i[Var_m] + Var_i[E_m], style and content. A channel
    that never varies does not count. Source: ours, for the question of the paper's figure 4b."""

    n = sums = 0

    def add(self, f):
        """Take in features (M, B, C, h, w) of the M sites and B scenes."""
        f = f.double()
        self.n += f.shape[1]
        parts = f.var(0, correction=0), f.mean(0), f.square().mean(0)
        self.sums = self.sums + torch.stack([part.sum(0) for part in parts])

    def ratio(self):
        """Return R, in [0, 1]."""
        between, first, second = self.sums / self.n  # (C, h, w) each
        between, total = between.sum((1, 2)), (second - first.square()).sum((1, 2))
        live = total > 1e-9 * total.max()
        return (between[live] / total[live]).mean().item()


@torch.no_grad()
def style_bias(model, batches):
    """Return {level: (R before, R after)} for a network and `scene_batches`; it normalises by its batches."""
    device, found = next(model.parameters()).device, {level: (Variance(), Variance()) for level in LEVELS}
    model.train()
    for sites in batches:
        maps = [level_maps(model, x.to(device, memory_format=torch.channels_last)) for x in sites]
        for level in LEVELS:
            for side, variance in enumerate(found[level]):
                variance.add(torch.stack([of_site[level][side] for of_site in maps]))
    return {level: tuple(v.ratio() for v in pair) for level, pair in found.items()}
