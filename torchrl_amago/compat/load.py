"""Fill a policy, and a loss, with the weights of an AMAGO agent: all of them, or nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tensordict import TensorDictParams

from torchrl_amago import keys
from torchrl_amago.compat.files import Source, read_amago_weights
from torchrl_amago.compat.kinds import part_of
from torchrl_amago.compat.plan import Place, Plan
from torchrl_amago.compat.weights import Weights
from torchrl_amago.modules import CNNTimestepEncoder, Policy, PopArt
from torchrl_amago.modules.timestep import TimestepEncoder
from torchrl_amago.objectives import AMAGOLoss


@dataclass(frozen=True)
class LoadReport:
    """What became of every weight of an AMAGO agent.

    Args:
        loaded: AMAGO's name -> ours.
        not_mapped: AMAGO's name -> why it isn't needed here.
        kept: entries of ours that AMAGO's weights don't say, such as discounts and bins: those the
            policy and the loss were built with. Whether they are AMAGO's, only you know.

    Example:
        >>> print(LoadReport({"actor.a": "actor.b"}, {"critics.c": "of training"}, ("discounts",)))
        1 loaded
        1 not mapped: of training
            critics.c
        1 kept as they were: discounts
    """

    loaded: dict[str, str]
    not_mapped: dict[str, str]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for reason in dict.fromkeys(self.not_mapped.values()):
            names = [name for name, why in self.not_mapped.items() if why == reason]
            lines += [f"{len(names)} not mapped: {reason}", *(f"    {name}" for name in names)]
        if self.kept:
            lines.append(f"{len(self.kept)} kept as they were: {', '.join(self.kept)}")
        return "\n".join(lines)


def load_amago_weights(source: Source, policy: Policy, loss: AMAGOLoss | None = None) -> LoadReport:
    """Fill a policy, and a loss around it, with the weights of an AMAGO 3.x agent.

    The policy must be built with AMAGO's sizes (:func:`describe_amago_weights` reads them off) and must
    read what AMAGO's does, in its order: observations by their names' alphabet, then the previous
    reward and action. With a loss, critics, target networks and PopArt's statistics are filled as
    well; do that after :class:`~torchrl.objectives.SoftUpdate` is made, which starts from the online
    weights.

    Args:
        source: a file that AMAGO wrote, or a state dict of its agent, see :func:`read_amago_weights`.
        policy: what to fill.
        loss: what to fill besides; built around this policy.

    Returns:
        What became of every weight.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: for a safetensors file without the package.
        ValueError: if a weight has no place here, an entry of ours would stay unfilled, a shape
            differs, or the policy reads something else. Nothing has changed then.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> from torchrl_amago.compat import describe_amago_weights
        >>> sizes = {"tstep_encoder.base.in_layer": (16, 8), "tstep_encoder.base.out_layer": (8, 16),
        ...          "actor.base.in_layer": (32, 8), "actor.base.out_layer": (10, 32)}
        >>> agent = {f"{name}.weight": torch.randn(size) for name, size in sizes.items()}
        >>> agent |= {f"{name}.bias": torch.randn(size[0]) for name, size in sizes.items()}
        >>> options = describe_amago_weights(agent).policy_options()
        >>> options["timestep_options"] |= {"normalize_inputs": False, "out_norm": "none"}
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45, discounts=(0.9, 0.99),
        ...                      obs_keys=["observation"], **options)
        >>> print(load_amago_weights(agent, policy))
        8 loaded
    """
    weights = read_amago_weights(source)
    timestep = policy.encoder.module[0]
    check_reading(timestep)
    places = list(_policy_places(policy))
    if loss is not None:
        places += _loss_places(loss, policy)
    plan = Plan()
    for place in places:
        plan.add(place, part_of(weights, place.theirs))
    filled = {place.theirs for place in places}
    for name in weights:
        plan.leave_out(name, filled)
    plan.check_discounts(weights, policy.discounts if loss is None else loss.discounts)
    plan.raise_if_unfit()
    with torch.no_grad():
        for entry, value in plan.copies:
            entry.copy_(value)
    return LoadReport(plan.loaded, plan.not_mapped, tuple(plan.kept))


def check_reading(encoder: TimestepEncoder) -> None:
    """Refuse an encoder that joins what it reads in another order, or scales it otherwise, than AMAGO.

    Raises:
        ValueError: saying what to change.

    Example:
        >>> from torchrl_amago import MLPTimestepEncoder
        >>> shapes = {"prev_reward": (1,), "observation": (4,), "prev_action": (2,)}
        >>> check_reading(MLPTimestepEncoder(shapes))
        Traceback (most recent call last):
        ...
        ValueError: AMAGO joins observations, ...
    """
    read = list(encoder.in_keys)
    if isinstance(encoder, CNNTimestepEncoder):
        if encoder.vector_scale != "symlog":
            raise ValueError(
                "AMAGO's CNN encoder brings previous rewards and actions to scale by symlog, got "
                f"vector_scale={encoder.vector_scale!r}. Leave it out of timestep_options."
            )
        read = encoder.vector_keys
    previous = [key for key in (keys.PREV_REWARD, keys.PREV_ACTION) if key in read]
    observations = [key for key in read if key not in previous]
    expected = [*sorted(observations, key=str), *previous]
    if read != expected:
        raise ValueError(
            f"AMAGO joins observations, sorted by name, then the previous reward and action: {expected}; "
            f"this policy reads {read}. Give obs_keys in that order; where names differ from AMAGO's so "
            "that the order does too, rename them (torchrl.envs.RenameTransform)."
        )


def _policy_places(policy: Policy) -> Iterator[Place]:
    timestep, trajectory = policy.encoder.module
    for theirs, ours, module in (
        ("tstep_encoder", "timestep_encoder", timestep),
        ("traj_encoder", "seq_model", trajectory),
        ("actor", "actor", policy.actor.module),
    ):
        yield Place(theirs, ours, module, module.state_dict(keep_vars=True))


def _loss_places(loss: AMAGOLoss, policy: Policy) -> Iterator[Place]:
    trained = {p.data_ptr() for p in loss.actor_network_params.values(True, True)}
    if not trained & {p.data_ptr() for p in policy.actor.parameters()}:
        raise ValueError(
            "the loss must train this policy, but it has weights of its own. Build it around the policy: "
            "amago_loss(policy) or amago2_loss(policy)."
        )
    critic, actor = loss.critic_network.module, policy.actor.module
    yield Place("critics", "critic", critic, _entries(loss.critic_network_params))
    yield Place(
        "target_critics", "target_critic", critic, _entries(loss.target_critic_network_params)
    )
    yield Place("target_actor", "target_actor", actor, _entries(loss.target_actor_network_params))
    codec = loss.value_codec
    popart = getattr(codec, "popart", codec)
    if isinstance(popart, PopArt):
        # The bins of a codec that classifies are none of PopArt's, but they are kept as they are.
        bins = {} if popart is codec else dict(codec.named_buffers(recurse=False))
        yield Place("popart", "value_codec", popart, dict(popart.named_buffers()) | bins)


def _entries(params: TensorDictParams) -> Weights:
    return {name.removeprefix("module."): p for name, p in params.flatten_keys(".").items()}
