"""Pictures of what the method does in a run: python -m experiments.tour --run RUN [RUN ...] [out=FOLDER]

fsr.png         a channel of an image before and after FSR: values, amplitude, phase
styles.png      one scene in the style of every generated site, and how far apart its features are by level
cosines.png     cos(f, g) at every pixel of an image: both paths, both classes, every round
prototypes.png  cosines between the local prototypes of all sites and classes, untrained and trained
weights.png     l_norm and l_org of every FSR layer in every round

A run keeps its last and best round alone: last.pt is drawn, or best.pt without it, beside the initial weights
of its seed, "untrained". For more rounds give more runs, alike in everything but `rounds`: a run of 5 rounds
is the beginning of one of 100. Prototypes are of the drawn weights, from a pass over the training images.
"""

import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional

from config import BadInput
from datasets import load_sites, stack
from experiments.curves import LOOKS, axes, save_figure
from experiments.style_bias import LEVELS, scene_batches, scenes, style_bias
from fused_features import on_grids, squares_and_dots
from methods.find import method_and_model
from prototypes import add_class_sums, aggregate_prototypes, cosines, local_prototypes
from rounds.finished import open_run
from rounds.reading import FREE_ON_RESUME, check_same_config
from scoring.trained import model_of
from settings.program import Parser, run_program
from sites.given_splits import read_splits
from unet import PATHS, UNet

NO_TICKS = {"xticks": [], "yticks": []}


def save_as(figure, file, sentence):
    """Write the sentence below a figure, and the figure to a file."""
    figure.supxlabel(sentence, fontsize=9)
    save_figure(figure, file, 100)
    colours = Image.Quantize.MAXCOVERAGE  # a quarter of the bytes
    Image.open(file).convert("RGB").quantize(256, colours, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {' '.join(sentence.split())}")


def show(ax, values, title="", unit="", **more):
    """Show a map (H, W) with its scale if it has a unit, or an image (3, H, W); return what was drawn."""
    ax.set_title(title, fontsize=9)
    seen = ax.imshow((values if values.dim() == 2 else values.permute(1, 2, 0)).numpy(), **more)
    if unit:
        ax.figure.colorbar(seen, ax=ax, shrink=0.8).set_label(unit, fontsize=8)
    return seen


def around_fsr(model, x):
    """Return [(maps before, maps after)] of the FSR layers for images x."""
    e = model.features(x)[1]["encoder"]
    return [(model.encoder[k](functional.max_pool2d(e[k - 1], 2)), e[k]) for k in (1, 2, 3)]


def draw_fsr(file, model, x):
    """Draw the channel of the first FSR layer that varies most, of the first of the images x."""
    z, out = (maps[0] for maps in around_fsr(model, x)[0])
    c = z.var((1, 2)).argmax().item()
    F, F_out = (torch.fft.fftshift(torch.fft.fft2(each[c])) for each in (z, out))
    change = (F_out / F).where(F.abs() > 1e-3 * F.abs().max(), torch.nan)  # below, rounding sets the phase
    figure, ax = axes(4, 3, (8.4, 7), subplot_kw=NO_TICKS)
    show(ax[0, 0], x[0], "the image")
    for blank in (ax[1, 0], ax[2, 0], ax[2, 1]):
        blank.axis("off")
    low, high = torch.stack([z[c], out[c]]).aminmax()
    least, most = F.abs().clamp_min(1e-3).log10().aminmax()
    phase = {"unit": "radians", "cmap": "twilight", "vmin": -torch.pi, "vmax": torch.pi}
    for row, when, each, F_z in zip(ax, ("before", "after"), (z, out), (F, F_out)):
        show(row[1], each[c], f"channel {c} {when} FSR", "activation", cmap="gray", vmin=low, vmax=high)
        show(row[2], F_z.abs().clamp_min(1e-3).log10(), f"amplitude {when}", "log10, no unit", cmap="cividis",
             vmin=least, vmax=most)
        show(row[3], F_z.angle(), f"phase {when}", **phase)
    show(ax[2, 2], change.abs(), "amplitude after / before", "ratio", cmap="cividis", vmin=0, vmax=1.5)
    show(ax[2, 3], change.angle(), "phase after - before", **phase)
    change[change.shape[0] // 2, change.shape[1] // 2] = torch.nan  # the mean
    live = change[~change.isnan()]
    low, high, turn = *live.abs().aminmax(), live.angle().abs().max()
    save_as(figure, file, f"Amplitudes off the mean (the middle) are multiplied by {low:.3f} to {high:.3f}\n"
            f"and no phase turns by more than {turn:.0e} rad. The mean goes from {z[c].mean():.2f} to "
            f"{out[c].mean():.2f}.\nSo the map keeps its shape. White: amplitudes near 0, left out.")


def draw_weights(file, models, x):
    """Draw the mean of l_norm and l_org by layer and round, and the range from the 5 to the 95 % quantile."""
    found = [[layer.weights(z) for layer, (z, _) in zip(model.fsr, around_fsr(model, x))]
             for model in models.values()]
    figure, ax = axes(3, 1, (8.7, 3.6))
    for k, a in enumerate(ax[0]):
        for part, (name, look) in enumerate(zip(("l_norm", "l_org"), LOOKS)):
            l = torch.stack([of_round[k][part].flatten() for of_round in found])  # rounds, values
            at = torch.arange(len(l)) + 0.15 * part
            a.vlines(at, *l.quantile(torch.tensor([0.05, 0.95]), 1), color=look["color"])
            a.plot(at, l.mean(1), **look, label=name)
        a.set(title=f"FSR behind encoder level {k + 1}", ylim=(0, 1), yticks=[0, 0.25, 0.5, 0.75, 1])
        a.set_xticks(range(len(models)), [when.replace(" ", "\n") for when in models])
    ax[0, 0].set_ylabel("weight, no unit")
    ax[0, 0].legend()
    far = [max((l.mean() - 0.5).abs() for pair in of_round for l in pair) for of_round in found]
    save_as(figure, file, "Marks: means over images and channels; lines: 5 to 95 % quantile. The mean\n"
            f"furthest from one half is {far[0]:.3f} from it untrained, {far[-1]:.3f} in {[*models][-1]}.")


def draw_styles(file, models, config):
    """Draw one scene in all sites' styles, and the sites' share of the features' variance by level."""
    with tempfile.TemporaryDirectory() as folder:
        batches = scene_batches(folder, config)
    n = len(batches[0])
    figure, ((*left, a),) = axes(n + 1, 1, (2.1 * (n + 1), 2.8), subplot_kw=NO_TICKS)
    for site, ax, x in zip(sorted(scenes.TASKS[config.task][0]), left, batches[0]):
        show(ax, x[0], f"style of {site}")
    words = []
    for (when, model), look in zip(models.items(), LOOKS * len(models)):
        share = [after for _, after in style_bias(model, batches).values()]
        a.plot(share, **look, label=when)
        words.append(f"{when}: {share[0]:.2f} at the input x, {max(share):.2f} at most, at "
                     f"{LEVELS[share.index(max(share))]}, {share[-1]:.2f} at d0.")
    a.set(yticks=[0, 0.25, 0.5], ylim=(0, None))
    a.set_xticks(range(len(LEVELS)), LEVELS, fontsize=7)
    a.set_title("share of variance, no unit", fontsize=9)
    a.legend(fontsize=7, loc="lower left")
    save_as(figure, file, "Right: share of the features' variance that lies between styles, by level.\n"
            + "\n".join(words[::len(words) - 1]))


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
    figure, ax = axes(2, 2, (6.2, 6.9), subplot_kw=NO_TICKS)
    words, rounds = [], [*local]
    for row, when in zip(ax, (rounds[0], rounds[-1])):
        for a, path in zip(row, PATHS):
            rows = sorted((j, name, c[path][j]) for name, c in zip(names, local[when]) for j in c[path])
            unit = functional.normalize(torch.stack([vector for *_, vector in rows]))
            cos, same = unit @ unit.T, torch.tensor([[i == j for j, *_ in rows] for i, *_ in rows])
            seen = show(a, cos, f"{path}, {when}", cmap="cividis", vmin=-1, vmax=1)
            labels = [f"{name} {j}" for j, name, _ in rows]
            a.set_xticks(range(len(rows)), labels, rotation=90, fontsize=7)
            a.set_yticks(range(len(rows)), labels, fontsize=7)
            words.append(f"{path}, {when}: at least {cos[same].min():.2f} within a class, "
                         f"at most {cos[~same].max():.2f} between classes.")
    figure.colorbar(seen, ax=ax, shrink=0.8).set_label("cosine", fontsize=8)
    save_as(figure, file, "Each row is a site and a class, 0 the background.\n" + "\n".join(words))


def draw_cosines(file, models, local, x, y):
    """Draw cos(f, g) over an image x (1, 3, H, W) with labels y, the nearest g of each class."""
    n = len(models) + 1
    figure, ax = axes(n, 4, (1.75 * n, 7.7), subplot_kw=NO_TICKS)
    show(ax[0, 0], x[0], "image and outline")
    ax[0, 0].contour(y[0] > 0, [0.5], colors="black", linewidths=0.7)
    words = {path: [] for path in PATHS}
    for row, (path, j) in zip(ax, [(path, j) for path in PATHS for j in (1, 0)]):
        for a, (when, model) in zip(row[1:], models.items()):
            X, W, member = on_grids(model.features(x)[1], model.fusion, y, model.classes)[path]
            g = functional.normalize(aggregate_prototypes(local[when])[path][j])
            cos, inside = cosines(*squares_and_dots(X, W, g)).amax(0), member[0] == 0
            seen = show(a, cos[0], when if row is ax[0] else "", cmap="cividis", vmin=-1, vmax=1)
            if j:
                words[path].append(f"{when} {cos[inside].mean():.2f} and {cos[~inside].mean():.2f}")
        row[1].set_ylabel(f"{path},\n{'foreground' if j else 'background'} g", fontsize=9)
        row[0].axis("off")
    figure.colorbar(seen, ax=ax, shrink=0.8).set_label("cosine", fontsize=8)
    save_as(figure, file, "Each pixel's cosine with the nearest global prototype g of a class. Its mean\n"
            "for the foreground's g, on foreground and on background pixels:\n"
            + "\n".join(f"{path}: {', '.join(of_path)}" for path, of_path in words.items()))


def opened(runs):
    """Return folder and config of the run with most rounds, and {"untrained" or "round t": network} of all;
    raises BadInput for runs that differ in more than rounds, or whose network is not that of unet.py."""
    found = []
    for run in runs:
        kind = "last" if (run / "last.pt").is_file() else "best"
        config, (checkpoint,) = open_run(run, [kind])
        model = model_of(checkpoint, run / f"{kind}.pt", torch.device("cpu"))
        if not isinstance(model, UNet):
            raise BadInput(f"{run}: has no network of unet.py, whose layers are drawn; give another run")
        found.append((checkpoint["round"], run, config, model))
    found.sort(key=lambda each: each[0])
    _, last, config, _ = found[-1]
    for _, run, own, _ in found:
        check_same_config(run / "config.yaml", vars(own), vars(config), FREE_ON_RESUME | {"eval_every"})
    models = {"untrained": method_and_model(config)[1]} | {f"round {t}": model for t, *_, model in found}
    return last, config, models


@torch.no_grad()
def main():
    """Draw the pictures of one run, or of several that differ in their rounds."""
    parser = Parser(description=__doc__)
    parser.add_argument("--run", required=True, nargs="+", metavar="RUN",
                        help="run folders of train.py, and out=FOLDER for the pictures; none: FIRST RUN/tour")
    words = parser.parse_args().run
    runs = [Path(word).expanduser() for word in words if not word.startswith("out=")]
    *_, out = [runs[0] / "tour", *(word.removeprefix("out=") for word in words if word.startswith("out="))]
    run, config, models = opened(runs)
    out, trained = Path(out).expanduser(), [*models.values()][-1]
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


if __name__ == "__main__":
    run_program(main)
