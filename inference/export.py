"""A trained network as one file that runs without this project."""

import io
import json
import warnings

import torch
from torch import nn
from torch.nn import functional

from config import VOLUMES, BadInput, class_name
from rounds.checkpoint import save
from scoring.norms import one_by_one

OF_CASE = "of each image itself"  # what `inference.inputs.choose` calls them
IMAGES = ("float32 (B, 3, H, W), images of any size and range of values, grey ones three times; each is "
          "scaled to [0, 1] by its minimum and maximum here")
SLICES = ("float32 (B, 3, H, W), slices of any size, each with the one below and above as channels, at an "
          "end the last one twice; the volume clipped at its 99 % quantile and scaled to [0, 1] by its "
          "minimum and maximum")
TILES = ("float32 (B, 3, H, W), H and W multiples of 16, cut out of pictures at their own size that were "
         "scaled to [0, 1] by their minimum and maximum; predict.py averages overlapping tiles of S x S")


class AsPredicted(nn.Module):
    """A network with what predict.py does around it: x (B, 3, H, W) -> logits (B, C, H, W). Images are scaled
    to [0, 1] one by one, volumes before they are cut into slices. Both are resized to S x S, S = `size`, and
    the logits to the size that x had."""

    def __init__(self, network, size, scaled):
        super().__init__()
        self.network, self.size, self.scaled = network, size, scaled

    def forward(self, x):
        z = x
        if self.scaled:
            low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
            z = (x - low) / (high - low).clamp_min(1e-30)
        z = functional.interpolate(z, (self.size, self.size), mode="bilinear", antialias=True).clamp(0, 1)
        return functional.interpolate(self.network(z), x.shape[2:], mode="bilinear")


def export_network(network, target, config, statistics):
    """Write a network, its statistics and the scaling of its inputs baked in, as a file of `torch.export`:
    torch.export.load(FILE).module() is `AsPredicted`, for any B, H and W. Only slices of a volume that are
    normalised by themselves have to be those of one volume. `about.json` in the file says so. Raises
    BadInput."""
    volumes, of_case, C, S = config.task in VOLUMES, statistics == OF_CASE, config.classes, config.image_size
    if config.tiles and of_case:
        raise BadInput("site: with tiles the statistics of a case are those of many tiles, which an exported "
                       "network does not see; name a site of a run with test_stats: site")
    network = one_by_one(network) if of_case and not volumes else network
    whole = network if config.tiles else AsPredicted(network, S, not volumes)
    about = {"input": TILES if config.tiles else SLICES if volumes else IMAGES,
             "B": "the slices of one volume, at most 32 at a time" if of_case and volumes else "any",
             "S": S, "task": config.task, "output": f"logits (B, {C}, H, W), class 0 is background",
             "classes": [class_name(config, j) for j in range(C)], "statistics": statistics}
    x, content = torch.zeros(2, 3, S, S + 16, device=next(network.parameters()).device), io.BytesIO()
    B, H, W = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    any_of = {0: B, 2: 16 * H, 3: 16 * W} if config.tiles else {0: B, 2: H, 3: W}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, on how it packs weights
            program = torch.export.export(whole.eval(), (x,), dynamic_shapes=(any_of,))
            torch.export.save(program, content, extra_files={"about.json": json.dumps(about, indent=1)})
    except (RuntimeError, TypeError, ValueError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise BadInput(f"export: torch cannot export the network of this run ({reason}), "
                       "change the network") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    save(target, content.getvalue())
