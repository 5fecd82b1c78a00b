"""Scripts run as commands, in this process or in their own, or imported as modules."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from unittest import mock

import matplotlib
import pytest


def import_script(script: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script by its path, for as long as the monkeypatch lasts."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their annotations in the module they were defined in.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def start_script(
    script: Path, *flags: str, folder: Path, timeout: float = 300, **environ: str
) -> CompletedProcess:
    """Run `python script flags` in a folder, in a process without the environment of this one."""
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(script.parents[1]),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # else it looks for all fonts anew
        "HOME": str(folder),
    }
    return subprocess.run(
        [sys.executable, script, *flags],
        cwd=folder,
        env={**own, **environ},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_script(script: Path, *flags: str) -> CompletedProcess:
    """Run `python script flags` here, since importing torch takes longer than most scripts.

    Returns what it prints and its exit status; other errors pass through.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [str(script), *flags]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
        mock.patch.dict(os.environ, COLUMNS="300"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as leaving:
            status = leaving.code or 0
    if isinstance(status, str):  # Python prints it and leaves with 1
        err.write(status)
        status = 1
    return CompletedProcess(sys.argv, status, out.getvalue(), err.getvalue())
