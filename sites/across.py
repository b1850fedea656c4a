"""What shows only when all files of the sites are looked at together: memory, files that are not read,
patients, copies, classes."""

import os
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from config import BadInput, class_name
from sites.advice import DATA_KINDS, format_advice
from sites.files import check_regular, warn
from sites.layouts import files_below, is_table
from sites.patients import shared_names
from sites.readers import SPLITS, reader_of

GB = 2**30
CGROUP = Path("/sys/fs/cgroup")  # of a container or a queue, where the system has it


# ---- Before a file is decoded ----

def look_at_files(name, folder, entries, splits, config):
    """Raise BadInput if {site: entries} take too much memory; warn of files that are not read, and of names
    that look like patients. name: what warnings name, the folder or its one site."""
    files = [entry for site in entries.values() for entry in site]
    check_memory(folder, files, config)
    warn(name, unread(folder, files, config.leave_out or ()))
    for site, text in (shared_names(entries) if splits is None else {}).items():
        warn(site, [text])


def check_memory(folder, entries, config):
    """Raise BadInput if the entries need more memory than is free: what is kept of all, and what decoding
    the largest one takes for a while. A file whose header cannot be read counts as nothing here."""
    free = free_memory()
    if free is None:
        return
    sizes = [(*size_of(entry, config), entry.image) for entry in entries]
    kept = sum(kept for kept, _, _ in sizes)
    _, largest, file = max(sizes, key=lambda size: size[1], default=(0, 0, folder))
    name, need = (file, largest) if largest > free else (folder, kept + largest)
    if need > free:
        raise BadInput(f"{name}: there is not enough memory to decode it: it takes {need / GB:.2f} GB, "
                       f"{free / GB:.2f} GB are free; close other programs, use fewer or smaller files, or "
                       "lower image_size")


def size_of(entry, config):
    """Return how many bytes of an entry are kept, and how many decoding it takes at the least, by the header
    of its image; 0 and 0 if that cannot be read."""
    try:
        check_regular(entry.image)
        S, C, H, W = reader_of(config.task).shape_of(entry.image)
    except Exception:  # noqa: BLE001 - the reader will name the file and say what is wrong
        return 0, 0
    if config.tiles:
        return (C + 1) * H * W, 3 * C * H * W  # bytes: the pixels and the truth; what decoding adds
    inputs = S * config.image_size**2 * (4 * C + 1)  # channels in memory; three of any other are views
    return inputs + S * H * W, 2 * 4 * S * C * H * W  # the truth; the pixels, and the same scaled


def free_memory():
    """Return how many bytes the machine and the container leave to this process, None if nobody says so."""
    found = []
    with suppress(OSError, ValueError, KeyError):  # not Linux, or no container
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
        rows = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        found.append(int((CGROUP / "memory.max").read_text()) - int(rows["anon"]))
    return min(found, default=None)


def unread(folder, entries, leave_out=()):
    """Return a warning for each folder in which files that could be data belong to no entry, one if masks are
    united, and a table's. folder: a site's, or that of all sites; entries: those found in it."""
    if is_table(folder):
        from sites.table import table_warnings
        return table_warnings(folder, entries)
    read = {os.path.abspath(file) for entry in entries for file in (entry.image, *entry.masks)}
    left, texts = defaultdict(list), []
    for path in files_below(folder):
        if path.name.lower().endswith((*DATA_KINDS, "list.txt")) and os.path.abspath(path) not in read \
                and path.relative_to(folder).parts[0] not in leave_out:
            left[path.parent].append(path.name)
    for place, names in left.items():
        number = f"{len(names)} files that could be data are" if names[1:] else "1 file that could be data is"
        name = next(filter(format_advice, names), names[0])  # one that something can be said of
        advice = format_advice(name) or "docs/data.md shows where data are looked for, and a table for others"
        texts.append(f"{place}: {number} not read, such as {name}; {advice}")
    if several := [entry for entry in entries if len(entry.masks) > 1]:
        image, masks, _ = several[0][1:]
        more = f", and so are those of {len(several) - 1} other images" * (len(several) > 1)
        texts.append(f"{image}: its {len(masks)} masks are united, {masks[0].name} to {masks[-1].name}{more};"
                     " if they are classes, or of several readers, say so in a table")
    return texts


# ---- When all are decoded ----

def compare(sites, config, hospital=False):
    """Return what is suspicious about Sites together, as texts, and note in them the classes that no mask
    has. A hospital knows its own masks alone, and so of no class that nobody draws it."""
    samples = {site.name: [(part, sample) for part in SPLITS for sample in getattr(site, part)]
               for site in sites}
    texts, wanted = same_pictures(samples), set(range(1, config.classes))
    drawn = {site: set().union(*(sample.facts["labels"] for _, sample in of_site))
             for site, of_site in samples.items() if of_site}
    if config.classes == 2 or not drawn:  # of two nothing is said: a site without foreground has its warning
        return texts
    names = {j: f"class {j}" + f" ({class_name(config, j)})" * bool(config.class_names) for j in wanted}
    nobody = set() if hospital else wanted.difference(*drawn.values())
    texts += [f"{names[j]}: no mask of any site has it; it is left out of all scores, mend the masks or set "
              "classes" for j in sorted(nobody)]
    texts += [f"{names[j]}: site {site} never draws it, so it trains there as background; if it is not "
              "absent, draw it or leave the site out"
              for site, classes in drawn.items() for j in sorted(wanted - nobody - classes)]
    for site in sites:
        site.undrawn = nobody
    return texts


def same_pictures(sites):
    """Return a text for each picture that is there twice, first those that train and test. Pictures are the
    same if their pixels are, as the network takes them; blank ones are not compared. sites: {name: [(part of
    the split, Sample)]}."""
    known, found = {}, []
    for site, samples in sites.items():
        for part, sample in samples:
            here, pixels = (f"{site}/{sample.name}", part), sample.images.numpy()
            first = known.setdefault((pixels.shape, hash(pixels.tobytes())), here)
            if first is not here and pixels.any():
                places = f", one is in {first[1]} and one in {part}" * (part != first[1])
                text = f"{here[0]}: is the same picture as {first[0]}{places}; keep one of them"
                found.append(({part, first[1]} != {"train", "test"}, not places, text))
    return [text for *_, text in sorted(found, key=lambda row: row[:2])]
