"""Operators that `torch.compile` sees as one node, whatever the number of steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import CustomOpDef


def make_operator(name: str, forward: Callable, backward: Callable, fake: Callable) -> CustomOpDef:
    """Make an operator that is differentiable once, by an operator for its backward pass.

    Args:
        name: of the operator.
        forward: from tensors, `is_init` or None last, to one or more outputs.
        backward: from a list of forward's inputs and last output, and the first output's gradient,
            to gradients of the inputs but `is_init`.
        fake: forward for tensors without data.
    """
    operator = torch.library.custom_op(f"torchrl_amago::{name}", forward, mutates_args=())
    operator.register_fake(fake)
    run_backward = torch.library.custom_op(
        f"torchrl_amago::{name}_backward", backward, mutates_args=()
    )

    @run_backward.register_fake
    def _(saved: list[Tensor | None], grad: Tensor) -> list[Tensor]:
        inputs = saved[:-2]
        return [torch.empty_like(z, memory_format=torch.contiguous_format) for z in inputs]

    def save(ctx, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output if isinstance(output, Tensor) else output[-1])

    def differentiate(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (*run_backward(list(ctx.saved_tensors), grad.contiguous()), None)

    operator.register_autograd(differentiate, setup_context=save)
    return operator
