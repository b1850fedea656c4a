"""cases.csv: every scored case as a row, from which the means of a result follow."""

import csv
import io

COLUMNS = ("kind", "split", "site", "case", "file", "class", "dice", "precision", "recall", "hd95", "assd",
           "miss", "unit", "statistics")
MEASURED = ("dice", "precision", "recall", "hd95", "assd", "miss")


def case_rows(split, sample, scores, site, unit, statistics):
    """Return the rows of one sample's cases; of a volume that is scored by slices each slice is one.

    scores: [(slice or None, {dice, precision, ...})] from `score_sample`.
    """
    return [{"split": split, "site": site, "case": sample.case,
             "file": sample.name if s is None else f"{sample.name} slice {s}", "class": 1,
             "unit": unit, "statistics": statistics} | {name: score[name] for name in MEASURED}
            for s, score in scores]


def as_table(rows):
    """Return the content of cases.csv; numbers are written so that they can be read back exactly."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue().encode("utf-8", "backslashreplace")
