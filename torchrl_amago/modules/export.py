"""A policy's step as a function of tensors, for :func:`torch.export.export`: memory comes in and goes out.

Legend: N rows, S tensors of memory.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from torchrl_amago.modules.trajectory import StateMemory

if TYPE_CHECKING:
    from torchrl_amago.modules.policy import Policy


class PolicyStep(nn.Module):
    """A policy's greedy step, with what it remembers as an argument and a result.

    Weights, settings and the discount acted with are the policy's as it is now; exploration is left
    out. A row starts empty where `is_init` says so, as in a rollout.

    Args:
        policy: with an encoder whose memory doesn't grow (:class:`StateMemory`), or without memory.

    Raises:
        ValueError: if its memory grows, or a part has a `forward` of its own.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> step = make_policy(env, context_length=45, seq_model="gru").step_module()
        >>> inputs, states = step.inputs_of(env.reset()), step.initial_states(2)
        >>> program = torch.export.export(step, (inputs, states))
        >>> action, states = program.module()(inputs, states)
        >>> action.shape
        torch.Size([2])
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False)
        timestep, trajectory = policy.encoder.module
        if not policy.has_usual_parts():
            raise ValueError(
                "a step is exported for the usual parts of a policy, but this one's encoders, actor or "
                "outputs have hooks or a forward of their own. Export those modules themselves."
            )
        weight = next(policy.parameters())
        memory = trajectory.new_memory(1, weight.device, weight.dtype)
        if not (memory is None or isinstance(memory, StateMemory)):
            raise ValueError(
                f"a step is exported for encoders whose memory doesn't grow, but {type(trajectory).__name__} "
                f"has a {type(memory).__name__}. Use seq_model='gru', 'lstm', 'mamba', 'linear_attention' "
                "or 'feedforward', or act with the policy itself."
            )
        read = (timestep.in_keys, policy.actor.in_keys[1:], trajectory.in_keys[1:])
        #: Entries to read, by the name that an input has.
        self.keys: dict[str, NestedKey] = {_name(key): key for keys in read for key in keys}
        self._layers = [len(layer) for layer in memory.layers] if memory else []

    def inputs_of(self, step: TensorDictBase) -> dict[str, Tensor]:
        """Inputs of :meth:`forward` from the tensordict of a step, by name (`"a.b"` for nested entries)."""
        return {name: step.get(key) for name, key in self.keys.items()}

    def initial_states(self, num_rows: int) -> tuple[Tensor, ...]:
        """Memory of rollouts that haven't begun, S tensors `[N, ...]`."""
        weight = next(self.parameters())
        trajectory = self.policy.encoder.module[1]
        memory = trajectory.new_memory(num_rows, weight.device, weight.dtype)
        return tuple(itertools.chain(*memory.layers)) if memory else ()

    @torch.no_grad()
    def forward(
        self, inputs: Mapping[str, Tensor], states: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Act.

        Args:
            inputs: entries `[N, ...]` of a step, see :meth:`inputs_of`.
            states: what the last step returned, or :meth:`initial_states`.

        Returns:
            The most probable action `[N, ...]`, as the environment stores it, and the new states.
        """
        step = {key: inputs[name] for name, key in self.keys.items()}
        timestep, trajectory = self.policy.encoder.module
        _, time_idx_key, is_init_key = trajectory.in_keys
        is_init_N = step[is_init_key].reshape(-1)
        new = [
            torch.where(is_init_N.view(-1, *[1] * (state.ndim - 1)), 0.0, state) for state in states
        ]
        rest = iter(new)
        layers = [[next(rest) for _ in range(size)] for size in self._layers]
        extra = [step[key] for key in self.policy.actor.in_keys[1:]]
        logits = self.policy.compute_logits(
            timestep.read(step),
            extra,
            step[time_idx_key].reshape(-1),
            SimpleNamespace(layers=layers),
        )
        return self.policy.distribution.stored(logits).deterministic_sample, tuple(new)


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)
