"""Tests of how the project's files lie to each other: imports point one way, and a name means one thing."""

import ast
from collections import defaultdict

import pytest

from test_fedbcs import HERE

SCIENCE = ("fft_style", "fused_features", "prototypes", "unet", "federated")
TOP = (*SCIENCE, "config", "datasets", "train", "eval", "predict", "check_data")
ROOMS = ("experiments", "flower", "inference", "methods", "rounds", "scoring", "settings", "sites")
# What a file of a kind has, so that a caller can take any of that kind: a program, a method, a reader
OF_A_KIND = {"main", "SETTINGS", "FIXED", "training_sites", "read_pair", "read_labels", "read_alone",
             "shape_of"}
FILES = {name: HERE / f"{name}.py" for name in TOP} | {
    f"{room}.{file.stem}": file for room in ROOMS for file in (HERE / room).glob("*.py")
    if file.stem != "__init__"}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imports_of(tree):
    """The modules that a file imports, at its top or later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def circle_of(links):
    """The names that lie in a circle of {name: {name}}, or between two, [] if there is none."""
    left, before = dict(links), None
    while left != before:
        before, aims = left, set().union(*left.values())
        left = {name: others & left.keys() for name, others in left.items()
                if name in aims and others & left.keys()}
    return sorted(left)


def test_imports_point_one_way():
    """Between rooms and the files at the top, also those that wait until they are needed."""
    links = defaultdict(set)
    for name, tree in TREES.items():
        room = name.partition(".")[0]
        links[room] |= {other.partition(".")[0] for other in set(imports_of(tree)) & FILES.keys()} - {room}
    assert circle_of(links) == []
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]


@pytest.mark.parametrize("name", SCIENCE)
def test_the_science_imports_torch_and_itself(name):
    known = {*SCIENCE, "torch", "copy", "math", "time", "collections", "dataclasses", "functools", "typing"}
    assert {module.partition(".")[0] for module in imports_of(TREES[name])} <= known


def test_two_things_never_share_a_name():
    where = defaultdict(list)
    for file, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                where[node.name].append(file)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    names = target.elts if isinstance(target, ast.Tuple) else [target]
                    for name in names:
                        where[getattr(name, "id", None)].append(file)
    shared = {name: files for name, files in where.items() if len(files) > 1}
    assert {name: files for name, files in shared.items() if name not in OF_A_KIND | {None}} == {}
