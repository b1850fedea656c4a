"""The figures of reproduce.py. Plots need matplotlib (requirements-extra.txt), pictures do not."""

import statistics

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from config import load_config
from datasets import load_sites, read_splits
from eval import load_run, model_of, pick_device, predict
from experiments.run_grid import read_rows, result_of
from experiments.style_bias import LEVELS, scene_batches, style_bias
from rounds.checkpoint import load_checkpoint
from scoring.metrics import dice
from scoring.norm_statistics import own_network
from scoring.pictures import TILE, contact_sheet, fullest_slice, image_tile

# Okabe and Ito's colours, told apart by the colour-blind; the dashes and marks tell them in print
LOOKS = [("#000000", "-", "o"), ("#D55E00", "-", "s"), ("#0072B2", "--", "^"), ("#009E73", "-.", "v"),
         ("#CC79A7", ":", "D"), ("#E69F00", "--", "P"), ("#56B4E9", "-.", "X"), ("#7F7F7F", ":", "*")]
# colours of errors: found but not there, not found, and found as another class
EXTRA, MISSED, OTHER = (86, 180, 233), (213, 94, 0), (240, 228, 66)
NAMES = {"fedavg": "FedAvg", "fedprox": "FedProx", "fedbcs": "FedBCS", "harmofl": "HarmoFL",
         "fpl": "FPL", "fedplvm": "FedPLVM", "feduv": "FedUV", "input_norm": "input norm",
         "fsr": "FSR alone", "released": "as released"}


def axes(columns=1):
    """Return a matplotlib figure and its axes side by side, without top and right borders."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                            "lines.linewidth": 1.4, "legend.frameon": False})
    figure, found = pyplot.subplots(1, columns, figsize=(5.2 + 2.6 * (columns - 1), 3.4), sharey=True,
                                    squeeze=False, layout="constrained")
    return figure, found[0]


def by_setting(runs):
    """Return {setting: [Run of each seed]}, FedAvg first and FedBCS next."""
    names = dict.fromkeys([*("fedavg", "fedbcs"), *(run.setting for run in runs)])
    found = {name: [run for run in runs if run.setting == name] for name in names}
    return {name: of_name for name, of_name in found.items() if of_name}


def band(ax, x, curves, look, label):
    """Draw the mean of curves, one a seed, and the band from their lowest to their highest."""
    colour, dashes, mark = look
    curves = np.array(curves, float)
    ax.plot(x, curves.mean(0), color=colour, linestyle=dashes, marker=mark, markersize=3.5,
            markevery=max(1, len(x) // 10), label=label)
    if len(curves) > 1:
        ax.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)


def draw_tau(runs, config, file):
    """Figure 3: test Dice over temperatures, FedAvg as the base; bars: lowest to highest seed."""
    figure, (ax,) = axes()
    found = {name: [result_of(run)["dice"] for run in of_name]
             for name, of_name in by_setting(runs).items()}
    base = found.pop("fedavg")
    points = sorted((config.tau if name == "fedbcs" else float(name.removeprefix("tau=")), dice)
                    for name, dice in found.items())
    tau, mean = [t for t, _ in points], [statistics.mean(dice) for _, dice in points]
    reach = [[m - min(dice), max(dice) - m] for m, (_, dice) in zip(mean, points)]
    ax.errorbar(tau, mean, np.transpose(reach), color=LOOKS[1][0], marker="s", capsize=3, label="FedBCS")
    ax.axhline(statistics.mean(base), color="black", linestyle="--", label="Base: FedAvg")
    ax.axhspan(min(base), max(base), color="black", alpha=0.08, linewidth=0)
    ax.set(xscale="log", xlabel="temperature tau", ylabel="test Dice, mean of sites")
    ax.set_xticks(tau, [f"{t:g}" for t in tau])
    ax.minorticks_off()
    ax.legend()
    figure.savefig(file, dpi=200)


def draw_convergence(runs, config, file):
    """Figure 4a: validation Dice per round of every method, band from lowest to highest seed."""
    figure, (ax,) = axes()
    for look, (name, of_name) in zip(LOOKS * len(runs), by_setting(runs).items()):
        curves = [validation_curve(run) for run in of_name]
        band(ax, list(curves[0]), [list(curve.values()) for curve in curves], look,
             NAMES.get(name, name))
    ax.set(xlabel="communication round", ylabel="validation Dice, mean of sites")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(ncols=2)
    figure.savefig(file, dpi=200)


def draw_dots(rows, file):
    """Draw a dot a patient, the first setting's Dice against each other setting's, coloured by site.

    rows: of `tables.write_paired`; the first kind of round and statistics in them, the mean over seeds.
    """
    first, dice = rows[0][2:4], {}
    for name, _, *shown, site, patient, value in rows:
        if tuple(shown) == first:
            dice.setdefault(name, {}).setdefault((site, patient), []).append(float(value))
    base, *others = (name for name in dice)
    if not others:
        return
    figure, panels = axes(len(others))
    figure.set_size_inches(3.2 * len(others) + 0.4, 3.6)
    sites = sorted({site for site, _ in dice[base]})
    for ax, name in zip(panels, others):
        for look, site in zip(LOOKS * len(sites), sites):
            points = [[statistics.mean(dice[who][key]) for key in dice[base] if key[0] == site]
                      for who in (base, name)]
            ax.plot(*points, linestyle="", color=look[0], marker=look[2], markersize=4, label=site)
        ax.axline((0, 0), slope=1, color="black", linewidth=0.7)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=f"Dice, {NAMES.get(base, base)}",
               title=NAMES.get(name, name))
    panels[0].set_ylabel("Dice of the setting")
    panels[0].legend(fontsize=7)
    figure.savefig(file, dpi=150)


def validation_curve(run):
    """Return {round: mean validation Dice of the sites} of a run."""
    rounds = {}
    for row in read_rows(run.folder / "metrics.csv"):
        if row["split"] == "val":
            rounds.setdefault(int(row["round"]), []).append(float(row["dice"]))
    return {t: statistics.mean(dice) for t, dice in rounds.items()}


def draw_style(runs, config, file):
    """Figure 4b: the sites' share of the features' variance at every level; see style_bias.py."""
    batches = list(scene_batches(file.with_name(f"scenes_{config.task}"), config))
    figure, panels = axes(2)
    lines = ["level | " + " | ".join(f"{name} before | {name} after" for name in by_setting(runs))]
    columns = []
    for look, (name, of_name) in zip(LOOKS, by_setting(runs).items()):
        found = [style_bias(trained_model(run), batches) for run in of_name]
        for side, ax in enumerate(panels):
            curves = [[of_seed[level][side] for level in LEVELS] for of_seed in found]
            band(ax, range(len(LEVELS)), curves, look, NAMES.get(name, name))
            columns.append(np.mean(curves, 0))
    for ax, title in zip(panels, ("before normalisation", "after normalisation (and FSR)")):
        ax.set(xlabel="level, from input to output", title=title, ylim=(0, None))
        ax.set_xticks(range(len(LEVELS)), LEVELS)
    panels[0].set_ylabel("between-site share of variance")
    panels[0].legend()
    figure.savefig(file, dpi=200)
    rule = " | ".join(["---"] * (1 + len(columns)))
    rows = [f"{level} | " + " | ".join(f"{column[i]:.3f}" for column in columns)
            for i, level in enumerate(LEVELS)]
    text = "".join(f"| {line} |\n" for line in [lines[0], rule, *rows])
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nmean over seeds; written: {file.with_suffix('.md')}")


def trained_model(run):
    """Return the network of a run's best round."""
    return model_of(load_checkpoint(run.folder / "best.pt"), run.folder / "best.pt", torch.device("cpu"))


def draw_pictures(runs, config, file):
    """Figure 5: a row a site, its first test case: image, truth, and every method's prediction.

    The first seed's best rounds. Errors are coloured: orange is missed, blue is found in excess.
    """
    runs, device = [run for run in runs if run.seed == runs[0].seed], pick_device(config.device)
    own = load_config(runs[0].folder / "config.yaml")
    sites = load_sites(own, read_splits(runs[0].folder / "splits.json"))
    rows = {site.name: first_tiles(site.test[0]) for site in sites if site.test}
    for run in runs:
        _, model, of_norms, local = load_run(run.folder / "best.pt", sites, own, device)
        for site in (site for site in sites if site.test):
            network = own_network(model, of_norms.get(site.name, {}), local.get(site.name, {}))
            found = predict(network, site.test[0], own, device)
            rows[site.name].append(error_tile(site.test[0], found, own.classes))
    titles = ["image", "truth", *(NAMES.get(run.setting, run.setting) for run in runs)]
    labels = [f"{site.name}: {site.test[0].case}" for site in sites if site.test]
    other = ", yellow: as another class" if own.classes > 2 else ""
    labels[0] += f"   (white: found, orange: missed, blue: in excess{other}; number: Dice of the picture)"
    contact_sheet(list(zip(labels, rows.values())), titles).save(file)


def first_tiles(sample):
    """Return the tiles of a sample's image and truth, at the slice with most foreground."""
    s = fullest_slice(sample.truth)
    return [image_tile(sample, s), coloured(sample, s, sample.truth[s])]


def error_tile(sample, found, classes):
    """Return a sample's prediction as a tile, errors coloured, its Dice (mean of classes) in the corner."""
    s = fullest_slice(sample.truth)
    picture = Image.fromarray(coloured(sample, s, found[s]))
    mean = statistics.mean(dice(found[s] == j, sample.truth[s] == j) for j in range(1, classes))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, TILE - 18, 40, TILE), "black")
    draw.text((4, TILE - 16), f"{mean:.3f}", "white", ImageFont.load_default(12))
    return np.asarray(picture)


def coloured(sample, s, found):
    """Return slice s in grey with the foreground found in white, and in colours where it errs."""
    grey = image_tile(sample, s).mean(2, keepdims=True).repeat(3, 2) * 0.6
    p, y = (np.asarray(Image.fromarray(labels).resize((TILE, TILE), Image.Resampling.NEAREST))
            for labels in (found, sample.truth[s]))
    for area, colour in (((p == y) & (y > 0), (255, 255, 255)), ((p > 0) & (y == 0), EXTRA),
                         ((p == 0) & (y > 0), MISSED), ((p > 0) & (y > 0) & (p != y), OTHER)):
        grey[area] = 0.35 * grey[area] + 0.65 * np.array(colour)
    return grey.astype(np.uint8)


DRAW = {"tau": draw_tau, "convergence": draw_convergence, "style": draw_style,
        "pictures": draw_pictures}
