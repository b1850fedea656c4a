"""Settings that make no sense, checkpoints that are not whole, and a run folder that two want."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import eval as evaluation
import train
from config import BadInput, load_config
from datasets import load_sites
from rounds.lock import LOCK, locked
from rounds.reading import load_checkpoint
from rounds.run_folder import RunFolder
from scoring.trained import load_run
from settings import program as programs
from test_fedbcs import HERE, tiny_config, write_nuclei
from tests import mutate
from tests.helpers import (
    a_config,
    assert_same,
    rows_of,
    run_here,
    some_sites,
    start_training,
    without_seconds,
    write_run,
)

# ---- Settings ----

LONG = 9999
WRONG = ["method=[1]", "method=x.py:", "method={a: 1}", "method=3", "method=fedbcs\\n", "tau=" + "[" * LONG,
         "rounds=" + "9" * LONG, "width=0x" + "f" * LONG, "lr=1e300", "lr=.inf", "lr=.nan", "lr=true", "lr=",
         "device=cuda:99999999999999999999", "device=tpu", "image_size=1000000000", "image_size=33", "width=0",
         "width=5000", "batch_size=2.5", "fold=1", "hold_out=", "amp=", "amp=fp8", "folds=1", "data=~nobody9/x",
         "data=a\0b", "out=a\nb", "out=" + "x" * 5000, "case_pattern=((((", "case_pattern=a" + "(" * 500,
         "levels={a: 1}", "levels=[[0]]", "levels=[0, 0]", "levels=" + "[0," * LONG, "seed=true", "seed=-1",
         "min_sites=1e3", "task=[nuclei]", "resume=maybe", "a" * LONG + "=1", "=", "x",
         "!!python/object:os.system=1", "rounds=!!python/object/apply:os.getcwd []", "rounds=&a [*a]",
         "weights=2024-01-01", "fsr=!!binary aGk=", "tau=0x10", "rounds=010", "rounds=1:30", "rounds=1_000", "lr=1:30.5", "eval_every=0", "local_epochs=null"]


@pytest.mark.parametrize("override", WRONG)
def test_a_setting_is_what_its_author_wrote_or_is_refused(tmp_path, monkeypatch, capsys, override):
    (tmp_path / "c.yaml").write_text("task: nuclei\ndata: nowhere\ndevice: cpu\nout: run\n")
    code, out, err = run_here(monkeypatch, capsys, train, tmp_path, "--config", "c.yaml", override)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and len(err) < 600
    assert "nowhere: there is no such data folder" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_a_key_that_is_given_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text("task: nuclei\ndata: nowhere\nlr: 0.1\nlr: 0.01\n")
    code, _, err = run_here(monkeypatch, capsys, train, tmp_path, "--config", "c.yaml")
    assert code == 2 and err.startswith("error: c.yaml: is not YAML, mend it: the key 'lr' is given twice")


@pytest.mark.parametrize("code, words", [
    ("import nothing_of_this_name", "cannot be imported (ModuleNotFoundError"), ("1 / 0", "ZeroDivisionError"),
    ("raise SystemExit(0)", "cannot be imported (SystemExit"), ("def f(", "SyntaxError"), ("f = 3", "no function f"),
    ("def f(config):\n    raise SystemExit", "raises SystemExit"), ("def f(config):\n    return 1 / 0", "raises Zero"),
    ("def f():\n    pass", "raises TypeError"), ("def f(config):\n    return 3", "no function f(config)")])
def test_a_method_file_that_cannot_be_used(tmp_path, monkeypatch, capsys, code, words):
    write_nuclei(tmp_path / "d")
    (tmp_path / "c.yaml").write_text("task: nuclei\ndata: d\ndevice: cpu\nout: run\nimage_size: 32\nwidth: 2")
    (tmp_path / "mine.py").write_text(code)
    code, _, err = run_here(monkeypatch, capsys, train, tmp_path, "--config", "c.yaml", "method=mine.py:f")
    assert code == 2 and err.startswith("error: method: mine.py") and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_home_folder_is_expanded_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config({"task": "nuclei", "data": "~/d", "out": "~/o", "splits": "~/s", "method": "~/m.py:f"}
                         | {"method": "fedbcs"})
    assert (config.data, config.out, config.splits) == tuple(str(tmp_path / name) for name in "dos")


def test_what_went_wrong_is_what_is_said(capsys):
    def fails(problem):
        def main():
            raise problem
        return main
    full = OSError(errno.ENOSPC, "No space left on device")
    for problem, words in (
            (full, "the output (stdout): cannot be written"), (MemoryError(), "memory: there is not enough"),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory: "),
            (OSError(errno.EACCES, "Permission denied", "x/y"), "x/y: Permission denied; check its permissions"),
            (OSError(errno.ENOSPC, "No space left on device", "x/y"), "x/y: No space left on device; make room"),
            (OSError(errno.ENOENT, "No such file", "x/y"), "x/y: No such file; it or its folder was there before"),
            (BadInput("a" * 5000), "a" * 1000)):
        with pytest.raises(SystemExit) as end:
            programs.run_program(fails(problem))
        err = capsys.readouterr().err
        assert end.value.code == 2 and words in err and err.count("\n") == 1 and len(err) < 2100
    with pytest.raises(RuntimeError, match="a fault"):
        programs.run_program(fails(RuntimeError("a fault of the program")))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk(tmp_path):
    write_nuclei(tmp_path / "d")
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, HERE / "check_data.py", "d", "--task", "nuclei"], cwd=tmp_path,
                               stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error: the output (stdout): cannot be written (No space left")


def test_a_screen_of_another_encoding(tmp_path):
    folder = write_nuclei(tmp_path / "d")
    (folder / "b").rename(folder / "Zürich")
    found = subprocess.run([sys.executable, HERE / "check_data.py", "d", "--task", "nuclei"], cwd=tmp_path,
                           capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert found.returncode == 0 and found.stderr == b"" and b"Z\\xfcrich" in found.stdout


# ---- Checkpoints ----

NAN, WORD = torch.tensor([float("nan")]), "w"
PARTS = {
    "config": [None, [], {1: 2}, WORD], "round": [None, -1, 1.5, True, WORD],
    "weights": [None, [], {}, {WORD: NAN}, {1: torch.ones(1)}, {WORD: 3}],
    "local": [None, [], {WORD: None}, {WORD: {WORD: NAN}}], "statistics": [3, {WORD: []}, {WORD: {WORD: NAN}}],
    "prototypes": [None, {WORD: []}, {WORD: {WORD: torch.ones(1, 2)}}, {WORD: {0: torch.ones(2)}},
                   {WORD: {0: NAN[None]}}, {WORD: {0: torch.ones(1, 2), 1: torch.ones(1, 3)}}],
    "kept": [None, [], {WORD: None}, {WORD: {}}, {WORD: {"local": {}, "optimizer": []}},
             {WORD: {"local": {}, "optimizer": {"state": {0: {"x": NAN}}, "param_groups": []}}},
             {WORD: {"local": {}, "round": -1}}, {WORD: {"local": {}, "optimizer": None, "memory": 3}}],
    "history": [None, {}, [3], [(1, 2)], [(None,) * 8], [(1, "val", "a", 0.5, {WORD: WORD}, None, None, None)]], "seconds": [None, float("nan"), WORD],
    "best": [None, [], {}, {"round": 1, "dice": WORD}, {"round": -1, "dice": None}]}
MALFORMED = [(name, i) for name, values in PARTS.items() for i in range(len(values))]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train.train(tiny_config(write_nuclei(folder / "d"), folder / "run", "optimizer=adam", "lr=1e-3"))
    return folder


@pytest.mark.parametrize("name, i", MALFORMED)
def test_malformed_parts_of_a_checkpoint_are_named(finished_run, tmp_path, name, i):
    checkpoint = torch.load(finished_run / "run" / "last.pt")
    torch.save(checkpoint | {name: PARTS[name][i]}, tmp_path / "last.pt")
    with pytest.raises(BadInput, match=f"its part '{name}' is not what this program writes"):
        load_checkpoint(tmp_path / "last.pt")


def test_every_flipped_bit_of_a_checkpoints_tensors_is_seen(finished_run, tmp_path):
    """A zip's directory says where a file's bytes lie; a bit in one of them changes its checksum."""
    content, random = (finished_run / "run" / "last.pt").read_bytes(), torch.Generator().manual_seed(0)
    values = torch.load(finished_run / "run" / "last.pt")["weights"]["fusion.encoder.0.weight"].numpy().tobytes()
    start = content.index(values)
    for at in torch.randint(len(values), (20,), generator=random).tolist():
        spoilt = bytearray(content)
        spoilt[start + at] ^= 1
        (tmp_path / "last.pt").write_bytes(spoilt)
        with pytest.raises(BadInput, match="damaged"):
            load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("part", ["statistics", "local"])
def test_parts_that_do_not_fit_the_network(tmp_path, part):
    config, sites = a_config(), some_sites()
    write_run(tmp_path, config, sites)
    checkpoint = torch.load(tmp_path / "best.pt")
    name = "head.bias" if part == "local" else "encoder.0.1.running_mean"
    torch.save(checkpoint | {part: {"a": checkpoint[part].get("a", {}) | {name: torch.ones(17)}}}, tmp_path / "best.pt")
    with pytest.raises(BadInput, match="do not fit the network"):
        load_run(tmp_path / "best.pt", sites, config, torch.device("cpu"))


def test_weights_of_another_network_are_not_resumed(finished_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt")
    state["weights"]["head.bias"] = torch.ones(3)
    torch.save(state, tmp_path / "run" / "last.pt")
    config = tiny_config(finished_run / "d", tmp_path / "run", "optimizer=adam", "lr=1e-3", "resume=true", "rounds=3")
    with pytest.raises(BadInput, match="weights do not fit the network"):
        train.train(config)


def test_the_code_of_a_run_is_run_only_if_it_is_trusted(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("task: nuclei\ndata: d\nmethod: theirs/bad.py:f\n")
    (tmp_path / "theirs" / "bad.py").write_text("open('ran', 'w')\nf = None")
    code, _, err = run_here(monkeypatch, capsys, evaluation, tmp_path, "--run", "theirs")
    assert code == 2 and err.startswith("error: trust: this run would run the code of theirs/bad.py")
    assert not (tmp_path / "ran").exists()


# ---- The run folder ----

def test_one_process_at_a_time(tmp_path):
    config = tiny_config(tmp_path / "d", tmp_path / "deep" / "run")
    with locked(config):
        code = f"from rounds.lock import locked; from types import SimpleNamespace as S\n" \
               f"with locked(S(out={config.out!r}, data={config.data!r}, task='nuclei')): pass"
        other = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=False)
        assert other.returncode == 1 and "is in use by another process" in other.stderr
    assert not (tmp_path / "deep").exists()  # nothing was written in it
    with locked(config):
        (tmp_path / "deep" / "run" / "x").write_text("")
    assert [path.name for path in (tmp_path / "deep" / "run").iterdir()] == ["x"]


def test_a_lock_is_gone_with_its_process(tmp_path):
    config = tiny_config(tmp_path / "d", tmp_path / "run")
    code = f"from rounds.lock import locked; from types import SimpleNamespace as S; import time\n" \
           f"with locked(S(out={config.out!r}, data={config.data!r}, task='nuclei')): print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(BadInput, match="in use"), locked(config):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with locked(config):
        pass
    other.stdout.close()


@pytest.mark.parametrize("out, words", [("d/run", "lies in the data folder"), ("d", "lies in the data folder"),
                                        (".", "holds the data folder"), ("link/run", "lies in the data")])
def test_run_and_data_stay_apart(tmp_path, out, words):
    write_nuclei(tmp_path / "d")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=words), locked(tiny_config(tmp_path / "d", tmp_path / out)):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_goes_on_has_no_earlier_end(finished_run, tmp_path):
    shutil.copytree(finished_run / "run", tmp_path / "run")
    run = tmp_path / "run"
    (run / "metrics.csv").write_text("killed before it was written\n")
    (run / "last.pt.123.part").write_bytes(b"half")
    done = tiny_config(finished_run / "d", run, "optimizer=adam", "lr=1e-3", "resume=true")
    w = load_checkpoint(run / "last.pt")["weights"]
    RunFolder(done, w, load_sites(done))
    assert (run / "result.json").exists() and not list(run.glob("*.part"))
    assert (run / "metrics.csv").read_bytes() == (finished_run / "run" / "metrics.csv").read_bytes()
    longer = tiny_config(finished_run / "d", run, "optimizer=adam", "lr=1e-3", "resume=true", "rounds=3")
    RunFolder(longer, w, load_sites(longer))
    assert not (run / "result.json").exists() and not (run / "predictions.png").exists()


def killed(folder, until):
    """Start or go on with a run and kill it once until() is true, if it has not come to its end by then."""
    process = start_training(folder, "resume=true")
    while process.poll() is None and not until():
        time.sleep(0.002)
    process.kill()
    err = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), err


def after(seconds):
    """A moment so long from now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def half_written(folder):
    """A moment in which a file of the run is half written."""
    return lambda: list((folder / "run").glob("*.part"))


def saved(folder):
    """The next moment in which a round is saved, so that another one goes on."""
    file = folder / "run" / "last.pt"
    before = file.stat().st_mtime_ns if file.exists() else None
    return lambda: file.exists() and file.stat().st_mtime_ns != before


def resumes_to(whole, folder):
    """Go on with a killed run by the same command; its end has to be that of the run in the folder `whole`."""
    left = sorted(path.name for path in (folder / "run").iterdir()) if (folder / "run").exists() else []
    process = start_training(folder, "resume=true")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (left, out, err)
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(run / name) for run in (whole, folder / "run"))
        assert a.keys() == b.keys() > {"round", "weights", "statistics", "local"}
        for key in a.keys() - {"config", "seconds", "history"}:
            assert_same(a[key], b[key])
    a, b = (json.loads((run / "result.json").read_text()) for run in (whole, folder / "run"))
    assert a["best"] == b["best"] and a["last"] == b["last"]
    assert without_seconds(rows_of(whole)) == without_seconds(rows_of(folder / "run"))
    assert {path.name for path in (folder / "run").iterdir()} == {path.name for path in whole.iterdir()} == {
        "best.pt", "last.pt", "config.yaml", "metrics.csv", "predictions.png", "result.json", "splits.json", "cases.csv"}
    return out


def prepare_kills(folder):
    """Return the folder of an uninterrupted run in `folder` and how many seconds it took."""
    write_nuclei(folder / "d")
    (folder / "c.yaml").write_text("task: nuclei\ndata: d\nout: run\nrounds: 8\nwidth: 2\nimage_size: 32\n"
                                   "batch_size: 2\ndevice: cpu\noptimizer: adam\nlr: 1e-3\n")
    start = time.perf_counter()
    process = start_training(folder, "out=whole")
    process.communicate()
    return folder / "whole", time.perf_counter() - start


def test_kills_at_any_moment(tmp_path):
    """Four of one run, at its start and in three of its rounds; `python -m tests.kills` makes 60, each of a run of
    its own."""
    whole, seconds = prepare_kills(tmp_path)
    killed(tmp_path, after(0.15 * seconds))
    for _ in range(3):
        killed(tmp_path, saved(tmp_path))
    assert not (tmp_path / "run" / "result.json").exists()
    assert 3 <= int(re.search(r"resuming after round (\d+)", resumes_to(whole, tmp_path))[1]) < 8


def test_spoilt_inputs_end_as_documented(capsys):
    """Some here; `python -m tests.mutate 600` tries all."""
    mutate.main(90)
