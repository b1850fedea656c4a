"""What reproduce.py writes: tables of means over seeds, and figures. Plots need matplotlib
(requirements-extra.txt), tables and pictures do not."""

import statistics

import numpy as np
import torch

from datasets import load_sites
from experiments.curves import LOOKS, axes, mean_curve, read_curves, save_figure
from experiments.run_grid import by_setting, result_of
from experiments.style_bias import LEVELS, scene_batches, style_bias
from rounds.checkpoint import save
from scoring.evaluate import pick_device, predict
from scoring.metrics import MEASURES
from scoring.norms import network_of
from scoring.pictures import ERRORS, as_png, coloured, contact_sheet, fullest_slice, image_tile
from scoring.results import as_table
from scoring.trained import load_run
from sites.given_splits import read_splits

TABLE_WORDS = """
Test Dice of the round with the best validation, `test_stats: {stats}`, mean ± standard deviation over seeds
{seeds}; difference: the mean, and that of each seed. Sent by a site in a round: weights + prototypes, and
the number of those vectors.
"""


def markdown(lines):
    """Return rows of cells as a markdown table, the first of them its head."""
    rule = ["---"] * len(lines[0])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [lines[0], rule, *lines[1:]])


def publish(file, text, rows):
    """Print a text; write it to FILE.md and rows {column: value} to FILE.csv, unless file is None."""
    if file:
        save(file.with_suffix(".md"), text.encode())
        save(file.with_suffix(".csv"), as_table(rows, rows[0]))
    print(f"\n{text}")


def write_means(file, runs, config):
    """Write FILE.md and the tidy FILE.csv, a row a setting, seed and site, or a site's class."""
    results, rows = {}, []
    for name, seeds in by_setting(runs).items():
        results[name] = [result_of(run) for (run,) in seeds]
        for (run,), result in zip(seeds, results[name]):
            for site, scores in result["sites"].items():
                classes = {f"{site}/{j}": of_class for j, of_class in scores.get("classes", {}).items()}
                for place, row in ({site: scores} | classes).items():
                    rows.append({"setting": name, "seed": run.seed, "site": place}
                                | {what: row[what] for what in MEASURES} | result["more"])
    everywhere = {name: found for name, found in results.items() if " without " not in name}
    texts = [table_of_methods(everywhere)]
    if config.classes > 2:
        texts.append(table_of_classes(everywhere))
    if len(everywhere) < len(results):
        texts.append(table_of_held_out(results))
    words = TABLE_WORDS.format(stats=config.test_stats, seeds=", ".join(str(run.seed) for (run,) in seeds))
    publish(file, "\n".join(texts) + words, rows)


def table_of_methods(results):
    """Return the markdown table of {setting: [result of each seed]}: Dice of the sites, and what is sent."""
    dice, more = {}, {}
    for name, found in results.items():
        dice[name] = [[row["dice"] for row in result["sites"].values()] for result in found]
        weights, prototypes, vectors = (statistics.mean(result["more"][what] for result in found)
                                        for what in ("weight_bytes", "prototype_bytes", "prototypes"))
        more[name] = {"val": mean_and_sd(result["more"]["val"] for result in found),
                      "bytes sent": f"{weights / 1e6:.2f} MB + {prototypes / 1e3:.2f} kB",
                      "prototypes": f"{vectors:.1f}"}
    return table_of_dice(["", *found[0]["sites"]], dice, more)


def table_of_held_out(results):
    """Return the markdown table of what each site scores when it is held out."""
    start = "fedavg without "
    sites = [name.removeprefix(start) for name in results if name.startswith(start)]
    dice = {name: list(zip(*([result["sites"][site]["dice"] for result in results[f"{name} without {site}"]]
                             for site in sites))) for name in ("fedavg", "fedbcs")}
    return table_of_dice(["held out", *sites], dice, {name: {} for name in dice})


def table_of_dice(head, dice, more):
    """Return the markdown table of {setting: [[Dice of each site] of each seed]}: the sites, their mean, and
    its difference to that of the first setting. more: {setting: {heading: cell}}."""
    base = next(iter(dice))
    means = {name: np.nanmean(np.array(seeds, float), 1) for name, seeds in dice.items()}
    lines = [[*head, "mean", f"difference to {base}", *more[base]]]
    for name, seeds in dice.items():
        each = means[name] - means[base]
        against = f"{each.mean():+.3f} ({' '.join(f'{d:+.3f}' for d in each)})"
        lines.append([name, *map(mean_and_sd, zip(*seeds)), f"**{mean_and_sd(means[name])}**",
                      "" if name == base else against, *more[name].values()])
    return markdown(lines)


def table_of_classes(results):
    """Return the markdown table of settings x foreground classes, the unweighted mean over sites."""
    lines = [["class", *next(iter(results.values()))[0]["classes"]]]
    for name, found in results.items():
        lines.append([name, *(mean_and_sd(one["classes"][j]["dice"] for one in found) for j in lines[0][1:])])
    return markdown(lines)


def mean_and_sd(values):
    """Return 'mean ± standard deviation' of the values that are there, '-' if none is."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


# ---- Figures ----

def band(ax, x, curves, look, label):
    """Draw the mean of curves, one a seed, and the band from their lowest to their highest."""
    curves = np.array(curves, float)
    ax.plot(x, curves.mean(0), **look, markersize=3.5, markevery=max(1, len(x) // 10), label=label)
    if len(curves) > 1:
        ax.fill_between(x, curves.min(0), curves.max(0), color=look["color"], alpha=0.12, linewidth=0)


def write_tau(file, runs, config):
    """Table, and figure 3: test Dice over temperatures, FedAvg as the base; bands: lowest to highest seed."""
    write_means(file, runs, config)
    figure, ((ax,),) = axes()
    base, *others = by_setting(runs).values()
    curve = dict(sorted((seeds[0][0].config.tau, [result_of(run)["dice"] for (run,) in seeds])
                        for seeds in others))
    band(ax, [*curve], [*zip(*curve.values())], LOOKS[1], "FedBCS")
    band(ax, [*curve], [[result_of(run)["dice"]] * len(curve) for (run,) in base], LOOKS[0], "Base: FedAvg")
    ax.set(xscale="log", xlabel="temperature tau", ylabel="test Dice, mean of sites")
    ax.set_xticks([*curve], [f"{tau:g}" for tau in curve])
    ax.minorticks_off()
    ax.legend()
    save_figure(figure, file.with_suffix(".png"), 200)


def draw_convergence(file, runs, config):
    """Figure 4a: validation Dice per round of every method, band from lowest to highest seed."""
    figure, ((ax,),) = axes()
    for look, (name, seeds) in zip(LOOKS * len(runs), by_setting(runs).items()):
        curves = [mean_curve(read_curves(run.folder / "metrics.csv")[1]) for (run,) in seeds]
        band(ax, [*curves[0]], [[*curve.values()] for curve in curves], look, name)
    ax.set(xlabel="communication round", ylabel="validation Dice, mean of sites")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(ncols=2)
    save_figure(figure, file.with_suffix(".png"), 200)


def draw_style(file, runs, config):
    """Figure 4b: the sites' share of the features' variance at every level; see style_bias.py."""
    batches = scene_batches(file.with_name(f"scenes_{config.task}"), config)
    figure, (panels,) = axes(2, sharey=True)
    columns, cpu = [["level", *LEVELS]], torch.device("cpu")
    for look, (name, seeds) in zip(LOOKS, by_setting(runs).items()):
        models = [load_run(run.folder / "best.pt", [], run.config, cpu)[1] for (run,) in seeds]
        shares = np.array([[*style_bias(model, batches).values()] for model in models])  # seeds, levels, 2
        for ax, of_side, when in zip(panels, np.moveaxis(shares, 2, 0), ("before", "after")):
            band(ax, range(len(LEVELS)), of_side, look, name)
            columns.append([f"{name} {when}", *(f"{share:.3f}" for share in of_side.mean(0))])
    for ax, title in zip(panels, ("before normalisation", "after normalisation (and FSR)")):
        ax.set(xlabel="level, from input to output", title=title, ylim=(0, None),
               xticks=range(len(LEVELS)), xticklabels=LEVELS)
    panels[0].set_ylabel("between-site share of variance")
    panels[0].legend()
    save_figure(figure, file.with_suffix(".png"), 200)
    text = markdown([*zip(*columns)])
    save(file.with_suffix(".md"), text.encode())
    print(f"\n{text}\nmean over seeds")


def draw_pictures(file, runs, config):
    """Figure 5: a row a site: its first test image, truth, and all methods' predictions, errors coloured."""
    device, own = pick_device(config), runs[0].config
    sites = load_sites(own, read_splits(runs[0].folder / "splits.json"))
    shown = {site.name: (site.test[0], fullest_slice(site.test[0].truth)) for site in sites if site.test}
    rows = {name: [image_tile(sample, s), coloured(sample, s, sample.truth[s])]
            for name, (sample, s) in shown.items()}
    for run in runs:
        _, model, of_norms, local = load_run(run.folder / "best.pt", sites, run.config, device)
        for name, (sample, s) in shown.items():
            network = network_of(name, model, of_norms, local)
            rows[name].append(coloured(sample, s, predict(network, sample, own, device)[s]))
    labels = [f"{name}: {sample.name}" for name, (sample, _) in shown.items()]
    labels[0] += f"   ({ERRORS}{', yellow: as another class' * (own.classes > 2)})"
    titles = ["image", "truth", *(run.setting for run in runs)]
    save(file.with_suffix(".png"), as_png(contact_sheet(list(zip(labels, rows.values())), titles)))
