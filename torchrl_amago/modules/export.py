"""A policy's step as a function of tensors, for :func:`torch.export.export`. Legend: N rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain, zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn

from torchrl_amago.keys import as_tuple
from torchrl_amago.modules.actor import ActorModule
from torchrl_amago.modules.timestep import TimestepEncoder
from torchrl_amago.modules.trajectory import StateMemory, TrajectoryEncoder

if TYPE_CHECKING:
    from torchrl_amago.modules.policy import Policy

States = tuple[Tensor, ...]


class PolicyStep(nn.Module):
    """A policy's greedy step, with its memory as an argument and a result.

    Weights, settings and the discount acted with are the policy's as it is now; exploration is left
    out. A row starts empty where `is_init` is True, as in a rollout.

    Raises:
        ValueError: if the memory grows (it must be :class:`StateMemory` or none), or a part has
            hooks or a `forward` of its own.

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
        if changed := parts_with_own_forward(policy):
            raise ValueError(
                f"a step is exported for plain parts of a policy, but {changed[0]} has hooks or a "
                "forward of its own. Export that module itself."
            )
        timestep, trajectory = policy.encoder.module
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False)
        memory = self._new_memory(1)
        if not (memory is None or isinstance(memory, StateMemory)):
            raise ValueError(
                "a step is exported for encoders whose memory doesn't grow, but "
                f"{type(trajectory).__name__} has a {type(memory).__name__}. Use seq_model='gru', "
                "'lstm', 'mamba', 'linear_attention' or 'feedforward', or act with the policy."
            )
        read = (timestep.in_keys, policy.actor.in_keys[1:], trajectory.in_keys[1:])
        #: Entries to read, by the name that an input has.
        self.keys: dict[str, NestedKey] = {".".join(as_tuple(key)): key for key in chain(*read)}
        self._layer_sizes = [len(layer) for layer in memory.layers] if memory else []

    def inputs_of(self, step: TensorDictBase) -> dict[str, Tensor]:
        """Return the inputs of :meth:`forward` by name; `"a.b"` is a nested entry of the step."""
        return {name: step.get(key) for name, key in self.keys.items()}

    def initial_states(self, num_rows: int) -> States:
        """Return the memory of rollouts that haven't begun, tensors `[N, ...]`."""
        memory = self._new_memory(num_rows)
        return tuple(chain(*memory.layers)) if memory else ()

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor], states: States) -> tuple[Tensor, States]:
        """Return the greedy action `[N, ...]`, as the environment stores it, and the new states.

        The states given are those of the last step, or :meth:`initial_states`.
        """
        policy, step = self.policy, {key: inputs[name] for name, key in self.keys.items()}
        timestep, trajectory = policy.encoder.module
        time_N, is_init_N = (step[key].reshape(-1) for key in trajectory.in_keys[1:])
        new = [torch.where(is_init_N.view(-1, *[1] * (s.ndim - 1)), 0.0, s) for s in states]
        rest = iter(new)
        layers = [[next(rest) for _ in range(size)] for size in self._layer_sizes]
        observations = [step[key] for key in policy.actor.in_keys[1:]]
        memory = SimpleNamespace(layers=layers)
        *_, params = step_outputs(policy, timestep.read(step), time_N, memory, observations)
        actions = policy.distribution.stored(params[:, policy.sampler.index])
        return actions.deterministic_sample, tuple(new)

    def _new_memory(self, num_rows: int) -> StateMemory | None:
        weight = next(self.policy.parameters())
        return self.policy.encoder.module[1].new_memory(num_rows, weight.device, weight.dtype)


def step_outputs(
    policy: Policy,
    inputs: list[Tensor],
    positions_N: Tensor,
    memory: Any,
    observations: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a step's embedding, state and action parameters from what a policy's parts read."""
    timestep, trajectory = policy.encoder.module
    x = timestep.encode(inputs, None)
    batch = x.shape[:-1]
    state = trajectory.step(x.reshape(-1, x.shape[-1]), positions_N, memory).reshape(*batch, -1)
    if trajectory.state_norm is not None:
        state = trajectory.state_norm(state)
    return x, state, policy.actor.module(state, *observations)


def parts_with_own_forward(policy: Policy) -> list[str]:
    """Return the classes of a policy's parts that have hooks, or do more than their base class."""
    encoder = policy.encoder
    encoders = encoder.module if isinstance(encoder, TensorDictSequential) else ()
    bases = (TensorDictSequential, ActorModule, TimestepEncoder, TrajectoryEncoder)
    return [
        type(module).__name__
        for module, base in zip_longest((encoder, policy.actor, *encoders), bases, fillvalue=())
        if not isinstance(module, base)
        or type(module).forward is not base.forward
        or module._forward_hooks
        or module._forward_pre_hooks
    ]
