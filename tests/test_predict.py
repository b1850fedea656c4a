"""A trained network on new images: the same predictions as eval.py's, on the files' own grids."""

import csv
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from datasets import load_sites
from inference import inputs
from inference.inputs import list_inputs, read_unlabelled
from inference.outputs import output_names
from rounds.reading import load_checkpoint
from scoring import evaluate as evaluation
from scoring import pictures
from scoring.norms import own_network
from scoring.trained import load_run
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import CPU, run_here, write_prostate

ORIENTATIONS = [np.diag([-0.5, -0.5, 3, 1]), np.diag([0.5, 0.5, 3, 1]),
                np.array([[0, 0, 3.0, 5], [0.5, 0, 0, 6], [0, -0.5, 0, 7], [0, 0, 0, 1]])]


def finished(folder, task):
    """Train on small data d in a folder; return the folder and the config."""
    data = (write_nuclei if task == "nuclei" else write_prostate)(folder / "d")
    config = tiny_config(data, folder / "run", f"task={task}", "lr=0.2")
    train.train(config)
    return folder, config


@pytest.fixture(scope="module", params=["nuclei", "prostate"])
def a_run(request, tmp_path_factory):
    return finished(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def a_run_on_images(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("images"), "nuclei")


@pytest.fixture
def trained(a_run):
    """A folder with data d and a finished run, and its config, which a test may change."""
    return a_run[0], SimpleNamespace(**vars(a_run[1]))


@pytest.fixture
def trained_on_images(a_run_on_images):
    return a_run_on_images[0], SimpleNamespace(**vars(a_run_on_images[1]))


def read_output(file):
    """Return a written mask as (S, H, W) bool in this project's order."""
    if file.suffix == ".png":
        assert Image.open(file).mode == "L"  # one byte a pixel
        return (np.asarray(Image.open(file)) > 0)[None]
    image = nibabel.load(file)
    turned = nibabel.as_closest_canonical(image)  # right, anterior, superior
    return np.asarray(turned.dataobj)[::-1, ::-1].transpose(2, 1, 0) > 0


def rows_of(file):
    with open(file, newline="") as table:
        return list(csv.DictReader(table))


@pytest.mark.parametrize("words", [["site=a"], ["test_stats=case"]])
def test_it_predicts_what_eval_predicts(trained, tmp_path, monkeypatch, capsys, words):
    """To the bit, on the file's own grid; masks that lie beside the images are not inputs."""
    folder, config = trained
    code, out, err = run_here(monkeypatch, capsys, predict, tmp_path, "--run", folder / "run", folder / "d" / "a",
                              f"out={tmp_path / 'p'}", *words)
    whose = "of each image itself" if "case" in words[0] else "of the run's site a"
    assert (code, err) == (0, "") and whose in out
    config.test_stats = "case" if "case" in words[0] else "site"
    sites = load_sites(config)
    _, model, own, local = load_run(folder / "run" / "best.pt", sites, config, CPU)
    network = own_network(model, own.get("a", {}), local.get("a", {}))
    samples = evaluation_samples(sites[0])
    rows = {row["file"]: row for row in rows_of(tmp_path / "p" / "prediction.csv")}
    assert len(rows) == len(samples)
    for sample in samples:
        expected = evaluation.predict(network, sample, config, CPU)
        below = "images/" if config.task == "nuclei" else ""
        ending = ".png" if config.task == "nuclei" else ".nii.gz"
        found = read_output(tmp_path / "p" / f"{below}{sample.case}{ending}")
        assert (found == expected).all()
        row = next(row for file, row in rows.items() if file.endswith(sample.name))
        assert float(row["share"]) == pytest.approx(expected.mean(), abs=1e-6)
        voxel = 1 if config.task == "nuclei" else 0.5 * 0.5 * 3
        assert float(row["size"]) == pytest.approx(expected.sum() * voxel)
        assert row["unit"] == ("pixels" if config.task == "nuclei" else "mm^3")


def evaluation_samples(site):
    return [*site.train, *site.val, *site.test]


def test_a_hospital_that_took_no_part(trained, tmp_path, monkeypatch, capsys):
    """Its statistics are those that eval.py collects of it, and are kept for the next call."""
    folder, config = trained
    write = write_nuclei if config.task == "nuclei" else write_prostate
    other = write(tmp_path / "o", ("new",), cases=6)
    arguments = ["--run", folder / "run", other / "new", f"out={tmp_path / 'p'}"]
    code, out, _ = run_here(monkeypatch, capsys, predict, tmp_path, *arguments)
    assert code == 0 and "\ncollecting statistics of the input images themselves" in out
    config.data, config.test_stats = str(other), "site"
    sites = load_sites(config, {}, strict=False)
    own = load_run(folder / "run" / "best.pt", sites, config, CPU)[2]
    kept = torch.load(tmp_path / "p" / "statistics.pt")["statistics"]
    assert kept.keys() == own["new"].keys()
    assert all(torch.equal(kept[name], own["new"][name]) for name in kept)
    monkeypatch.setattr(inputs, "statistics_of", lambda *_: pytest.fail("they are kept"))
    first = next((tmp_path / "p").rglob("0.png" if config.task == "nuclei" else "Case0.nii.gz")).read_bytes()
    code, out, _ = run_here(monkeypatch, capsys, predict, tmp_path, *arguments)
    assert code == 0 and "collecting" not in out and "of an earlier call, kept in" in out
    assert next((tmp_path / "p").rglob("0.png" if config.task == "nuclei" else "Case0.nii.gz")).read_bytes() == first


@pytest.mark.parametrize("affine", ORIENTATIONS)
@pytest.mark.parametrize("axes", [0, 1])
def test_a_volumes_mask_lies_on_its_own_grid(tmp_path, monkeypatch, capsys, affine, axes):
    """Affine, orientation, shape and units are the input's; the same anatomy gives the same mask."""
    data = write_prostate(tmp_path / "d")
    train.train(tiny_config(data, tmp_path / "run", "task=prostate", "rounds=1", "lr=0.2"))
    voxels = np.random.default_rng(0).integers(0, 100, (20, 24, 6)).astype(np.int16)
    lps = nibabel.Nifti1Image(voxels, np.diag([-0.5, -0.5, 3, 1]))
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(lps.affine), nibabel.io_orientation(affine))
    turned = lps.as_reoriented(turn)
    stored = nibabel.Nifti1Image(np.asarray(turned.dataobj).reshape(*turned.shape, *[1] * axes), turned.affine)
    stored.header.set_xyzt_units("mm")
    for name, image in (("lps", lps), ("stored", stored)):
        nibabel.save(image, tmp_path / f"{name}.nii.gz")
        assert run_here(monkeypatch, capsys, predict, tmp_path, "--run", "run", f"{name}.nii.gz",
                        f"out={name}", "test_stats=case")[0] == 0
    found = nibabel.load(tmp_path / "stored" / "stored.nii.gz")
    assert found.shape == stored.shape and (found.affine == stored.affine).all()
    assert found.get_data_dtype() == np.uint8 and found.header.get_xyzt_units()[0] == "mm"
    assert (read_output(tmp_path / "lps" / "lps.nii.gz")
            == np.asarray(nibabel.load(tmp_path / "lps" / "lps.nii.gz").dataobj).transpose(2, 1, 0)).all()
    flat = nibabel.Nifti1Image(np.asarray(found.dataobj).reshape(turned.shape), found.affine)
    nibabel.save(flat, tmp_path / "flat.nii.gz")
    assert (read_output(tmp_path / "flat.nii.gz") == read_output(tmp_path / "lps" / "lps.nii.gz")).all()
    assert 0 < np.asarray(found.dataobj).mean() < 1


def test_a_file_that_cannot_be_read_is_named_and_skipped(trained, tmp_path, monkeypatch, capsys):
    folder, config = trained
    data = tmp_path / "in"
    shutil.copytree(folder / "d" / "a", data)
    first = list_inputs(data, config.task).files[0]
    first.write_bytes(b"no image")
    code, out, err = run_here(monkeypatch, capsys, predict, tmp_path, "--run", folder / "run", data, "site=a",
                              f"out={tmp_path / 'p'}", "probabilities=true")
    assert code == 1 and err.startswith(f"skipped: {first}: cannot be read") and err.count("\n") == 1
    number = len(list_inputs(data, config.task).files)
    assert f"{number - 1} of {number} files predicted" in out
    probabilities = sorted((tmp_path / "p").rglob("*.npz"))
    assert len(probabilities) == number - 1
    foreground = np.load(probabilities[0])["foreground"]
    assert foreground.dtype == np.float16
    assert ((foreground > 0.5) == read_output(probabilities[0].with_suffix(""))).mean() > 0.99
    assert list((tmp_path / "p").glob("sheet_*.png"))


@pytest.mark.parametrize("words, message", [
    (["x"], "x: there is no such file"), ([], "expected one INPUT"), (["d", "d"], "expected one INPUT"),
    (["d", "site=nobody"], "site: the run has no nobody"), (["d", "site=a", "test_stats=case"], "site: with test_stats: case"), (["d", "lr=1"], "lr: cannot be changed here"),
    (["d", "probabilities=yes"], "expected true or false"), (["d", "out=d"], "holds other files"),
    (["d", "export=x.pt2"], "takes no INPUT"), (["export=x.pt2"], "needs the statistics of a site"),
    (["empty"], "has no .png")])
def test_words_that_cannot_be_used(trained_on_images, tmp_path, monkeypatch, capsys, words, message):
    folder, _ = trained_on_images
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "d", tmp_path / "d")
    code, _, err = run_here(monkeypatch, capsys, predict, tmp_path, "--run", folder / "run", *words)
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_local_weight_follows_its_site(trained_on_images, tmp_path, monkeypatch, capsys):
    folder, _ = trained_on_images
    shutil.copytree(folder / "run", tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    state["local"] = {"a": {"head.bias": torch.tensor([9.0, -9.0])}}  # all is background
    torch.save(state, tmp_path / "run" / "best.pt")
    for site, share in (("a", 0), ("b", None)):
        assert run_here(monkeypatch, capsys, predict, tmp_path, "--run", "run", folder / "d" / "a",
                        f"site={site}", f"out={site}")[0] == 0
        shares = [float(row["share"]) for row in rows_of(tmp_path / site / "prediction.csv")]
        assert sum(shares) == 0 if share == 0 else sum(shares) > 0


def test_names_of_outputs(tmp_path):
    for name in ("a.png", "A.tif", "b.png", "sub/b.png", "c.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    names = {str(file.relative_to(tmp_path)): str(name) for file, name in output_names(files, tmp_path, ".x").items()}
    assert names == {"A.tif": "A.tif.x", "a.png": "a.png.x", "b.png": "b.x", "sub/b.png": "sub/b.x", "c.nii.gz": "c.x"}


def scaled(x):
    """Images (B, 3, H, W) in [0, 1], each from 0 to 1."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return (x - low) / (high - low)


def test_an_exported_network_needs_nothing_of_this_project(trained, tmp_path, monkeypatch, capsys):
    """Logits in a process that cannot import the project, for several batches and sizes. Images come as they are
    in their files, in any range of values; slices of volumes scaled."""
    folder, config = trained
    code, out, _ = run_here(monkeypatch, capsys, predict, tmp_path, "--run", folder / "run", "site=a",
                            "export=net.pt2")
    assert code == 0 and "of the run's site a" in out
    config.test_stats, volumes = "site", config.task == "prostate"
    _, model, own, _ = load_run(folder / "run" / "best.pt", load_sites(config), config, CPU)
    torch.manual_seed(0)

    def example(network, shape):
        x = scaled(torch.rand(shape))
        small = torch.nn.functional.interpolate(x, (32, 32), mode="bilinear", antialias=True)
        y = torch.nn.functional.interpolate(network(small), shape[2:], mode="bilinear")
        return (x if volumes else 200 * x - 50), y.detach()

    torch.save([example(own_network(model, own["a"]), (B, 3, *size))
                for B, size in ((1, (32, 32)), (3, (32, 32)), (2, (45, 70)))], tmp_path / "examples.pt")
    code = ("import sys, torch\nassert not any('unet' in name for name in sys.modules)\n"
            "net = torch.export.load('net.pt2').module()\n"
            "for x, y in torch.load('examples.pt'):\n"
            "    assert (net(x) - y).abs().max() < 1e-5, x.shape\n"
            "try:\n    import unet\nexcept ImportError:\n    print('alone')\n")
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                           env={"PATH": "", "OMP_NUM_THREADS": "1"})
    assert found.stdout == "alone\n", found.stderr
    assert run_here(monkeypatch, capsys, predict, tmp_path, "--run", folder / "run", "test_stats=case",
                    "export=case.pt2")[0] == 0
    extra = {"about.json": ""}
    of_case = torch.export.load(tmp_path / "case.pt2", extra_files=extra).module()
    about = json.loads(extra["about.json"])
    assert about["B"].startswith("the slices of one volume") if volumes else about["B"] == "any"
    for B in (1, 3, 5):  # of volumes a batch is a case, of images each is one
        x, y = example(own_network(model, {}) if volumes else
                       lambda x: torch.cat([own_network(model, {})(one) for one in x.split(1)]), (B, 3, 40, 32))
        assert (of_case(x) - y).abs().max() < 1e-4


def test_memory_does_not_grow_with_the_number_of_files(trained_on_images, tmp_path, monkeypatch, capsys):
    """At most two samples are alive at a time."""
    folder, _ = trained_on_images
    import weakref
    alive, most = weakref.WeakSet(), []

    class Held:
        def __init__(self, sample):
            self.__dict__.update(sample._asdict())
            alive.add(self)
            most.append(len(alive))
    monkeypatch.setattr(inputs, "read_unlabelled", lambda *given: Held(read_unlabelled(*given)))
    many = write_nuclei(tmp_path / "many", ("a",), cases=20)
    assert run_here(monkeypatch, capsys, predict, tmp_path, "--run", folder / "run", many, "site=a", "out=p")[0] == 0
    assert max(most) <= 3 and len(most) == 20


def test_sheets_of_volumes_show_slices_through_what_was_found():
    labels = np.zeros((40, 4, 4), bool)
    assert pictures.slices_through(labels)[1] == "slices 1, 9, 17, 24, 32, 40 of 40"  # nothing was found
    labels[[3, 4, 9]] = True
    assert pictures.slices_through(labels) == ([3, 4, 9], "slices 4, 5, 10 of 40")
