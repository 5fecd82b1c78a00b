"""Imports go one way, optional packages stay optional, and importing the package stays light.

The direction is ``keys, action_space, _cpu, _validation, _files <- rows, _masking,
objectives.functional <- modules, envs, data <- offline, objectives <- evaluation, compat <- plots,
scaling <- trainers``: a file may import from its own part and from those before it. Read off the source by AST, so
an import hidden in a function counts as well; only ``if TYPE_CHECKING:`` blocks don't.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torchrl_amago"
NAME = "torchrl_amago"

# A part may import those of lower rank and itself. Parts of equal rank don't know one another.
RANKS = {
    "_files": 0,
    "_signals": 0,
    "_state_file": 1,
    "progress": 1,
    "keys": 0,
    "action_space": 0,
    "_cpu": 0,
    "_validation": 0,
    "_masking": 1,
    "rows": 1,
    "objectives.functional": 1,
    "modules": 2,
    "envs": 2,
    "data": 2,
    "offline": 3,
    "objectives": 3,
    "compat": 4,
    "evaluation": 4,
    "scaling": 5,
    "plots": 5,
    "trainers": 6,
    "": 7,  # the package's own __init__ re-exports from everywhere
}


def part_of(module: str) -> str:
    """The part of `RANKS` that a module (dotted, without the package's name) belongs to."""
    fitting = [part for part in RANKS if part and (module + ".").startswith(part + ".")]
    if fitting:
        return max(fitting, key=len)
    if module:
        raise AssertionError(f"{NAME}.{module} has no rank: give its part one in RANKS, on purpose")
    return ""


def dotted(path: Path, package: Path) -> str:
    """`modules/actor.py` -> `modules.actor`, `modules/__init__.py` -> `modules`."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if _is_type_checking(node):
        yield from node.orelse
    else:
        yield from ast.iter_child_nodes(node)


def imports(node: ast.AST, *, top_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import under a node that would run; `from a import b` gives `a.b`."""
    for child in _children(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            yield from ((child.lineno, f"{base}.{alias.name}") for alias in child.names)
        elif not (
            top_only and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        ):
            yield from imports(child, top_only=top_only)


def direction_violations(package: Path) -> list[str]:
    """Every import against the direction, as `file:line: message`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        importer = part_of(dotted(path, package))
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(package)}:{line}"
            if name.startswith("."):
                found.append(f"{where}: relative import {name}; write it from {NAME}")
            elif name == NAME or name.startswith(NAME + "."):
                # `from torchrl_amago import X` reads the top __init__, which stands above everything.
                target = name[len(NAME) + 1 :]
                part = part_of(target) if _is_module(package, target) else ""
                if importer != part and RANKS[part] >= RANKS[importer]:
                    found.append(f"{where}: {importer or NAME} must not import {part or NAME}")
    return found


def _is_module(package: Path, target: str) -> bool:
    first = target.split(".")[0]
    return (package / first).is_dir() or (package / f"{first}.py").is_file()


def required_packages() -> set[str]:
    """Import names of what setup.py requires (for these, the distribution's name)."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL_REQUIRES":
            return {re.match(r"[\w-]+", entry)[0] for entry in ast.literal_eval(node.value)}
    raise AssertionError("setup.py has no literal list INSTALL_REQUIRES")


def optional_at_top(package: Path, required: set[str]) -> list[str]:
    """Imports outside functions of anything but the standard library and required packages."""
    allowed = required | set(sys.stdlib_module_names) | {NAME}
    return [
        f"{path.relative_to(package)}:{line}: {name} is optional; import it in the function that needs it"
        for path in sorted(package.rglob("*.py"))
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), top_only=True)
        if not name.startswith(".") and name.split(".")[0] not in allowed
    ]


def test_imports_go_one_way():
    assert direction_violations(PACKAGE) == []


# Files that subclass an optional package's classes, for users to import by name.
ADAPTERS = {"envs/libs/pokemon.py": "poke_env", "offline/_showdown_replay.py": "poke_env"}


def test_optional_packages_are_not_imported_at_module_top():
    found = optional_at_top(PACKAGE, required_packages())
    of_adapters = [
        line
        for line in found
        for file, package in ADAPTERS.items()
        if line.startswith(f"{file}:") and f" {package}." in line
    ]
    assert of_adapters
    assert sorted(set(found) - set(of_adapters)) == []


def test_adapters_are_imported_by_their_users_alone():
    names = {NAME + "." + file.removesuffix(".py").replace("/", ".") for file in ADAPTERS}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() not in ADAPTERS:
            found = {
                name
                for _, name in imports(ast.parse(path.read_text(encoding="utf-8")), top_only=True)
            }
            assert not {
                one for one in found for name in names if (one + ".").startswith(name + ".")
            }


def test_importing_the_package_stays_light():
    heavy = [
        "matplotlib",
        "wandb",
        "tensorboard",
        "torch.utils.tensorboard",
        "pandas",
        "jax",
        "ray",
        "safetensors",
    ]
    code = f"import sys, {NAME}; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def _write(package: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("modules/a.py", "from torchrl_amago.objectives import AMAGOLoss", "import objectives"),
        ("modules/a.py", "def f():\n    import torchrl_amago.trainers.x", "import trainers"),
        ("modules/a.py", "from torchrl_amago.envs import tasks", "import envs"),
        ("modules/a.py", "from torchrl_amago import MetaFrozenLake", "import torchrl_amago"),
        ("objectives/functional.py", "from torchrl_amago.modules import x", "import modules"),
        (
            "evaluation/a.py",
            "try:\n    import torchrl_amago.trainers\nfinally:\n    pass",
            "trainers",
        ),
        ("keys.py", "from torchrl_amago.modules.a import x", "import modules"),
        ("modules/a.py", "from .b import x", "relative import"),
    ],
)
def test_an_import_against_the_direction_is_found(tmp_path, file, source, message):
    folders = ["modules", "envs", "objectives", "trainers", "evaluation"]
    files = {f"{folder}/__init__.py": "" for folder in folders} | {file: source}
    (violation,) = direction_violations(_write(tmp_path, files))
    assert violation.startswith(file)
    assert message in violation


def test_imports_along_the_direction_pass(tmp_path):
    files = {
        "__init__.py": "from torchrl_amago.trainers import x",
        "keys.py": "import torch",
        "modules/__init__.py": "from torchrl_amago.modules.a import x",
        "modules/a.py": "from torchrl_amago.keys import x\n"
        "from torchrl_amago.objectives.functional import y\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from torchrl_amago.trainers import z\n",
        "objectives/__init__.py": "",
        "objectives/functional.py": "import torch",
        "trainers/__init__.py": "from torchrl_amago.modules import x",
    }
    assert direction_violations(_write(tmp_path, files)) == []


def test_a_part_without_a_rank_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="newpart has no rank"):
        direction_violations(_write(tmp_path, {"newpart.py": ""}))


def test_an_optional_import_at_module_top_is_found(tmp_path):
    source = "import torch\ntry:\n    import wandb\nexcept ImportError:\n    wandb = None\n"
    lazy = "class A:\n    def f(self):\n        import wandb\n"
    package = _write(tmp_path, {"a.py": source, "b.py": lazy})
    (violation,) = optional_at_top(package, required_packages())
    assert violation.startswith("a.py:3: wandb is optional")


def test_required_packages_are_read_from_setup():
    assert {"torch", "torchrl", "tensordict", "gymnasium", "numpy"} <= required_packages()


@pytest.mark.parametrize(
    "file", sorted((ROOT / "tests/benchmarks").glob("test_*.py")), ids=lambda f: f.stem
)
def test_benchmarks_can_be_imported(file):
    """They aren't part of the default run, so nothing else would notice a renamed import."""
    importlib.import_module(f"tests.benchmarks.{file.stem}")
