"""The figures of reproduce.py. Plots need matplotlib (requirements-extra.txt), pictures do not."""

import numpy as np
import torch

from datasets import load_sites
from experiments import paired
from experiments.curves import LOOKS, axes, mean_curve, read_curves, save_figure
from experiments.run_grid import by_setting, result_of
from experiments.style_bias import LEVELS, scene_batches, style_bias
from experiments.tables import markdown
from rounds.checkpoint import save
from scoring.evaluate import pick_device, predict
from scoring.norms import own_network
from scoring.pictures import ERRORS, as_png, coloured, contact_sheet, fullest_slice, image_tile
from scoring.trained import load_run
from sites.given_splits import read_splits


def band(ax, x, curves, look, label):
    """Draw the mean of curves, one a seed, and the band from their lowest to their highest."""
    colour, dashes, mark = look
    curves = np.array(curves, float)
    ax.plot(x, curves.mean(0), color=colour, linestyle=dashes, marker=mark, markersize=3.5,
            markevery=max(1, len(x) // 10), label=label)
    if len(curves) > 1:
        ax.fill_between(x, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)


def draw_tau(file, runs, config):
    """Figure 3: test Dice over temperatures, FedAvg as the base; bands: lowest to highest seed."""
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


def draw_dots(file, cases):
    """Draw a dot a patient, the mean over seeds of the first setting's Dice against each other setting's.
    cases: {setting: [[rows of each fold] of each seed]}."""
    found = {name: paired.by_site(of_name, paired.DICE) for name, of_name in cases.items()}
    base, *others = found
    if not others:
        return
    figure, (panels,) = axes(len(others), sharey=True)
    for ax, name in zip(panels, others):
        for look, site in zip(LOOKS * len(found[base]), found[base]):
            ax.plot(found[base][site].mean(0), found[name][site].mean(0), linestyle="", color=look[0],
                    marker=look[2], markersize=4, label=site)
        ax.axline((0, 0), slope=1, color="black", linewidth=0.7)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=f"test Dice, {base}",
               ylabel=f"test Dice, {name}")
    panels[0].legend(fontsize=7)
    save_figure(figure, file.with_suffix(".png"), 200)


def draw_style(file, runs, config):
    """Figure 4b: the sites' share of the features' variance at every level; see style_bias.py."""
    batches = scene_batches(file.with_name(f"scenes_{config.task}"), config)
    figure, (panels,) = axes(2, sharey=True)
    columns = [["level", *LEVELS]]
    for look, (name, seeds) in zip(LOOKS, by_setting(runs).items()):
        models = [load_run(run.folder / "best.pt", [], run.config, torch.device("cpu"))[1] for (run,) in seeds]
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
            network = own_network(model, of_norms.get(name, {}), local.get(name, {}))
            rows[name].append(coloured(sample, s, predict(network, sample, own, device)[s]))
    labels = [f"{name}: {sample.name}" for name, (sample, _) in shown.items()]
    labels[0] += f"   ({ERRORS}{', yellow: as another class' * (own.classes > 2)})"
    titles = ["image", "truth", *(run.setting for run in runs)]
    save(file.with_suffix(".png"), as_png(contact_sheet(list(zip(labels, rows.values())), titles)))
