"""Patients: cases by a pattern on names, and whether names say that several images are of one patient."""

import re
from collections import Counter, defaultdict

from sites.layouts import as_seen

# P1_q0, P1-3, P1_L, P1 left, P1L: a stem that holds a number, and a short ending
ENDINGS = [re.compile(rf"(?is)(.*\d.*?){ending}(?:_0000)?(?:\.nii)?\.[^.]+") for ending in (
    r"([ _.-]+[a-z]{0,5})(\d{1,4})", r"([ _.-]+(?:[a-z]{1,2}|left|right))()", "([a-z])()")]
NO_PATIENTS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # folders
FOLDER = "^([^/]+)/"


def joined(entries, case_pattern, problems):
    """Return entries whose cases are group 1 of a pattern on their names; adds to `problems` the names that
    do not match it."""
    found = [re.search(case_pattern, name_of(entry)) for entry in entries]
    problems += [f"{entry.image}: its name does not match case_pattern {case_pattern!r}, mend the pattern or "
                 "rename the file" for entry, match in zip(entries, found) if not (match and match[1])]
    return [entry._replace(case=match[1]) for entry, match in zip(entries, found) if match and match[1]]


def name_of(entry):
    """Return the name that case_pattern is for: the file's, after its folder below the site if it has one."""
    folder = entry.case.rpartition("/")[0]
    return f"{folder}/" * bool(folder) + as_seen(entry.image.name)


def shared_names(entries):
    """Return {site: warning} of the sites in which each image is a case of its own although several share all
    of their names but a short ending; it names the case_pattern that joins them. entries: {site: [Entry]}."""
    names = {site: [name_of(entry) for entry in found] for site, found in entries.items()}
    stems = {site: stems for site, found in entries.items() if (stems := stems_of(names[site]))
             and len({entry.case for entry in found}) == len(found) == len(set(names[site]))}
    pattern = pattern_of([pair for found in stems.values() for pair in found])
    fits = all(joins(pattern, names[site], stems.get(site, zip(names[site], names[site]))) for site in names)
    texts = {}
    for site, found in stems.items():
        of_stem = defaultdict(list)
        for name, (stem, _) in zip(names[site], found):
            of_stem[stem].append(name)
        alike = [together for together in of_stem.values() if len(together) > 1]
        remedy = f"set case_pattern='{pattern}', which makes {len(of_stem)} cases of {len(found)} images, or "
        texts[site] = (
            f"{sum(map(len, alike))} images share all of their names but a short ending with another, as "
            f"{alike[0][0]} and {alike[0][1]} do; if those are of one patient, one patient would train and "
            f"test: {remedy * fits}write the patients into the column case of a table")
    return texts


def stems_of(names):
    """Return [(stem, ending as a regular expression)] of a site's names, in their order; [] if they give no
    reason to join any. A stem is a folder, if all of the names lie in some."""
    found = [(name.partition("/")[0], FOLDER) for name in names if "/" in name]
    if len(found) < len(names) or {stem.casefold() for stem, _ in found} <= NO_PATIENTS:
        found = [parted(name) for name in names]
    number = Counter(stem for stem, _ in found)
    return found if 1 < len(number) < len(found) else []


def parted(name):
    """Return (stem, ending) of a name, the ending "" if it has no short one."""
    for ending in ENDINGS:
        if match := ending.fullmatch(name):
            return match[1], re.escape(match[2]) + r"\d+" * bool(match[3])
    return re.sub(r"(?is)(\.nii)?\.[^.]+$", "", name), ""


def pattern_of(stems):
    """Return the case_pattern that joins names of one stem."""
    number = Counter(stem for stem, _ in stems)
    endings = sorted({ending for stem, ending in stems if number[stem] > 1})
    if endings == [FOLDER]:
        return FOLDER
    short = "|".join(endings) if len(endings) < 6 else "[ _.-][A-Za-z]{0,5}[0-9]*"
    return f"^(.+?)({short})?" + (r"(\.nii)?\.[^.]+$" if any("." in stem for stem in number) else r"\.")


def joins(pattern, names, stems):
    """Return whether a pattern makes the cases that the stems are: as many, and one for each stem."""
    matches = [re.search(pattern, name) for name in names]
    pairs = {(match and match[1], stem) for match, (stem, _) in zip(matches, stems)}
    return all(matches) and len(pairs) == len({case for case, _ in pairs}) == len({stem for _, stem in pairs})
