"""Pages of the API reference, made from the packages' `__all__`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from key_table import KEY_TABLE
from sphinx.pycode import ModuleAnalyzer

import torchrl_amago


def write_pages(folder: Path) -> None:
    """Write a page for each public module, and their index; files that are the same stay."""
    folder.mkdir(exist_ok=True)
    pages, about = {}, {}
    for module, page in make_pages():
        pages[module.__name__], about[module.__name__] = page, summary(module)
    pages["keys"], about["keys"] = keys_page(), "Every entry of a tensordict."
    pages["index"] = index_of(about)
    for old in folder.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / f"{name}.rst"
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")


def make_pages() -> Iterator[tuple[ModuleType, str]]:
    """Yield each public module and its page.

    A name is documented in the first module that has it, the subpackages before the package that
    gathers their most used names; others link there.
    """
    homes: dict[int, str] = {}
    modules = list(public_modules())
    for module in [*modules[1:], modules[0]]:
        lines = [heading(module.__name__), ""]
        lines += [summary(module), ""]
        linked = []
        for name in sorted(module.__all__, key=str.lower):
            value = getattr(module, name)
            key = id(value) if inspect.isclass(value) or inspect.isroutine(value) else hash(name)
            if key in homes:
                linked.append(f"* :py:obj:`{name} <{homes[key]}>`")
                continue
            homes[key] = f"{module.__name__}.{name}"
            lines += [directive(homes[key], value), ""]
        if linked:
            lines += ["Documented elsewhere:", "", *linked, ""]
        yield module, "\n".join(lines)


def public_modules() -> Iterator[ModuleType]:
    """Yield the package and its public modules, those with a list of public names."""
    yield torchrl_amago
    for found in pkgutil.walk_packages(torchrl_amago.__path__, "torchrl_amago."):
        if any(part.startswith("_") for part in found.name.split(".")):
            continue
        if found.ispkg or found.name == "torchrl_amago.plots":
            module = importlib.import_module(found.name)
            if hasattr(module, "__all__"):
                yield module


def directive(path: str, value: object) -> str:
    """Return the directive that documents an object."""
    if inspect.isclass(value):
        return f".. autoclass:: {path}\n   :members:\n   :show-inheritance:"
    if inspect.isroutine(value):
        return f".. autofunction:: {path}"
    text = [attribute_doc(path.rpartition(".")[2], value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        text.append("Entries: " + ", ".join(f"``{key}``" for key in value) + ".")
    elif isinstance(value, int | float | str | tuple):
        text.append(f"Value: ``{value!r}``.")
    return "\n".join([f".. py:data:: {path}", "", *(f"   {line}\n" for line in text if line)])


def attribute_doc(name: str, value: object) -> str:
    """Return the comment or string beside the definition of a value."""
    for module in [
        module for key, module in sys.modules.items() if key.startswith("torchrl_amago")
    ]:
        if vars(module).get(name) is value:
            docs = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
            if ("", name) in docs:
                return " ".join(docs["", name]).strip()
    return ""


def keys_page() -> str:
    """Return the page with the table of the keys."""
    lines = [heading("Keys"), "", "Entries of tensordicts (``torchrl_amago.keys``).", ""]
    lines += [".. list-table::", "   :header-rows: 1", ""]
    rows = [("key", "shape", "dtype", "written by", "read by", "meaning"), *KEY_TABLE]
    for row in rows:
        key = row[0] if row is rows[0] else f"``{row[0]!r}``"
        lines += [f"   * - {key}", *(f"     - {cell}".replace("*", "\\*") for cell in row[1:])]
    return "\n".join([*lines, ""])


def index_of(about: Mapping[str, str]) -> str:
    """Return the page that lists the others, with a line about each."""
    names = sorted(about)
    text = "Every public name, by module. The most used ones are in ``torchrl_amago`` itself, too."
    lines = [heading("API reference"), "", text, ""]
    lines += [f"* :doc:`{name}`: {about[name]}" for name in names]
    lines += ["", ".. toctree::", "   :hidden:", "", *(f"   {name}" for name in names), ""]
    return "\n".join(lines)


def summary(module: ModuleType) -> str:
    """Return the first line of a module's docstring."""
    return inspect.getdoc(module).partition("\n")[0]


def heading(text: str) -> str:
    """Return a title with its line."""
    return f"{text}\n{'=' * len(text)}"
