"""A trained network as one file that runs without this project."""

import io
import json
import warnings

import torch

from config import VOLUMES, class_name
from rounds.checkpoint import save


def export_network(network, target, config, statistics):
    """Write a network, its statistics baked in, as a file of `torch.export`.

    torch.export.load(FILE).module()(x) gives logits (B, C, S, S) of x (B, 3, S, S), S = `image_size`, for
    any B. With statistics of each case a batch is one case, an image or the slices of one volume, for the
    statistics of several would be mixed. `about.json` in the file says so."""
    batch = "any"
    if statistics == "of each case itself":
        batch = "the slices of one volume, at most 32 at a time" if config.task in VOLUMES \
            else "1: one image at a time"
    one, S = batch.startswith("1"), config.image_size
    x = torch.zeros(1 if one else 2, 3, S, S, device=next(network.parameters()).device)
    program = torch.export.export(network, (x,),
                                  dynamic_shapes=None if one else ({0: torch.export.Dim("batch")},))
    about = {"input": "float32 (B, 3, S, S), scaled to [0, 1] and " + (
                 "cut out at its own size; predict.py averages overlapping tiles" if config.tiles else
                 "resized as the run's images were"),
             "S": S, "B": batch, "task": config.task,
             "output": f"logits (B, {config.classes}, S, S), class 0 is background",
             "classes": [class_name(config, j) for j in range(config.classes)], "statistics": statistics}
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, on how it packs weights
        torch.export.save(program, content, extra_files={"about.json": json.dumps(about, indent=1)})
    target.parent.mkdir(parents=True, exist_ok=True)
    save(target, content.getvalue())
