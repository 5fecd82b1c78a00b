"""The shape of the package: sizes, names, the openings of docstrings."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_amago

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "torchrl_amago").rglob("*.py"))
PROSE = sorted([*FILES, *(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])
# Docstrings name a thing or begin with an imperative verb; these pose a riddle.
OPENINGS = re.compile(r"(What|Whatever|Which|How|Whether|Who|Whose|Where|When|Refuse|Tell)\b")
# Environments of other packages, and tasks after published ones: each is small, and their number grows.
DOMAINS = (
    "torchrl_amago/envs/libs/",
    "torchrl_amago/envs/tasks/alchemy",
    "torchrl_amago/offline/_showdown_replay",
    "torchrl_amago/offline/showdown_logs",
)
SCALING = "torchrl_amago/scaling/"
LARGEST_PACKAGE = 18_359  # without both; lower it as the package shrinks, never raise it
LARGEST_SCALING = 1_408
LARGEST_DOMAINS = 3_500
LARGEST_DOMAIN_CLASS = 150
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def parsed(files: list[Path]) -> Iterator[tuple[str, ast.Module]]:
    for path in files:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function's body, without its signature and docstring."""
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_docstrings_open_with_a_thing_or_a_verb():
    offenders = [
        f"{file}:{getattr(node, 'lineno', 1)}: {doc.splitlines()[0]}"
        for file, tree in parsed(PROSE)
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED) and (doc := ast.get_docstring(node))
        if OPENINGS.match(doc)
    ]
    assert offenders == []


@pytest.mark.parametrize("text", ["What values it.", "Whether it is so.", "Refuse words."])
def test_a_riddle_is_found(text):
    assert OPENINGS.match(text)
    assert not OPENINGS.match("Raise if an option is not allowed.")


def test_files_and_functions_are_short():
    long_files = {f.name: n for f in FILES if (n := len(f.read_text("utf-8").splitlines())) > 400}
    assert long_files == {}
    long_functions = {
        f"{file}:{function.name}": n
        for file, tree in parsed(FILES)
        for function in functions(tree)
        if (n := body_lines(function)) > 50
    }
    assert long_functions == {}


def test_examples_are_short():
    examples = [*(ROOT / "examples").glob("[01]*.py"), ROOT / "examples" / "ppo_with_memory.py"]
    assert len(examples) > 6
    sizes = {path.name: len(path.read_text("utf-8").splitlines()) for path in examples}
    assert {name: size for name, size in sizes.items() if size > 120} == {}


def test_the_package_stays_small():
    parts = {"domains": DOMAINS, "scaling": SCALING, "package": ""}
    lines = Counter()
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        part = next(part for part, begins in parts.items() if name.startswith(begins))
        lines[part] += len(path.read_text(encoding="utf-8").splitlines())
    assert lines["package"] <= LARGEST_PACKAGE
    assert lines["domains"] <= LARGEST_DOMAINS
    assert lines["scaling"] <= LARGEST_SCALING
    raises = sum(
        isinstance(node, ast.Raise) and not file.startswith(SCALING)
        for file, tree in parsed(FILES)
        for node in ast.walk(tree)
    )
    assert raises <= 220
    assert len(torchrl_amago.__all__) <= 45


def test_domains_have_small_classes():
    long_classes = {
        f"{file}: {node.name}": length
        for file, tree in parsed(FILES)
        for node in ast.walk(tree)
        if file.startswith(DOMAINS) and isinstance(node, ast.ClassDef)
        if (length := node.end_lineno - node.lineno + 1) > LARGEST_DOMAIN_CLASS
    }
    assert long_classes == {}


def test_a_function_is_measured_without_its_docstring():
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    a = 1\n    return a\n'
    assert body_lines(next(functions(ast.parse(source)))) == 2
