"""Tests of more than two classes: labels, losses, scores, and every program from training to prediction."""

import csv
import json
import re
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import eval as scoring
import federated
import predict
import train
from config import DEFAULTS, BadInput, as_yaml, class_name, load_config
from datasets import load_sites
from experiments import reproduce
from scoring import evaluate as evaluation
from scoring import metrics, pictures, results
from scoring.norms import own_network
from scoring.trained import load_run
from sites import demo_data, images, scenes, volumes
from test_fedbcs import literal_alignment, random_problem, tiny_config
from tests.helpers import a_config, a_sample, run_here, train_by
from unet import PATHS

NAMES = "class_names=[disc,cup]"


def write_images(folder, sites=("a", "b"), cases=5, size=32, without=()):
    """Discs of class 1 with a cup of class 2; at the sites `without` there is no cup."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    for site in sites:
        for case in range(cases):
            r = np.hypot(y - rng.uniform(12, 20), x - rng.uniform(12, 20))
            labels = (r < 9).astype(np.uint8) + ((r < 5) & (site not in without))
            image = 60 * labels[..., None] + rng.integers(0, 60, (size, size, 3))
            scenes.save_image(folder / site, str(case), image.astype(np.uint8), labels)
    return folder


def write_volumes(folder, sites=("a", "b"), cases=3):
    """Volumes of 4 slices, class 1 in two of them and class 2 within it."""
    rng = np.random.default_rng(0)
    for site in sites:
        for case in range(cases):
            labels = np.zeros((4, 32, 32), np.uint8)
            labels[1:3, 8:22, 8:22], labels[1:3, 11:18, 11:18] = 1, 2
            volume = (50 * labels + rng.integers(0, 30, labels.shape)).astype(np.int16)
            style = scenes.PROSTATE["site1"]._replace(spacing=(0.5, 0.5, 3.0))
            scenes.save_prostate(folder / site, f"Case{case}", volume, labels, style)
    return folder


# ---- Settings ----

def test_names_of_classes():
    """With or without background; two classes have one line in every table, named only if asked for."""
    start = {"task": "images", "data": "d", "out": "o", "classes": 3}
    for names in (["disc", "cup"], ["background", "disc", "cup"]):
        config = load_config(start | {"class_names": names})
        assert config.class_names == ["background", "disc", "cup"] and class_name(config, 2) == "cup"
        assert vars(load_config({**vars(config), **{k: "none" for k, v in vars(config).items() if v is None}})) \
            == vars(config)
    assert class_name(load_config(start), 2) == "2"
    for wrong, words in (({"class_names": ["a"]}, "class_names: names 1 classes of the 3"),
                         ({"class_names": ["a", "a"]}, "class_names: expected a list of different names"),
                         ({"class_names": "cup"}, "class_names: expected a list"),
                         ({"classes": 1}, "classes: "), ({"classes": 256}, "classes: ")):
        with pytest.raises(BadInput, match=re.escape(words)):
            load_config(start | wrong)


@pytest.mark.parametrize("task", ["images", "volumes"])
def test_plain_tasks_are_the_old_words(tmp_path, task):
    """task: images reads as nuclei does, volumes as prostate, to the bit, with two classes."""
    folder = (write_images if task == "images" else write_volumes)(tmp_path / "d")
    old = {"images": "nuclei", "volumes": "prostate"}[task]
    runs = []
    for word in (task, old):
        config = tiny_config(folder, tmp_path / word, f"task={word}")
        train.train(config)
        state = torch.load(config.out + "/last.pt", weights_only=True)
        runs.append((state["weights"], json.loads((tmp_path / word / "result.json").read_text())["best"]["test"]))
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(runs[0][0][name], runs[1][0][name]) for name in runs[0][0])


# ---- Labels ----

def save_mask(file, labels):
    if file.suffix == ".png":
        Image.fromarray(labels.astype(np.uint8)).save(file)
    else:
        nibabel.save(nibabel.Nifti1Image(labels.astype(np.int16)[..., None], np.eye(4)), file)
    return file


@pytest.mark.parametrize("name", ["m.png", "m.nii.gz"])
def test_labels_are_classes(tmp_path, name):
    """0 .. K-1 stay as they are; with two classes all above 0 are 1; any other label is named."""
    read = images.read_pair if name == "m.png" else volumes.read_pair
    labels = np.zeros((8, 8), int)
    labels[2:5, 2:5], labels[3, 3], labels[6, 6] = 1, 2, 3
    mask = save_mask(tmp_path / name, labels)
    image = save_mask(tmp_path / f"i{name[1:]}", np.arange(64).reshape(8, 8))
    wanted = labels[None] if name == "m.png" else labels.T[None]
    for classes, expected in ((2, wanted > 0), (4, wanted), (255, wanted)):
        found = read(image, mask, classes)[1]
        assert found.dtype == np.uint8
        turned = found if name == "m.png" else found[:, ::-1, ::-1]  # RAS in the file, LPS in memory
        assert np.array_equal(turned, expected)
    with pytest.raises(BadInput, match=re.escape(f"{mask}: has the label 3, but classes: 3 means the labels 0 to 2")):
        read(image, mask, 3)
    save_mask(mask, np.where(labels == 0, 255, labels) if name == "m.png" else np.where(labels == 0, 900, labels))
    with pytest.raises(BadInput, match="has the label (255|900)"):
        read(image, mask, 4)
    save_mask(mask, labels.clip(1))  # no background at all is possible where labels say what they are
    assert read(image, mask, 4)[1].min() == 1 and any("100 % of it is foreground" in t for t in read(image, mask, 4)[-1])
    with pytest.raises(BadInput, match="all of it is foreground"):
        read(image, mask, 2)


def test_masks_that_cannot_hold_three_classes(tmp_path):
    """Lossy files and colours say nothing certain about a class; grey in three channels does."""
    labels = np.zeros((16, 16), np.uint8)
    labels[4:12, 4:12], labels[6:9, 6:9] = 1, 2
    Image.fromarray(labels * 100).save(tmp_path / "lossy.jpg")
    colours = np.zeros((16, 16, 3), np.uint8)
    colours[labels == 1, 0], colours[labels == 2, 1] = 1, 2
    Image.fromarray(colours).save(tmp_path / "colours.png")
    Image.fromarray(np.repeat(labels[..., None], 3, 2)).save(tmp_path / "grey.png")
    for name, words in (("lossy.jpg", "is a lossy file, in which 3 classes"), ("colours.png", "is a mask in colours")):
        with pytest.raises(BadInput, match=f"{name}: {words}"):
            images.read_labels(tmp_path / name, 3)
        assert images.read_labels(tmp_path / name)[0].any()
    assert np.array_equal(images.read_labels(tmp_path / "grey.png", 3)[0], labels)


# ---- The losses against their literal forms ----

@pytest.mark.parametrize("classes", [2, 3, 5])
def test_objective_equals_the_literal_forms(classes):
    """L = (CE + Dice) / 2 + mu (L_contra + L_consis): loops over pixels and classes, and `literal_alignment`."""
    model, _, y, G = random_problem(4, [0, 1, 2], classes)
    x = torch.rand(2, 3, 32, 32, dtype=torch.double)
    config = SimpleNamespace(**DEFAULTS | {"prototype_weight": 0.5, "tau": 0.2})
    context = federated.Context("a", 2, {}, G, {}, {})
    found = federated.fedbcs_losses(model, x, y, context, config)
    logits, maps = model.features(x)
    p, entropy, dice = logits.float().softmax(1), [], []
    for c in range(classes):
        truth = y == c
        entropy.append(-p[:, c][truth].log().sum())
        dice.append((2 * p[:, c][truth].sum() + 1e-5) / (p[:, c].sum() + truth.sum() + 1e-5))
    L_dice = (sum(entropy) / y.numel() + 1 - sum(dice) / classes) / 2
    torch.testing.assert_close(found["dice"].double(), L_dice.double(), rtol=1e-5, atol=1e-6)
    contrast, consistency = literal_alignment(maps, model.fusion, y, G, 0.2)
    torch.testing.assert_close(found["contrast"].double(), 0.5 * contrast.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["consistency"].double(), 0.5 * consistency.double(), rtol=1e-4, atol=1e-6)
    assert all(context.total[path][1].shape == (classes,) for path in PATHS)


# ---- Scores ----

@pytest.mark.parametrize("classes", [2, 3, 5])
def test_scores_of_each_class_equal_brute_force(classes):
    """Each class as a mask of its own; a site has the mean over classes, and the total of misses."""
    rng = np.random.default_rng(classes)
    config = a_config(classes=classes)
    samples = [a_sample("a", f"c{i}", own=(12, 12))._replace(truth=rng.integers(0, classes, (1, 12, 12), np.uint8))
               for i in range(3)]
    samples[0].truth[samples[0].truth == classes - 1] = 0
    predictions = [rng.integers(0, classes, (1, 12, 12), np.uint8) for _ in samples]
    found = [row for p, sample in zip(predictions, samples) for row in evaluation.score_sample(p, sample, config)]
    assert [j for _, j, _ in found] == 3 * list(range(1, classes))
    by_class = {j: [scores for _, k, scores in found if k == j] for j in range(1, classes)}
    for j in range(1, classes):
        for (p, sample), scores in zip(zip(predictions, samples), by_class[j]):
            both = np.sum((p == j) & (sample.truth == j))
            assert scores["dice"] == 2 * both / (np.sum(p == j) + np.sum(sample.truth == j))
    site = metrics.site_scores(by_class)
    each = [np.mean([scores["dice"] for scores in by_class[j]]) for j in range(1, classes)]
    assert site["dice"] == np.mean(each) and site["images"] == 3
    assert site["misses"] == 1 and by_class[classes - 1][0]["miss"] == 1  # not there, but predicted
    assert ("classes" in site) == (classes > 2)
    if classes > 2:
        assert [site["classes"][j]["dice"] for j in range(1, classes)] == each
        mean = metrics.mean_scores({"a": site, "b": site, "none": metrics.site_scores({j: [] for j in by_class})})
        assert mean["classes"][1]["dice"] == each[0] and mean["dice"] == site["dice"] and mean["misses"] == 2


def test_a_class_that_a_case_lacks_follows_the_rule_for_empty_masks():
    config, sample = a_config(classes=3), a_sample("a", "c", own=(10, 10))
    sample.truth[:] = 0
    sample.truth[0, 2:5, 2:5] = 1
    right, wrong = sample.truth.copy(), sample.truth.copy()
    wrong[0, 7, 7] = 2
    (_, _, disc), (_, _, cup) = evaluation.score_sample(right, sample, config)
    assert disc["dice"] == cup["dice"] == 1 and cup["hd95"] == cup["miss"] == 0
    cup = evaluation.score_sample(wrong, sample, config)[1][2]
    assert cup["dice"] == 0 and cup["miss"] == 1 and cup["hd95"] == pytest.approx(np.hypot(10, 10))


def test_pictures_give_each_class_its_colour():
    labels = np.zeros((pictures.TILE, pictures.TILE), np.uint8)
    labels[20:100, 20:100], labels[40:60, 40:60] = 1, 2
    tile = np.zeros((pictures.TILE, pictures.TILE, 3), np.uint8)
    drawn = pictures.draw_classes(tile, labels, 3, pictures.RED)
    assert not (drawn[39, 40:60]).any()  # where disc and cup meet there is one line, the cup's
    green, blue = list(pictures.COLOURS.values())[:2]
    assert tuple(drawn[20, 50]) == green and tuple(drawn[40, 50]) == blue and not drawn[30, 30].any()
    assert tuple(pictures.draw_classes(tile, labels > 0, 2, pictures.RED)[20, 50]) == pictures.RED
    assert pictures.legend(["background", "disc", "cup"]) == "   (outlines: disc green, cup blue)"
    assert pictures.legend(["background", "nucleus"]) == ""


# ---- The programs ----

@pytest.fixture(scope="module", params=["images", "volumes"])
def trained(request, tmp_path_factory):
    """A folder with data of three classes and a finished run on them, named run; site b has no cup."""
    folder = tmp_path_factory.mktemp("classes")
    if request.param == "images":
        write_images(folder / "d", without=("b",))
    else:
        write_volumes(folder / "d")
    config = tiny_config(folder / "d", folder / "run", f"task={request.param}", "classes=3", NAMES, "rounds=2",
                         "prototype_weight=1")
    (folder / "c.yaml").write_text(as_yaml(config))
    train.train(config)
    return folder, config


def rows_in(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_carries_its_classes(trained, monkeypatch, capsys):
    """Prototypes of each class, result.json and metrics.csv with both; all follow from cases.csv; eval agrees."""
    folder, _ = trained
    G = torch.load(folder / "run" / "last.pt", weights_only=True)["prototypes"]
    assert {path: sorted(G[path]) for path in PATHS} == {path: [0, 1, 2] for path in PATHS}
    result = json.loads((folder / "run" / "result.json").read_text())
    rows = rows_in(folder / "run" / "cases.csv")
    assert {row["class"] for row in rows} == {"disc", "cup"}
    for kind, split in (("best", "test"), ("last", "val")):
        scores = result[kind][split]
        for site, of_site in scores["sites"].items():
            mine = [row for row in rows if (row["kind"], row["split"], row["site"]) == (kind, split, site)]
            each = {name: float(np.mean([float(row["dice"]) for row in mine if row["class"] == name]))
                    for name in ("disc", "cup")}
            assert {name: of_class["dice"] for name, of_class in of_site["classes"].items()} == each
            assert of_site["dice"] == float(np.mean(list(each.values()))) and of_site["images"] == len(mine) / 2
        cups = [of_site["classes"]["cup"]["dice"] for of_site in scores["sites"].values()]
        assert scores["mean"]["classes"]["cup"]["dice"] == float(np.mean(cups))
    assert "foreground classes 1 disc, 2 cup" in result["definitions"]["classes"]
    splits = {row["split"] for row in rows_in(folder / "run" / "metrics.csv")}
    assert splits == {"train", "val", "val disc", "val cup"}
    before = (folder / "run" / "cases.csv").read_bytes()
    code, out, _ = run_here(monkeypatch, capsys, scoring, folder, "--run", "run")
    assert code == 0 and out.count("\n  cup ") == 2 * 3 * (1 if result["best"]["round"] == 2 else 2)
    assert (folder / "run" / "cases.csv").read_bytes() == before
    again = json.loads((folder / "run" / "result_eval.json").read_text())
    assert all(again[kind] == result[kind] for kind in ("best", "last"))


def test_tables_have_a_line_for_each_class():
    row = {"dice": .5, "hd95": 1., "assd": 1., "misses": 0, "images": 2}
    site = row | {"classes": {"disc": row, "cup": row | {"dice": .25}}}
    scores = {"sites": {"a": site}, "mean": site}
    lines = results.format_table(scores, "px").split("\n")
    assert [line.split()[0] for line in lines] == ["site", "a", "disc", "cup", "mean", "disc", "cup", "worst:"]
    assert "0.2500" in lines[3] and "0.2500" in lines[6] and len({len(line) for line in lines}) == 1


def test_a_run_of_three_classes_resumes_to_the_bit(trained, tmp_path):
    folder, config = trained
    (tmp_path / "c.yaml").write_text(as_yaml(config).replace("rounds: 2", "rounds: 1"))
    for words in (("out=r",), ("out=r", "rounds=2", "resume=true")):
        train_by(tmp_path, *words, "device=cpu")
    ours, once = (torch.load(place / "last.pt", weights_only=True) for place in (tmp_path / "r", folder / "run"))
    assert all(torch.equal(ours["weights"][name], once["weights"][name]) for name in once["weights"])
    assert (tmp_path / "r" / "cases.csv").read_bytes() == (folder / "run" / "cases.csv").read_bytes()


def test_predictions_of_three_classes(trained, tmp_path, monkeypatch, capsys):
    """The masks are eval's predictions with the labels 0 to 2; the table has a row a class; all add up to 1."""
    folder, config = trained
    code, _, err = run_here(monkeypatch, capsys, predict, folder, "--run", "run", "d/a", "site=a",
                              f"out={tmp_path / 'p'}", "probabilities=true")
    assert code == 0, err
    sites = load_sites(config)
    _, model, statistics, _ = load_run(folder / "run" / "best.pt", sites, config, torch.device("cpu"))
    network = own_network(model, statistics["a"])
    table = rows_in(tmp_path / "p" / "prediction.csv")
    samples = [sample for part in ("train", "val", "test") for sample in getattr(sites[0], part)]
    assert len(table) == 2 * len(samples) and [row["class"] for row in table[:2]] == ["disc", "cup"]
    for sample in samples:
        found = evaluation.predict(network, sample, config, torch.device("cpu"))
        if config.task == "images":
            written = np.asarray(Image.open(tmp_path / "p" / "images" / sample.name))[None]
            unit = 1
        else:
            image = nibabel.load(tmp_path / "p" / sample.name)
            written, unit = np.asarray(image.dataobj).transpose(2, 1, 0), 0.75
            assert image.get_data_dtype() == np.uint8
        assert np.array_equal(written, found)
        mine = [row for row in table if row["file"].endswith(sample.name)]
        assert [float(row["size"]) for row in mine] == [np.sum(found == j) * unit for j in (1, 2)]
        stem = f"images/{sample.name}" if config.task == "images" else sample.name
        p = np.load(tmp_path / "p" / f"{stem}.npz")["classes"]
        assert p.shape == (3, *found.shape) and np.allclose(p.astype(float).sum(0), 1, atol=2e-3)
        assert (p.argmax(0) == found).mean() > 0.99  # float16 may tie
    code, _, err = run_here(monkeypatch, capsys, predict, folder, "--run", "run", f"export={tmp_path / 'n.pt2'}",
                            "site=a")
    assert code == 0, err
    files = {"about.json": ""}
    net = torch.export.load(tmp_path / "n.pt2", extra_files=files).module()
    assert net(torch.rand(3, 3, 32, 32)).shape == (3, 3, 32, 32)
    assert json.loads(files["about.json"])["classes"] == ["background", "disc", "cup"]


def test_the_report_counts_each_class(trained, tmp_path, monkeypatch, capsys):
    folder, config = trained
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, folder / "d", "--task", config.task, "classes=3",
                            NAMES)
    assert code == 0 and re.search(r"labels    0, 1, 2; 1 disc \d+\.\d %, 2 cup \d+\.\d % of the pixels", out)
    assert ("2 cup 0.0 %" in out) == (config.task == "images")  # site b has none
    Image.open(tmp_path / f"check_{config.task}.png").verify()
    code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, folder / "d", "--task", config.task)
    assert code == 0 and "foreground is > 0" in out
    if config.task == "images":
        mask = folder / "d" / "a" / "masks" / "0.png"
        kept = mask.read_bytes()
        Image.fromarray(np.asarray(Image.open(mask)) * 2).save(mask)
        code, out, _ = run_here(monkeypatch, capsys, check_data, tmp_path, folder / "d", "--task", "images", "classes=3")
        assert code == 1 and f"{mask}: has the label 4, but classes: 3 means the labels 0 to 2" in out
        code, _, err = run_here(monkeypatch, capsys, train, tmp_path, "--config", folder / "c.yaml", "out=other")
        assert code == 2 and "has the label 4" in err and err.count("\n") == 1
        mask.write_bytes(kept)


def test_the_comparison_has_a_table_of_classes(trained, tmp_path, monkeypatch, capsys):
    folder, _ = trained
    code, _, err = run_here(monkeypatch, capsys, reproduce, folder, "table", "--config", "c.yaml", "--out",
                            tmp_path / "o", "--seeds", "0", "--methods", "fedavg", "rounds=1", "prototype_weight=0",
                            "fsr=none")
    assert code == 0, err
    text = (tmp_path / "o" / "table.md").read_text()
    assert re.search(r"\| class \| disc \| cup \|\n.*\n\| fedavg \| \d\.\d{3} \| \d\.\d{3} \|", text)
    assert {row["site"] for row in rows_in(tmp_path / "o" / "table.csv")} == {
        "a", "a/disc", "a/cup", "b", "b/disc", "b/cup"}


def test_generated_discs(tmp_path, monkeypatch):
    """Three sites with all three classes; the cup lies in the disc; the sites differ in light, colour and blur."""
    monkeypatch.chdir(tmp_path)
    folder = demo_data.ensure("images")
    sites = load_sites(load_config({"task": "images", "data": str(folder), "out": "o", "classes": 3}))
    assert [site.name for site in sites] == ["field", "flash", "lens"]
    four = load_sites(load_config({"task": "images", "data": "demo", "out": "o", "classes": 4}))
    assert [site.undrawn for site in four] == [{3}] * 3
    looks = []
    for site in sites:
        shares = [[(sample.truth == j).mean() for j in range(3)] for sample in (*site.train, *site.test)]
        assert np.min(shares) > 0.002 and 0.02 < np.mean(shares, 0)[1] < 0.2
        pixels = [np.asarray(Image.open(file)).astype(float) for file in (folder / site.name / "images").iterdir()]
        looks.append([np.mean([p.mean((0, 1)) for p in pixels], 0),
                      np.mean([abs(np.diff(p.mean(2), axis=0)).mean() for p in pixels])])
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert abs(looks[a][0] - looks[b][0]).max() > 15 and looks[a][1] != looks[b][1]
