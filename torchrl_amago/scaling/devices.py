"""Devices: the one to compute on, batches that reach it in one copy, functions as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torchrl.envs import EnvBase

from torchrl_amago._cpu import reads_are_free
from torchrl_amago._validation import check_choice
from torchrl_amago.modules import Policy
from torchrl_amago.modules.trajectory.memory import Memory


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of a name, if this machine has it; ``auto`` is CUDA, else the CPU.

    Raises:
        ValueError: for other names, and for devices that are not there.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    known = ["auto", "cpu", *(["cuda"] if gpus else []), *gpus]
    known += ["mps"] if torch.backends.mps.is_available() else []
    remedy = "Names are those of torch.device."
    if str(name).startswith("cuda") and not gpus:
        remedy = "PyTorch sees no GPU here: install its CUDA build, check nvidia-smi, or use 'cpu'."
    check_choice("device", str(name), known, remedy)
    kind = ("cuda" if gpus else "cpu") if str(name) == "auto" else str(name)
    return torch.device(f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind)


def collector_devices(env: EnvBase, acting: str | torch.device) -> dict[str, torch.device]:
    """Return a collector's options for a policy that acts on another device than the CPU."""
    env_device, acting = env.device or torch.device("cpu"), pick_device(acting)
    if acting == env_device == torch.device("cpu"):
        return {}
    return {"env_device": env_device, "policy_device": acting, "storing_device": env_device}


def send(batch: TensorDictBase, device: torch.device | str) -> TensorDict:
    """Copy a batch to a device as one block of memory, pinned if the device is a GPU.

    Entry by entry, the fixed cost of 30 copies is larger than that of their bytes. The host doesn't
    wait for the copy.

    Example:
        >>> sent = send(TensorDict(x=torch.arange(3), y=torch.ones(3, 2)), "cpu")
        >>> sent["x"], sent["y"].shape
        (tensor([0, 1, 2]), torch.Size([3, 2]))
    """
    device = torch.device(device)
    entries = [(key, x) for key, x in batch.items(True, True) if isinstance(x, Tensor)]
    entries.sort(key=lambda entry: -entry[1].element_size())  # each begins at a multiple of it
    parts = [x.reshape(-1).view(torch.uint8) for _, x in entries]
    sizes = [len(part) for part in parts]
    block = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == "cuda")
    block = torch.cat(parts, out=block).to(device, non_blocking=True)
    out = TensorDict(batch_size=batch.batch_size, device=device)
    for (key, x), piece in zip(entries, block.split(sizes), strict=True):
        out.set(key, piece.view(x.dtype).view(x.shape))
    return out


@dataclass(eq=False, repr=False)
class BatchFeed:
    """Batches of a replay buffer on the loss's device, one of them drawn ahead in a thread.

    The sequence of batches is that of ``draw()`` as long as the trials stay and nothing else draws
    from its generator. (With TorchRL's `prefetch` it depends on timing.) On a CPU, nothing is drawn
    ahead or copied.

    Args:
        draw: function that returns a batch.
        loss_module: decides the device; its method ``check``, if it has one, is called with each
            batch before it is sent, while a look at its values is free.
        check: called before that, raises for bad data.

    Example:
        >>> draw = lambda: TensorDict(x=torch.ones(2))
        >>> BatchFeed(draw, torch.nn.Linear(1, 1)).sample()["x"]
        tensor([1., 1.])
    """

    draw: Callable[[], TensorDictBase]
    loss_module: nn.Module
    check: Callable[[TensorDictBase], None] | None = None

    def __post_init__(self) -> None:
        weight = next(self.loss_module.parameters())
        self.device, self.is_direct = weight.device, reads_are_free(weight)
        self.check_loss = getattr(self.loss_module, "check", None)
        self._next: Future | None = None
        self._thread = ThreadPoolExecutor(1, "batches")  # starts with the first batch ahead
        self._stream = torch.cuda.Stream(self.device) if weight.is_cuda else None

    def sample(self, ahead: bool = False) -> TensorDictBase:
        """Return the next batch, and begin to draw the one after it if `ahead`."""
        if self.is_direct:
            return self.draw()
        drawn, self._next = self._next, None
        batch, arrival = self._draw() if drawn is None else drawn.result()
        if ahead:
            self._next = self._thread.submit(self._draw)
        if arrival is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrival)
            next(iter(batch.values(True, True))).record_stream(current)  # all are of one block
        return batch

    def _draw(self) -> tuple[TensorDictBase, torch.cuda.Event | None]:
        batch = self.draw()
        if self.check is not None:
            self.check(batch)
        if self.check_loss is not None:
            batch = self.check_loss(batch)
        with torch.cuda.stream(self._stream):  # None changes nothing
            return send(batch, self.device), self._stream and self._stream.record_event()


class CudaGraphs:
    """A function of tensors, recorded as a CUDA graph for each set of shapes and replayed.

    The host then spends one launch on it. Its first calls with new shapes run as they are, the next
    one records. Tensors that aren't arguments, such as weights, must stay where they are. A memory
    of a policy may be an argument: it has graphs of its own, one for each ``span``, which end with
    it. (Tensordict's `CudaGraphModule` has one graph, and waits for the GPU at each call.)

    Args:
        function: of tensors in dictionaries, lists and tensordicts; returns such.
        warmup: calls before the recording.
    """

    def __init__(self, function: Callable[..., Any], warmup: int = 3) -> None:
        self.function, self.warmup = function, warmup
        self._by_memory: WeakKeyDictionary[Any, tuple[Counter, dict]] = WeakKeyDictionary()

    @staticmethod
    def serve(x: Tensor) -> bool:
        """Return True for a tensor on a device that has graphs."""
        return x.is_cuda

    def __call__(self, *inputs: Any) -> Any:
        leaves = tree_leaves(inputs)
        given = [x for x in leaves if isinstance(x, Tensor)]
        memory = next((x for x in leaves if isinstance(x, Memory)), self)
        calls, graphs = self._by_memory.setdefault(memory, (Counter(), {}))
        key = getattr(memory, "span", None), tuple((x.shape, x.dtype) for x in given)
        calls[key] += 1
        if calls[key] <= self.warmup:
            return self.aside(inputs)
        if key not in graphs:
            static = tree_map_only(Tensor, Tensor.clone, inputs)
            places = [x for x in tree_leaves(static) if isinstance(x, Tensor)]
            graphs[key] = places, *self.record(static)
        places, replay, out = graphs[key]
        torch._foreach_copy_(places, given)
        replay()
        return tree_map_only(Tensor, Tensor.clone, out)

    def aside(self, inputs: tuple[Any, ...]) -> Any:
        """Run on a stream of its own, as CUDA wants it before a recording."""
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = self.function(*inputs)
        current.wait_stream(stream)
        return out

    def record(self, inputs: tuple[Any, ...]) -> tuple[Callable[[], None], Any]:
        """Record the function on these inputs; return its replay and where that writes."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.function(*inputs)
        return graph.replay, out


def compile_policy(policy: Policy, **options: Any) -> Policy:
    """Compile a policy's steps in place, on a GPU as CUDA graphs; options are `torch.compile`'s."""
    policy.compile(**options)
    if CudaGraphs.serve(next(policy.parameters())) and policy.compiled_step is not None:
        policy.compiled_step = CudaGraphs(policy.compiled_step)
    return policy
