"""A cost model of one update of AMAGO on discrete actions, and the counts that check it.

An update costs FLOPs of matrix products, bytes that all other operators read and write, and a fixed time for
each operator that is launched:

    seconds = flops / flop_rate + attention / attention_rate + bytes / bandwidth + launches * launch_time

FLOPs follow from sizes alone, :func:`update_flops`. Bytes and launches are counted on the meta device or in a
real update, :class:`Count`; a compiled update moves fewer, and a CUDA graph has one launch.

Legend: B rows, T steps, d width of the sequence model, L its layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from torchrl_amago.objectives import AMAGOLoss


def update_flops(loss: AMAGOLoss, rows: int, steps: int, causal: bool = False) -> tuple[int, int]:
    """FLOPs of products with weights, and of attention, in forward and backward of a listing critic's update.

    A product with a matrix of n weights costs 2 n a token forwards and 4 n backwards. The encoder reads T + 1
    steps, and nothing learns from its inputs' gradients; targets are forward passes of actor and critics.
    Attention costs 4 T d a token and layer forwards and 8 T d backwards, half of it if kernels skip what a
    causal mask hides.
    """
    matrices = {}
    for network in ("encoder", "actor", "critic"):
        params = getattr(loss, f"{network}_network_params")
        weights = [x.shape for x in params.values(True, True) if x.requires_grad and x.ndim >= 2]
        matrices[network] = weights
    sizes = {name: sum(shape.numel() for shape in shapes) for name, shapes in matrices.items()}
    tokens, states = rows * steps, rows * (steps + 1)
    products = 6 * sizes["encoder"] * states + (6 + 2) * (sizes["actor"] + sizes["critic"]) * tokens
    trajectory = loss.encoder_network.module[1]
    layers, width = len(trajectory.blocks), trajectory.output_size
    attention = 12 * layers * width * rows * (steps + 1) ** 2
    return products, attention // 2 if causal else attention


class Count(TorchDispatchMode):
    """FLOPs, bytes and launches of everything that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.launches += 1
        elif not func.is_view and func.overloadpacket.__name__ not in (
            "empty",
            "detach",
            "_unsafe_view",
        ):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            # An expanded tensor is read once.
            self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
            self.launches += 1
        return out


@dataclass
class Machine:
    """What a device does in a second."""

    flop_rate: float
    attention_rate: float
    bandwidth: float
    launch_time: float

    def seconds(self, products: float, attention: float, moved: float, launches: float) -> float:
        """Time of an update."""
        work = products / self.flop_rate + attention / self.attention_rate + moved / self.bandwidth
        return work + launches * self.launch_time


def calibrate(
    device: torch.device, dtype: torch.dtype, rows: int, steps: int, width: int, heads: int
) -> Machine:
    """Measure a device on the shapes of an update: a product, attention, an addition, and a tiny operator."""
    x, weight = torch.randn(rows * steps, width), torch.randn(width, 4 * width)
    x, weight = (z.to(device, dtype) for z in (x, weight))
    q = torch.randn(rows, heads, steps, width // heads).to(device, dtype).requires_grad_()
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention() -> None:
        attend(q, q, q, is_causal=True).sum().backward()

    # Operators between products read and write memory that was used a while ago, or never.
    tiny, wide = torch.zeros(1, device=device), [(x @ weight).float() for _ in range(8)]
    bytes_moved = 2 * sum(z.nbytes for z in wide)

    def move() -> list[torch.Tensor]:
        return [torch.nn.functional.leaky_relu(z) for z in wide]

    return Machine(
        flop_rate=2 * x.numel() * 4 * width / seconds_of(lambda: x @ weight, device),
        attention_rate=12 * width * rows * steps**2 / seconds_of(attention, device),
        bandwidth=bytes_moved / seconds_of(move, device),
        launch_time=seconds_of(lambda: tiny + tiny, device),
    )


def seconds_of(function: Callable[[], object], device: torch.device, rounds: int = 15) -> float:
    """Median time of a call, without the first ones; on one CPU thread its own time, whatever else runs."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def timed() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    for _ in range(3):
        timed()
    return sorted(timed() for _ in range(rounds))[rounds // 2]
