"""Draw how a run went, finished or still running: python -m experiments.curves --run RUN

Writes RUN/curves.png: the loss terms and the validation Dice of each site over the rounds. It needs
matplotlib (requirements-extra.txt).
"""

import csv
from pathlib import Path

from config import BadInput
from settings.program import Parser, run_program

TERMS = {"loss_dice": "L_dice", "loss_contrast": "mu L_contra", "loss_consistency": "mu L_consis"}


def read_curves(file):
    """Return ({term: {round: mean over the sites}}, {site: {round: validation Dice}}) of metrics.csv."""
    try:
        with open(file, newline="", encoding="utf-8") as table:
            rows = list(csv.DictReader(table))
    except FileNotFoundError:
        raise BadInput(f"{file}: is not there yet, wait for the first round, or give another --run") from None
    losses, dice = {}, {}
    for row in rows:
        t = int(row["round"])
        if row["split"] == "val":
            dice.setdefault(row["site"], {})[t] = float(row["dice"])
        for term in TERMS if row["split"] == "train" else ():
            if row[term] not in ("", "null"):
                losses.setdefault(term, {}).setdefault(t, []).append(float(row[term]))
    means = {term: {t: sum(values) / len(values) for t, values in of_term.items()}
             for term, of_term in losses.items()}
    return means, dice


def draw_curves(file, losses, dice):
    """Draw the loss terms on the left and the sites' validation Dice on the right."""
    try:
        import matplotlib
    except ImportError:
        raise BadInput("matplotlib: is not installed; pip install -r requirements-extra.txt") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for term, values in losses.items():
        if any(values.values()):
            left.plot(list(values), list(values.values()), marker=".", label=TERMS[term])
    for site, values in dice.items():
        right.plot(list(values), list(values.values()), marker=".", label=site)
    left.set(xlabel="round", ylabel="loss, mean of sites", title="loss terms")
    right.set(xlabel="round", ylabel="Dice", ylim=(0, 1), title="validation")
    for ax in (left, right):
        if ax.lines:
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main():
    """Draw the curves of a run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder of train.py")
    run = Path(parser.parse_args().run).expanduser()
    draw_curves(run / "curves.png", *read_curves(run / "metrics.csv"))
    print(f"written to {run / 'curves.png'}")


if __name__ == "__main__":
    run_program(main)
