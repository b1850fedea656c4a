"""Labels are looked at as labels, all files together, and volumes of any organ as they were scanned."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import predict
import train
from config import BadInput, load_config
from datasets import load_sites
from flower.site_rules import load_own_site
from inference import outputs
from scoring import evaluate as scoring
from sites import across, images, labels, readers, volumes
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import (
    CPU,
    a_config,
    a_model,
    nuclei_config,
    prostate_config,
    run_here,
    write_prostate,
)

Y, X = np.mgrid[:40, :40]
DISC = (Y - 14) ** 2 + (X - 18) ** 2 < 60
CUP = (Y - 14) ** 2 + (X - 18) ** 2 < 36
SMALL = (Y - 14) ** 2 + (X - 18) ** 2 < 6


def saved(file, values, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(file, **options)
    return file


def smoothed(mask, times=3):
    soft = 255.0 * mask
    for _ in range(times):
        for axis in (0, 1):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return soft.round().astype(np.uint8)


def palette(index, *colours):
    image = Image.fromarray(index.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in 3 * [colour]])
    return image


# ---- One mask ----

DUST = np.random.default_rng(0).integers(0, 3, DISC.shape)
OBJECTS = np.uint8(1) * DISC + np.uint8(5) * (Y > 30) + np.uint8(9) * (X > 33)  # with a number each, touching
READ = {  # name: (mask, what is foreground, words of its only warning or None)
    "plain": (np.uint8(255) * DISC, DISC, None),
    "empty": (0 * Y.astype(np.uint8), 0 * Y > 0, None),
    "classes": (np.uint8(1) * DISC + np.uint8(1) * SMALL, DISC,
                "2 labels above 0 (1, 2), which all count as foreground; set classes=3 if they are classes, or"),
    "coded classes": (np.uint8(128) * DISC + np.uint8(127) * SMALL, DISC, "2 labels above 0 (128, 255)"),
    "objects": (OBJECTS, OBJECTS > 0, "labels above 0 (1, 5, 9, 14), which all count"),
    "tiny objects": (np.uint8((Y // 4 * 10 + X // 4) * (Y % 4 < 2) * (X % 4 < 2)),
                     (Y // 4 * 10 + X // 4 > 0) & (Y % 4 < 2) & (X % 4 < 2), "99 labels above 0"),
    "uncertain rim": (np.where(SMALL, 1, 255 * DISC).astype(np.uint8), DISC, "255 mostly means uncertain"),
    "uncertain, 16 bits": (np.where(SMALL, 20, 65535 * DISC).astype(np.uint16), DISC, "65535 mostly means"),
    "smoothed": (smoothed(DISC), smoothed(DISC) > 127, "fades from 0 to 255"),
    "smoothed small": (smoothed(SMALL), smoothed(SMALL) > smoothed(SMALL).max() / 2, "fades from 0 to"),
    "layers": ((Y % 9 * (X > 5)).astype(np.uint8), (Y % 9 > 0) & (X > 5), "8 labels above 0"),
    "noise of a JPEG": (np.where(DISC, 255, DUST).astype(np.uint8), DISC, "fades from 0 to 255"),
    "shares of raters": (np.uint8(51) * np.uint8(sum((Y - 14 - r) ** 2 + (X - 18) ** 2 < 60 for r in range(5))),
                         (Y - 16) ** 2 + (X - 18) ** 2 < 60, "fades from 0 to 255"),
    "exchanged": (np.uint8(255) * ~DISC, ~DISC, "foreground fills 100 % of its border"),
    "cup is 0": (np.where(CUP, 0, np.where(DISC, 128, 255)).astype(np.uint8), ~CUP, None),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_mask_of_two_classes_means(tmp_path, name):
    mask, wanted, words = READ[name]
    found, warnings = images.read_labels(saved(tmp_path / "m.png", mask))
    assert ((found > 0) == wanted).mean() > 0.99 if "raters" in name else ((found > 0) == wanted).all()
    if name == "cup is 0":
        assert len(warnings) == 2 and "2 labels" in warnings[0] and "of its border" in warnings[1]
    else:
        assert [words in text for text in warnings] == [True] * (words is not None)
        assert all(text.startswith(f"{tmp_path}/m.png: ") for text in warnings)


def test_a_smoothed_mask_is_read_above_half(tmp_path):
    """Of small objects much more lies above 0 than above half; the warning says both."""
    found, (text,) = images.read_labels(saved(tmp_path / "m.png", smoothed(DISC)))
    assert 0.95 < found.mean() / DISC.mean() < 1.05
    above = 100 * (smoothed(DISC) > 0).mean()
    assert f"{100 * found.mean():.1f} % of it, while {above:.1f} % is above 0" in text


RAMP = range(255, -1, -1)
TABLES = {  # (mask, options), all of which show an exchanged black and white
    "palette png": (palette(np.uint8(255) * DISC, *RAMP), "m.png", {}),
    "palette tiff": (palette(np.uint8(255) * DISC, *RAMP), "m.tif", {}),
    "two colours": (palette(DISC, 255, 0), "m.tif", {}),
    "white is zero": (Image.fromarray(np.uint8(255) * ~DISC), "m.tif", {"tiffinfo": {262: 0}}),
    "fax": (Image.fromarray(~DISC), "m.tif", {"compression": "group4", "tiffinfo": {262: 0}}),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_lookup_table_that_inverts_is_refused(tmp_path, name):
    """What is shown as white is foreground, unless it fills the border: then it could be read two ways."""
    image, file, options = TABLES[name]
    with pytest.raises(BadInput, match="m.*: its lookup table shows 0 as white, and white fills its border"):
        images.read_labels(saved(tmp_path / file, image, **options))


def test_labels_that_are_nearly_whole(tmp_path):
    """What a scale or a spline leaves is rounded; what is soft or lost by rounding is refused."""
    true = np.float32(DISC) + SMALL + 2 * (Y > 36)
    for off in (0.0078 * true, np.random.default_rng(0).normal(0, 1e-5, true.shape)):
        found = []
        assert (labels.as_whole((true + off).astype(np.float32), "m", found) == true).all()
        assert "nearly whole" in found[0]
    found = []
    assert (labels.as_whole(true, "m", found) == true).all() and found == []
    for wrong in (0.25 * true, true + 0.1, true / 255):
        with pytest.raises(BadInput, match="m: its labels are not whole numbers, one is .*without a scale"):
            labels.as_whole(wrong.astype(np.float32), "m", [])


def test_labels_that_nibabel_scaled(tmp_path):
    true = np.zeros((12, 12, 4))
    true[2:8, 2:8, 1], true[2:8, 2:8, 2], true[4:8, 4:8, 3] = 1, 2, 4
    eight = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header
    nibabel.save(nibabel.Nifti1Image(true, np.eye(4), eight), tmp_path / "m.nii")
    assert abs(nibabel.load(tmp_path / "m.nii").get_fdata() - true).max() > 0.003
    found = volumes.read_labels(tmp_path / "m.nii")[0]
    assert sorted(np.unique(found)) == [0, 1, 2, 4] and (found > 0).sum() == (true > 0).sum()


def test_uncertain_pixels_beside_classes_are_named(tmp_path):
    file = saved(tmp_path / "m.png", np.where(SMALL, 1, 255 * DISC).astype(np.uint8))
    with pytest.raises(BadInput, match="label 255 .which mostly means uncertain: save it as 0., but classes"):
        labels.as_classes(images.read_labels(file, 3)[0], file, 3)


# ---- Blank pictures ----

def noise(low, high, shape=(40, 40, 3), kind=np.uint8):
    return np.random.default_rng(0).integers(low, high, shape).astype(kind)


PAPER = noise(243, 248)
SPECK = PAPER.copy()
SPECK[8:12, 8:12] = 90
PICTURES = {  # name: (pixels, whether they are blank)
    "one value": (np.full((40, 40), 7, np.uint8), True), "paper": (PAPER, True), "dark": (noise(0, 6), True),
    "coloured paper": (np.uint8([10, 0, 0]) + noise(236, 241), True),
    "noise": (noise(232, 248, (400, 400)), True),  # the means of whole spots differ little, those of their rows more
    "paper of 16 bits": (noise(62000, 62400, (40, 40), np.uint16), True),
    "a speck": (SPECK, False), "stripes": (np.uint8(255) * (Y % 4 == 0), False),
    "one colour differs": (PAPER - np.uint8([0, 60, 0]) * DISC[..., None], False),
    "dim": (np.uint8(12) * DISC + noise(0, 3, (40, 40)), False),
    "an offset of 16 bits": (np.uint16(32768 + 600 * DISC) + noise(0, 40, (40, 40), np.uint16), False),
}


@pytest.mark.parametrize("name", PICTURES)
def test_blank_pictures_are_read_as_zeros(tmp_path, name):
    pixels, blank = PICTURES[name]
    disc = np.resize(DISC, pixels.shape[:2])
    file, mask = saved(tmp_path / "i.png", pixels), saved(tmp_path / "m.png", np.uint8(0) * disc)
    image, _, _, found = images.read_pair(file, mask)
    assert image.any() != blank and [("is blank" in text) for text in found] == [True] * blank
    saved(mask, np.uint8(1) * disc)
    if blank:
        with pytest.raises(BadInput, match="i.png: has one value everywhere, or nearly so, but its mask"):
            images.read_pair(file, mask)
    else:
        assert images.read_pair(file, mask)[0].max() == 1


def test_a_blank_tile_trains_and_its_prediction_is_empty(tmp_path, monkeypatch, capsys):
    folder = write_nuclei(tmp_path / "d", ("a",), cases=3)
    saved(folder / "a" / "images" / "1.png", PAPER[:32, :32])
    saved(folder / "a" / "masks" / "1.png", np.zeros((32, 32), np.uint8))
    train.train(tiny_config(folder, tmp_path / "run", "rounds=1"))
    assert "warning: a: " in (err := capsys.readouterr().err) and "1.png: is blank" in err
    code, out, err = run_here(monkeypatch, capsys, predict, tmp_path, "--run", "run",
                              folder / "a" / "images", "out=p", "test_stats=case", "probabilities=true")
    assert code == 0 and f"note: {folder}/a/images/1.png: nothing is looked for" in out and "is blank" in err
    assert not np.asarray(Image.open(tmp_path / "p" / "1.png")).any()
    assert np.load(tmp_path / "p" / "1.png.npz")["foreground"].max() == 0


# ---- All files together ----

def test_the_same_picture_twice(tmp_path, capsys):
    """Those that train and test come first; another name or format hides nothing, blank ones may repeat."""
    folder = write_nuclei(tmp_path / "d")
    a, b = folder / "a", folder / "b"
    for kind, source, target in (("images", a, b), ("masks", a, b)):
        shutil.copy(source / kind / "2.png", target / kind / "7.png")
    Image.open(a / "images" / "2.png").save(b / "images" / "7.bmp")
    (b / "images" / "7.png").unlink()
    for number in "01":
        saved(a / "images" / f"{number}.png", PAPER)
        saved(a / "masks" / f"{number}.png", 0 * DISC.astype(np.uint8))
    sites = load_sites(nuclei_config(folder))
    line, = (line for line in capsys.readouterr().err.splitlines() if "the same picture" in line)
    assert "b/7.bmp: is the same picture as a/2.png" in line and "in all" not in line
    parts = {site.name: [(part, sample) for part in ("train", "test") for sample in getattr(site, part)]
             for site in sites}
    one, two, three = (sample for _, sample in parts["b"][:3])
    texts = across.same_pictures({"x": [("train", one), ("train", two), ("train", three)],
                                  "y": [("train", one), ("val", two), ("test", three)]})
    assert [re.findall("one is in .* and one in .*;", text) for text in texts] == [
        ["one is in train and one in test;"], ["one is in train and one in val;"], []]


def test_pictures_that_only_look_alike_are_not_the_same(tmp_path):
    folder = write_nuclei(tmp_path / "d", ("a",), cases=2)
    pixels = np.asarray(Image.open(folder / "a" / "images" / "0.png")).copy()
    pixels[1, 1], pixels[2, 2] = pixels[2, 2], pixels[1, 1]
    saved(folder / "a" / "images" / "1.png", pixels)
    sites = load_sites(nuclei_config(folder))
    assert across.compare(sites, nuclei_config(folder)) == []


@pytest.mark.parametrize("place", ["site", "a/images/9.png", "a/masks/0.png", "b/more"])
def test_a_link_to_nowhere(tmp_path, monkeypatch, capsys, place):
    folder = write_nuclei(tmp_path / "d")
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to("gone")
    with pytest.raises(BadInput, match=f"{place}: is a link to nowhere .gone., mend or remove it"):
        load_sites(nuclei_config(folder))
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, folder, "--task", "nuclei")
    assert code == 1 and f"{place}: is a link to nowhere" in out


def test_memory_is_asked_for_before_anything_is_decoded(tmp_path, monkeypatch):
    """The sum of many small files is blamed, not one of them; a file that alone is too large is named."""
    folder = write_nuclei(tmp_path / "d")
    monkeypatch.setattr(readers, "reader_of", lambda _: pytest.fail("nothing may be decoded"))
    for free, words in ((100_000, r"d: there is not enough memory to decode it: it takes 0.00 GB"),
                        (20_000, r"a/images/0.png: there is not enough memory to decode it")):
        monkeypatch.setattr(across, "free_memory", lambda free=free: free)
        with pytest.raises(BadInput, match=words):
            load_sites(nuclei_config(folder))
    entry = SimpleNamespace(image=folder / "a" / "images" / "0.png")
    kept, decoding = across.size_of(entry, nuclei_config(folder, "image_size=64"))
    assert (kept, decoding) == (64 * 64 * 13 + 32 * 32, 8 * 3 * 32 * 32)
    entry = SimpleNamespace(image=write_prostate(tmp_path / "v") / "a" / "Case0.nii.gz")
    assert across.size_of(entry, prostate_config(tmp_path / "v"))[0] == 4 * 32 * 32 * 5 + 4 * 32 * 32


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says how much memory is free")
def test_free_memory_is_the_least_that_is_left(tmp_path, monkeypatch):
    assert 0 < across.free_memory() < 2**44
    monkeypatch.setattr(across, "CGROUP", tmp_path)
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 9999\n")
    (tmp_path / "memory.max").write_text("51000\n")
    assert across.free_memory() == 50000
    (tmp_path / "memory.max").write_text("max\n")
    assert across.free_memory() > 50000


# ---- Classes that are nowhere ----

def write_classes(folder, of_site):
    """Sites of 5 pictures whose masks have the labels that `of_site` names."""
    write_nuclei(folder, tuple(of_site))
    for site, drawn in of_site.items():
        for i in range(5):
            mask = sum(np.uint8(j) * ((Y[:32, :32] // 8 == j) & (X[:32, :32] > 8 + i)) for j in drawn)
            saved(folder / site / "masks" / f"{i}.png", mask.astype(np.uint8))
    return folder


def test_a_class_that_no_mask_has_is_not_scored(tmp_path, monkeypatch, capsys):
    folder = write_classes(tmp_path / "d", {"a": (1, 3), "b": (1,)})
    words = ("task=images", "classes=4", "class_names=[disc,cup,vessel]")
    config = nuclei_config(folder, *words)
    sites = load_sites(config)
    err = capsys.readouterr().err
    assert "class 2 (cup): no mask of any site has it; it is left out of all scores" in err
    assert "2 warnings in all" in err
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, folder, "--task", "images", *words[1:])
    assert code == 0 and "class 3 (vessel): site b never draws it, so it trains there as background" in out
    settings = a_config(task="images", classes=4, class_names=["disc", "cup", "vessel"])
    rows, model = [], a_model(a_config())

    def disc_alone(model, site, split, *_):
        return ((sample, torch.tensor(sample.truth * (sample.truth == 1))) for sample in getattr(site, split))
    monkeypatch.setattr(scoring, "predictions", disc_alone)
    scores = scoring.evaluate(model, sites, "test", settings, CPU, {}, {}, rows=rows)
    assert scores["mean"]["classes"]["cup"] == {"dice": None, "hd95": None, "assd": None, "misses": None,
                                                "images": 0}
    a, b = scores["sites"].values()
    assert (a["dice"], b["dice"], scores["mean"]["dice"]) == (0.5, 1, 0.75)  # of disc and vessel
    assert a["images"] == b["images"] == 1 and {row["class"] for row in rows} == {"disc", "vessel"}
    quick = scoring.validate(model, model.state_dict(), {}, sites, settings, CPU)[0]
    assert quick["mean"]["dice"] == 0.75 and quick["mean"]["classes"]["cup"]["dice"] is None


def test_a_run_with_a_class_that_nobody_has(tmp_path):
    folder = write_classes(tmp_path / "d", {"b": (2,), "a": (2,)})
    train.train(tiny_config(folder, tmp_path / "run", "task=images", "classes=3", "rounds=1"))
    a = json.loads((tmp_path / "run" / "result.json").read_text())["last"]["test"]["sites"]["a"]
    assert a["images"] == 1 and a["classes"]["1"]["dice"] is None and a["dice"] == a["classes"]["2"]["dice"]


def test_a_hospital_alone_hears_of_a_class_that_it_never_draws(tmp_path, capsys):
    folder = write_classes(tmp_path / "d", {"a": (1,)})
    site = load_own_site("a", nuclei_config(folder / "a", "task=images", "classes=3"))
    said = capsys.readouterr().err
    assert "class 2: site a never draws it" in said and "no mask" not in said and site.undrawn == set()


# ---- Volumes of any organ ----

PLANES = {  # spacing of x, y, z: (slice, row, column)
    (0.5, 0.5, 3): (2, 1, 0), (4, 0.5, 0.5): (0, 2, 1), (0.5, 2, 0.5): (1, 2, 0), (1, 1, 1): (2, 1, 0),
    (0.7, 0.7, 0.6): (2, 1, 0), (1.0, 0.98, 0.98): (2, 1, 0), (4, 4, 0.5): (2, 1, 0), (1.2, 1, 1): (0, 2, 1)}


@pytest.mark.parametrize("sizes", PLANES)
def test_slices_are_cut_across_the_largest_spacing(sizes):
    assert volumes.slice_order(sizes) == PLANES[sizes]


@pytest.mark.parametrize("stored", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("sizes", [(0.5, 0.6, 3.0), (4.0, 0.5, 0.6), (0.5, 4.0, 0.6)])
def test_a_mask_comes_back_on_the_files_own_grid(tmp_path, sizes, stored):
    """However its axes are stored, slices are the planes that were scanned, and the way back is exact."""
    affine = np.diag((*sizes, 1)) * (-1, 1, -1, 1)
    affine = affine[:, [*stored, 3]]
    mask = np.random.default_rng(0).integers(0, 2, [(9, 8, 7)[axis] for axis in stored]).astype(np.uint8)
    image = (50 * mask + np.arange(mask.size).reshape(mask.shape) % 7).astype(np.int16)
    for name, array in (("i", image), ("m", mask)):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii")
    pixels, truth, spacing, _ = volumes.read_pair(tmp_path / "i.nii", tmp_path / "m.nii")
    assert spacing[0] == max(sizes) and len(truth) == (9, 8, 7)[sizes.index(max(sizes))]
    assert pixels.shape == (len(truth), 1, *truth.shape[1:]) == volumes.shape_of(tmp_path / "i.nii")
    assert pixels[:, 0][truth == 1].min() > pixels[:, 0][truth == 0].max()
    content = outputs.as_mask(truth, tmp_path / "i.nii", a_config(task="volumes"))
    back = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
    assert (np.asarray(back.dataobj) == mask).all() and np.allclose(back.affine, affine)


def test_the_report_names_the_plane(tmp_path, monkeypatch, capsys):
    folder = write_prostate(tmp_path / "d")
    for file in folder.rglob("*.nii.gz"):
        image = nibabel.load(file)
        turned = np.asarray(image.dataobj).transpose(2, 0, 1)
        nibabel.save(nibabel.Nifti1Image(turned, np.diag((4, .5, .5, 1))), file)
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, folder, "--task", "volumes")
    assert code == 0 and "32 x 32 x 4 sagittal slices (3)" in out and "0.5 x 0.5 x 4 mm (3)" in out


def ct(k=0):
    """A body of 40 with an organ of 100, bone, air, and a scanner's padding around."""
    r, values = (X - 20) ** 2 + (Y - 20) ** 2, np.random.default_rng(k).normal(40, 8, (40, 40, 3))
    values[DISC], values[20:22, 20:26] = 100, 900
    values[r > 16**2], values[r > 19**2] = -1000, -3024
    return values


def test_a_window_shows_what_padding_hides():
    found = []
    without = volumes.prepared(ct(), "v", found, (2, 1, 0))
    assert "v: its darkest value, -3024, lies far below the others" in found[0] and "set window" in found[0]
    assert without[:, 0].transpose(2, 1, 0)[DISC].mean() - without[1, 0, 16, 30] < 0.05
    found = []
    inside = volumes.prepared(ct(), "v", found, (2, 1, 0), [-160, 240])[:, 0].transpose(2, 1, 0)
    assert found == [] and inside.min() == 0 and inside.max() == 1 and inside.dtype == np.float32
    assert inside[DISC].mean() == pytest.approx(260 / 400, abs=0.01)
    with pytest.raises(BadInput, match="v: its values, -3024 to 900, show nothing between 1000 and 2000"):
        volumes.prepared(ct(), "v", [], (2, 1, 0), [1000, 2000])


def test_ct_without_a_window_is_a_warning_of_check_data(tmp_path, monkeypatch, capsys):
    folder = write_prostate(tmp_path / "d", ("a",))
    def report(*words):
        return run_here(monkeypatch, capsys, check_data, tmp_path, folder, "--task", "volumes", *words)
    assert "window" not in report()[1]
    for file in folder.rglob("Case?.nii.gz"):
        volume = nibabel.load(file)
        nibabel.save(nibabel.Nifti1Image(volume.get_fdata() * 5 - 1000, volume.affine), file)
    code, out, _ = report()
    assert code == 0 and "\n1 warning\n  a: values from -" in out and "look like CT" in out
    assert "warning" not in report("window=[-1000,1000]")[1]


def test_warnings_that_many_files_share_are_one_line_of_check_data():
    few = [f"d/a/{k}.png: is odd" for k in range(3)]
    assert check_data.in_short([*few, "a: 3 images"]) == [*few, "a: 3 images"]
    line, other = check_data.in_short([*few, "d/a/3.png: is odd", "d/b/3.png: is odd"])
    assert line == "d/a/0.png: is odd; so with 3 others there: 1.png, 2.png, 3.png" and other == "d/b/3.png: is odd"


@pytest.mark.parametrize("spoil, warned", [
    (lambda v: v, False), (lambda v: np.where(np.arange(v.size).reshape(v.shape) == 5, -30000, v), True),
    (lambda v: np.where(np.arange(v.size).reshape(v.shape) % 9, v, -1500), True),
    (lambda v: np.where(v < 200, 0, v), False), (lambda v: np.maximum(v, 500), False)])
def test_a_darkest_value_far_below_the_others(spoil, warned):
    found = []
    values = np.random.default_rng(0).gamma(2, 200, (20, 20, 5))  # as an MRI's are
    volumes.check_darkest(spoil(values), "v", found)
    assert len(found) == warned


def test_window_is_a_key_of_volumes(tmp_path):
    given = {"task": "volumes", "data": "d", "out": "o"}
    assert load_config(given, ["window=[-160, 240]"]).window == [-160, 240]
    assert load_config(given, ["window=none"]).window is None is load_config(given).window
    for wrong in ("[240, -160]", "[1]", "[1, 1]", "5", "[a, b]", "true"):
        with pytest.raises(BadInput, match="window: expected two numbers, the lower one first, such .* or none"):
            load_config(given, [f"window={wrong}"])
    with pytest.raises(BadInput, match="window: .* is for volumes, set it to none"):
        load_config(given | {"task": "images"}, ["window=[0, 1]"])
    folder = write_prostate(tmp_path / "d", ("a",))
    sites = [load_sites(prostate_config(folder, *words))[0] for words in ((), ("window=[20, 60]",))]
    plain, inside = (site.train[0].images for site in sites)
    assert (inside == 1).float().mean() > 0.03 > (plain == 1).float().mean()


def test_predict_uses_the_runs_window(tmp_path, monkeypatch, capsys):
    folder = write_prostate(tmp_path / "d", ("a",))
    train.train(tiny_config(folder, tmp_path / "run", "task=prostate", "rounds=1", "window=[20, 60]"))
    seen, read = [], volumes.read_alone
    monkeypatch.setattr(volumes, "read_alone", lambda file, window: seen.append(window) or read(file, window))
    code, _, err = run_here(monkeypatch, capsys, predict, tmp_path, "--run", "run",
                            folder / "a" / "Case0.nii.gz")
    assert (code, err) == (0, "") and seen and all(window == [20, 60] for window in seen)
    assert os.listdir(tmp_path / "run" / "predictions")
