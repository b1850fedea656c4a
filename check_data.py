"""Look at a data folder before training: python check_data.py FOLDER --task nuclei [key=value ...]

Prints what every site holds and everything that is wrong with its files; draws one contact sheet.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import demo_data
from config import BadInput, Parser, load_config, run_program
from datasets import list_files, missing_sites, read_splits, site_of, split_of
from readers import IMAGE_KINDS, look_at, read_sample, visible

SAMPLES = 4  # on a site, on the contact sheet
TILE = 192   # pixels, side of a picture on a sheet
GAP = 4      # between them


def check(config, sheet):
    """Print the report on config.data, write the contact sheet, return the number of problems."""
    folder = demo_data.ensure(config.task) if config.data == "demo" else Path(config.data)
    entries, problems = list_files(folder, config.task, config.case_pattern)
    splits = read_splits(config.splits) if config.splits else None
    problems += missing_sites(folder, entries, splits)
    rows = []
    for site, found in entries.items():
        facts, samples = read_all(site, found, config, problems)
        cases = {entry.case for entry in found}
        split = cases and tried(problems, split_of, site, cases, splits, config)
        if samples and len(samples) == len(found):  # else the others may have the foreground
            parts = split or {"train": [], "val": [], "test": cases}
            tried(problems, site_of, site, samples, parts, folder / site)
        ignored = other_files(folder / site, config.task)
        print("\n".join(report(site, config.task, found, facts, samples, split, ignored)))
        if samples:
            rows.append((site, [tile for sample in shown(samples) for tile in tiles(sample)]))
    print(f"\n{len(problems)} problem{'s' * (len(problems) != 1)}")
    for problem in problems:
        print(f"  {problem}")
    if rows:
        save_sheet(rows, sheet)
    return len(problems)


def tried(problems, work, *arguments):
    """Return what work(*arguments) does, or None, with its BadInput added to `problems`."""
    try:
        return work(*arguments)
    except BadInput as problem:
        problems.append(str(problem))
        return None


def read_all(site, entries, config, problems):
    """Return the facts and Samples of all files that can be read; others go to `problems`."""
    facts, samples = [], []
    for entry in entries:
        found = [tried(problems, look_at, entry.image, config.task),
                 tried(problems, look_at, entry.mask, config.task, True)]
        if all(found):
            facts.append(found[0] | found[1])
            sample = tried(problems, read_sample, entry, site, config.task, config.image_size)
            samples += [sample] if sample else []
    return facts, samples


def report(site, task, entries, facts, samples, parts, ignored):
    """Return the lines on one site; facts: from `look_at`, of the files that could be read."""
    number = sum(len(sample.images) for sample in samples)
    cases, unit = len({entry.case for entry in entries}), "images" if task == "nuclei" else "slices"
    lines = [site, f"  cases     {cases} in {len(entries)} files, {number} {unit} readable"]
    if facts:
        share = np.mean([sample.truth.mean() for sample in samples]) if samples else 0
        labels = sorted(set().union(*(fact["labels"] for fact in facts)))
        low, high = min(fact["low"] for fact in facts), max(fact["high"] for fact in facts)
        listed = ", ".join(f"{label:g}" for label in labels[:8]) + " ..." * (len(labels) > 8)
        lines += [f"  size      {distinct(fact['size'] for fact in facts)}",
                  f"  channels  {distinct(fact['channels'] for fact in facts)}",
                  f"  values    {low:g} to {high:g}",
                  f"  labels    {listed}; foreground is > 0, {100 * share:.1f} % of the pixels",
                  f"  spacing   {distinct(fact['spacing'] for fact in facts)}"]
    if parts:
        sizes = ", ".join(f"{part} {len(parts[part])}" for part in ("train", "val", "test"))
        lines.append(f"  split     {sizes} cases")
    if ignored:
        lines.append(f"  ignored   {ignored} files of other kinds")
    return lines


def distinct(values, at_most=4):
    """Return the different texts with their number: '512 x 512 (50)'."""
    values = list(values)
    different = sorted(set(values), key=lambda value: -values.count(value))
    listed = ", ".join(f"{value} ({values.count(value)})" for value in different[:at_most])
    return listed + f", {len(different) - at_most} others" * (len(different) > at_most)


def other_files(site, task):
    """Return how many files of a site's folders are no images or volumes and therefore not read."""
    kinds = (*IMAGE_KINDS, "list.txt") if task == "nuclei" else (".nii", ".nii.gz")
    inside = [path for folder in visible(site) if folder.is_dir() for path in visible(folder)]
    files = [path for path in (*visible(site), *inside) if path.is_file()]
    return sum(not path.name.lower().endswith(kinds) for path in files)


# ---- Pictures ----

def shown(samples):
    """Return up to SAMPLES samples of a site, of different cases first."""
    first = {sample.case: sample for sample in reversed(samples)}
    rest = [sample for sample in samples if sample is not first[sample.case]]
    return [*reversed(first.values()), *rest][:SAMPLES]


def tiles(sample):
    """Return two tiles of the slice with most foreground: plain, and with its mask's outline."""
    s = int(sample.truth.sum((1, 2)).argmax())
    image = image_tile(sample, s)
    return [image, draw_outline(image, sample.truth[s], (0, 255, 0))]


def image_tile(sample, s):
    """Return slice s of a sample, not its neighbours, as a tile (TILE, TILE, 3) uint8."""
    image = (sample.images[s] * 255).round().byte()
    image = image if len(sample.truth) == 1 else image[1:2].expand(3, -1, -1)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    return np.asarray(picture.resize((TILE, TILE), Image.Resampling.BILINEAR))


def draw_outline(tile, mask, colour):
    """Return a copy of a tile with the outline of a mask (H, W), of any size, in a colour.

    It is two pixels wide at the size of the tile: those on either side of the mask's edge.
    """
    inside = np.asarray(Image.fromarray(mask).resize((TILE, TILE), Image.Resampling.NEAREST))
    padded = np.pad(inside, 1)
    around = np.stack([inside, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2],
                       padded[1:-1, 2:]])
    drawn = tile.copy()
    drawn[around.any(0) & ~around.all(0)] = colour
    return drawn


def contact_sheet(rows, titles=()):
    """Return a picture of rows (label, [tiles]); titles: captions over the tiles."""
    head, label_height = (18 if titles else 0), 18
    wide = max(len(images) for _, images in rows)
    size = wide * (TILE + GAP), head + len(rows) * (TILE + label_height)
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, title in enumerate(titles):
        draw.text((i * (TILE + GAP) + 4, 3), title, "black", font)
    for number, (label, images) in enumerate(rows):
        y = head + number * (TILE + label_height)
        draw.text((4, y + 2), label, "black", font)
        for i, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (i * (TILE + GAP), y + label_height))
    return sheet


def save_sheet(rows, file):
    """Write the contact sheet and say where; raises BadInput if it cannot be written."""
    try:
        contact_sheet(rows).save(file)
    except (OSError, ValueError) as problem:
        raise BadInput(f"{file}: cannot be written ({problem}), give another --sheet") from None
    print(f"contact sheet with outlines of the masks: {file}")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="data folder, one folder a site; or demo")
    parser.add_argument("--task", required=True, choices=("nuclei", "prostate"))
    parser.add_argument("--sheet", metavar="FILE", help="contact sheet; default: check_TASK.png")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="case_pattern=...")
    given = parser.parse_intermixed_args()
    settings = {"task": given.task, "data": given.folder, "out": "unused"}
    config = load_config(settings, given.overrides)
    sys.exit(1 if check(config, given.sheet or f"check_{given.task}.png") else 0)


if __name__ == "__main__":
    run_program(main)
