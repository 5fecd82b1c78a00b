"""What goes where: a place for every weight of AMAGO's, or a list of what doesn't fit and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from torchrl_amago.compat.kinds import Kind, PartDescription, kind_of
from torchrl_amago.compat.weights import Weights
from torchrl_amago.modules import TransformerEncoder

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
class Place:
    """A network of ours that one of AMAGO's belongs in.

    Args:
        theirs: AMAGO's name of it.
        ours: ours.
        module: says which kind it is.
        entries: what to fill, by name.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> Place("actor", "actor", layer, layer.state_dict()).entries["bias"].shape
        torch.Size([3])
    """

    theirs: str
    ours: str
    module: nn.Module
    entries: Weights


@dataclass
class Plan:
    """Copies to make, what is left out, and what doesn't fit. Nothing is changed by it.

    Example:
        >>> plan = Plan()
        >>> plan.leave_out("optimizer.step", filled={"actor"})
        >>> plan.raise_if_unfit()
        Traceback (most recent call last):
        ...
        ValueError: AMAGO's weights don't fit this policy; nothing was changed.
        no place for:
            optimizer.step
        Sizes agree, so look at where the weights come from.
    """

    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    not_mapped: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    remedies: list[str] = field(default_factory=list)

    def add(self, place: Place, theirs: Weights) -> None:
        """Find a place for every weight of one network."""
        kind = _common_kind(place, theirs)
        translate = kind.translator(theirs)
        filled = {self._add_weight(place, name, theirs[name], translate) for name in theirs}
        for ours in place.entries:
            if ours not in filled:
                self._unfilled(f"{place.ours}.{ours}")
        self._check_heads(place, theirs)
        if place.theirs in _MEASURED:
            self.remedies += _differences(place, kind, theirs)

    def _add_weight(
        self, place: Place, name: str, value: Tensor, translate: Callable[[Weights], Weights]
    ) -> str | None:
        """Our name of one weight, if it has one."""
        full_name = f"{place.theirs}.{name}"
        try:
            ((ours, translated),) = translate({name: value}).items()
        except KeyError:
            self._problem("no place for", full_name)
            return None
        except (RuntimeError, IndexError):
            self._problem("not a shape that AMAGO writes", f"{full_name} {tuple(value.shape)}")
            return None
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
        return ours

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

    def check_discounts(self, weights: Mapping[str, Tensor], ours: Sized) -> None:
        """Shapes may agree by chance: more discounts, fewer parameters for each."""
        theirs = weights.get("popart.mu")
        if theirs is not None and len(theirs) != len(ours):
            self._problem("numbers of discounts that differ", f"{len(theirs)} -> {len(ours)}")
            self.remedies.append(f"discounts: {len(theirs)} of them (there are {len(ours)})")

    def raise_if_unfit(self) -> None:
        """Refuse the whole, saying all that doesn't fit.

        Raises:
            ValueError: if anything doesn't.
        """
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

    def _without_entry(self, full_name: str, ours: str, value: Tensor, place: Place) -> None:
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

    def _check_heads(self, place: Place, theirs: Weights) -> None:
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


def _common_kind(place: Place, theirs: Weights) -> Kind:
    kind = kind_of(place.theirs, theirs)
    if not isinstance(place.module, kind.module):
        raise ValueError(
            f"AMAGO's {place.theirs} is what {kind.module.__name__} is here, but the policy has "
            f"{type(place.module).__name__}. Build it with {place.ours}={kind.name!r}; nothing was changed."
        )
    return kind


def _differences(place: Place, kind: Kind, theirs: Weights) -> list[str]:
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
