"""What metrics.csv says of a finished run."""

import csv
from statistics import fmean

from config import BadInput


def rows_of(folder):
    """Return the rows of a run's metrics.csv as dictionaries, none if there is no such file; raises BadInput
    for one that is damaged."""
    file = folder / "metrics.csv"
    try:
        with open(file, newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error):
        raise BadInput(f"{file}: cannot be read as a table, restore it or remove it") from None
    if rows and not {"round", "split", "site", "dice"} <= rows[0].keys():
        raise BadInput(f"{file}: is no table of a run, restore it or remove it")
    return rows


def validation_of(folder, t):
    """Return in words the validation Dice of round t of a run, and that of its worst site."""
    scored = [row for row in rows_of(folder) if row["round"] == str(t) and row["split"] == "val"]
    try:
        dice = {row["site"]: float(row["dice"]) for row in scored}
    except (TypeError, ValueError):
        raise BadInput(f"{folder / 'metrics.csv'}: has a Dice that is no number, restore it") from None
    if not dice:
        return "its validation Dice is not known"
    worst = min(dice, key=dice.get)
    return f"validation Dice {fmean(dice.values()):.3f}, at the worst site {worst} {dice[worst]:.3f}"


def foreign_sites(folder, sites):
    """Return the names of those sites that took no part in the training of a run. A hospital of a federation
    (it has kept.pt) knows nothing of the others, and nothing is said of them."""
    if (folder / "kept.pt").exists():
        return []
    trained = {row["site"] for row in rows_of(folder) if row["split"] == "train"}
    return [site.name for site in sites if not site.train and site.name not in trained]
