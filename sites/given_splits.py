"""Splits that are given: by a splits.json, by a table's column, or by the run that is gone on with."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

from config import BadInput
from sites.files import reading
from sites.layouts import as_seen, is_table
from sites.readers import SPLITS
from sites.table import table_splits


def known_split(site, cases, splits, strict, folds=None):
    """Return a site's split as given by `splits`; raises BadInput where the data contradict it. Only with
    folds may a site have no test case."""
    split = {part: list(splits.get(site, {}).get(part, [])) for part in SPLITS}
    listed = Counter(chain(*split.values()))
    unlisted, missing = sorted(cases - listed.keys()), sorted(listed.keys() - cases)
    if twice := [case for case in listed if listed[case] > 1]:
        raise BadInput(f"splits: case {twice[0]} of site {site} is listed twice, keep one")
    if not strict:
        if site in splits:
            trained = len(cases & {*split["train"], *split["val"]})
            print(f"{site}: taken for the run's site of that name: {trained} of its cases trained or "
                  f"validated, {len(unlisted)} are new and tested, {len(missing)} of the run's are missing")
        split["test"] += unlisted
        return {part: [case for case in split[part] if case in cases] for part in SPLITS}
    if site not in splits:
        raise BadInput(f"splits: does not mention the site {site}, add it or remove its folder")
    if missing:
        raise BadInput(f"splits: case {missing[0]} of site {site} is not in the data; restore or remove it")
    if not split["test"] and not folds and len(listed) > 1:
        raise BadInput(f"splits: site {site} has no test case, add one")
    if unlisted:
        print(f"{site}: {len(unlisted)} cases in no split are not used: {', '.join(unlisted)}")
    return split


def given_splits(config):
    """Return the splits of a table's column split, or of the file config.splits; None if there are none."""
    found = table_splits(config) if is_table(config.data) else None
    return found or (read_splits(config.splits) if config.splits else None)


def read_splits(file):
    """Return {site: {train|val|test: [case]}} of a splits.json; raises BadInput if it is none."""
    with reading(file, "text of the form {SITE: {train|val|test: [CASE]}}"):
        splits = json.loads(Path(file).read_text(encoding="utf-8"))
        if other := {part for split in splits.values() for part in split} - {*SPLITS}:
            raise ValueError(f"{min(other)} is none of {', '.join(SPLITS)}")
        for site, part in ((site, part) for site, split in splits.items() for part in split):
            if not isinstance(splits[site][part], list):
                raise TypeError(f"{part} of site {site} is no list")
        return {as_seen(site): {part: list(map(as_seen, cases)) for part, cases in split.items()}
                for site, split in splits.items()}
