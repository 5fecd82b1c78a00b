"""Scripts run as commands, but in this process: importing torch takes longer than most of them."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock


def run_script(script: Path, *flags: str) -> CompletedProcess:
    """Run `python script flags`, for what it prints and its exit status; other errors pass through."""
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
