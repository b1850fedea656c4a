"""Look at a data folder before training: python check_data.py FOLDER --task nuclei [key=value ...]

Prints what every site holds, what is suspicious about its files (warnings) and what is wrong with them
(problems), and draws one contact sheet. Exit code 1 if there are problems.
"""

import settings  # noqa: F401 - it says how idle threads wait, before torch is imported

# isort: split
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from config import VOLUMES, BadInput, class_name, load_config
from datasets import SPLITS, Site, split_of, warnings_on
from rounds.checkpoint import save
from scoring.pictures import GREEN, as_png, contact_sheet, legend, outlined_tiles
from settings.program import Parser, run_program
from sites import across, demo_data
from sites.given_splits import given_splits
from sites.layouts import list_files
from sites.patients import shared_names
from sites.readers import read_sample

SAMPLES = 4  # of a site, on the contact sheet
AIR = -500   # in Hounsfield units at most; -1000 but for noise and smoothing


def check(config, sheet):
    """Print the report on config.data, write the contact sheet, return the number of problems."""
    folder = demo_data.ensure(config.task) if config.data == "demo" else Path(config.data)
    entries, problems = list_files(folder, config.task, config.case_pattern, config.leave_out or ())
    files = [entry for found in entries.values() for entry in found]
    across.check_memory(folder, files, config)
    warnings = across.unread(folder, files, config.leave_out or ())
    warnings += [f"{site}: {text}" for site, text in shared_names(entries).items()]
    splits = None if problems else attempt(problems, given_splits, config)
    rows, sites = [], []
    for name, of_site in entries.items():
        read = [attempt(problems, read_sample, entry, name, config.task, config.image_size, config.classes,
                        config.window) for entry in of_site]
        samples, cases = [sample for sample in read if sample], {entry.case for entry in of_site}
        parts = (attempt(problems, split_of, name, cases, splits, config) if cases else None) or {}
        sites.append(Site(name, **{part: [sample for sample in samples if sample.case in parts.get(part, ())]
                                   for part in SPLITS}))
        warnings += warnings_on(samples, sites[-1].train, of_site)
        low = min((sample.facts["low"] for sample in samples), default=0)
        if config.task in VOLUMES and not config.window and low <= AIR:
            warnings.append(f"{name}: values from {low:g} look like CT, of which little contrast is left "
                            "without a window; set window=[low,high], such as [0,200], here too, and look "
                            "whether the contact sheet shows what is to be found")
        print("\n".join(report(name, config, of_site, samples, parts)))
        if samples:
            key = "" if rows else legend([class_name(config, j) for j in range(config.classes)])
            rows.append((name + key, [tile for sample in examples(samples) for tile in outlined_tiles(
                sample, sample.truth, config.classes, GREEN)]))
    if rows:
        save(Path(sheet), as_png(contact_sheet(rows)))
        print(f"\ncontact sheet with outlines of the masks: {sheet}")
    warnings = in_short(warnings + across.compare(sites, config))
    for texts, what in ((warnings, "warning"), (problems, "problem")):
        if texts or texts is problems:
            print(f"\n{len(texts)} {what}{'s' * (len(texts) != 1)}", *texts, sep="\n  ")
    return len(problems)


def in_short(texts, at_most=3, named=20):
    """Return the texts; where more than a few say the same of files of one folder, they are one line."""
    alike, lines = defaultdict(list), []
    for text in texts:
        file, _, rest = text.partition(": ")
        alike[Path(file).parent, rest].append((text, Path(file).name))
    for same in alike.values():
        others = ", ".join(name for _, name in same[1:named + 1]) + " ..." * (len(same) > named + 1)
        lines += [text for text, _ in same] if len(same) <= at_most else [
            f"{same[0][0]}; so with {len(same) - 1} others there: {others}"]
    return lines


def attempt(problems, function, *given):
    """Return what a function returns; None if it raises BadInput, which goes to `problems`."""
    try:
        return function(*given)
    except BadInput as problem:
        problems.append(str(problem))
        return None


def report(site, config, entries, samples, parts):
    """Return the lines on one site; samples: of the files that could be read."""
    slices = f", {sum(len(sample.images) for sample in samples)} slices" if config.task in VOLUMES else ""
    lines = [site, f"  images    {len(samples)} of {len(entries)} readable{slices}",
             f"  cases     {len({entry.case for entry in entries})}"]
    if facts := [sample.facts for sample in samples]:
        labels = sorted(set().union(*(fact["labels"] for fact in facts)))
        low, high = min(fact["low"] for fact in facts), max(fact["high"] for fact in facts)
        listed = ", ".join(f"{label:g}" for label in labels[:8]) + " ..." * (len(labels) > 8)
        names = [f"{j} {name}".strip() for j, name in enumerate(config.class_names or [""] * config.classes)]
        names = names if config.classes > 2 else ["", "foreground is > 0,"]
        shares = [f"{names[j]} {100 * np.mean([(sample.truth == j).mean() for sample in samples]):.1f} %"
                  for j in range(1, config.classes)]
        lines += [f"  {key:9} {distinct(fact[key] for fact in facts)}"
                  for key in ("size", "spacing", "channels")]
        lines += [f"  values    {low:g} to {high:g}",
                  f"  labels    {listed}; {', '.join(shares)} of the pixels"]
    if parts:
        lines.append(f"  split     {', '.join(f'{part} {len(parts[part])}' for part in SPLITS)} cases")
    return lines


def distinct(values, at_most=4):
    """Return the different texts with their number: '512 x 512 (50)'."""
    different = Counter(values).most_common()
    listed = ", ".join(f"{value} ({number})" for value, number in different[:at_most])
    return listed + f", {len(different) - at_most} others" * (len(different) > at_most)


def examples(samples):
    """Return up to SAMPLES samples of a site, of different cases first."""
    ordered = [*{sample.case: sample for sample in samples}.values(), *samples]
    return list({id(sample): sample for sample in ordered}.values())[:SAMPLES]


def main():
    """Print the report on a data folder and draw its contact sheet."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="data folder, one folder a site; a table; or demo")
    parser.add_argument("--task", required=True, choices=("nuclei", "prostate", "images", "volumes"))
    parser.add_argument("--sheet", metavar="FILE.png", help="contact sheet; default: check_TASK.png")
    parser.add_argument("--write", metavar="FILE.csv", help="write what was found as a table, to mend it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="case_pattern=..., classes=...")
    given = parser.parse_intermixed_args()
    config = load_config({"task": given.task, "data": given.folder, "out": "unused"}, given.overrides)
    sheet = Path(given.sheet or f"check_{given.task}.png").expanduser()
    if sheet.suffix.lower() != ".png" or not sheet.parent.is_dir():
        raise BadInput(f"sheet: {sheet} cannot be written, name a .png file in a folder that exists")
    problems = check(config, sheet)
    if given.write:
        from sites.table import write_table
        print(f"\n{write_table(Path(given.write).expanduser(), config)}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    run_program(main)
