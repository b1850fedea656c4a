"""Tests of the data: pixel formats, volumes, layouts, splits, batches, generated sites, the report."""

import gzip
import itertools
import json
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform
from PIL import Image
from torch.nn import functional

import check_data
import datasets
from config import BadInput
from datasets import batches, load_sites, samples_of, seeded, splits_of, warnings_on
from sites import demo_data, readers, scenes
from sites.readers import SPLITS, Sample
from test_fedbcs import write_nuclei
from tests.helpers import nuclei_config, prostate_config, run_quietly, write_prostate

# ---- Data ----

def one_sample(folder, task="nuclei", size=32):
    """The first sample of the folder's only site, read alone."""
    entries, problems = datasets.list_files(folder, task)
    assert not problems
    (site, found), = entries.items()
    return readers.read_sample(found[0], site, task, size)


RAMP = np.arange(40 * 48, dtype=np.float64).reshape(40, 48) / (40 * 48 - 1)


@pytest.mark.parametrize("mode, name", [
    ("L", "x.png"), ("RGB", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("LA", "x.png"), ("I;16", "x.png"),
    ("L", "x.tif"), ("F", "x.tiff"), ("RGB", "x.BMP"), ("RGB", "x.jpg"), ("CMYK", "x.jpeg")])
def test_pixel_formats(tmp_path, mode, name):
    """Every format gives the same picture, scaled to [0, 1] over all its channels; alpha is dropped."""
    for kind in ("images", "masks"):
        (tmp_path / "a" / kind).mkdir(parents=True)
    byte = (255 * RAMP).round().astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray((60000 * RAMP + 100).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray((3 * RAMP - 1).astype(np.float32))
    else:
        image = Image.fromarray(byte).convert("RGB" if mode == "CMYK" else "L").convert(mode)
        if mode in ("RGBA", "LA"):
            image.putalpha(77)
    image.save(tmp_path / "a" / "images" / name)
    Image.fromarray(np.uint8(RAMP > 0.5)).convert("RGBA").save(tmp_path / "a" / "masks" / "X.png")
    sample = one_sample(tmp_path, size=48)
    assert sample.images.shape == (1, 3, 48, 48) and sample.images.dtype == torch.float32
    assert (sample.truth == (RAMP > 0.5)).all() and sample.spacing == (1, 1, 1)
    expected = functional.interpolate(torch.tensor(RAMP)[None, None].float(), (48, 48), mode="bilinear")
    lossy = 0.06 if name.endswith(("jpg", "jpeg")) else 0.012
    assert (sample.images - expected).abs().max() < lossy
    assert sample.images.min() >= 0 and sample.images.max() <= 1


def test_masks_are_above_zero_and_jpeg_masks_above_half(tmp_path):
    folder = write_nuclei(tmp_path, ("a",), cases=1)
    file = folder / "a" / "masks" / "0.png"
    disc = np.asarray(Image.open(file)) > 0
    labels = disc * np.uint8(1)
    labels[16:] *= 2  # labels 1 and 2 are merged
    palette = Image.fromarray(labels).convert("P")
    palette.putpalette([0, 0, 0, 0, 0, 0, 9, 9, 9])  # label 1 is painted black
    palette.putdata(labels.ravel().tolist())
    for mask in (Image.fromarray(labels), palette):
        mask.save(file)
        assert (one_sample(folder).truth == disc).all()
    file.unlink()
    Image.fromarray(np.uint8(255) * disc).save(file.with_suffix(".jpg"), quality=30)
    assert (one_sample(folder).truth ^ disc).mean() < 0.01  # its noise above 0 is not foreground


def test_resizing_keeps_areas_and_does_not_alias(tmp_path):
    folder = write_nuclei(tmp_path, ("a",), cases=1, size=256)
    stripes = np.tile(np.uint8([[255], [0], [0], [0]]), (64, 256))
    Image.fromarray(stripes).save(folder / "a" / "images" / "0.png")
    mask = np.zeros((256, 256), np.uint8)
    mask[10:118, 16:200] = 255
    Image.fromarray(mask).save(folder / "a" / "masks" / "0.png")
    sample = one_sample(folder, size=64)
    assert (sample.images[:, :, 4:-4] - 0.25).abs().max() < 0.05  # stripes become grey
    assert sample.masks.float().mean() == pytest.approx((mask > 0).mean(), rel=0.02)
    rows = sample.masks[0].any(1).nonzero()
    assert (rows.min(), rows.max()) == (2, 28)  # rows 10, 14, .., 114


def test_a_constant_image_is_refused(tmp_path):
    folder = write_nuclei(tmp_path, ("a",), cases=1)
    Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "a" / "images" / "0.png")
    with pytest.raises(BadInput, match=r"0.png: has one value everywhere, or nearly so, but its mask"):
        one_sample(folder)


def test_volumes_follow_their_header(tmp_path):
    """A volume stored in another axis order and direction gives the same sample and spacing."""
    rng, samples = np.random.default_rng(0), []
    volume = rng.integers(0, 1000, (20, 24, 6)).astype(np.int16)
    volume[0, 0, 0] = 30000  # above the 99 % quantile
    mask = np.zeros(volume.shape, np.uint8)
    mask[4:10, 5:20, 1:3], mask[5:8, 6:9, 2] = 1, 2  # two labels are merged
    for number, codes in enumerate(("LPS", "RAS", "SLA", "PIR")):
        site = tmp_path / str(number) / "a"
        site.mkdir(parents=True)
        for name, array in (("case00.NII.GZ", volume), ("Case00_Segmentation.nii.gz", mask)):
            image = nibabel.Nifti1Image(array, np.diag([-0.5, -0.6, 3.0, 1.0]))  # x to left, y to back
            turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
            (site / name).write_bytes(gzip.compress(image.as_reoriented(turn).to_bytes()))
        samples.append(one_sample(tmp_path / str(number), "prostate", 24))
    for sample in samples:
        assert sample.spacing == pytest.approx((3, 0.6, 0.5))
        assert (sample.truth == (mask > 0).transpose(2, 1, 0)).all()
        torch.testing.assert_close(sample.images, samples[0].images)
    clipped = np.minimum(volume, np.quantile(volume, 0.99)).transpose(2, 1, 0)
    own = functional.interpolate(torch.tensor(clipped / clipped.max()).float()[:, None], (24, 24),
                                 mode="bilinear", antialias=True)
    torch.testing.assert_close(samples[0].images[:, 1], own[:, 0], atol=1e-4, rtol=0)


def test_spacing_in_another_unit(tmp_path):
    folder = write_prostate(tmp_path / "d", ("a",), cases=1)
    for file in (folder / "a").iterdir():
        image = nibabel.load(file)
        image = nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([-5e-4, -5e-4, 3e-3, 1]))
        image.header.set_xyzt_units("meter")
        nibabel.save(image, file)
    assert one_sample(folder, "prostate").spacing == pytest.approx((3, 0.5, 0.5))


def test_three_slice_stacks_repeat_the_edge():
    slices = torch.arange(4.0).view(4, 1, 1).expand(4, 2, 2)
    found = readers.three_slice_stacks(slices)
    assert found[:, :, 0, 0].tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]
    assert readers.three_slice_stacks(slices[:1])[:, :, 0, 0].tolist() == [[0, 0, 0]]
    assert found.untyped_storage().nbytes() == 6 * 4 * 4  # a view of six slices, not twelve


def test_training_takes_slices_with_foreground_and_scoring_whole_volumes(tmp_path):
    site = load_sites(prostate_config(write_prostate(tmp_path / "d")))[0]
    assert [(sample.name, s) for sample, s in site.train_slices] == [
        (site.train[0].name, 1), (site.train[0].name, 2)]
    assert all(len(sample.truth) == 4 for sample in site.test)


def test_layouts(tmp_path):
    """images/ + masks/, and the TNBC download, whose slides are the cases."""
    plain = write_nuclei(tmp_path / "d", ("a",))
    for slide in ("01", "02", "03"):
        for kind in ("Slide", "GT"):
            (plain / "tnbc" / f"{kind}_{slide}").mkdir(parents=True)
            for i in (1, 2):
                source = plain / "a" / ("images" if kind == "Slide" else "masks") / f"{i}.png"
                (plain / "tnbc" / f"{kind}_{slide}" / f"{i}.png").write_bytes(source.read_bytes())
    (plain / "a" / "images" / ".DS_Store").write_text("")
    (plain / ".hidden").mkdir()
    a, t = load_sites(nuclei_config(plain))
    assert [site.name for site in (a, t)] == ["a", "tnbc"]
    assert len(a.train) == 3 and len(t.train) == 2  # one slide of two images
    assert {sample.case for sample in datasets.samples_of(t)} == {"Slide_01", "Slide_02", "Slide_03"}
    shutil.rmtree(plain / "tnbc" / "Slide_02")
    with pytest.raises(BadInput, match="tnbc/GT_02/1.png: has no image of that name"):
        load_sites(nuclei_config(plain))


def cut(file, size=None):
    file.write_bytes(file.read_bytes()[:size or file.stat().st_size // 2])


def save_array(file, array):
    Image.fromarray(array).save(file)


NUCLEI_FAULTS = [
    (lambda a: cut(a / "images" / "1.png"), "images/1.png: cannot be read"),
    (lambda a: cut(a / "masks" / "1.png", 10), "masks/1.png: cannot be read"),
    (lambda a: (a / "images" / "1.png").write_text("no"), "images/1.png: cannot be read"),
    (lambda a: (a / "masks" / "1.png").unlink(), "images/1.png: has no mask"),
    (lambda a: (a / "images" / "1.png").unlink(), "masks/1.png: has no image"),
    (lambda a: save_array(a / "masks" / "1.png", np.zeros((31, 32), np.uint8)), r"masks/1.png: its size \(31, 32\)"),
    (lambda a: save_array(a / "images" / "1.jpg", np.zeros((32, 32), np.uint8)), "1.png: images/1.jpg is a second"),
    (lambda a: [(a / "masks" / "1.png").unlink(), Image.fromarray(
        np.full((32, 32), np.nan, np.float32)).save(a / "masks" / "1.tif")], "masks/1.tif: has NaN"),
    (lambda a: (a / "images" / "0.png").rename(a / "0.png"), "a/masks/0.png: has no image"),
    (lambda a: [shutil.rmtree(a / kind) for kind in ("images", "masks")], "a: has no images"),
    (lambda a: [(a / "images" / "1.png").unlink(), Image.fromarray(
        np.full((32, 32), np.nan, np.float32)).save(a / "images" / "1.tif")], "images/1.tif: has NaN"),
    (lambda a: [(a / "images" / "1.png").unlink(), Image.new("L", (32, 32)).save(
        a / "images" / "1.tif", save_all=True, append_images=[Image.new("L", (32, 32))])],
     "images/1.tif: has 2 pages"),
]


@pytest.mark.parametrize("number", range(len(NUCLEI_FAULTS)))
def test_bad_images(tmp_path, number):
    spoil, words = NUCLEI_FAULTS[number]
    folder = write_nuclei(tmp_path / "d")
    spoil(folder / "a")
    with pytest.raises(BadInput, match=words) as problem:
        load_sites(nuclei_config(folder))
    assert "\n" not in str(problem.value) and str(problem.value).count(", ") + str(problem.value).count(
        ";") >= 1  # it says what to do


def save_volume(file, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-.5, -.5, 3, 1]) if affine is None else affine), file)


VOLUME = np.arange(32 * 32 * 4, dtype=np.float32).reshape(32, 32, 4)
MASK = np.ones((32, 32, 4), np.uint8)
MASK[:4] = 0
PROSTATE_FAULTS = [
    (lambda a: cut(a / "Case0.nii.gz"), "Case0.nii.gz: cannot be read"),
    (lambda a: cut(a / "Case0_segmentation.nii.gz", 30), "Case0_segmentation.nii.gz: cannot be read"),
    (lambda a: (a / "Case0.nii.gz").write_text("no"), "Case0.nii.gz: cannot be read"),
    (lambda a: save_volume(a / "Case0.nii.gz", VOLUME.astype(np.complex64)), "Case0.nii.gz: .*complex"),
    (lambda a: save_volume(a / "Case0.nii.gz", np.stack([VOLUME, VOLUME], 3)),
     "Case0.nii.gz: is 4-D"),
    (lambda a: save_volume(a / "Case0.nii.gz", VOLUME[..., 0]), "Case0.nii.gz: is 2-D"),
    (lambda a: save_volume(a / "Case0.nii.gz", np.where(VOLUME == 5, np.nan, VOLUME)), "Case0.nii.gz: has NaN"),
    (lambda a: save_volume(a / "Case0.nii.gz", np.where(VOLUME == 5, np.inf, VOLUME)), "infinite"),
    (lambda a: save_volume(a / "Case0_segmentation.nii.gz", MASK[:-1]), "Case0_segmentation.nii.gz: its size"),
    (lambda a: save_volume(a / "Case0_segmentation.nii.gz", MASK, np.diag([.5, -.5, 3, 1])),
     "Case0_segmentation.nii.gz: its header"),
    (lambda a: (a / "Case0_segmentation.nii.gz").unlink(), "Case0.nii.gz: has no mask"),
    (lambda a: (a / "Case0.nii.gz").unlink(), "Case0_segmentation.nii.gz: has no image"),
    (lambda a: save_volume(a / "case0.nii", VOLUME), "case0.nii: a/Case0.nii.gz is a second image"),
]


@pytest.mark.parametrize("number", range(len(PROSTATE_FAULTS)))
def test_bad_volumes(tmp_path, number):
    spoil, words = PROSTATE_FAULTS[number]
    folder = write_prostate(tmp_path / "d")
    spoil(folder / "a")
    with pytest.raises(BadInput, match=words) as problem:
        load_sites(prostate_config(folder))
    assert "\n" not in str(problem.value)


def test_a_site_whose_training_cases_are_healthy_trains_on_all_their_slices(tmp_path, capsys):
    folder = write_prostate(tmp_path / "d", ("a",))
    train_case, = splits_of(load_sites(prostate_config(folder)))["a"]["train"]
    save_volume(folder / "a" / f"{train_case}_segmentation.nii.gz", 0 * MASK)
    site, = load_sites(prostate_config(folder))
    assert len(site.train_slices) == 4
    assert "no mask of its training cases has foreground (> 0)" in capsys.readouterr().err


def test_a_healthy_site_or_one_of_one_picture_trains_or_is_left_out(tmp_path, capsys):
    folder = write_nuclei(tmp_path / "d", ("a", "b", "c"))
    for file in (folder / "a" / "masks").iterdir():
        save_array(file, np.zeros((32, 32), np.uint8))
    for file in (*folder.glob("b/images/*"), *folder.glob("b/masks/*")):
        if file.stem != "0":
            file.unlink()
    a, b, _ = load_sites(nuclei_config(folder))
    out, err = capsys.readouterr()
    assert len(a.train_slices) == 3 and err.count("\n") == 1
    assert "a/masks: no mask of its training cases has foreground" in err
    assert splits_of([b]) == {"b": {"train": ["0"], "val": [], "test": []}}
    assert "b: has 1 case, so it trains alone" in out
    assert splits_of(load_sites(nuclei_config(folder), splits_of([a, b, _]))) == splits_of([a, b, _])
    load_sites(nuclei_config(folder, "hold_out=a"))
    assert "a/masks: no mask of its cases has foreground" in capsys.readouterr().err
    load_sites(nuclei_config(folder, "hold_out=c"))
    assert "c/masks" not in capsys.readouterr().err
    (folder / "a" / "images" / "0.png").write_bytes(b"broken, and never looked at")
    capsys.readouterr()
    sites = load_sites(nuclei_config(folder, "leave_out=[a, b]"))
    out, err = capsys.readouterr()
    assert [site.name for site in sites] == ["c"] and "left out: a, b\n" in out and err == ""
    (folder / "away").symlink_to("/not mounted")
    assert len(load_sites(nuclei_config(folder, "leave_out=[a, b, away]"))) == 1
    (folder / "away").unlink()
    with pytest.raises(BadInput, match="leave_out: .* has no site z"):
        load_sites(nuclei_config(folder, "leave_out=[z]"))
    for file in (folder / "c" / "masks").iterdir():
        save_array(file, np.zeros((32, 32), np.uint8))
    with pytest.raises(BadInput, match="no mask of any site has foreground"):
        load_sites(nuclei_config(folder, "leave_out=[a, b]"))


# ---- Splits ----

@pytest.mark.parametrize("n, counts", [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (7, (5, 1, 1)),
                                       (8, (4, 2, 2)), (12, (8, 2, 2)), (13, (7, 3, 3)), (50, (30, 10, 10))])
def test_split_counts(n, counts, capsys):
    cases = [f"c{i}" for i in range(n)]
    split = datasets.split_cases("a", cases, nuclei_config("unused"))
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == counts
    assert sorted(itertools.chain(*split.values())) == sorted(cases)  # nobody twice, nobody left out
    assert ("without validation" in capsys.readouterr().out) == (n == 2)
    assert split == datasets.split_cases("a", cases[::-1], nuclei_config("unused"))
    if n > 7:
        assert split != datasets.split_cases("a", cases, nuclei_config("unused", "seed=1"))
        assert split != datasets.split_cases("b", cases, nuclei_config("unused"))


@pytest.mark.parametrize("K, n", [(3, 3), (4, 11), (5, 20), (4, 3), (9, 5)])
def test_folds_partition_the_cases(K, n):
    cases = [f"c{i}" for i in range(n)]
    folds = [datasets.split_cases("a", cases, nuclei_config("unused", f"folds={K}", f"fold={k}"))
             for k in range(K)]
    assert sorted(itertools.chain(*(fold["test"] for fold in folds))) == sorted(cases)
    for k, fold in enumerate(folds):
        assert sorted(itertools.chain(*fold.values())) == sorted(cases)
        assert fold["val"] == folds[(k + 1) % K]["test"]
        assert fold["train"] and len(fold["test"]) in (n // K, n // K + 1)
    split = datasets.split_cases("a", cases[:2], nuclei_config("unused", f"folds={K}"))
    assert split["train"] == [] and sorted(split["val"] + split["test"]) == cases[:2]


def test_a_fold_may_leave_a_small_site_untested(tmp_path):
    """Its splits are read back with folds, and refused without."""
    folder = write_nuclei(tmp_path / "d", ("a",), cases=3)
    (tmp_path / "d" / "b").mkdir()
    write_nuclei(tmp_path / "d" / "..", ("d/b",), cases=5)
    config = nuclei_config(folder, "folds=5", "fold=4")
    sites = load_sites(config)
    assert [len(site.test) for site in sites] == [0, 1] and len(sites[0].train) == 2
    assert splits_of(load_sites(config, splits_of(sites))) == splits_of(sites)
    with pytest.raises(BadInput, match="site a has no test case"):
        load_sites(nuclei_config(folder), splits_of(sites))


def test_patients_stay_on_one_side(tmp_path):
    """Several files of a patient share a split; a file that does not match is an error."""
    folder = write_nuclei(tmp_path / "d", ("a",), cases=12)
    for kind in ("images", "masks"):
        for i in range(12):
            (folder / "a" / kind / f"{i}.png").rename(folder / "a" / kind / f"p{i // 3}_{i}.png")
    site, = load_sites(nuclei_config(folder, r"case_pattern=^(p\d+)_"))
    groups = [{sample.case for sample in part} for part in (site.train, site.val, site.test)]
    assert [len(group) for group in groups] == [2, 1, 1] and len(set.union(*groups)) == 4
    assert [len(part) for part in (site.train, site.val, site.test)] == [6, 3, 3]
    for kind in ("images", "masks"):
        (folder / "a" / kind / "p0_0.png").rename(folder / "a" / kind / "q.png")
    with pytest.raises(BadInput, match="q.png: its name does not match case_pattern"):
        load_sites(nuclei_config(folder, r"case_pattern=^(p\d+)_"))


def test_splits_file(tmp_path, capsys):
    folder, file = write_nuclei(tmp_path / "d"), tmp_path / "splits.json"
    splits = {site: {"train": ["0", "1"], "val": [], "test": ["3"]} for site in "ab"}

    def load(changed):
        file.write_text(json.dumps(changed))
        return load_sites(nuclei_config(folder, f"splits={file}"))

    assert splits_of(load(splits)) == splits
    assert "a: 2 cases in no split are not used: 2, 4" in capsys.readouterr().out
    a = splits["a"]
    for changed, words in (
            ({"a": a}, "does not mention the site b"), (splits | {"c": a}, "lacks the site c"),
            (splits | {"b": a | {"val": ["9"]}}, "case 9 of site b is not in the data"),
            (splits | {"b": a | {"val": ["3"]}}, "case 3 of site b is listed twice"),
            (splits | {"b": a | {"test": []}}, "site b has no test case"),
            ([1], "cannot be read as text of the form"), ({"a": {"training": []}}, "cannot be read as text of the form"),
            ({"a": {"train": [1]}}, "cannot be read as text of the form"),
            ({"a": a | {"test": "3"}, "b": a}, "cannot be read as text of the form .*test of site a is no list"),
            ({"a": a | {"test": {"3": 1}}, "b": a}, "test of site a is no list")):
        with pytest.raises(BadInput, match=words):
            load(changed)
    file.write_text("{")
    with pytest.raises(BadInput, match="splits.json: cannot be read"):
        load_sites(nuclei_config(folder, f"splits={file}"))


def test_other_data_counts_as_test_unless_the_splits_know_it(tmp_path, capsys):
    folder = write_nuclei(tmp_path / "d", ("a", "new"))
    splits = {"a": {"train": ["0", "1"], "val": ["2"], "test": ["3", "gone"]}, "away": {"train": ["1"]}}
    a, new = load_sites(nuclei_config(folder), splits, strict=False)
    assert splits_of([a])["a"] == {"train": ["0", "1"], "val": ["2"], "test": ["3", "4"]}
    assert not new.train and not new.val and len(new.test) == 5
    assert "a: taken for the run's site of that name: 3 of its cases trained or validated, 1 are " \
        "new and tested, 1 of the run's are missing" in capsys.readouterr().out
    splits["a"]["test"].append("1")
    with pytest.raises(BadInput, match="case 1 of site a is listed twice"):
        load_sites(nuclei_config(folder), splits, strict=False)


# ---- Batches ----

def test_augmentation_is_one_of_eight_symmetries_of_image_and_mask_alike():
    x = torch.arange(16.0).view(4, 4)
    seen = {tuple(datasets.turned(x, turn).flatten().tolist()) for turn in range(8)}
    assert len(seen) == 8
    sample = Sample("a", "c", "c.png", x.expand(1, 3, 4, 4), x[None].to(torch.uint8), None, (1, 1, 1))
    found, y = datasets.stack([(sample, 0)] * 200, seeded(0))
    assert torch.equal(found[:, 0], y.float()) and torch.equal(found[:, 0], found[:, 2])
    assert {tuple(image.flatten().tolist()) for image in found[:, 0]} == seen
    plain, _ = datasets.stack([(sample, 0)])
    assert torch.equal(plain[0, 0], x)


def test_batches_cover_every_slice_once_in_a_seeded_order():
    samples = [Sample("a", str(i), "", torch.full((1, 3, 2, 2), float(i)),
                      torch.zeros(1, 2, 2, dtype=torch.uint8), None, (1, 1, 1)) for i in range(11)]
    slices = [(sample, 0) for sample in samples]

    def order(*words):
        found = [x[:, 0, 0, 0].tolist() for x, _ in batches(slices, 4, seeded(*words))]
        assert [len(part) for part in found] == [4, 4, 3]
        return list(itertools.chain(*found))

    assert sorted(order(0, "a", 1)) == list(range(11)) != order(0, "a", 1)
    assert order(0, "a", 1) == order(0, "a", 1) != order(0, "a", 2)


# ---- Generated sites and the report ----

def test_demo_is_written_whole_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scenes, "write_sites", lambda task, part: [part.mkdir(parents=True), 1 / 0])
    with pytest.raises(ZeroDivisionError):
        demo_data.ensure("nuclei")
    assert list((tmp_path / "data").iterdir()) == []  # nothing half-written
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for task, sites in (("nuclei", 4), ("prostate", 6)):
        folder = demo_data.ensure(task)
        entries, problems = datasets.list_files(folder, task)
        assert folder == Path("data") / f"demo_{task}" and len(entries) == sites and not problems
        before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
        demo_data.ensure(task)
        assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_report_shows_four_pictures_of_one_patient_and_warns_of_those_in_no_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_nuclei(tmp_path / "d", ("a",))
    save_array(folder / "a" / "masks" / "4.png", np.uint8([[0] * 16 + [1] * 8 + [2] * 8] * 32))
    check_data.check(nuclei_config(folder), "sheet.png")
    width = Image.open("sheet.png").width
    check_data.check(nuclei_config(folder, "case_pattern=(.png)"), "sheet.png")
    assert Image.open("sheet.png").width == width
    a = {"train": ["0", "1"], "val": [], "test": ["3"]}
    for splits, problems in ({"a": a}, 0), ({"b": a}, 1):
        (tmp_path / "s.json").write_text(json.dumps(splits))
        capsys.readouterr()
        assert check_data.check(nuclei_config(folder, "splits=s.json"), "sheet.png") == problems
        assert "masks/4.png: has 2 labels above 0" in capsys.readouterr().out


def test_report_names_everything_that_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = write_nuclei(tmp_path / "d")
    cut(folder / "a" / "images" / "1.png")
    (folder / "b" / "masks" / "2.png").unlink()
    save_array(folder / "b" / "masks" / "4.png", np.zeros((9, 9), np.uint8))
    (folder / "b" / "images" / "notes.txt").write_text("")  # no data
    assert check_data.check(nuclei_config(folder), "sheet.png") == 3
    out = capsys.readouterr().out
    for words in ("a/images/1.png: cannot", "b/images/2.png: has no mask", "b/masks/4.png: its size",
                  "3 problems", "32 x 32 (4)", "labels    0, 255", "train 3, val 1, test 1",
                  "1 pixel"):
        assert words in out
    assert Image.open("sheet.png").width > 500
    done = run_quietly(check_data, "d", "--task", "nuclei", "image_size=64", folder=tmp_path)
    assert done.returncode == 1 and done.stderr == "" and "3 problems" in done.stdout
    done = run_quietly(check_data, "nowhere", "--task", "nuclei", folder=tmp_path)
    assert done.returncode == 2 and re.fullmatch("error: nowhere: .*\n", done.stderr)


def test_report_on_volumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert check_data.check(prostate_config(write_prostate(tmp_path / "d")), "sheet.png") == 0
    out = capsys.readouterr().out
    assert "32 x 32 x 4 slices (3)" in out and "0.5 x 0.5 x 3 mm (3)" in out and "0 problems" in out


def test_warnings_stand_in_the_order_of_the_files(tmp_path):
    """Whatever split they are in."""
    site, = load_sites(nuclei_config(write_nuclei(tmp_path / "d", ("a",))))
    for split in SPLITS:
        samples = getattr(site, split)
        samples[:] = [sample._replace(warnings=(sample.name,)) for sample in samples]
    files = sorted((tmp_path / "d" / "a" / "images").iterdir())
    assert [sample.name for sample in samples_of(site)] != [file.name for file in files]
    assert warnings_on(samples_of(site), site.train, []) == [file.name for file in files]
