"""Fill a policy, and a loss, with the weights of an AMAGO agent: all of them, or nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDictParams
from torch import Tensor, nn

from torchrl_amago import keys
from torchrl_amago.compat.files import Source, read_amago_weights
from torchrl_amago.compat.kinds import Kind, PartDescription, kind_of, part_of
from torchrl_amago.compat.weights import Weights
from torchrl_amago.modules import CNNTimestepEncoder, Policy, PopArt, TransformerEncoder
from torchrl_amago.modules.timestep import TimestepEncoder
from torchrl_amago.objectives import AMAGOLoss

# Parts of an agent that only a loss has a place for.
_OF_LOSS = ("critics", "target_critics", "target_actor", "popart")
_NO_COUNTERPART = {
    "maximized_critics": "a copy of the critics, in whose place the loss uses the critics themselves",
}
_NO_LOSS = "of training, and no loss was given"
# Parts whose differences are said in terms of our arguments; the others are copies or follow from them.
_MEASURED = ("tstep_encoder", "traj_encoder", "actor", "critics")
# What decides how many numbers a part reads or writes.
_SIZE_ARGUMENTS = {
    "timestep_encoder reads": "choose entries with obs_keys",
    "actor reads": "the state's size, and nothing else (actor_obs_keys)",
    "actor writes": "for each of the discounts, the parameters of the distribution",
    "critic reads": "the state's size; with takes_actions, also 1 and the action's",
    "critic writes": "bins of the value_codec, or 1; without takes_actions discounts x actions",
}
# Entries of ours that AMAGO keeps in its configuration.
_CONFIGURATION = {"discounts", "bins", "num_outside"}


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
    plan = _Plan()
    for place in places:
        plan.add(place, part_of(weights, place.theirs))
    filled = {place.theirs for place in places}
    for name in weights:
        plan.leave_out(name, filled)
    plan.check_discounts(weights, policy, loss)
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


# --- places ---


@dataclass(frozen=True)
class _Place:
    """A network of ours that one of AMAGO's belongs in.

    Args:
        theirs: AMAGO's name of it.
        ours: ours.
        module: says which kind it is.
        entries: what to fill, by name.
    """

    theirs: str
    ours: str
    module: nn.Module
    entries: Weights


def _policy_places(policy: Policy) -> Iterator[_Place]:
    timestep, trajectory = policy.encoder.module
    for theirs, ours, module in (
        ("tstep_encoder", "timestep_encoder", timestep),
        ("traj_encoder", "seq_model", trajectory),
        ("actor", "actor", policy.actor.module),
    ):
        yield _Place(theirs, ours, module, module.state_dict(keep_vars=True))


def _loss_places(loss: AMAGOLoss, policy: Policy) -> Iterator[_Place]:
    trained = {p.data_ptr() for p in loss.actor_network_params.values(True, True)}
    if not trained & {p.data_ptr() for p in policy.actor.parameters()}:
        raise ValueError(
            "the loss must train this policy, but it has weights of its own. Build it around the policy: "
            "amago_loss(policy) or amago2_loss(policy)."
        )
    critic, actor = loss.critic_network.module, policy.actor.module
    yield _Place("critics", "critic", critic, _entries(loss.critic_network_params))
    yield _Place(
        "target_critics", "target_critic", critic, _entries(loss.target_critic_network_params)
    )
    yield _Place("target_actor", "target_actor", actor, _entries(loss.target_actor_network_params))
    codec = loss.value_codec
    popart = getattr(codec, "popart", codec)
    if isinstance(popart, PopArt):
        # The bins of a codec that classifies are none of PopArt's, but they are kept as they are.
        bins = {} if popart is codec else dict(codec.named_buffers(recurse=False))
        yield _Place("popart", "value_codec", popart, dict(popart.named_buffers()) | bins)


def _entries(params: TensorDictParams) -> Weights:
    return {name.removeprefix("module."): p for name, p in params.flatten_keys(".").items()}


# --- what goes where ---


@dataclass
class _Plan:
    """Copies to make, what is left out, and what doesn't fit."""

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    not_mapped: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    remedies: list[str] = field(default_factory=list)

    def add(self, place: _Place, theirs: Weights) -> None:
        """Find a place for every weight of one network."""
        kind = _common_kind(place, theirs)
        translate = kind.translator(theirs)
        filled = set()
        for name, value in theirs.items():
            full_name = f"{place.theirs}.{name}"
            try:
                ((ours, translated),) = translate({name: value}).items()
            except KeyError:
                self._problem("no place for", full_name)
                continue
            except (RuntimeError, IndexError):
                self._problem("not a shape that AMAGO writes", f"{full_name} {tuple(value.shape)}")
                continue
            entry = place.entries.get(ours)
            full_ours = f"{place.ours}.{ours}"
            if entry is None:
                self._without_entry(full_name, ours, value, place)
            elif entry.shape != translated.shape:
                shapes = f"{tuple(translated.shape)} -> {tuple(entry.shape)}"
                self._problem("shapes that differ", f"{full_name} -> {full_ours}: {shapes}")
            else:
                self.copies.append((entry, translated))
                self.loaded[full_name] = full_ours
            filled.add(ours)
        for ours in place.entries:
            if ours not in filled:
                self._unfilled(f"{place.ours}.{ours}")
        self._check_heads(place, theirs)
        if place.theirs in _MEASURED:
            self.remedies += _differences(place, kind, theirs)

    def leave_out(self, name: str, filled: set[str]) -> None:
        """Say why a weight isn't loaded, unless it belongs to a network that is filled."""
        part = name.partition(".")[0]
        if part in filled:
            return
        if part in _NO_COUNTERPART:
            self.not_mapped[name] = _NO_COUNTERPART[part]
        elif part in _OF_LOSS:
            self.not_mapped[name] = (
                _NO_LOSS if "critics" not in filled else "the codec has no PopArt"
            )
        else:
            self._problem("no place for", name)

    def check_discounts(
        self, weights: Mapping[str, Tensor], policy: Policy, loss: AMAGOLoss | None
    ) -> None:
        """Shapes may agree by chance: more discounts, fewer parameters for each."""
        theirs = weights.get("popart.mu")
        ours = len(policy.discounts) if loss is None else len(loss.discounts)
        if theirs is not None and len(theirs) != ours:
            self._problem("numbers of discounts that differ", f"{len(theirs)} -> {ours}")
            self.remedies.append(f"discounts: {len(theirs)} of them (there are {ours})")

    def raise_if_unfit(self) -> None:
        if not self.problems:
            return
        lists = [f"{what}:\n    " + "\n    ".join(all_) for what, all_ in self.problems.items()]
        remedies = dict.fromkeys(self.remedies)
        remedy = (
            "Build policy and loss with AMAGO's sizes:\n    " + "\n    ".join(remedies)
            if remedies
            else "Sizes agree, so look at where the weights come from."
        )
        raise ValueError(
            "AMAGO's weights don't fit this policy; nothing was changed.\n"
            + "\n".join(lists)
            + f"\n{remedy}"
        )

    def _without_entry(self, full_name: str, ours: str, value: Tensor, place: _Place) -> None:
        if ours.startswith("input_norm.") and not any(
            name.startswith("input_norm.") for name in place.entries
        ):
            self.not_mapped[full_name] = "statistics that normalize_inputs=False doesn't use"
        elif ours.endswith("head_scale") and (value == 1).all():
            self.not_mapped[full_name] = "all ones, which head_scaling=False means"
        else:
            self._problem("no place for", full_name)
            if ours.endswith("head_scale"):
                self.remedies.append("seq_model_options: head_scaling=True (it is False)")

    def _check_heads(self, place: _Place, theirs: Weights) -> None:
        """Without scales for heads on our side, no shape shows how many there are."""
        scales = [value for name, value in theirs.items() if name.endswith("head_scaler")]
        if isinstance(place.module, TransformerEncoder):
            wanted, given = scales[0].numel(), place.module.num_heads
            if wanted != given:
                self._problem("numbers of heads that differ", f"{wanted} -> {given}")
                self.remedies.append(f"seq_model_options: num_heads={wanted} (it is {given})")

    def _unfilled(self, name: str) -> None:
        if name.rpartition(".")[2] in _CONFIGURATION:
            self.kept.append(name)
        else:
            self._problem("not filled", name)

    def _problem(self, what: str, which: str) -> None:
        self.problems.setdefault(what, []).append(which)


def _common_kind(place: _Place, theirs: Weights) -> Kind:
    kind = kind_of(place.theirs, theirs)
    if not isinstance(place.module, kind.module):
        raise ValueError(
            f"AMAGO's {place.theirs} is what {kind.module.__name__} is here, but the policy has "
            f"{type(place.module).__name__}. Build it with {place.ours}={kind.name!r}; nothing was changed."
        )
    return kind


def _differences(place: _Place, kind: Kind, theirs: Weights) -> list[str]:
    """Our arguments that must be others, as far as shapes show it."""
    try:
        wanted = kind.measure(kind.translator(theirs)(theirs))
        given = kind.measure(place.entries)
    except (KeyError, IndexError, RuntimeError):
        return []  # incomplete weights; which ones are missing is said elsewhere
    return _compare(place.ours, wanted, given)


def _compare(part: str, wanted: PartDescription, given: PartDescription) -> list[str]:
    def text(options: Mapping[str, Any], name: str) -> str:
        return repr(options[name]) if name in options else "without weights"

    prefix = part.removesuffix("_encoder")
    # Heads are compared elsewhere: not all of our weights show them.
    names = sorted((wanted.options.keys() | given.options.keys()) - {"num_heads"})
    found = [
        f"{prefix}_options: {name}={text(wanted.options, name)} (it is {text(given.options, name)})"
        for name in names
        if wanted.options.get(name) != given.options.get(name)
    ]
    for verb, size, ours in (
        ("reads", wanted.input_size, given.input_size),
        ("writes", wanted.output_size, given.output_size),
    ):
        hint = _SIZE_ARGUMENTS.get(f"{part} {verb}")
        if size != ours and hint is not None:
            found.append(f"{part} {verb} {size} numbers ({ours} here): {hint}")
    return found
