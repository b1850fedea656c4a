"""The result of a run: its tables, its images, what its numbers mean, and the machine they were found on."""

import csv
import io
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from config import VOLUMES, class_name
from scoring.metrics import in_mean

MEASURED = ("dice", "precision", "recall", "hd95", "assd", "miss")
CASE_COLUMNS = ("kind", "split", "site", "case", "file", "class", *MEASURED, "unit", "statistics")
KINDS, SCORED = ("best", "last"), {"val": "validation", "test": "test"}


def print_result(result, config, normed, foreign):
    """Print the tables of the best and the last round, once if they are the same. result: {best: {round, val,
    test}, last: ...}; normed: whether the network has batch norms; foreign: sites that did not train."""
    same = result["best"]["round"] == result["last"]["round"]
    note = f"test_stats: {config.test_stats}" if normed else "no batch-norm statistics"
    note += f"; took no part in training: {', '.join(foreign)}" if foreign else ""
    for kind in ("last",) if same else KINDS:
        name = "best and last" if same else kind
        for split, title in SCORED.items():
            print(f"\n{name} round {result[kind]['round']}, {title}, {note}")
            print(format_table(result[kind][split], units(config)["hd95"], foreign), flush=True)


def explained(result, config, normed, foreign, seconds):
    """Return the result with its units, its definitions and the facts of the run."""
    return (result | {"units": units(config), "definitions": definitions(config, normed, foreign)}
            | run_facts(seconds))


def format_table(scores, unit, foreign=()):
    """Return `evaluate`'s result as aligned lines: every site, the mean, the site of lowest Dice, each with
    its foreground classes below if there are several. unit: of the distances; foreign: as for
    `mean_scores`. Without images: one line."""
    sites, mean = scores["sites"], scores["mean"]
    scored = [name for name in sites if sites[name]["images"]]
    if not scored:
        return "no site has an image"
    apart = [name for name in scored if name not in in_mean(sites, foreign)]
    rows = [row for name in sites for row in with_classes(name, sites[name])]
    rows += with_classes(f"mean without {', '.join(apart)}" if apart else "mean of sites", mean)
    worst = min(scored, key=lambda name: sites[name]["dice"])
    rows.append((f"worst: {worst}", sites[worst]))
    wide = max(len(label) for label, _ in rows)
    lines = [f"{'site':{wide}}  images    Dice  HD95 {unit}  ASSD {unit}  misses"]
    for label, row in rows:
        numbers = ["-" if row[name] is None else f"{row[name]:.{digits}f}"
                   for name, digits in (("dice", 4), ("hd95", 2), ("assd", 2), ("misses", 0))]
        cells = [f"{value:>{width}}" for value, width in zip(numbers, (6, 7, 7, 6))]
        lines.append("  ".join([f"{label:{wide}}", f"{row['images']:6}", *cells]))
    return "\n".join(lines)


def with_classes(label, row):
    """Return the row of a table, and behind it one for each foreground class if there are several."""
    return [(label, row), *((f"  {j}", of_class) for j, of_class in row.get("classes", {}).items())]


def units(config):
    """Return the unit of each number of a result: distances are in mm only where files say mm."""
    distance = "mm" if config.task in VOLUMES else "px"
    return {"dice": "1", "hd95": distance, "assd": distance, "misses": "images", "images": "1",
            "peak_mb": "MiB", "seconds": "s"}


def case_rows(split, sample, scores, site, config):
    """Return a row for each case and foreground class of one sample, {column: value}. scores: [(slice or
    None, class, {dice, precision, ...})] from `score_sample`."""
    return [{"split": split, "site": site, "case": sample.case,
             "file": sample.name if s is None else f"{sample.name} slice {s}",
             "class": class_name(config, j), "unit": units(config)["hd95"],
             "statistics": config.test_stats or "none"} | {name: score[name] for name in MEASURED}
            for s, j, score in scores]


def as_table(rows, columns=CASE_COLUMNS):
    """Return rows {column: value} as a CSV file, numbers so that they can be read back exactly."""
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode("utf-8", "backslashreplace")


def definitions(config, normed=True, foreign_sites=()):
    """Return what every number of a result means. normed: whether the network has batch norms; foreign_sites:
    those that took no part."""
    image = "one volume, in 3-D" if config.task in VOLUMES else "one picture"
    if config.eval_slices == "foreground":
        image = "one slice with organ in its truth, in 2-D"
    unit, of_case = "images", "the image alone, at most 32 slices at once"
    if config.tiles:
        unit, of_case = "tiles", "up to 64 tiles that cover the image, cumulative over batches"
    kind = {"site": f"site: batch-norm mean and variance of up to 64 training {unit} of the image's own "
                    "site, cumulative over batches, never sent or averaged",
            "case": f"case: batch-norm mean and variance of {of_case}"}
    words = {
        "dice": "foreground Dice 2|P and T|/(|P|+|T|) on the file's grid; both empty 1, one 0",
        "hd95": "larger of the two directed 95th percentiles (linear interpolation) of border "
                "distances; both masks empty 0, one empty the diagonal of the image",
        "assd": "mean of the border distances of both directions pooled; empty masks as for hd95",
        "misses": "images with exactly one of prediction and truth empty; in 'mean' their total",
        "image": image,
        "images": "how many images are scored; cases.csv has a row for each, whose case is the patient",
        "mean": "sites: mean over a site's images; mean: unweighted mean over the sites with images, of "
                "which those that took no part in training count only if there is no other",
        "test_stats": kind[config.test_stats] if normed else "none: the network has no batch norm",
        "eval_slices": f"{config.eval_slices}: an image is {image}",
        "best": "the round of the best validation mean Dice, the last round if no site validates",
        "last": "the last round",
        "peak_mb": "largest resident memory of the process, plus the largest allocation on a GPU"}
    if config.classes > 2:
        names = ", ".join(f"{j} {class_name(config, j)}" for j in range(1, config.classes))
        words["classes"] = (f"foreground classes {names}: each is scored as a mask of its own, by the same "
                            "rules; a site's number is the mean over them, its misses are their total; a "
                            "class that no mask of any site has is not scored")
    if config.init:
        words["init"] = f"the weights before round 1 are those in {config.init}"
    if config.keep_largest:
        words["keep_largest"] = "of every class found in an image, only the largest connected part counts"
    if foreign_sites:
        own = (": they used statistics of their own unlabelled images"
               if normed and config.test_stats == "site" else "")
        words["foreign_sites"] = f"{', '.join(foreign_sites)} took no part in training{own}"
    return words


def run_facts(seconds):
    """Return {commit, versions, peak_mb, seconds}; the commit is None where git does not know it."""
    packages = ("torch", "numpy", "nibabel", "pillow", "pyyaml")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], check=True, text=True,
                                cwd=Path(__file__).parents[1], capture_output=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"commit": commit, "versions": versions, "peak_mb": peak_mb(), "seconds": round(seconds, 1)}


def peak_mb():
    """Return the largest resident memory of this process in MiB, plus the largest allocation on a GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident *= 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round((resident + on_gpu) / 2**20, 1)
