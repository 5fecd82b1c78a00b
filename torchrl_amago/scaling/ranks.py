"""Data-parallel learners: several processes that make each update together, as one would alone.

Legend: R ranks, K metrics.
"""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torchrl.data import ReplayBuffer

from torchrl_amago import keys

T = TypeVar("T")

# Ranks wait for the first one as long as it collects, evaluates or saves. A rank that dies is
# noticed at once, by its closed connections or by torchrun.
_LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Ranks:
    """The number of this process among those that make each update together; by default alone.

    Every rank computes its share of a batch; gradients, running statistics and metrics are summed,
    so that all make the step of one process with the whole batch. The first rank alone collects,
    evaluates and writes files.

    Args:
        rank: number of this process, from 0.
        size: number of processes. More than one need torch's default process group.
        leader: lowest rank on this machine, which writes the trials that its ranks read.
        machines: number of machines.

    Example:
        >>> ranks = Ranks.from_environment()  # those of torchrun, if it started this process
        >>> ranks.is_first, ranks.size, ranks.share(32)
        (True, 1, 32)
    """

    rank: int = 0
    size: int = 1
    leader: int = 0
    machines: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Join the processes that `torchrun` started; without it, a process is alone.

        Where there is a GPU for each rank of a machine, it becomes torch's current device, and
        tensors on GPUs travel by nccl. All others travel by gloo.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1 or "RANK" not in os.environ:
            return cls()
        rank = int(os.environ["RANK"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        if not distributed.is_initialized():
            backend, local_size = "gloo", int(os.environ.get("LOCAL_WORLD_SIZE", size))
            if torch.cuda.device_count() >= local_size and distributed.is_nccl_available():
                torch.cuda.set_device(local_rank)
                backend = "cpu:gloo,cuda:nccl"
            distributed.init_process_group(backend, timeout=_LONGEST_WAIT)
            atexit.register(distributed.destroy_process_group)
        return cls(rank, size, rank - local_rank, int(os.environ.get("GROUP_WORLD_SIZE", 1)))

    @property
    def is_first(self) -> bool:
        """True on the rank that collects, evaluates and writes files."""
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """True on the rank of each machine that writes its trials."""
        return self.rank == self.leader

    def share(self, batch_size: int) -> int:
        """Return the number of rows of a batch that this rank takes; the first ranks take more."""
        if batch_size < self.size:
            raise ValueError(
                f"batch_size is that of all ranks together and must be at least their number, got "
                f"{batch_size} rows for {self.size} ranks. Raise it, or start fewer processes."
            )
        return batch_size // self.size + (self.rank < batch_size % self.size)

    def sample(self, buffer: ReplayBuffer) -> TensorDictBase:
        """Draw this rank's rows of a batch, whose size is the buffer's."""
        return buffer.sample() if self.size == 1 else buffer.sample(self.share(buffer.batch_size))

    def check(self, batch_size: int, buffer: ReplayBuffer, is_written: bool = True) -> None:
        """Raise ValueError unless there is a row for each rank, and a folder for each machine."""
        if self.size == 1:
            return
        self.share(batch_size)
        found = self.gather((self.leader, getattr(buffer.storage, "path", None)))
        if is_written and (any(not path for _, path in found) or len({*found}) > self.machines):
            raise ValueError(
                "the ranks of a machine must read one folder of trials, got "
                f"{[str(path) for _, path in found]}. Make the buffer with one path, with "
                "mode='continue' on the machine's first rank, then mode='read' on the others."
            )

    def copy_trials(self, buffer: ReplayBuffer) -> None:
        """Write the trials that the first rank has stored since to other machines' folders."""
        if self.machines == 1:
            return
        storage, news = buffer.storage, None
        found = self.gather((storage.trials().written, self.is_leader, storage.path))
        new = found[0][0] - min(written for written, is_leader, _ in found if is_leader)
        if self.is_first and 0 < new <= len(storage):
            length = buffer.sampler.trials(storage).length
            num_trials = int(np.searchsorted(length[::-1].cumsum(), new)) + 1
            news = storage[-new:], length[-num_trials:].tolist()
        news = self.broadcast(news)
        if self.is_leader and not self.is_first and new:
            # Those that have left the storage since can't be sent.
            storage.loads(found[0][2]) if news is None else storage.write(*news)
        self.gather(None)

    def folder(self, run_dir: Path) -> Path:
        """Return a folder for this rank's own files: the first rank's is the run's."""
        return run_dir if self.is_first else run_dir / f"rank_{self.rank}"

    def buffer_options(self, run_dir: str | Path, in_place: bool) -> dict[str, Any]:
        """Return where and how this rank opens its buffer, if several do or it stays in place."""
        path = Path(run_dir) / (f"replay_{self.leader}" if self.leader else "replay")
        options = {"path": path, "mode": "continue" if self.is_leader else "read"}
        return options if in_place or self.size > 1 else {}

    def load_trials(self, buffer: ReplayBuffer, path: Path) -> None:
        """Load a saved buffer, after the first rank; ranks that only read take its priorities."""
        if self.is_leader:
            buffer.loads(path)
        else:
            buffer.sampler.loads(path / "sampler")

    def attach(self, loss_module: nn.Module) -> None:
        """Let the modules of a loss sum their running statistics over ranks from now on.

        Such a module has a function ``all_reduce(*tensors)``, by default their identity.
        """
        # TorchRL's losses keep networks out of their submodules.
        networks = [value for value in vars(loss_module).values() if isinstance(value, nn.Module)]
        for module in (part for root in (loss_module, *networks) for part in root.modules()):
            if hasattr(module, "all_reduce"):
                module.all_reduce = self.sum if self.size > 1 else type(module).all_reduce

    def start(self, module: nn.Module, buffer: ReplayBuffer, update: int = 0) -> None:
        """Give all ranks the first one's weights, and each of the others its own random numbers."""
        if self.size == 1:
            return
        for tensor in [*module.parameters(), *module.buffers()]:
            distributed.broadcast(tensor.detach(), src=0)
        # TorchRL warns once of batches of another size than the buffer's own.
        warnings.filterwarnings("ignore", message="Got conflicting batch_sizes")
        seed = self.broadcast(torch.initial_seed())
        if not self.is_first:
            mixed = np.random.SeedSequence([seed, update, self.rank]).generate_state(2)
            torch.manual_seed(int(mixed[0]) << 32 | int(mixed[1]))
            np.random.seed(mixed[0])
            buffer.set_rng(None)  # a generator like the first rank's would draw the same rows

    def sum(self, *tensors: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Sum tensors over ranks in one message; the arguments stay as they are."""
        if self.size == 1:
            return tensors
        flat = torch.cat([x.detach().reshape(-1).to(dtype) for x in tensors])
        distributed.all_reduce(flat)
        parts = flat.split([x.numel() for x in tensors])
        return tuple(p.view(x.shape).to(x.dtype) for p, x in zip(parts, tensors, strict=True))

    def agree(self, choice: str | None, choices: Sequence[str]) -> str | None:
        """Return the last of the ``choices`` that a rank has made, or None if none has."""
        if self.size == 1:
            return choice
        number = torch.tensor(-1 if choice is None else choices.index(choice))
        distributed.all_reduce(number, distributed.ReduceOp.MAX)
        return choices[number] if number >= 0 else None

    def weigh(self, batch: TensorDictBase, problem: str = "") -> tuple[float, str]:
        """Return this rank's fraction of all real steps, and the problems of all ranks, if any."""
        if self.size == 1:
            return 1.0, problem
        mask = batch.get(keys.MASK, None)
        count = batch.numel() if mask is None else int(mask.sum())
        total, problems = self.sum(torch.tensor([count, bool(problem)]))[0].tolist()
        if problems:
            found = enumerate(self.gather(problem))
            problem = "; ".join(f"rank {rank}: {text}" for rank, text in found if text)
        return count / max(total, 1.0), problem

    @torch.no_grad()
    def sum_gradients(
        self, optimizer: Optimizer, metrics: TensorDictBase, fraction: float
    ) -> TensorDictBase:
        """Sum gradients in place over ranks, and make the metrics those of the whole batch.

        Metrics are means over this rank's part, whose ``fraction`` the gradients are weighted with.
        Names ending in ``_min`` and ``_max`` are extremes, and ``effective_batch`` is a count.
        """
        if self.size == 1:
            return metrics
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        # Each rank writes a row of its own, so that the sum holds the numbers of all.
        own_K = torch.stack([x.detach().float() for x in metrics.values()])
        rows_RK = own_K.new_zeros(self.size, 1 + len(own_K))
        rows_RK[self.rank, 0], rows_RK[self.rank, 1:] = fraction, own_K
        *summed, rows_RK = self.sum(*gradients, rows_RK, dtype=gradients[0].dtype)
        torch._foreach_copy_(gradients, summed)
        fraction_R, *columns = rows_RK.unbind(1)
        for name, value_R in zip(list(metrics.keys()), columns, strict=True):
            extreme = {"_min": value_R.amin, "_max": value_R.amax}.get(name[-4:])
            weight_R = 1.0 if name == "effective_batch" else fraction_R
            metrics.set(name, extreme() if extreme else (weight_R * value_R).sum())
        return metrics

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, which are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def gather_errors(self, batch: TensorDictBase, buffer: Any) -> list[TensorDictBase]:
        """Return the entries of all ranks' batches that a buffer makes priorities of."""
        if self.size == 1:
            return [batch]
        error = getattr(buffer, "priority_key", "td_error")
        return self.gather(batch.select("index", "collector", error, strict=False).cpu())

    def broadcast(self, value: T) -> T:
        """Return the first rank's value, which is pickled."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function on the first rank alone; return its result, or raise, on all of them.

        On the others an error of Python keeps its type, and any else is a RuntimeError.
        """
        result, raised = None, None
        try:
            result = function() if self.is_first else None
        except Exception as error:  # noqa: BLE001 - raised below, on all ranks
            raised = error
        is_builtin = type(raised).__module__ == "builtins"
        kind = type(raised) if is_builtin else RuntimeError
        result, kind, message = self.broadcast((result, raised and kind, str(raised)))
        if kind is not None:
            raise raised or kind(f"on the first rank: {message}")
        return result

    @contextmanager
    def leaders_first(self) -> Iterator[None]:
        """Let the first rank of each machine run a block before the others do."""
        with ExitStack() as afterwards:
            if self.is_leader:
                afterwards.callback(self.gather, None)
            else:
                self.gather(None)
            yield
