"""Spoil files, folders and settings at random: python -m tests.mutate [INPUTS]

Every input is given to check_data.py, train.py or eval.py. Asserted of each: an exit code as documented, at
most one line `error:`, no traceback, nothing left behind by a refusal, no more than 60 seconds. Seeded.
"""

import collections
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

import check_data
import eval as evaluation
import train
from settings.program import run_program
from test_fedbcs import tiny_config, write_nuclei
from tests.helpers import write_prostate

BASE = ("task: nuclei\ndata: nuclei\nout: run\nrounds: 1\nwidth: 2\nimage_size: 32\nbatch_size: 2\n"
        "device: cpu\n")
VALUES = ["", "none", "null", "true", "-1", "0", "1e999", "[", "[[1]]", "{a: b}", "~", "~/x", "../x", "/", "\0",
          "9" * 400, "é", "2024-01-01", "!!binary aGk=", "&a [*a]", "'", "a: b: c", "0x1F", "1_000", ".inf"]
CODES = {"check_data": {0, 1, 2}, "train": {0, 2, 3}, "eval": {0, 2}}


# ---- What is done to an input; each function returns the program to run and its arguments ----

def any_file(draw, folder, pattern):
    """One of the files below a folder that match a pattern."""
    return draw.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def flipped(draw, folder):
    """Flip bits of a file of the data."""
    task = draw.choice(("nuclei", "prostate"))
    file = any_file(draw, folder / task, "*")
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 8, 200))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return "check_data", task, "--task", task


def truncated(draw, folder):
    """Cut a file of the data, or add to it."""
    task = draw.choice(("nuclei", "prostate"))
    file = any_file(draw, folder / task, "*")
    content = file.read_bytes()
    cut = content[:draw.randrange(len(content))]
    file.write_bytes(draw.choice((cut, b"", content * 2, content + b"\0" * 99)))
    return "check_data", task, "--task", task


def rearranged(draw, folder):
    """Rename, link, remove or add something in a site's folder."""
    task = draw.choice(("nuclei", "prostate"))
    file = any_file(draw, folder / task, "*")
    other = any_file(draw, folder, "*")
    what = draw.randrange(9)
    if what == 0:
        file.unlink()
    elif what == 1:
        name = draw.choice((b"/\xff\xfe.png", b"/a b.nii.gz", b"/.x", b"/-rf"))
        os.rename(file, os.fsencode(file.parent) + name)
    elif what == 2:
        file.unlink()
        file.symlink_to(draw.choice((other, folder, "/dev/zero", file, "nowhere")))
    elif what == 3:
        file.unlink()
        os.mkfifo(file)
    elif what == 4:
        file.unlink()
        file.mkdir()
    elif what == 5:
        file.write_bytes(other.read_bytes())
    elif what == 6:
        site = next(path for path in file.parents if path.parent == folder / task)
        names = (b"x_mask.png", b"GT/x.png", b"labels/0_mask_1.png", b"x.dcm", b"Slide_1/0.png", b"0/0.png")
        path = Path(os.fsdecode(os.fsencode(site) + b"/" + draw.choice(names)))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(other.read_bytes())
    elif what == 7:
        file.chmod(0)
    else:
        file.parent.rename(file.parent.with_name(draw.choice(("Images", "x", "Slide_1", "GT", ".hidden"))))
    return "check_data", task, "--task", task, *draw.choice(((), ("--write", "w.csv")))


def a_table(draw, folder):
    """Write a table of the data and spoil a cell, a line, the header or the bytes of it."""
    task = draw.choice(("nuclei", "prostate"))
    ending, mask = (".png", "masks/{}.png") if task == "nuclei" else (".nii.gz", "Case{}_segmentation.nii.gz")
    image = "images/{}.png" if task == "nuclei" else "Case{}.nii.gz"
    rows = [["image", draw.choice(("mask", "mask", "mask_1")), "site", "case", "split"]] + [
        [f"{task}/{site}/{image.format(k)}", f"{task}/{site}/{mask.format(k)}", site, f"c{k}", split]
        for site in "ab" for k, split in enumerate(("train", "val", "test"))]
    row = draw.choice(rows)
    cells = *VALUES, row[0], row[0] + ";" + row[1], "a" + ending, "mask_2", "a,b"
    row[draw.randrange(5)] = draw.choice(cells)
    separator = draw.choice(",,;\t")
    lines = [separator.join(cells) for cells in rows]
    what = draw.randrange(4)
    if what == 0:
        lines.insert(draw.randrange(len(lines)), draw.choice((*lines, "", "\"", "#", separator * 9)))
    elif what == 1:
        lines = [line.rpartition(separator)[0] for line in lines]
    text = draw.choice(("\n", "\r\n")).join(lines)
    content = text.encode(draw.choice(("utf-8", "utf-8-sig", "utf-16", "latin-1")), "ignore")
    end = draw.choice((len(content), len(content), draw.randrange(len(content))))
    (folder / "t.csv").write_bytes(content[:end])
    return draw.choice((("check_data", "t.csv", "--task", task),
                        ("train", "--config", "c.yaml", "data=t.csv", f"task={task}")))


def tiled(draw, folder):
    """Spoil the data in one of these ways and train on pictures at their own size."""
    shutil.rmtree(folder / "prostate")
    (folder / "nuclei").rename(folder / "prostate")  # so that the spoilt one of the two tasks is this one
    shutil.copytree(folder / "prostate", folder / "nuclei")
    task = draw.choice((flipped, truncated, rearranged))(draw, folder)[1]
    return "train", "--config", "c.yaml", "tiles=true", f"data={task}"


def a_setting(draw, folder):
    """Give a key of the config a value that was not meant for it."""
    from config import KEYS
    key = draw.choice([*KEYS, "fedprox_mu", "unknown"])
    return "train", "--config", "c.yaml", f"{key}={draw.choice(VALUES)}"


def a_config_file(draw, folder):
    """Spoil the config file itself."""
    lines = BASE.splitlines()
    lines[draw.randrange(len(lines))] = draw.choice(
        ("", "? [a]", "a", "- b", "\t", f"lr: {draw.choice(VALUES)}"))
    content = "\n".join(lines).encode() + draw.choice((b"", b"\xff", b"\x00", b"\n%YAML 9\n", b"\n---\na: 1"))
    (folder / "c.yaml").write_bytes(content)
    return "train", "--config", "c.yaml"


def a_run(draw, folder):
    """Spoil a file of a finished run, by a bit or a part of another type, and score or resume it."""
    shutil.copytree(folder / "finished", folder / "run")
    file = any_file(draw, folder / "run", draw.choice(("*.pt", "*.pt", "*.yaml", "*.json")))
    if file.suffix == ".pt" and draw.random() < 0.6:
        checkpoint = torch.load(file)
        part = draw.choice(sorted(checkpoint))
        value = draw.choice((None, 3, "x", [], {}, {"a": 1}, [1], float("nan"), torch.ones(1),
                             {"a": torch.ones(1)}))
        if isinstance(checkpoint[part], dict) and checkpoint[part] and draw.random() < 0.5:
            checkpoint[part][draw.choice(sorted(checkpoint[part], key=str))] = value
        else:
            checkpoint[part] = value
        torch.save(checkpoint, file)
    else:
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content[:draw.choice((len(content), draw.randrange(len(content))))])
    if draw.random() < 0.5:
        return "eval", "--run", "run"
    return "train", "--config", "c.yaml", "resume=true", draw.choice(("rounds=1", "rounds=2"))


KINDS = (flipped, truncated, rearranged, a_table, tiled, a_setting, a_config_file, a_run)
PROGRAMS = {"check_data": check_data, "train": train, "eval": evaluation}


# ---- One input ----

def run(program, arguments):
    """Return (exit code, stdout, stderr, seconds) of a program in this process."""
    out, err, code, start = io.StringIO(), io.StringIO(), 0, time.perf_counter()
    sys.argv = [program, *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_program(PROGRAMS[program].main)
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue(), time.perf_counter() - start


def prepare(folder):
    """Write the data, the config and a finished run that inputs are spoilt copies of."""
    write_nuclei(folder / "nuclei", cases=3)
    write_prostate(folder / "prostate")
    (folder / "c.yaml").write_text(BASE)
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(tiny_config("nuclei", "finished", "rounds=1"))
    settings = (folder / "finished" / "config.yaml").read_text().replace("out: finished", "out: run")
    (folder / "finished" / "config.yaml").write_text(settings)


def contents(folder):
    """Return {path: size and time of change} of all below a folder."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
            if not path.is_dir() or path.is_symlink()}


def try_input(number, whole, work):
    """Spoil a fresh copy of `whole` by the seed `number`, run a program on it, return (kind, exit code)."""
    draw = random.Random(number)
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(whole, work)
    os.chdir(work)
    kind = KINDS[number % len(KINDS)]
    program, *arguments = kind(draw, work)
    before = contents(work)
    try:
        code, _, err, seconds = run(program, arguments)
    except Exception as problem:
        raise AssertionError(f"input {number}: {program} {arguments}: {type(problem).__name__}: "
                             f"{problem}") from problem
    told = f"input {number}: {program} {arguments}: exit {code}: {err}"
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code in CODES[program], told
    assert len(errors) == (code >= 2) and "Traceback" not in err and len(err) < 5000, told
    assert all(line.startswith(("error:", "warning:", "site ")) for line in err.splitlines()), told
    assert seconds < 60, told
    if code == 2:
        assert contents(work).keys() <= before.keys() | {work / f"check_{arguments[0]}.png"}, told
        assert not list(work.rglob("*.part")) and not list(work.rglob(".lock")), told
    return kind.__name__, code


def main(inputs=600):
    """Try so many inputs and print how many of each kind ended in which exit code."""
    here, found, wrong = os.getcwd(), collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        whole, work = Path(folder) / "whole", Path(folder) / "work"
        whole.mkdir()
        try:
            prepare(whole)
            for number in range(inputs):
                try:
                    found[try_input(number, whole, work)] += 1
                except AssertionError as problem:
                    wrong.append(str(problem))
                    print(problem, flush=True)
        finally:
            os.chdir(here)
    print(json.dumps({f"{kind}, exit {code}": n for (kind, code), n in sorted(found.items())}, indent=1))
    assert not wrong, f"{len(wrong)} of {inputs} inputs"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
