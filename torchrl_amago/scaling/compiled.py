"""An update as one compiled function, and functions replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary
from weakref import ref as weakref

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.utils._pytree import tree_flatten, tree_map_only

from torchrl_amago._cpu import reads_are_free
from torchrl_amago.modules import Policy

Update = tuple[TensorDict, dict[str, Tensor], Tensor]
Gradients = tuple[dict[nn.Parameter, Tensor], TensorDict, dict[str, Tensor], Tensor]


class QueuedUpdate:
    """Loss, gradients, clipping and AdamW, all queued before the host looks at a number.

    A total loss or gradient that is NaN or infinite changes no weight, and shows in the result.
    :class:`~torchrl_amago.trainers.FiniteOptimizationStepper` calls it, once AdamW has its state,
    on GPUs and where updates are compiled.

    Args:
        loss_module: reads a batch and returns losses and metrics.
        optimizer: a fused AdamW.
        clip_norm, clip_each: see :class:`~torchrl_amago.trainers.FiniteOptimizationStepper`.
        half: compute the loss under bfloat16 autocast.
        compile: compile loss, gradients and clipping as one function, and replay whole updates as
            CUDA graphs on a GPU.
    """

    def __init__(
        self,
        loss_module: nn.Module,
        optimizer: Optimizer,
        clip_norm: float | None,
        clip_each: bool,
        half: bool,
        compile: bool = False,
    ) -> None:
        self.loss_module, self.optimizer = loss_module, optimizer
        self.networks = by_network(loss_module, optimizer)
        self.clip_norm, self.clip_each, self.half = clip_norm, clip_each, half
        groups = optimizer.param_groups
        self.device = groups[0]["params"][0].device
        # Learning rates are numbers for schedules, and tensors here: a new one compiles nothing.
        self._rates = [torch.zeros((), device=self.device) for _ in groups]
        self._state = optimizer.state
        names = getattr(loss_module, "tensor_keys", None)
        self._priority_key = getattr(names, "priority", "td_error")
        self._call = self.update
        if compile:
            self.gradients = torch.compile(self.gradients)
            self._call = CudaGraphs(self.update) if self.device.type == "cuda" else self.update

    @staticmethod
    def serves(optimizer: Optimizer, compile: bool) -> bool:
        """Return True for a fused AdamW with a state on a GPU, or anywhere to compile."""
        is_wanted = compile or not reads_are_free(optimizer.param_groups[0]["params"][0])
        return bool(is_wanted and optimizer.state and optimizer.defaults.get("fused"))

    def fits(self, optimizer: Optimizer) -> bool:
        """Return False for another optimiser, or once it has loaded another state."""
        return self._state is optimizer.state

    def __call__(self, batch: TensorDictBase) -> Update:
        """Make one update; return metrics, gradient norms, and ``[total + norm, norm]``."""
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        *update, td_error = self._call(batch)
        if td_error is not None:  # a graph writes to a batch of its own
            batch.set(self._priority_key, td_error)
        return tuple(update)

    @torch.no_grad()
    def update(self, batch: TensorDictBase) -> tuple[Any, ...]:
        """Make one update at the learning rates of the last call."""
        # Else gradients would split the function into two graphs.
        with torch.enable_grad(), torch._dynamo.config.patch(trace_autograd_ops=True):
            gradients, metrics, norms, checked = self.gradients(batch)
        found_inf = (~checked[0].isfinite()).float()
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            params = [p for p in group["params"] if p in gradients]
            averages, squares, steps = (
                [self._state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            found = [gradients[p] for p in params]
            options = dict(zip(("beta1", "beta2"), group["betas"], strict=True))
            names = ("weight_decay", "eps", "maximize", "amsgrad")
            options |= {name: group[name] for name in names}
            # Compiled code can't call the fused kernel.
            adamw(params, found, averages, squares, [], steps, fused=True, capturable=True,
                  lr=rate, found_inf=found_inf, **options)  # fmt: skip
        return metrics, norms, checked, batch.get(self._priority_key, None)

    def gradients(self, batch: TensorDictBase) -> Gradients:
        """Compute the loss and clipped gradients by parameter."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            losses = self.loss_module(batch)
        total = total_loss(losses)
        params = [p for params in self.networks.values() for p in params]
        found = torch.autograd.grad(total, params, allow_unused=True)
        with torch.no_grad():
            gradients = {p: g for p, g in zip(params, found, strict=True) if g is not None}
            of_networks = {
                name: [gradients[p] for p in params if p in gradients]
                for name, params in self.networks.items()
            }
            norms = grad_norms(of_networks)
            norm = torch.stack([*norms.values()]).norm()
            for name, of_network in norms.items() if self.clip_norm is not None else ():
                factor = self.clip_norm / ((of_network if self.clip_each else norm) + 1e-6)
                torch._foreach_mul_(of_networks[name], factor.clamp(max=1.0))
            checked = torch.stack([total.detach().float() + norm, norm])
        return gradients, losses.detach(), norms, checked


def by_network(loss_module: nn.Module, optimizer: Optimizer) -> dict[str, list[nn.Parameter]]:
    """Group an optimiser's parameters by the loss's networks; others are ``other``."""
    names, networks = {p: name for name, p in loss_module.named_parameters()}, {}
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        network, is_network, _ = names.get(p, "").partition("_network_params")
        networks.setdefault(network if is_network else "other", []).append(p)
    return networks


def total_loss(losses: TensorDictBase) -> Tensor:
    """Sum the entries whose names begin with ``loss``; the others are metrics."""
    return sum(value for key, value in losses.items() if key.startswith("loss"))


def grad_norms(gradients: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Compute the gradient norm of each network that has gradients."""
    return {name: nn.utils.get_total_norm(x) for name, x in gradients.items() if x}


class CudaGraphs:
    """A function of tensors, recorded as a CUDA graph for each set of shapes and replayed.

    The host then spends one launch on it. Its first calls with new shapes run as they are, the next
    one records. Tensors that aren't arguments, such as weights, must stay where they are.

    Args:
        function: of tensors in dictionaries, lists and tensordicts; returns such.
        warmup: calls before the recording.
    """

    def __init__(self, function: Callable[..., Any], warmup: int = 3) -> None:
        self.function, self.warmup = function, warmup
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], None], Any]] = {}
        self._calls: dict[Any, int] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Any, key: Any = None) -> Any:
        """Call the function; `key` stands for what its graph depends on besides shapes."""
        leaves, structure = tree_flatten(inputs)
        given = [x for x in leaves if isinstance(x, Tensor)]
        key = key, tuple((x.shape, x.dtype) for x in given)
        self._calls[key] = calls = self._calls.get(key, 0) + 1
        if calls <= self.warmup:
            return self.aside(inputs)
        if key not in self._graphs:
            static = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            replay, out = self.record(structure.unflatten(static))
            self._graphs[key] = [x for x in static if isinstance(x, Tensor)], replay, out
        static, replay, out = self._graphs[key]
        torch._foreach_copy_(static, given)
        replay()
        return tree_map_only(Tensor, Tensor.clone, out)

    def aside(self, inputs: tuple[Any, ...]) -> Any:
        """Run on a stream of its own, as CUDA wants it before a recording."""
        self._stream = self._stream or torch.cuda.Stream()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            out = self.function(*inputs)
        current.wait_stream(self._stream)
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
        graphs: class of the graphs.
    """

    def __init__(
        self, step: Callable[..., Any], graphs: Callable[..., CudaGraphs] = CudaGraphs
    ) -> None:
        self.step, self.graphs = step, graphs
        self._by_memory: WeakKeyDictionary[Any, CudaGraphs] = WeakKeyDictionary()

    def __call__(self, inputs: Any, positions_N: Tensor, memory: Any, observations: Any) -> Any:
        place = self if memory is None else memory
        if place not in self._by_memory:
            # A graph outlives no memory: it holds the addresses of its tensors.
            held = (lambda: None) if memory is None else weakref(memory)
            self._by_memory[place] = self.graphs(
                lambda x, positions, observed: self.step(x, positions, held(), observed)
            )
        span = getattr(memory, "span", None)
        return self._by_memory[place](inputs, positions_N, observations, key=span)


def compile_policy(policy: Policy, **options: Any) -> Policy:
    """Compile a policy's steps in place, on a GPU as CUDA graphs.

    Args:
        options: of :func:`torch.compile`.
    """
    policy.compile(**options)
    device = next(policy.parameters()).device
    if device.type == "cuda" and policy.compiled_step is not None:
        policy.compiled_step = StepGraphs(policy.compiled_step)
    return policy
