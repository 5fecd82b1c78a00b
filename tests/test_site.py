"""The site: every page is in its index, every public name in the API reference, and it builds without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import torchrl_amago
from torchrl_amago import keys

DOCS = Path(__file__).parents[1] / "docs"


def test_every_page_is_in_the_index():
    listed = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text("utf-8"), re.S)
    names = {line for body in listed for line in body.splitlines() if line and line[0] != ":"}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert names - {"api/index"} == {page for page in pages if not page.startswith("_")} - {"index"}


def test_every_public_name_is_in_the_reference(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(DOCS)
    import api_pages

    pages = {module.__name__: page for module, page in api_pages.make_pages()}
    assert len(pages) > 15
    for name in torchrl_amago.__all__:
        assert re.search(rf"[.`]{name}\b", pages["torchrl_amago"]), name
    documented = re.findall(r"^\.\. .*:: (.*)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(documented) == len(set(documented))
    for path in documented:
        module, _, name = path.rpartition(".")
        assert name in sys.modules[module].__all__


def test_every_entry_is_in_the_table(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    from key_table import KEY_TABLE

    names = {value for name, value in vars(keys).items() if name.isupper()}
    assert names <= {spec.key for spec in KEY_TABLE}


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, tmp_path]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "api" / "torchrl_amago.html").exists()
