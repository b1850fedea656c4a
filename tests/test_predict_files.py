"""What predict.py reads and leaves out of an INPUT, and what it may write over: nothing but its own files."""

import errno
import json
import os
import shutil
from collections import deque
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

import eval as scoring
import predict
import train
from config import BadInput
from datasets import Site
from inference import outputs
from inference.inputs import list_inputs
from inference.outputs import LIST, RESERVED, TABLE, OutputFolder, companions, output_names
from rounds import checkpoint
from scoring.components import largest_part
from scoring.history import foreign_sites, validation_of
from scoring.results import definitions, print_result
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import a_config, run_here


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """A finished run in a folder with data d, which tests leave as they are."""
    folder = tmp_path_factory.mktemp("run")
    train.train(tiny_config(write_nuclei(folder / "d"), folder / "run", "lr=0.2", "test_stats=site"))
    return folder


@pytest.fixture
def predicting(a_run, tmp_path, monkeypatch, capsys):
    """Return call(*words): predict.py in `tmp_path`, where `in` holds three pictures, with a site's statistics."""
    (tmp_path / "in").mkdir()
    for name in "012":
        shutil.copy(a_run / "d" / "a" / "images" / f"{name}.png", tmp_path / "in")
    return lambda *words: run_here(monkeypatch, capsys, predict, tmp_path, "--run", a_run / "run", *words)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---- Inputs ----

def test_what_is_not_read_is_named(predicting, tmp_path):
    touch(tmp_path / "in", "3.webp", "4.dcm", "notes.txt", "sub/5.nii.gz", "9_mask.png", ".hidden.webp")
    (tmp_path / "in" / "IM0001").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "in" / "elsewhere").symlink_to(tmp_path)
    code, out, err = predicting("in", "site=a", "out=p")
    assert code == 1 and "3 of 9 files predicted" in out
    assert [line.split(": ")[:2] for line in err.splitlines()] == [
        ["not read", f"in/{name}"] for name in ("3.webp", "4.dcm", "9_mask.png", "IM0001", "elsewhere", "sub/5.nii.gz")]


@pytest.mark.parametrize("task, names, files", [
    ("images", "a/images/0.png a/masks/0.png b/images/0.tif b/GroundTruth/0.tif c/gt/1.png c/1.png", 3),
    ("images", "0.png 0_mask.png 0_gt.png 0-seg.png 0_label_2.png 0_mask.tif 1.png", 2),
    ("images", "Slide_01/01_1.png GT_01/01_1.png", 1),
    ("images", "imagesTr/x_0000.png labelsTr/x.png", 1),
    ("volumes", "Case0.nii.gz Case0_segmentation.nii.gz", 1)])
def test_masks_are_left_alone(tmp_path, task, names, files):
    touch(tmp_path, *names.split())
    found = list_inputs(tmp_path, task)
    assert (len(found.files), len(found.left), found.unread) == (files, len(names.split()) - files, {})


def test_masks_named_by_a_list_or_a_table(tmp_path):
    touch(tmp_path, "s/a.png", "s/b.png", "s/c.png", "s/d.png", "s/e.png", "s/f.png")
    (tmp_path / "s" / "list.txt").write_text("# image mask\na.png b.png\n")
    (tmp_path / "t.csv").write_text("image,mask_1,mask_2,site\ns/c.png,s/d.png,s/e.png,s\n")
    (tmp_path / "other.csv").write_text("name,mask\n\0")
    for path in (tmp_path, tmp_path / "s"):
        assert [file.name for file in list_inputs(path, "images").files] == ["a.png", "c.png", "f.png"]


def test_nothing_but_masks(tmp_path):
    touch(tmp_path, "x_mask.png", "masks/1.png", "masks/2.png")
    with pytest.raises(BadInput, match=r"left out .*masks/1.png and 1 others; not read: .*x_mask.png"):
        list_inputs(tmp_path, "images")
    assert list_inputs(tmp_path / "x_mask.png", "images").files == [tmp_path / "x_mask.png"]


def test_a_folder_of_masks_as_input(predicting, tmp_path):
    (tmp_path / "in").rename(tmp_path / "masks")
    assert "warning: masks: has the name of a folder of masks" in predicting("masks", "site=a", "out=p")[2]


# ---- Outputs ----

def test_the_output_may_lie_in_the_input(predicting, tmp_path):
    for _ in range(2):
        code, out, err = predicting("in", "site=a", "out=in/p", "probabilities=true")
        assert (code, err) == (0, "") and "3 of 3 files predicted" in out
    (tmp_path / "in" / "p").rename(tmp_path / "in" / "moved")
    shutil.copytree(tmp_path / "in" / "moved", tmp_path / "in" / "sub" / "copied")
    code, out, err = predicting("in", "site=a", "out=q")
    assert (code, err) == (0, "") and "3 of 3 files predicted" in out
    assert "left out as masks, predictions or runs: in/moved/0.png" in out


def test_what_predict_did_not_write_is_never_replaced(predicting, a_run, tmp_path):
    """Pictures beside an old prediction.csv, a run folder, a mask that somebody corrected, a stranger's file."""
    touch(tmp_path / "in", TABLE)
    before = contents(tmp_path / "in"), contents(a_run / "run")
    for out, words in (("in", "holds other files"), (a_run / "run", "holds other files"), ("in/0.png", "is a file")):
        code, _, err = predicting("in", "site=a", f"out={out}")
        assert code == 2 and words in err and err.count("\n") == 1
    assert (contents(tmp_path / "in"), contents(a_run / "run")) == before
    assert predicting("in", "site=a", "out=p")[0] == 0
    kept = (tmp_path / "p" / "1.png").read_bytes()
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "p" / "1.png")
    assert "p/1.png: was changed since" in predicting("in", "site=a", "out=p")[2]
    (tmp_path / "p" / "1.png").write_bytes(kept)
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "p" / "7.png")
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "in" / "7.png")
    assert "p/7.png: was not written by predict.py" in predicting("in", "site=a", "out=p")[2]
    assert "p/7.png: is an input" in predicting("p", "site=a", "out=p")[2]
    assert (tmp_path / "p" / "7.png").read_bytes() == (tmp_path / "in" / "0.png").read_bytes()


def test_a_link_in_the_output_folder_leads_to_no_input(tmp_path):
    touch(tmp_path, "in/sub/0.png")
    OutputFolder(tmp_path / "p", [], ["a.png"])
    (tmp_path / "p" / "sub").symlink_to(tmp_path / "in" / "sub")
    with pytest.raises(BadInput, match="is an input"):
        OutputFolder(tmp_path / "p", [tmp_path / "in" / "sub" / "0.png"], ["sub/0.png"])


@pytest.mark.parametrize("content", ['{"../in/0.png": null}', '{"/x": null}', "[1]", "{", '{"a": 1', "null"])
def test_a_list_that_predict_did_not_write(tmp_path, content):
    touch(tmp_path, "p/x", "in/0.png")
    (tmp_path / "p" / LIST).write_text(content)
    with pytest.raises(BadInput, match="is no list that predict.py wrote"):
        OutputFolder(tmp_path / "p", [], [])


def test_a_killed_call_is_gone_on_with(predicting, tmp_path, monkeypatch):
    """Whatever the moment, the next call gives the same files; nothing half written stays."""
    assert predicting("in", "site=a", "out=whole")[0] == 0
    for name, at in product((TABLE, "1.png", LIST, "sheet_001.png"), (0, 1)):
        replaced = os.replace

        def killed(part, file, name=name, at=at, replaced=replaced):
            if file.name == name and not at:
                raise KeyboardInterrupt
            replaced(part, file)
            if file.name == name:
                raise KeyboardInterrupt
        monkeypatch.setattr(checkpoint.os, "replace", killed)
        assert predicting("in", "site=a", "out=p")[0] == 130
        monkeypatch.setattr(checkpoint.os, "replace", replaced)
        parts = list((tmp_path / "p").rglob("*.part"))
        for part in parts:  # the next call is another process
            part.rename(part.with_name(part.name.replace(str(os.getpid()), "1")))
        assert parts or at
        assert name != "1.png" or not (tmp_path / "p" / TABLE).exists()  # an unfinished folder has no table
        code, _, err = predicting("in", "site=a", "out=p")
        assert (code, err) == (0, "") and contents(tmp_path / "p") == contents(tmp_path / "whole")
        if name == "1.png":
            shutil.rmtree(tmp_path / "p")


def test_pictures_that_are_gone(predicting, tmp_path):
    """Their masks are named; what an unreadable picture had is removed, for it would look like its mask."""
    assert predicting("in", "site=a", "out=p", "probabilities=true")[0] == 0
    (tmp_path / "in" / "2.png").unlink()
    (tmp_path / "in" / "1.png").write_bytes(b"no picture")
    code, _, err = predicting("in", "site=a", "out=p")
    assert code == 1 and "skipped: in/1.png" in err
    assert "holds predictions of pictures that are not in this INPUT" in err and "2.png, 2.png.npz" in err
    assert sorted(contents(tmp_path / "p")) == [
        "0.png", "2.png", "2.png.npz", "2_probability.png", TABLE, LIST, "sheet_001.png"]
    assert predicting("in", "site=a", "out=p")[2].count("2.png,") == 1  # it is said each time


def test_a_full_disk(predicting, tmp_path, monkeypatch):
    """One line names the file, nothing half written stays, and the next call goes on; an export alike."""
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(outputs, "as_mask", lambda *_: monkeypatch.setattr(checkpoint.os, "fsync", full) or b"x")
    code, _, err = predicting("in", "site=a", "out=p")
    assert code == 2 and err.startswith("error: p/0.png") and "No space left" in err and err.count("\n") == 1
    code, _, err = predicting("site=a", "export=net.pt2")
    assert code == 2 and err.startswith("error: net.pt2") and "No space left" in err and err.count("\n") == 1
    assert not [*tmp_path.rglob("*.part"), *tmp_path.glob("net*")]
    monkeypatch.undo()
    os.chdir(tmp_path)


def test_no_two_inputs_share_a_name(tmp_path):
    """Names of masks, probabilities and their pictures differ in any file system, also from sheets and tables."""
    stems = ("a", "A", "a.png", "a.tif", "a_probability", "sheet_001", "prediction.csv", "a.png.npz", "a.png_2")
    names = {f"{folder}{stem}{ending}" for folder in ("", "sub/", "a.png/") for stem in stems
             for ending in (".png", ".tif", ".jpg", ".npz.png") if f"{folder}{stem}{ending}" != "a.png"}
    names |= {"sheet_002.jpg", "statistics.pt.jpg", "x.jpg", "x.png/y.jpg", "w.png/y.jpg", "w.tif"}  # folders, too
    touch(tmp_path, *names)
    files = sorted(tmp_path / name for name in names)
    found = output_names(files, tmp_path, ".png")
    written = [str(name).casefold() for mask in found.values() for name in companions(mask)]
    assert len(written) == 3 * len(files) == len(set(written)) and not any(map(RESERVED.fullmatch, written))
    folders = {str(folder).casefold() for mask in found.values() for folder in mask.parents}
    assert folders.isdisjoint(written)


# ---- Keys ----

@pytest.mark.parametrize("words, message", [
    (["export=net.onnx"], "export: net.onnx is no .pt2 file; .pt2 is what torch.export.load opens"),
    (["export=a/net.pt"], "give export=net.pt2"), (["export=there.pt2"], "there.pt2 exists already"),
    (["export=x.pt2", "threshold=0.3"], "threshold: has no part in an exported network"),
    (["x", "threshold=1"], "threshold: '1' cannot be used"), (["x", "threshold=half"], "threshold: 'half'"),
    (["x", "out=a", "out=b"], "out: is given twice"), (["x", "out=~no one/p"], "out: '~no one/p' cannot be used"),
    (["x", "site="], "site: expected a value"), (["x", "trust=maybe"], "trust: 'maybe' cannot be used, expected true")])
def test_words_that_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "there.pt2")
    with pytest.raises(BadInput) as refused:
        predict.read_words(words)
    assert message in str(refused.value)


def test_threshold_and_probabilities(predicting, tmp_path):
    """Foreground is where the probability is above the threshold; 0.5 is what no threshold gives."""
    assert predicting("in", "site=a", "out=none", "probabilities=true")[0] == 0
    p = np.load(tmp_path / "none" / "0.png.npz")["foreground"][0].astype(float)
    grey = np.asarray(Image.open(tmp_path / "none" / "0_probability.png"))
    assert grey.dtype == np.uint8 and abs(grey / 255 - p).max() < 0.003
    middle = float(np.median(p))
    for threshold in (middle, 0.5):
        assert predicting("in", "site=a", f"out={threshold}", f"threshold={threshold}")[0] == 0
        found = np.asarray(Image.open(tmp_path / str(threshold) / "0.png")) > 0
        assert ((p > threshold) == found)[abs(p - threshold) > 1e-3].all()
        assert f",{threshold}," in (tmp_path / str(threshold) / TABLE).read_text()
    assert (tmp_path / "0.5" / "0.png").read_bytes() == (tmp_path / "none" / "0.png").read_bytes()


# ---- The largest part ----

def flooded(mask):
    """The largest connected part by a flood from each voxel, the first of equal ones."""
    left, best = mask.copy(), np.zeros_like(mask)
    for start in zip(*np.nonzero(mask)):
        part, queue = np.zeros_like(mask), deque([start])
        while queue:
            at = queue.popleft()
            if all(0 <= i < n for i, n in zip(at, mask.shape)) and left[at]:
                left[at], part[at] = False, True
                queue.extend(tuple(np.add(at, step)) for axis in np.eye(mask.ndim, dtype=int) for step in (axis, -axis))
        best = part if part.sum() > best.sum() else best
    return best


@pytest.mark.parametrize("shape", [(1, 9, 11), (4, 6, 7), (1, 1, 5), (3, 1, 1)])
def test_the_largest_part_equals_a_flood(shape):
    rng = np.random.default_rng(0)
    for share in (0, 0.3, 0.5, 0.6, 0.8, 1):
        mask = rng.random(shape) < share
        assert (largest_part(mask) == flooded(mask)).all()
    spiral = np.zeros((1, 64, 64), bool)
    for i in range(0, 30, 4):
        spiral[0, i, i:64 - i] = spiral[0, 63 - i, i:64 - i] = spiral[0, i:64 - i, 63 - i] = True
    assert (largest_part(spiral) == flooded(spiral)).all()


def test_keep_largest(a_run, tmp_path, monkeypatch, capsys):
    """eval.py and predict.py keep one part of each case, and result_eval.json says so."""
    shutil.copytree(a_run / "run", tmp_path / "run")
    words = ("--run", "run")
    assert run_here(monkeypatch, capsys, scoring, tmp_path, *words, "keep_largest=true")[0] == 0
    told = json.loads((tmp_path / "run" / "result_eval.json").read_text())
    assert "only the largest connected part" in told["definitions"]["keep_largest"]
    assert told["best"]["test"] != json.loads((tmp_path / "run" / "result.json").read_text())["best"]["test"]
    for out, more in (("all", ()), ("one", ("keep_largest=true",))):
        assert run_here(monkeypatch, capsys, predict, tmp_path, *words, a_run / "d" / "a" / "images", "site=a",
                        f"out={out}", *more)[0] == 0
    for file in (tmp_path / "all").glob("[0-9].png"):
        parts = [np.asarray(Image.open(tmp_path / out / file.name))[None] > 0 for out in ("all", "one")]
        assert (largest_part(parts[0]) == parts[1]).all() and parts[1].any()


# ---- What a run is worth, and eval.py ----

def test_the_runs_validation_is_said(a_run, predicting, tmp_path):
    """Mean and worst site, of the round that predicts."""
    best = json.loads((a_run / "run" / "result.json").read_text())["best"]
    dice = {site: of_site["dice"] for site, of_site in best["val"]["sites"].items()}
    worst = min(dice, key=dice.get)
    out = predicting("in", "site=a", "out=p")[1]
    assert f"round {best['round']}: validation Dice {best['val']['mean']['dice']:.3f}, at the worst site {worst} " \
           f"{dice[worst]:.3f}\n" in out
    assert validation_of(tmp_path, 1) == "its validation Dice is not known"
    (tmp_path / "metrics.csv").write_text("round,split,site,dice\n1,val,a,null\n")
    with pytest.raises(BadInput, match="no number"):
        validation_of(tmp_path, 1)


def test_eval_leaves_the_runs_own_files(a_run, tmp_path, monkeypatch, capsys):
    """It names the files it writes; a training that goes on removes them; no table is all dashes."""
    shutil.copytree(a_run / "run", tmp_path / "run")
    before = contents(tmp_path / "run")
    other = write_nuclei(tmp_path / "other", ("new", "a"), cases=2)
    code, out, _ = run_here(monkeypatch, capsys, scoring, tmp_path, "--run", "run", f"data={other}")
    assert code == 0 and out.endswith("written to run: result_eval.json, cases_eval.csv\n") and "{" not in out
    assert "best and last" in out or "best round" in out
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"result_eval.json", "cases_eval.csv"}
    told = json.loads(after["result_eval.json"])["definitions"]["foreign_sites"]
    assert told.startswith("new took no part")
    config = tiny_config(a_run / "d", tmp_path / "run", "lr=0.2", "test_stats=site", "resume=true", "rounds=3")
    train.train(config)
    assert not {"result_eval.json", "cases_eval.csv"} & contents(tmp_path / "run").keys()


def test_no_table_of_dashes(capsys):
    config = a_config()
    none = {"dice": None, "hd95": None, "assd": None, "misses": None, "images": 0}
    scores = {"sites": {"a": none}, "mean": none}
    some = {"dice": .5, "hd95": 1., "assd": 1., "misses": 0, "images": 1}
    result = {kind: {"round": 1, "val": scores, "test": {"sites": {"a": some}, "mean": some}}
              for kind in ("best", "last")}
    print_result(result, config, True, [])
    out = capsys.readouterr().out
    assert "best and last round 1, validation, test_stats: case\nno site has an image\n" in out and out.count("mean of sites") == 1
    assert " - " not in out and "keep_largest" not in definitions(config)


def test_sites_that_took_no_part(tmp_path):
    """By what metrics.csv says of the training; a hospital of a federation does not know of others."""
    sites = [Site("a", [], [], [1]), Site("b", [], [], [1]), Site("c", [], [], [1])]
    (tmp_path / "metrics.csv").write_text("round,split,site,dice\n1,train,a,null\n1,val,b,0.5\n")
    assert foreign_sites(tmp_path, sites) == ["b", "c"]
    touch(tmp_path, "kept.pt")
    assert foreign_sites(tmp_path, sites) == []


def test_a_threshold_is_of_two_classes(tmp_path, monkeypatch, capsys):
    logits = torch.tensor([[2.0, 1.0]]).view(1, 2, 1, 1)
    assert outputs.at_threshold(logits, None) is logits
    p = float(logits.softmax(1)[0, 1])
    assert outputs.at_threshold(logits, p - 1e-3).argmax(1) == 1 and outputs.at_threshold(logits, p + 1e-3).argmax(1) == 0
