"""Draw how a run went, finished or still running: python -m experiments.curves --run RUN

Writes RUN/curves.png, the loss terms and the validation Dice of each site over the rounds, and of a finished
run RUN/dice.png, a box of each site's test Dice in the best round. It needs matplotlib.
"""

import io
import statistics
from pathlib import Path

from config import BadInput
from experiments.run_grid import rows_in
from rounds.checkpoint import save
from settings.program import Parser, run_program

# of lines, which the colour-blind and a black and white print tell apart
LOOKS = [dict(zip(("color", "linestyle", "marker"), look)) for look in (
    ("#000000", "-", "o"), ("#D55E00", "-", "s"), ("#0072B2", "--", "^"), ("#009E73", "-.", "v"),
    ("#CC79A7", ":", "D"), ("#E69F00", "--", "P"), ("#56B4E9", "-.", "X"), ("#7F7F7F", ":", "*"),
    ("#882255", "-", "p"))]
LABELS = {"loss_dice": "L_dice", "loss_contrast": "mu L_contra", "loss_consistency": "mu L_consis"}


def read_curves(file):
    """Return ({loss_TERM: {round: mean over the sites}}, {site: {round: validation Dice}}) of metrics.csv."""
    losses, dice = {}, {}
    for row in rows_in(file):
        t = int(row["round"])
        if row["split"] == "val":
            dice.setdefault(row["site"], {})[t] = float(row["dice"])
        for name, value in row.items():
            if name.startswith("loss_") and value not in (None, "", "null"):
                losses.setdefault(name, {}).setdefault(t, []).append(float(value))
    means = {name: {t: statistics.mean(values) for t, values in of_term.items()}
             for name, of_term in losses.items()}
    return means, dice


def mean_curve(dice):
    """Return {round: mean over the sites} of {site: {round: Dice}}."""
    return {t: statistics.mean(of_site[t] for of_site in dice.values() if t in of_site)
            for t in sorted(set().union(*dice.values()))}


def axes(columns=1, rows=1, size=None, **more):
    """Return a matplotlib figure and its axes (rows, columns); raises BadInput if there is no matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise BadInput("matplotlib: is not installed and this plot needs it; "
                       "pip install -r requirements-extra.txt") from None
    pyplot.switch_backend("Agg")  # a file, no window
    return pyplot.subplots(rows, columns, figsize=size or (2.6 + 2.6 * columns, 3.4), squeeze=False,
                           layout="constrained", **more)


def draw_curves(file, losses, dice):
    """Draw the loss terms on the left, the sites' validation Dice on the right; return the figure."""
    figure, ((left, right),) = axes(2)
    for ax, curves in ((left, losses), (right, dice)):
        for look, (name, values) in zip(LOOKS * len(curves), curves.items()):
            label = LABELS.get(name, name.removeprefix("loss_"))
            ax.plot([*values], [*values.values()], **look, markersize=3, label=label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        if ax is right and dice:
            means = mean_curve(dice)
            best = max(means, key=means.get)
            ax.axvline(best, color="grey", linewidth=0.8, label=f"best round, {best}")
        if curves:
            ax.legend(fontsize=8)
    left.set(xlabel="round", ylabel="loss, mean of sites", title="loss terms")
    right.set(xlabel="round", ylabel="Dice", ylim=(0, 1), title="validation")
    save_figure(figure, file, 110)
    return figure


def draw_boxes(file, rows):
    """Draw a box of Dice a site, or a site's class, and a dot a row of cases.csv, of one split and round."""
    names, dice = len({row["class"] for row in rows}) > 1, {}
    for row in rows:
        dice.setdefault(row["site"] + f"\n{row['class']}" * names, []).append(float(row["dice"]))
    figure, ((ax,),) = axes(size=(2.6 + 2.6 * max(1, len(dice) // 5), 3.4))
    ax.boxplot(list(dice.values()), whis=(0, 100), widths=0.6, medianprops={"color": LOOKS[1]["color"]})
    for place, values in enumerate(dice.values(), 1):
        ax.plot([place] * len(values), values, "o", color=LOOKS[2]["color"], markersize=3, alpha=0.6)
    ax.set_xticks(range(1, len(dice) + 1), dice, fontsize=7)
    ax.set(ylabel="test Dice, best round", ylim=(0, 1.02))
    save_figure(figure, file, 110)


def save_figure(figure, file, dpi):
    """Write a figure as a PNG file, whole or not at all; raises BadInput where the disk does not take it."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    save(Path(file), content.getvalue())


def main():
    """Draw the curves of a run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder of train.py")
    run = Path(parser.parse_args().run).expanduser()
    draw_curves(run / "curves.png", *read_curves(run / "metrics.csv"))
    print(f"written to {run / 'curves.png'}")
    if (run / "cases.csv").exists():
        draw_boxes(run / "dice.png", [row for row in rows_in(run / "cases.csv")
                                      if (row["kind"], row["split"]) == ("best", "test")])
        print(f"written to {run / 'dice.png'}")


if __name__ == "__main__":
    run_program(main)
