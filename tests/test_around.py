"""Tests of what happens around a run: whose checkpoints, where it starts, what is saved when, what is said."""

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval as scoring
import settings
import train
from config import KEYS, BadInput, load_config
from experiments import curves, diagnose
from rounds import checkpoint, run_folder
from rounds.advice import Advice
from rounds.lock import LOCK, locked
from rounds.reading import TO_RESUME, load_checkpoint
from rounds.run_folder import RunFolder
from rounds.screen import RoundTable, show_step
from scoring import evaluate as evaluation
from settings.program import Screen
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests.helpers import assert_same, rows_of, without_seconds


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with data in d and a finished run of two rounds in run."""
    folder = tmp_path_factory.mktemp("around")
    train.train(tiny_config(write_nuclei(folder / "d"), folder / "run", "optimizer=adam", "lr=1e-3"))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, beside its data."""
    shutil.copytree(finished, tmp_path / "copy")
    text = (tmp_path / "copy" / "run" / "config.yaml").read_text()
    (tmp_path / "copy" / "run" / "config.yaml").write_text(text.replace(str(finished), str(tmp_path / "copy")))
    return tmp_path / "copy" / "run"


def resume(run, *overrides):
    """Resume the run of a folder with its own settings."""
    train.train(load_config(run / "config.yaml", ["resume=true", f"out={run}", *overrides]))


# ---- Whose checkpoints ----

@pytest.mark.parametrize("kind", ["best", "last"])
@pytest.mark.parametrize("change", [{"method": "evil.py:f"}, {"seed": 5}, {"width": 4}])
def test_no_program_uses_a_checkpoint_of_another_run(run, program, monkeypatch, kind, change):
    """Nor does any run the code that it names."""
    monkeypatch.chdir(run.parent)
    (run.parent / "evil.py").write_text("open('ran', 'w')")
    file, key = run / f"{kind}.pt", min(change)
    saved = torch.load(file)
    torch.save(saved | {"config": saved["config"] | change}, file)
    words = rf"{kind}\.pt: belongs to another config, differing in {key} \("
    for rounds in (2, 3):
        with pytest.raises(BadInput, match=words):
            resume(run, f"rounds={rounds}")
    if key != "width":
        return
    for module in (scoring, *([diagnose] if kind == "last" else [])):
        code, _, err = program(module, run.parent, "--run", "run")
        assert code == 2 and f"{kind}.pt: belongs to another config" in err
    assert not (run.parent / "ran").exists()


@pytest.mark.parametrize("part", TO_RESUME)
def test_a_part_that_last_pt_lacks_is_named(run, part):
    saved = torch.load(run / "last.pt")
    del saved[part]
    torch.save(saved, run / "last.pt")
    with pytest.raises(BadInput, match=rf"last\.pt: lacks its part '{part}'"):
        resume(run)


@pytest.mark.parametrize("spoil, words", [
    (lambda kept: kept.pop("memory"), "its part 'kept'"), (lambda kept: kept.pop("optimizer"), "its part 'kept'"),
    (lambda kept: kept.update(local={"head.bias": torch.ones(9)}), "its local weights do not fit")])
def test_what_a_site_kept_is_whole(run, spoil, words):
    saved = torch.load(run / "last.pt")
    spoil(saved["kept"]["a"])
    torch.save(saved, run / "last.pt")
    with pytest.raises(BadInput, match=words):
        resume(run)


def test_a_best_round_whose_file_is_gone(run):
    (run / "best.pt").unlink()
    with pytest.raises(BadInput, match="best.pt: is gone; restore it"):
        resume(run)


# ---- Where a run starts ----

def test_data_that_moved_are_the_same_run(run, program, capsys):
    (run.parent / "d").rename(run.parent / "moved")
    code, _, err = program(scoring, run.parent, "--run", "run", f"data={run.parent / 'moved'}")
    assert code == 0 and err == ""
    before = load_checkpoint(run / "best.pt")["weights"]
    resume(run, f"data={run.parent / 'moved'}")
    assert capsys.readouterr().err == ""
    assert_same(before, load_checkpoint(run / "best.pt")["weights"])
    assert program(scoring, run.parent, "--run", "run")[0] == 0  # config.yaml knows the new place
    (run.parent / "moved" / "b" / "images" / "0.png").rename(run.parent / "moved" / "b" / "images" / "8.png")
    (run.parent / "moved" / "b" / "masks" / "0.png").rename(run.parent / "moved" / "b" / "masks" / "8.png")
    with pytest.raises(BadInput, match="differs from the splits"):
        resume(run)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_images_exchanged_under_the_same_names_are_said(run, capsys, kind):
    one, other = (run.parent / "d" / "a" / kind / f"{i}.png" for i in (0, 1))
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    if kind == "masks":
        Image.fromarray(255 - np.asarray(Image.open(one))).save(one)
    for rounds in (3, 4):  # the second time too
        resume(run, f"rounds={rounds}")
        err = capsys.readouterr().err
        line, = (line for line in err.splitlines() if "is not the image" in line)
        assert line.startswith("warning: a: ")


def test_resume_where_nothing_is_says_that_it_begins(finished, tmp_path, capsys):
    config = tiny_config(finished / "d", tmp_path / "new", "resume=true", "rounds=1")
    train.train(config)
    assert f"resume: there is no {tmp_path / 'new' / 'last.pt'} to go on from" in capsys.readouterr().out


def test_a_run_starts_from_the_weights_of_another(finished, tmp_path, capsys):
    config = tiny_config(finished / "d", tmp_path / "new", f"init={finished / 'run' / 'best.pt'}", "lr=1e-30",
                         "rounds=1")
    train.train(config)
    theirs = load_checkpoint(finished / "run" / "best.pt")
    assert f"init: starts from the weights of round {theirs['round']}" in capsys.readouterr().out
    assert_same(theirs["weights"]["head.weight"], load_checkpoint(tmp_path / "new" / "last.pt")["weights"]["head.weight"])
    assert f"are those in {config.init}" in (tmp_path / "new" / "result.json").read_text()
    for override, words in (("width=3", r"best.pt: its weights do not fit .*set init to none"),
                            ("init=nowhere.pt", "nowhere.pt: there is no such file")):
        with pytest.raises(BadInput, match=words):
            train.train(tiny_config(finished / "d", tmp_path / "other", f"init={config.init}", override))
    assert not (tmp_path / "other" / "last.pt").exists()


# ---- What is saved, and when ----

def test_saving_takes_a_share_of_the_time_and_the_end_is_saved(tmp_path, monkeypatch):
    """A second a round and two a write: after the first round every fortieth second is enough."""
    clock, written = [0.0], []

    def slow(file, content):
        clock[0] += 1.0 if file.suffix == ".pt" else 0
        written.append((file.name, torch.load(io.BytesIO(content))["round"] if file.suffix == ".pt" else 0))

    monkeypatch.setattr(run_folder.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run_folder, "save", slow)
    config = tiny_config("unused", tmp_path / "run", "rounds=200")
    site = SimpleNamespace(name="a", train=[], val=[], test=[])
    with RunFolder(config, {"w": torch.zeros(2)}, [site]) as folder:
        for t in folder.rounds_left():
            clock[0] += 1
            dice = {"sites": {}, "mean": {"dice": min(t, 70) / 100}}  # better until round 70
            folder.save(t, {"w": torch.full((2,), float(t))}, {}, [], dice)
            if t == 199:
                folder.kept["a"] = "of a round that is not saved yet"
                break
    last = [t for name, t in written if name == "last.pt"]
    assert last[0] == 1 and last[-1] == 199 and 5 <= len(last) <= 9
    best = [t for name, t in written if name == "best.pt"]
    assert max(best) == 70 and set(best) - {70} <= set(last)
    assert folder.writing <= 0.05 * clock[0] + 3 and [name for name, _ in written].index("best.pt") < \
        [name for name, _ in written].index("last.pt")


def test_a_server_saves_every_round(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SHARE", 0.0)
    folder = RunFolder(tiny_config("unused", tmp_path / "run", "rounds=3"), {"w": torch.zeros(2)})
    for t in folder.rounds_left():
        folder.save(t, {"w": torch.zeros(2)}, {}, [])
        assert load_checkpoint(tmp_path / "run" / "last.pt")["round"] == t


@pytest.mark.parametrize("killed", [True, False])
def test_rounds_that_a_kill_lost_are_repeated_to_the_bit(finished, tmp_path, monkeypatch, killed):
    """A kill goes back to what was written, round 1 here; Ctrl-C loses the unfinished round alone."""
    overrides = ("optimizer=adam", "lr=1e-3", "rounds=4", "resume=true", "method=fedbn")
    monkeypatch.setattr(run_folder, "SHARE", 0.0)
    train.train(tiny_config(finished / "d", tmp_path / "whole", *overrides))
    config = tiny_config(finished / "d", tmp_path / "run", *overrides)
    with monkeypatch.context() as patch:
        original = train.validate

        def interrupted(model, w, kept, *more):
            if len(os.listdir(tmp_path / "run")) and kept["a"]["optimizer"]["state"][0]["step"] >= 6:
                raise KeyboardInterrupt  # in round 3, when what the sites keep is of that round already
            return original(model, w, kept, *more)

        patch.setattr(train, "validate", interrupted)
        if killed:
            patch.setattr(RunFolder, "__exit__", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["round"] == (1 if killed else 2)
    train.train(config)
    for kind in ("best", "last"):
        one, other = (load_checkpoint(tmp_path / name / f"{kind}.pt") for name in ("whole", "run"))
        for part in ("round", "weights", "local", "kept", "prototypes", "best"):
            assert_same(one.get(part), other.get(part))
    assert without_seconds(rows_of(tmp_path / "whole")) == without_seconds(rows_of(tmp_path / "run"))
    assert (tmp_path / "whole" / "cases.csv").read_bytes() == (tmp_path / "run" / "cases.csv").read_bytes()


def test_a_last_round_that_is_the_best_is_scored_once(finished, tmp_path, monkeypatch):
    asked, original = [], evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *words, **more: asked.append(words[2]) or original(*words, **more))
    train.train(tiny_config(finished / "d", tmp_path / "run", "rounds=1"))
    assert asked == ["val", "test"]
    rows = (tmp_path / "run" / "cases.csv").read_text()
    assert rows.count("best,") == rows.count("last,") > 0


def test_a_curve_is_written_whole_or_not_at_all(run, program, monkeypatch):
    (run / "curves.png").write_bytes(b"an earlier one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    code, _, err = program(curves, run.parent, "--run", "run")
    assert code == 2 and err.startswith("error: run/curves.png: No space left on device; make room")
    assert (run / "curves.png").read_bytes() == b"an earlier one" and not list(run.glob("*.part"))


# ---- The lock, the keyboard and the screen ----

def test_a_lock_that_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    lock, precious = tmp_path / "run" / LOCK, tmp_path / "precious"
    precious.write_text("precious")
    for make in (lambda: lock.symlink_to(precious), lambda: lock.symlink_to("nowhere"), lambda: os.mkfifo(lock),
                 lock.mkdir):
        make()
        with pytest.raises(BadInput, match=r"\.lock: is no regular file, remove it"), \
                locked(tiny_config(tmp_path / "d", tmp_path / "run")):
            pass
        lock.rmdir() if lock.is_dir() and not lock.is_symlink() else lock.unlink()
    os.link(precious, lock)
    with locked(tiny_config(tmp_path / "d", tmp_path / "run")):
        pass
    assert precious.read_text() == "precious" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("words", [["train.py", "--config", "config.yaml"], ["check_data.py", "x", "--task", "nuclei"],
                                   ["-m", "experiments.diagnose", "--run", "x"]])
def test_ctrl_c_while_torch_is_imported(tmp_path, words):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ValueError\n")
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    ran = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True, text=True, check=False,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "")


def test_ctrl_c_at_any_other_time_is_an_exception():
    with pytest.raises(KeyboardInterrupt):
        settings.on_interrupt(signal.SIGINT, sys._getframe())


def test_names_only_appear_on_a_screen():
    stream = io.StringIO()
    print("\rprogress", "a\x1b[2J\x9b\u202eb\rc\td\n", file=Screen(stream), end="")
    assert stream.getvalue() == "\rprogress a\\x1b[2J\\x9b\\u202eb\\rc\td\n"
    assert not Screen(stream).isatty()


def test_escape_codes_in_names_of_files(tmp_path, program):
    write_nuclei(tmp_path / "d", ("a", "b\x1b[31m"))
    (tmp_path / "d" / "a" / "images" / "0.png").rename(tmp_path / "d" / "a" / "images" / "\x1b]0;x\x07.png")
    (tmp_path / "c.yaml").write_text("task: nuclei\ndata: d\nout: run\ndevice: cpu\n")
    _, out, err = program(train, tmp_path, "--config", "c.yaml")
    assert "\\x1b]0;x\\x07.png" in out + err and "\x1b" not in out + err


def test_the_table_of_rounds_cuts_no_name_and_shows_progress(capsys, monkeypatch):
    long = "University Hospital of Somewhere, Department of Pathology"
    table = RoundTable(load_config({"task": "nuclei", "data": "demo", "out": "o", "rounds": 9}), ["a", long])
    update = SimpleNamespace(site="a", losses={"dice": 0.5})
    table.add(1, [update], 2.0, {"sites": {"a": {"dice": 0.25}, long: {"dice": None}}, "mean": {"dice": 0.25}})
    out = capsys.readouterr().out
    titles, line = out.splitlines()[1:]
    assert titles.split("  ")[-1].strip() == "left" and long in titles and len(titles) == len(line)
    assert line.split() == ["1", "0.5000", "0.250", "-", "0.250", "2.0", "0:00:16"]
    assert titles.index(long) + len(long) == line.index("-") + 1
    show_step(3)("a", 1, 2)
    assert capsys.readouterr().out == ""  # a log has no progress
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show_step(3)("a", 1, 2)
    assert capsys.readouterr().out.rstrip() == f"\r    3  [{'#' * 10:20}] 1/2  a"


def test_help_has_every_key(program, tmp_path):
    code, out, _ = program(train, tmp_path, "--help")
    assert code == 0 and all(f"\n  {key} " in out for key in KEYS) and "fedprox_mu" in out
    assert "\n  tau               0.1           temperature of the contrastive loss\n" in out
    code, out, _ = program(curves, tmp_path, "--help")
    assert "\n\nWrites RUN/curves.png" in out  # its paragraphs are kept


def test_a_run_that_diverged_is_not_advised_to_resume(finished, tmp_path, program):
    (tmp_path / "c.yaml").write_text((finished / "run" / "config.yaml").read_text().replace("adam", "sgd"))
    for out in ("run", "run2"):
        code, _, err = program(train, tmp_path, "--config", "c.yaml", "out=run", "lr=1e30", "resume=true")
        assert code == 3 and "lower lr and start again in another out=FOLDER" in err and err.count("\n") == 1
    assert program(train, tmp_path, "--config", "c.yaml", f"out={out}", "lr=0.01")[0] == 0  # as advised


def test_a_file_that_cannot_be_written_says_why(tmp_path):
    with pytest.raises(BadInput, match=r"gone/last\.pt: No such file .*restore it; then start again"):
        checkpoint.save(tmp_path / "gone" / "last.pt", b"")


# ---- Training that goes wrong ----

def told(dice, losses, task="nuclei", rounds=20, of_classes=None, **settings):
    """The rounds in which Advice speaks, and its words; dice: of the two sites, round by round."""
    config = load_config({"task": task, "data": "demo", "out": "o", "rounds": rounds} | settings)
    advice, lines = Advice(config), io.StringIO()
    with contextlib.redirect_stderr(lines):
        for t, (pair, loss) in enumerate(zip(dice, losses, strict=False), 1):
            sites = {site: {"dice": d} | (of_classes or {}) for site, d in zip("ab", pair)}
            scores = {"sites": sites, "mean": {"dice": None if None in pair else sum(pair) / 2}}
            advice.look(t, [SimpleNamespace(losses={"dice": loss / 2, "contrast": loss / 2})], scores)
            advice.look(t, [], None)
    return lines.getvalue().splitlines()


def test_training_that_goes_wrong_is_said_once_and_one_that_learns_is_left_alone():
    rising, falling = [1 / t for t in range(1, 21)], [1 - t / 40 for t in range(1, 21)]
    line, = told([(0.6, 0.0)] * 20, falling)
    assert line.startswith("warning: round 6: the validation Dice of b is below 0.01; try optimizer=adam lr=0.001, "
                           "tiles=true if objects are small in large images, batch_size=2 and")
    line, = told([(0.6, 0.6)] * 20, falling, of_classes={"classes": {"disc": {"dice": 1.0}, "cup": {"dice": 0.0}}})
    assert "the validation Dice of a cup, b cup is below 0.01;" in line
    assert "window=[0,200] if this is CT" in told([(0.0, 0.0)] * 20, falling, task="volumes")[0]
    line, = told([(0.0, 0.0)] * 20, falling, "volumes", optimizer="adam", batch_size=2, window=[0, 200])
    assert "; try more rounds; check_data.py" in line  # what is set already is not asked for
    line, = told([(0.6, 0.6)] * 8 + [(0.5, 0.54)] * 12, falling)
    assert line.startswith("warning: round 9: the mean validation Dice fell from 0.600 in round 1 to 0.520")
    line, = told([(0.3, 0.6), (0.3004, 0.58)] * 10, falling)
    assert line.startswith("warning: round 6: the validation Dice of a stays at 0.300, as if all were marked")
    line, = told([(0.3, 0.4), (0.4, 0.3)] * 10, [0.7] * 20)
    assert line.startswith("warning: round 6: the loss stands still at 0.700, with a mean validation Dice of 0.350")
    assert told([(0.0, 0.0)] * 5 + [(0.3 + t / 60, 0.3 + t / 50) for t in range(15)], rising) == []  # slow at first
    line, = told([(0.3 + t / 100, 0.2 + t / 90) for t in range(20)], falling)  # learns, but too little
    assert line.startswith("warning: round 20: the last round has a mean validation Dice of 0.45")
    assert told([(0.8, 0.8)] * 20, [0.1] * 20) == told([(0.0, 0.0)] * 5, rising) == told([(None, None)] * 20, falling) == []
    assert len(told([(0.6, 0.6)] + [(0.0, 0.3)] * 19, [0.7] * 20)) == 4
