"""The evaluate role: watch a run's board and evaluate its newest policy."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from torchrl_amago._files import lock
from torchrl_amago._signals import Outcome, on_signals
from torchrl_amago.evaluation import Results, evaluation_metrics
from torchrl_amago.progress import ProgressTable
from torchrl_amago.scaling._board import LeaveError, Role

_POLL_SECONDS = 0.5


def evaluate_run(
    policy: nn.Module,
    evaluator: Callable[[], Results],
    run_dir: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Evaluate a run's newest policy, again and again, until its learner has finished.

    Rows go to ``<run_dir>/evaluations/0.csv``, those of a second evaluator at the same time to
    ``1.csv``, and so on. A policy that is replaced during an evaluation is skipped.

    Args:
        policy: built as the learner's; the evaluator plays it.
        evaluator: called without arguments; returns numbers by name or ``TrialResults``.
        run_dir, settings: see :func:`~torchrl_amago.scaling.collect`, as for results and errors.
    """
    role = Role(run_dir, policy, settings)
    with contextlib.ExitStack() as held:
        held.enter_context(policy.register_forward_pre_hook(lambda *_: role.check()))
        table = _free_table(Path(run_dir) / "evaluations", held)
        held.enter_context(on_signals(role.request_stop))
        while role.outcome is None:
            if not role.update():
                time.sleep(_POLL_SECONDS)
                continue
            begin = time.monotonic()
            with contextlib.suppress(LeaveError):
                metrics = evaluation_metrics(evaluator())
                seconds = time.monotonic() - begin
                table.append({"update": role.version, "seconds_evaluation": seconds, **metrics})
            if role.is_last:
                role.outcome = role.outcome or "finished"
    return role.outcome


def _free_table(folder: Path, held: contextlib.ExitStack) -> ProgressTable:
    """Return the first table that no other evaluator writes, with the rows it has."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        with contextlib.suppress(BlockingIOError):
            held.enter_context(lock(folder / f".{number}.lock", wait=False))
            break
    table = ProgressTable(folder / f"{number}.csv")
    if table.path.exists():
        table.load_state_dict({"text": table.path.read_text(encoding="utf-8")})
    return table
