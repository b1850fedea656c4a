"""Pictures of what the method does in a run: python -m experiments.tour --run RUN [out=FOLDER]

fsr.png         a channel of an image before and after FSR: values, amplitude, phase
styles.png      one scene in the style of every generated site, and how far apart its features are by level
cosines.png     cos(f, g) at every pixel of an image, of each path, untrained and trained
prototypes.png  cosines between the local prototypes of all sites and classes, untrained and trained
weights.png     l_norm and l_org of every FSR layer, untrained and trained

A run keeps its last and best round alone: "trained" is last.pt, or best.pt without it, "untrained" its seed's
initial weights. Prototypes are of these weights, from a pass over the training images. Without FSR or
prototypes there are fewer pictures. It needs matplotlib.
"""

import tempfile
from pathlib import Path

import torch
from torch.nn import functional

from config import BadInput
from datasets import load_sites, read_splits, stack
from experiments.curves import axes, save_figure
from experiments.figures import LOOKS
from experiments.style_bias import LEVELS, scene_batches, scenes, style_bias
from fused_features import PATHS, on_grids, squares_and_dots
from methods.find import method_and_model
from prototypes import add_class_sums, aggregate_prototypes, cosines, local_prototypes
from rounds.finished import open_run
from scoring.trained import model_of
from settings.program import Parser, run_program
from unet import UNet


def panels(rows, columns, size=2.3):
    """Return a figure and its axes (rows, columns), without ticks; raises BadInput without matplotlib."""
    figure, (first,) = axes()
    first.remove()
    figure.set_size_inches(size * columns, size * rows + 0.7)
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})


def finish(figure, file, sentence):
    """Write the sentence below a figure, and the figure to a file."""
    figure.supxlabel(sentence, fontsize=9, wrap=True)
    save_figure(figure, file, 80)
    print(f"{file}: {' '.join(sentence.split())}")


def show(figure, ax, values, title, colours="cividis", unit=None, **more):
    """Show a map (H, W) with its scale in a unit, or an image (3, H, W) without one."""
    seen = ax.imshow((values if unit else values.permute(1, 2, 0)).numpy(), cmap=colours, **more)
    ax.set_title(title, fontsize=9)
    if unit:
        figure.colorbar(seen, ax=ax, shrink=0.8).set_label(unit, fontsize=8)


def around_fsr(model, x):
    """Return [(maps before, maps after)] of the FSR layers for images x."""
    e = model.features(x)[1]["encoder"]
    return [(model.encoder[k](functional.max_pool2d(e[k - 1], 2)), e[k]) for k in (1, 2, 3)]


def draw_fsr(file, model, x):
    """Draw the channel of the first FSR layer that varies most, of the first of the images x."""
    z, out = (maps[0] for maps in around_fsr(model, x)[0])
    c = z.var((1, 2)).argmax().item()
    F = [torch.fft.fftshift(torch.fft.fft2(each[c])) for each in (z, out)]
    figure, ax = panels(2, 4)
    show(figure, ax[0, 0], x[0], "the image")
    ax[1, 0].axis("off")
    for (_, *row), name, each, F_z in zip(ax, ("before", "after"), (z, out), F):
        show(figure, row[0], each[c], f"channel {c} {name} FSR", "gray", "activation")
        show(figure, row[1], F_z.abs().clamp_min(1e-3).log10(), f"amplitude {name}", unit="log10, no unit")
        show(figure, row[2], F_z.angle(), f"phase {name}", "twilight", "radians", vmin=-3.15, vmax=3.15)
    live = F[0].abs() > 1e-3 * F[0].abs().max()  # below, rounding alone sets the phase
    live[live.shape[0] // 2, live.shape[1] // 2] = False
    ratio = (F[1] / F[0])[live]
    low, high, turn = *ratio.abs().aminmax(), ratio.angle().abs().max()
    finish(figure, file, f"Amplitudes off the mean (the middle) are multiplied by {low:.3f} to {high:.3f}\n"
           f"and no phase turns by more than {turn:.0e} rad. The mean goes from {z[c].mean():.2f} to "
           f"{out[c].mean():.2f}.\nSo both rows look alike but for their scales.")


def draw_weights(file, models, x):
    """Draw the mean of l_norm and l_org by layer, and the range from the 5 to the 95 % quantile."""
    figure, ax = panels(1, 2, 3.2)
    for a, (when, model) in zip(ax[0], models.items()):
        found = [layer.weights(z) for layer, (z, _) in zip(model.fsr, around_fsr(model, x))]
        for part, (name, (colour, _, mark)) in enumerate(zip(("l_norm", "l_org"), LOOKS)):
            at = [k + 0.15 * part for k in range(len(found))]
            a.vlines(at, *zip(*(l[part].quantile(torch.tensor([0.05, 0.95])) for l in found)), color=colour)
            a.plot(at, [l[part].mean() for l in found], mark, color=colour, label=name)
        a.set(title=when, ylabel="weight, no unit", ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1],
              xticks=range(3), xticklabels=["e1", "e2", "e3"], xlabel="FSR behind encoder level")
        a.legend()
    far = max((l.mean() - 0.5).abs() for pair in found for l in pair)
    finish(figure, file, "Marks: means over images and channels; lines: 5 to 95 % quantile.\n"
           f"After training no layer's mean is further than {far:.2f} from one half.")


def draw_styles(file, models, config):
    """Draw one scene in all sites' styles, and the sites' share of the features' variance by level."""
    with tempfile.TemporaryDirectory() as folder:
        batches = scene_batches(folder, config)
    figure, ((*left, a),) = panels(1, len(batches[0]) + 1, 2.6)
    for site, ax, x in zip(sorted(scenes.TASKS[config.task][0]), left, batches[0]):
        show(figure, ax, x[0], f"style of {site}")
    for (when, model), (colour, _, mark) in zip(models.items(), LOOKS):
        share = [after for _, after in style_bias(model, batches).values()]
        a.plot(share, marker=mark, color=colour, label=when)
    a.set(xticks=range(len(LEVELS)), xticklabels=LEVELS, yticks=[0, 0.25, 0.5], ylim=(0, None),
          title="share of variance")
    a.legend(fontsize=8)
    finish(figure, file, "Right: share of the features' variance that lies between styles, from x to d0.\n"
           f"Trained: {share[0]:.2f} at the input, {max(share):.2f} at most, {share[-1]:.2f} at the end.")


def prototypes_of(model, sites, config):
    """Return each site's local prototypes of the network, from its training images."""
    found = []
    for site in sites:
        total = {}
        for i in range(0, len(site.train_slices), config.batch_size):
            x, y = stack(site.train_slices[i:i + config.batch_size])
            add_class_sums(total, on_grids(model.features(x)[1], model.fusion, y, model.classes))
        found.append(local_prototypes(total))
    return found


def draw_prototypes(file, local, names):
    """Draw the cosines between all sites' local prototypes, class by class. local: {when: of each site}."""
    figure, ax = panels(2, 2, 3.1)
    for row, (when, sent) in zip(ax, local.items()):
        for a, path in zip(row, PATHS):
            rows = sorted((j, name, c[path][j]) for name, c in zip(names, sent) for j in c[path])
            unit = functional.normalize(torch.stack([vector for *_, vector in rows]))
            show(figure, a, unit @ unit.T, f"{path}, {when}", unit="cosine", vmin=-1, vmax=1)
            labels = [f"{name} {j}" for j, name, _ in rows]
            a.set_xticks(range(len(rows)), labels, rotation=90, fontsize=7)
            a.set_yticks(range(len(rows)), labels, fontsize=7)
    same, cos = torch.tensor([[i == j for j, *_ in rows] for i, *_ in rows]), unit @ unit.T
    finish(figure, file, "Each row is a site and a class, 0 the background. In the trained\n"
           f"decoder the cosine within a class is at least {cos[same].min():.2f},\n"
           f"between classes at most {cos[~same].max():.2f}.")


def draw_cosines(file, models, local, x, y):
    """Draw cos(f, g) over an image x (1, 3, H, W) with labels y, the nearest g of each class."""
    figure, ax = panels(2, 5)
    show(figure, ax[0, 0], x[0], "image and outline")
    ax[0, 0].contour(y[0] > 0, [0.5], colors="black", linewidths=0.7)
    ax[1, 0].axis("off")
    for row, path in zip(ax, PATHS):
        for a, (when, j) in zip(row[1:], [(when, j) for when in models for j in (0, 1)]):
            model, G = models[when], aggregate_prototypes(local[when])[path]
            X, W, member = on_grids(model.features(x)[1], model.fusion, y, model.classes)[path]
            cos, inside = cosines(*squares_and_dots(X, W, functional.normalize(G[j])))[0].amax(-1), member[..., 1] > 0
            title = f"{path}, {when},\n{('background', 'foreground')[j]} g"
            show(figure, a, cos, title, unit="cosine", vmin=-1, vmax=1)
    finish(figure, file, "Each pixel's cosine with the nearest global prototype g of a class.\n"
           f"Trained decoder, foreground g: mean {cos[inside[0]].mean():.2f} on foreground, "
           f"{cos[~inside[0]].mean():.2f} on background pixels.")


@torch.no_grad()
def draw_all(run, out):
    """Draw what a run has to show into a folder."""
    kind = "last" if (run / "last.pt").is_file() else "best"
    config, (checkpoint,) = open_run(run, [kind])
    trained = model_of(checkpoint, run / f"{kind}.pt", torch.device("cpu"))
    models = {"untrained": method_and_model(config)[1], f"round {checkpoint['round']}": trained}
    if not isinstance(trained, UNet):
        raise BadInput(f"{run}: its network is not that of unet.py, whose layers are drawn; give another run")
    sites = [site for site in load_sites(config, read_splits(run / "splits.json")) if site.train_slices]
    x, y = stack([site.train_slices[0] for site in sites])
    out.mkdir(parents=True, exist_ok=True)
    if trained.fsr:
        draw_fsr(out / "fsr.png", trained, x)
        draw_weights(out / "weights.png", models, x)
    if trained.fusion:
        local = {when: prototypes_of(model, sites, config) for when, model in models.items()}
        draw_prototypes(out / "prototypes.png", local, [site.name for site in sites])
        draw_cosines(out / "cosines.png", models, local, x[:1], y[:1])
    draw_styles(out / "styles.png", models, config)


def main():
    """Draw the pictures of a run."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder of train.py")
    parser.add_argument("out", nargs="?", metavar="out=FOLDER", help="where they go; none: RUN/tour")
    given = parser.parse_args()
    key, _, out = (given.out or f"out={given.run}/tour").partition("=")
    if key != "out":
        raise BadInput(f"{key[:80]}: is no key of this program, write out=FOLDER")
    draw_all(Path(given.run).expanduser(), Path(out).expanduser())


if __name__ == "__main__":
    run_program(main)
