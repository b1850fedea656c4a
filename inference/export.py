"""A trained network as one file that runs without this project."""

import json
import warnings

import torch

from config import VOLUMES, BadInput, class_name
from rounds.checkpoint import save


def export_network(network, target, config, statistics):
    """Write a network, its statistics baked in, as a file of `torch.export`.

    torch.export.load(FILE).module()(x) gives logits (B, C, S, S) of x (B, 3, S, S), S = `image_size`, for
    any B. With statistics of each case a batch is one case, an image or the slices of one volume, for the
    statistics of several would be mixed. `about.json` in the file says so.
    """
    of_case = statistics == "of each case itself"
    one = of_case and config.task not in VOLUMES
    of_volume = "the slices of one volume, at most 32 at a time" if of_case else "any"
    batch = "1: one image at a time" if one else of_volume
    x = torch.zeros(1 if one else 2, 3, config.image_size, config.image_size,
                    device=next(network.parameters()).device)
    shapes = None if one else ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (x,), dynamic_shapes=shapes)
    about = {"input": "float32 (B, 3, S, S), scaled to [0, 1] and resized as the run's images were",
             "S": config.image_size, "B": batch, "task": config.task,
             "output": f"logits (B, {config.classes}, S, S), class 0 is background",
             "classes": [class_name(config, j) for j in range(config.classes)], "statistics": statistics}
    part = target.with_name(f".{target.name}.part.pt2")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's own, on how it packs weights
            torch.export.save(program, part, extra_files={"about.json": json.dumps(about, indent=1)})
        content = part.read_bytes()
    except OSError as problem:
        raise BadInput(f"{target}: cannot be written ({problem.strerror}), "
                       "give another export=FILE") from None
    finally:
        part.unlink(missing_ok=True)
    save(target, content)
