"""docs/method.md says what the code does; docs/trained predicts; the tour draws it."""

import doctest
import re

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import train
from datasets import load_sites, stack
from experiments import style_bias, tour
from fused_features import literal_features
from rounds.finished import open_run
from scoring.metrics import score
from scoring.trained import model_of
from sites import scenes
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests.helpers import CPU
from tests.method_links import LINK, PAGE, line_of, with_right_numbers

TEXT = PAGE.read_text()


def test_links_point_at_their_functions():
    links = LINK.findall(TEXT)
    assert len(links) == TEXT.count(".py#L") > 15
    wrong = [f"{file}#L{n} should be #L{line_of(name, file)} ({name})" for name, file, n in links
             if int(n) != line_of(name, file)]
    assert not wrong, f"run python -m tests.method_links --write: {'; '.join(wrong)}"


def test_numbers_of_links_are_set_right():
    assert with_right_numbers(re.sub(r"#L\d+", "#L1", TEXT)) == with_right_numbers(TEXT)
    with pytest.raises(ValueError, match="prototypes.py has 0 functions nothing; mend"):
        with_right_numbers("[`nothing`](../prototypes.py#L1)")


def slug(heading):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_of_all_pages_lead_somewhere():
    pages = [HERE / "README.md", HERE / "flower" / "README.md", *(HERE / "docs").rglob("*.md")]
    text = {page: re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in pages}
    anchors = {page: {slug(h) for h in re.findall(r"^#+ (.+)$", text[page], re.MULTILINE)} for page in pages}
    links = [(page, *link.partition("#")[::2]) for page in pages
             for link in re.findall(r"\]\(([^)\s]+)\)", text[page]) if "://" not in link]
    assert len(links) > 100
    for page, file, anchor in links:
        target = (page.parent / file).resolve() if file else page
        known = not anchor or anchor[0] == "L" or anchor in anchors[target]
        assert target.exists() and known, (page, file, anchor)


def test_worked_numbers_are_the_codes():
    found = doctest.DocTestParser().get_doctest(re.sub("```\\w*", "", TEXT), {}, "method.md", str(PAGE), 0)
    assert len(found.examples) > 25
    said = []
    try:
        doctest.DocTestRunner(verbose=False).run(found, out=said.append)
    finally:
        torch.set_printoptions(profile="default")
    assert not said, "".join(said)


def test_page_is_short_and_its_pictures_are_there():
    assert len(TEXT.split()) <= 2500
    pictures = re.findall(r"!\[.+\]\((.+)\)", TEXT)
    assert pictures and all((PAGE.parent / name).stat().st_size < 150_000 for name in pictures)


def test_every_formula_parses():
    mathtext = pytest.importorskip("matplotlib.mathtext").MathTextParser("path")
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    formulas = re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", prose)
    assert len(formulas) > 50 and prose.count("$") == sum(4 if block else 2 for block, _ in formulas)
    for block, inline in formulas:
        formula = (block or inline).strip()
        mathtext.parse(f"${formula}$")
        # GitHub reads Markdown before it looks for formulas: _ behind a bracket begins italics,
        # \{ loses its \
        assert not re.search(r"(?<![A-Za-z0-9])_(?! )|\\[^A-Za-z]|[*`]|<\S", formula), formula


def test_trained_network_predicts_generated_images(tmp_path, program):
    """New scenes in the style of a site on which it does well; 0.89 and 0.96 when it was trained."""
    for case in range(2):
        scenes.write_case("nuclei", tmp_path / "north", f"{case}", scenes.NUCLEI["north"],
                          *(np.random.default_rng([77, case, part]) for part in (0, 1)))
    trained = HERE / "docs" / "trained"
    assert sum(file.stat().st_size for file in trained.iterdir()) < 3_000_000
    code, out, err = program(predict, tmp_path, "--run", trained, "north/images", "out=p", "device=cpu")
    assert code == 0 and "validation Dice 0.8" in out, err
    for case in range(2):
        found, truth = (np.asarray(Image.open(file)) > 0 for file in (
            next((tmp_path / "p").rglob(f"{case}*.png")), tmp_path / "north" / "masks" / f"{case}.png"))
        assert score(found, truth, (1, 1))["dice"] > 0.8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, with adaptive FSR; its first round alone is in `first`."""
    folder = tmp_path_factory.mktemp("tour")
    data = write_nuclei(folder / "data")
    for name, rounds in ("run", 2), ("first", 1):
        train.train(tiny_config(data, folder / name, "fsr=adaptive", "prototype_weight=1",
                                f"rounds={rounds}"))
    return folder / "run"


def test_tour_draws_what_a_run_has(run, program, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(style_bias, "SCENES", 2)
    original = tour.save_figure  # laying out a figure takes most of the time
    monkeypatch.setattr(tour, "save_figure", lambda figure, file, dpi: original(
        figure.set_layout_engine("none") or figure, file, 30))
    code, out, err = program(tour, run.parent, "--run", "run", "first", "out=seen")
    assert code == 0, err
    assert re.search(r"decoder: untrained \S+ and \S+, round 1 \S+ and \S+, round 2 \S+ and", out)
    assert sorted(file.name for file in (run.parent / "seen").iterdir()) == [
        "cosines.png", "fsr.png", "prototypes.png", "styles.png", "weights.png"]
    words = r"multiplied by (\S+) to (\S+) and no phase .* than (\S+) rad"
    low, high, turn = map(float, re.search(words, out).groups())
    assert 0 < low == high and turn < 1e-3


def test_tour_refuses_runs_that_differ_in_more_than_rounds(run, program):
    overrides = "fsr=adaptive", "prototype_weight=1", "rounds=1", "tau=0.2"
    train.train(tiny_config(run.parent / "data", run.parent / "other", *overrides))
    code, _, err = program(tour, run.parent, "--run", "run", "other")
    words = "other/config.yaml: belongs to another config, differing in tau (0.2, now 0.1);"
    assert code == 2 and words in err


@torch.no_grad()
def test_tour_takes_prototypes_of_the_training_images(run):
    config, (checkpoint,) = open_run(run, ["best"])
    site, model = load_sites(config)[0], model_of(checkpoint, run / "best.pt", CPU)
    config.batch_size = len(site.train_slices)
    x, y = stack(site.train_slices)
    f = literal_features("decoder", model.features(x)[1]["decoder"], model.fusion["decoder"])
    expected = f[y[:, ::4, ::4] == 1].mean(0)
    torch.testing.assert_close(tour.prototypes_of(model, [site], config)[0]["decoder"][1], expected)
