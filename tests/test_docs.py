"""What the documentation says is so: examples run, links and paths lead somewhere, commands take the flags shown."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.scripts import run_script

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchrl_amago"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Code spans that name a file or folder of this repository.
PATH = re.compile(
    r"`((?:docs|examples|tests|torchrl_amago|\.ci)/[\w./-]*|[\w-]+\.(?:md|toml|txt|py))`"
)


def _page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return [body for tag, body in FENCE.findall(text) if tag == language]


def shortened(block: str) -> str:
    """A block that trains, with two short rounds or two updates instead; others as they are."""
    rounds = block.replace("UPDATES_PER_ROUND = 1, 64, 120, 20", "UPDATES_PER_ROUND = 1, 8, 2, 1")
    return rounds.replace("total_updates=20,", "total_updates=2,")


def dead_links(text: str, folder: Path) -> list[str]:
    """Links to files that don't exist and to headings that no page has; the web isn't asked."""
    dead = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = folder / file
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text("utf-8") if file else text)
        ):
            dead.append(link)
    return dead


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def dead_paths(text: str, folder: Path) -> list[str]:
    """Code spans that look like a path of this repository but lead nowhere (from its root or the page's folder)."""
    return [p for p in PATH.findall(text) if not (ROOT / p).exists() and not (folder / p).exists()]


def command_scripts(text: str) -> list[tuple[str, list[str]]]:
    """(script, its flags) for every `python path/to/script.py ...` in the shell blocks."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|;|\|", line):
                words = shlex.split(command, comments=True)
                scripts = [word for word in words if word.endswith(".py")]
                if scripts and "python" in words[0]:
                    flags = [w.partition("=")[0] for w in words if w.startswith("--")]
                    found.append((scripts[0], flags))
    return found


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if ">>>" in path.read_text(encoding="utf-8")
)


def run_examples(module) -> tuple[int, str]:
    """Run a module's docstring examples; returns how many lines were seen, and the report of failures."""
    report: list[str] = []
    skipped = 0
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__):
        if test.examples:
            runner.run(test, out=report.append)
            skipped += sum(one.options.get(doctest.SKIP, False) for one in test.examples)
    return runner.tries + skipped, "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples may write files
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if "Install the extra" not in str(error):
            raise
        pytest.skip(str(error))
    tries, failures = run_examples(module)
    assert tries > 0, f"{name} holds >>> lines that doctest doesn't see"
    assert not failures, failures


def test_a_wrong_docstring_example_is_found(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text('"""\n>>> 1 + 1\n3\n"""\n', encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    tries, failures = run_examples(importlib.import_module("wrong_example"))
    assert tries == 1
    assert "Expected:" in failures


def test_public_classes_have_an_example():
    import torchrl_amago

    missing = []
    for name in torchrl_amago.__all__:
        value = getattr(torchrl_amago, name)
        if not getattr(value, "__doc__", None):
            missing.append(f"{name}: no docstring")
        elif isinstance(value, type) and ">>>" not in value.__doc__:
            missing.append(f"{name}: no >>> example")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=_page_name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert dead_links(text, page.parent) == []
    assert dead_paths(text, page.parent) == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p.read_text("utf-8"), "python")], ids=_page_name
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__docs__"}
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        exec(compile(shortened(block), _page_name(page), "exec"), namespace)


def test_python_blocks_use_public_names_only():
    """A reader copies what the pages import; nothing private or deep inside may be among it."""
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "python"):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("torchrl_amago"):
                    exported = importlib.import_module(node.module).__all__
                    assert {alias.name for alias in node.names} <= set(exported), page


COMMANDS = sorted({(s, tuple(f)) for p in PAGES for s, f in command_scripts(p.read_text("utf-8"))})


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_commands_name_scripts_and_flags_that_exist(script):
    assert (ROOT / script).is_file()
    run = run_script(ROOT / script, "--help")
    assert run.returncode == 0, run.stderr
    wanted = {flag for name, flags in COMMANDS if name == script for flag in flags}
    known = set(re.findall(r"--[\w.-]+", run.stdout))
    assert wanted <= known


def test_dead_links_paths_and_commands_are_found(tmp_path):
    text = "# One two\n[a](#one-two) [b](#three) [c](nowhere.md) [d](https://x.org) `docs/nothing.md` `README.md`\n"
    assert dead_links(text, tmp_path) == ["#three", "nowhere.md"]
    assert dead_paths(text, tmp_path) == ["docs/nothing.md"]
    shell = "```bash\ncd x && .venv/bin/python examples/a.py --flag 3 --other=4\n```\n"
    assert command_scripts(shell) == [("examples/a.py", ["--flag", "--other"])]


def test_readme_marks_the_test_command():
    """`.ci/run` takes the command from there; it must run pytest in the environment that `VENV` names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = text.split("<!-- test-command -->")
    assert len(marked) == 2
    command = blocks(marked[1].lstrip(), "bash")[0]
    assert command.startswith('VENV="${VENV:-.venv}"')
    assert command.rstrip().endswith('"$VENV/bin/python" -m pytest -n auto')
