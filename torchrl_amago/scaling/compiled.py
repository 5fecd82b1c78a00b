"""Functions replayed as CUDA graphs, and a policy whose steps are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from torchrl_amago.modules import Policy


class CudaGraphs:
    """A function of tensors, recorded as a CUDA graph for each set of shapes and replayed.

    The host then spends one launch on it. Its first calls with new shapes run as they are, the next
    one records. Tensors that aren't arguments, such as weights, must stay where they are.
    (Tensordict's `CudaGraphModule` has one graph, and waits for the GPU at each call.)

    Args:
        function: of tensors in dictionaries, lists and tensordicts; returns such.
        warmup: calls before the recording.
    """

    def __init__(self, function: Callable[..., Any], warmup: int = 3) -> None:
        self.function, self.warmup = function, warmup
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], None], Any]] = {}
        self._calls = Counter()

    @staticmethod
    def serve(x: Tensor) -> bool:
        """Return True for a tensor on a device that has graphs."""
        return x.is_cuda

    def __call__(self, *inputs: Any, key: Any = None) -> Any:
        """Call the function; `key` stands for what its graph depends on besides shapes."""
        given = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        key = key, tuple((x.shape, x.dtype) for x in given)
        self._calls[key] += 1
        if self._calls[key] <= self.warmup:
            return self.aside(inputs)
        if key not in self._graphs:
            static = tree_map_only(Tensor, Tensor.clone, inputs)
            places = [x for x in tree_leaves(static) if isinstance(x, Tensor)]
            self._graphs[key] = places, *self.record(static)
        places, replay, out = self._graphs[key]
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


class StepGraphs:
    """A policy's compiled step as CUDA graphs, one for each memory and number of slots it reads.

    Args:
        step: ``(inputs, positions, memory, observations) -> outputs``.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        self.step = step
        # A graph ends with its memory: it holds the addresses of its tensors.
        self._by_memory: WeakKeyDictionary[Any, CudaGraphs] = WeakKeyDictionary()

    def __call__(self, inputs: Any, positions_N: Tensor, memory: Any, observations: Any) -> Any:
        place = self if memory is None else memory
        if place not in self._by_memory:
            self._by_memory[place] = CudaGraphs(self.step)
        span = getattr(memory, "span", None)
        return self._by_memory[place](inputs, positions_N, memory, observations, key=span)


def compile_policy(policy: Policy, **options: Any) -> Policy:
    """Compile a policy's steps in place, on a GPU as CUDA graphs.

    Args:
        options: of :func:`torch.compile`.
    """
    policy.compile(**options)
    if CudaGraphs.serve(next(policy.parameters())) and policy.compiled_step is not None:
        policy.compiled_step = StepGraphs(policy.compiled_step)
    return policy
