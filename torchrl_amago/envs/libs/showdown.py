"""A Pokemon Showdown server of one's own, on this machine alone."""

from __future__ import annotations

import atexit
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

_CONFIG = """\
// Only this machine may connect; battles need neither files nor other processes.
exports.bindaddress = '127.0.0.1';
exports.repl = false;
exports.nothrottle = true;
exports.noguestsecurity = true;
exports.backdoor = false;
"""


class ShowdownServer:
    """Server of Pokemon battles: npm's ``pokemon-showdown``, started on the loopback address.

    Install it once, which takes minutes: ``npm install --prefix FOLDER pokemon-showdown``. The
    server stops with ``close()``, at the end of a ``with`` block, or with this process.

    Args:
        folder: where npm installed it: it has ``node_modules``.
        port: port to listen on; default a free one.
        patience: seconds to wait for the first answer.

    Raises:
        FileNotFoundError: without node, or without the server in the folder.
        TimeoutError: if the server doesn't answer in time.
        ValueError: if its configuration lets it listen to other machines.

    Example:
        >>> with ShowdownServer("showdown") as server:  # doctest: +SKIP
        ...     env = PokemonBattles(server.port)
    """

    def __init__(self, folder: str | Path, port: int | None = None, patience: float = 120) -> None:
        package = Path(folder).absolute() / "node_modules/pokemon-showdown"
        if shutil.which("node") is None or not (package / "pokemon-showdown").exists():
            raise FileNotFoundError(
                "a Pokemon Showdown server needs node and npm's package, and "
                f"{'node is missing' if shutil.which('node') is None else f'{package} is missing'}."
                f" Install node 20, then: npm install --prefix {folder} pokemon-showdown."
            )
        self.port = _free_port() if port is None else port
        config = package / "config/config.js"
        if not config.exists():
            config.write_text(_CONFIG)
        elif "'127.0.0.1'" not in config.read_text():
            raise ValueError(
                f"the server must listen to this machine alone, but {config} doesn't say so. Write "
                "exports.bindaddress = '127.0.0.1'; into it, or delete it."
            )
        for folder in ("logs/repl", "config/chat-plugins"):  # it fails without them
            (package / folder).mkdir(parents=True, exist_ok=True)
        self.log = Path(tempfile.mkstemp(prefix="showdown_", suffix=".log")[1])
        command = ["node", "pokemon-showdown", "start", "--no-security", str(self.port)]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=package,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C must not stop it in the middle of battles
            )
        atexit.register(self.close)
        deadline = time.monotonic() + patience
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise TimeoutError(
                    f"the Pokemon Showdown server must answer within {patience:g} s, it did not. "
                    f"Its last words: {self.log.read_text()[-500:]!r}."
                )
            time.sleep(0.2)

    def close(self) -> None:
        """Stop the server."""
        atexit.unregister(self.close)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> ShowdownServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=2):
                return True
        except OSError:
            return False


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
