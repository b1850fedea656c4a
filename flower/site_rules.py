"""What a site lets the server decide: which keys, how much, and on how few images it trains."""

import shlex
from pathlib import Path

import torch

from config import KEYS, METHODS, BadInput, method_module, read_override, read_yaml
from flower.guards import GUARDS
from flower.own_files import read
from scoring.evaluate import pick_device
from sites.across import GB, free_memory

ROOT = Path(__file__).resolve().parents[1]
NEVER = {"data", "out", "splits", "trust", "case_pattern"}  # files, their names, and which code is trusted
EACH = {"data", "out", "resume", "init", "leave_out"}       # what each place has of its own
OWN = ("data", "out", "splits", "case_pattern", "device")   # keys that a site sets for itself
# The largest values of the server that a site trains with; its node-config may have others, as max_KEY.
LARGEST = {"width": 64, "levels": 5, "image_size": 1024, "batch_size": 64, "local_epochs": 20, "rounds": 2000}
ANSWERS = 3  # to one question about a round: a server that was killed asks again


def check_server(context):
    """Raise BadInput unless all that the server overrides is in the site's `allow`.

    By default that is every key of the config that has to do with training. Those in NEVER are not the
    server's in its config file either; a method's file runs only where the site's own node-config names it."""
    node, run = context.node_config, context.run_config
    file = (ROOT / str(run["config"])).resolve()
    if not file.is_relative_to(ROOT):
        raise BadInput(f"config: {run['config']} lies outside of the bundle")
    changed = dict(map(read_override, shlex.split(str(run["overrides"]))))
    given = read_yaml(file) | changed
    method = given.get("method", "fedbcs")
    if method not in METHODS and method != node.get("method"):
        raise BadInput(f"method: the server wants to run the code of {str(method)[:80]!r}; "
                       "this site runs a file only if its own node-config has that as method")
    known = set(KEYS) | set(GUARDS) | set(getattr(method_module(method)[0], "SETTINGS", {}))
    permitted = set(str(node["allow"]).replace(",", " ").split()) if "allow" in node else known
    for key in sorted((key for key in given if key not in EACH), key=lambda key: key not in NEVER):
        if key in NEVER or key not in known or key in changed and key not in permitted:
            raise BadInput(f"{str(key)[:80]}: is set by the server and this site does not allow it; "
                           "see allow in flower/README.md")


def check_bounds(config, node):
    """Raise BadInput if the server wants more than the site's LARGEST, or than there is memory for."""
    for key, largest in LARGEST.items():
        wanted, most = getattr(config, key), int(node.get(f"max_{key}", largest))
        if (len(wanted) if key == "levels" else wanted) > most:
            raise BadInput(f"{key}: the server wants {wanted}, this site's max_{key} is {most}")
    need = 96 * config.batch_size * config.image_size**2 * config.width  # measured: 26 maps of float32, and
    need += 32000 * config.width**2 * (9 if config.optimizer == "adam" else 5)  # so many times the weights
    device = pick_device(config)
    free = (free_memory() or need) if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    if need > free:
        raise BadInput(f"batch_size: a training step takes more than {need / GB:.2f} GB, {free / GB:.2f} GB "
                       "are free; close other programs, or lower max_batch_size, max_image_size or max_width")


def count_answer(question, t, config, node):
    """Return what the site kept, with one more answer to a question about round t counted in `answered`.
    Raises BadInput for a round of no run, or too many answers."""
    kept, most = read(Path(config.out) / "kept.pt"), int(node.get("max_answers", ANSWERS))
    answered = kept.get("answered", {})
    times = answered.get(f"{question} {t}", 0)
    if not 1 <= t <= config.rounds or times >= most:
        raise BadInput(f"round {t}: the run has {config.rounds} rounds and this site has answered the "
                       f"{question} of this one {times} times, its max_answers is {most}; ask those who run "
                       "the server why")
    return kept | {"answered": answered | {f"{question} {t}": times + 1}}


def check_images(site, node):
    """Raise BadInput for fewer training images than `min_images`, 2 unless the node-config says otherwise: an
    update of one image can be inverted to that image."""
    least = int(node.get("min_images", 2))
    tiled = any(sample.tile for sample in site.train)  # tiles of one image are one image
    number = len(site.train if tiled else site.train_slices)
    if 0 < number < least:
        raise BadInput(f"min_images: this site has {number} training images, fewer than {least}")
