"""cases.csv: every scored case as a row, from which the means of a result follow."""

import csv
import io

from config import class_name
from scoring.results import units

COLUMNS = ("kind", "split", "site", "case", "file", "class", "dice", "precision", "recall", "hd95", "assd",
           "miss", "unit", "statistics")
MEASURED = ("dice", "precision", "recall", "hd95", "assd", "miss")


def case_rows(split, sample, scores, site, config):
    """Return the rows of one sample's cases, one a foreground class; of a volume that is scored by slices
    each slice is a case.

    scores: [(slice or None, class, {dice, precision, ...})] from `score_sample`.
    """
    return [{"split": split, "site": site, "case": sample.case,
             "file": sample.name if s is None else f"{sample.name} slice {s}",
             "class": class_name(config, j), "unit": units(config)["hd95"],
             "statistics": config.test_stats or "none"} | {name: score[name] for name in MEASURED}
            for s, j, score in scores]


def as_table(rows):
    """Return the content of cases.csv; numbers are written so that they can be read back exactly."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode("utf-8", "backslashreplace")
