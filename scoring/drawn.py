"""predictions.png: what the best round finds in the test images, the worst one of each site first."""

from functools import partial

import numpy as np

from config import VOLUMES, class_name
from scoring import pictures


def draw_predictions(sites, config, rows, find):
    """Return a picture with a row a site: of images the one of lowest Dice and one in the middle, with truth
    and errors; of volumes slices of the one of lowest Dice. rows: of cases.csv, of one checkpoint; find:
    (site, sample) -> the classes found (S, H, W). None if no site has a test image that was scored."""
    draw, drawn = of_volume if config.task in VOLUMES else of_images, []
    for site in sites:
        if scored := lowest_first(site, rows, config):
            words, tiles = draw(scored, partial(find, site), config)
            drawn.append((f"{site.name}: {words}{'' if drawn else key_of(config)}", tiles))
    titles = () if config.task in VOLUMES else 2 * ("image", "truth", "found, missed, too much")
    return pictures.contact_sheet(drawn, titles) if drawn else None


def key_of(config):
    """Return what the colours mean, behind the words of the first row."""
    names = [class_name(config, j) for j in range(config.classes)]
    return f"   ({pictures.ERRORS}{', yellow: as another class' * (len(names) > 2)}){pictures.legend(names)}"


def lowest_first(site, rows, config):
    """Return [(Dice, sample)] of a site's test images that were scored, the mean over classes and slices."""
    dice = {}
    for row in rows:
        if (row["site"], row["split"]) == (site.name, "test"):
            name = row["file"].rpartition(" slice ")[0] if config.eval_slices == "foreground" else row["file"]
            dice.setdefault(name, []).append(row["dice"])
    scored = [(float(np.mean(dice[sample.name])), sample) for sample in site.test if sample.name in dice]
    return sorted(scored, key=lambda pair: pair[0])


def of_images(scored, find, config):
    """Return words on the worst image and one in the middle, and three tiles of each."""
    chosen, tiles = {"worst": scored[0]}, []
    if len(scored) > 1:
        chosen["middle"] = scored[len(scored) // 2]
    for _, sample in chosen.values():
        image, truth = pictures.outlined_tiles(sample, sample.truth, config.classes, pictures.GREEN)
        tiles += [image, truth, pictures.coloured(sample, 0, find(sample)[0])]
    words = [f"{which} {sample.name} Dice {dice:.2f}" for which, (dice, sample) in chosen.items()]
    return ", ".join(words), tiles


def of_volume(scored, find, config):
    """Return words on the worst volume, and slices through what is organ or is found, in equal steps."""
    dice, sample = scored[0]
    found = find(sample)
    chosen, words = pictures.slices_through((found > 0) | (sample.truth > 0))
    return (f"worst {sample.name} Dice {dice:.2f}, {words}",
            [pictures.coloured(sample, s, found[s]) for s in chosen])
