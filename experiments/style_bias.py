"""Does style bias accumulate over layers? How much of the features' variance is that of the sites.

The same generated scenes, rendered in every site's style, go through a trained network, each site's
in batches of their own, as in training. Whatever differs at a pixel of a scene is then style.
"""

import os
from pathlib import Path

import numpy as np
import torch

from config import VOLUMES, load_config
from datasets import load_sites, stack
from fused_features import PATHS
from sites import scenes
from sites.layouts import list_files

SCENES = 24              # images; of volumes a quarter as many
SPACING = (0.7, 0.7, 3.0)  # mm (x, y, z) of all sites
LEVELS = ("x", "e0", "e1", "e2", "e3", "b", "d3", "d2", "d1", "d0")


def write_scenes(folder, task):
    """Write the same scenes in every generated site's style; noise and thickness are alike too."""
    styles = scenes.PROSTATE if task in VOLUMES else scenes.DISCS if task == "images" else scenes.NUCLEI
    for site, style in styles.items():
        for case in range(SCENES // 4 if task in VOLUMES else SCENES):
            of_scene, of_style = (np.random.default_rng([kind, case]) for kind in (3, 4))
            if task in VOLUMES:
                scene, mask = scenes.prostate_scene(of_scene, SPACING)
                volume = scenes.render_prostate(scene, style, of_style)
                scenes.save_prostate(folder / site, f"Case{case:02}", volume, mask, SPACING)
            elif task == "images":
                scene, labels = scenes.disc_scene(of_scene)
                image = scenes.render_disc(scene, style, of_style)
                scenes.save_image(folder / site, f"{case:02}", image, labels)
            else:
                scene = scenes.nuclei_scene(of_scene)
                image = scenes.render_nuclei(scene, style, of_style)
                scenes.save_image(folder / site, f"{case:02}", image, np.uint8(255) * (scene[0] > 0))


def scene_batches(folder, config):
    """Yield tuples of the sites' batches x (B, 3, H, W), all of the same scenes.

    folder: where the scenes are, written if there are none. Of volumes, the slices with organ.
    """
    folder = Path(folder)
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        write_scenes(part, config.task)
        part.rename(folder)  # what is there is whole
    own = load_config({"task": config.task, "data": str(folder), "out": "unused",
                       "image_size": config.image_size})
    entries, _ = list_files(folder, config.task)
    all_test = {site: {"test": [entry.case for entry in entries[site]]} for site in entries}
    slices = [[(sample, s) for sample in site.test for s, mask in enumerate(sample.masks)
               if mask.any()] for site in load_sites(own, all_test)]
    for i in range(0, len(slices[0]), config.batch_size):
        yield [stack(part[i:i + config.batch_size])[0] for part in slices]


def level_maps(model, x):
    """Return {level: (before, after)} its normalisation, maps (B, C, h, w) of one forward pass.

    before: the second convolution of the block; after: batch norm, ReLU and FSR if there is one.
    For the level "x": the image, and what a method's `input_transform` makes of it.
    """
    blocks = {f"e{k}": block for k, block in enumerate(model.encoder)} | {"b": model.bottleneck}
    blocks |= {f"d{k}": block for k, block in enumerate(model.decoder)}
    before, after, hooks = {"x": x}, {"x": model.input_transform(x)}, []
    for level, block in blocks.items():
        for store, module in ((before, block[3]), (after, block)):
            def keep(module, inputs, out, store=store, level=level):
                store[level] = out
            hooks.append(module.register_forward_hook(keep))
    _, maps = model.features(x)
    for hook in hooks:
        hook.remove()
    after |= {f"{path[0]}{k}": z for path in PATHS for k, z in enumerate(maps[path])}
    return {level: (before[level], after[level]) for level in LEVELS}


class Variance:
    """Between-site over total variance of features at the same pixel, over many scenes.

        R = mean over channels of  sum_p E_i[ Var_m f ] / sum_p Var_{m,i} f

    m: site, i: scene, p: pixel; Var_{m,i} = E_i[Var_m] + Var_i[E_m], style and content. A channel
    that never varies does not count. Source: ours, for the question of the paper's figure 4b.
    """

    def __init__(self):
        self.n, self.between, self.first, self.second = 0, 0, 0, 0

    def add(self, f):
        """Take in features (M, B, C, h, w) of the M sites and B scenes."""
        f = f.double()
        self.n += f.shape[1]
        self.between = self.between + f.var(0, correction=0).sum(0)
        self.first = self.first + f.mean(0).sum(0)
        self.second = self.second + f.square().mean(0).sum(0)

    def ratio(self):
        """Return R, in [0, 1]."""
        total = (self.second / self.n - (self.first / self.n).square()).sum((1, 2))
        between = (self.between / self.n).sum((1, 2))
        live = total > 1e-9 * total.max()
        return (between[live] / total[live]).mean().item()


@torch.no_grad()
def style_bias(model, batches):
    """Return {level: (R before, R after)} for a network, which normalises by its batches.

    batches: from `scene_batches`.
    """
    device, found = next(model.parameters()).device, {level: (Variance(), Variance()) for level in LEVELS}
    model.train()
    for sites in batches:
        maps = [level_maps(model, x.to(device, memory_format=torch.channels_last)) for x in sites]
        for level in LEVELS:
            for side, variance in enumerate(found[level]):
                variance.add(torch.stack([of_site[level][side] for of_site in maps]))
    return {level: tuple(v.ratio() for v in pair) for level, pair in found.items()}
