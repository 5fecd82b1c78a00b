"""The contract between actor head, policy and loss: parameters become a distribution over actions.

Legend: P parameters, A length of the action vector.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchrl_amago.action_space import ActionKind, ActionSpace

NO_SHAPE = torch.Size()


class VectorDistribution(Distribution, abc.ABC):
    """Base of distributions over action vectors, with the shape of ``like`` ``[..., A]``.

    Subclasses write ``sample``, or set ``has_rsample`` and write ``rsample``.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, like: Tensor) -> None:
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=False)

    @abc.abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability (of continuous actions: log-density) of vectors, ``[...]``, nats."""

    @abc.abstractmethod
    def entropy(self) -> Tensor:
        """Entropy ``[...]``, nats; the class says whether it is exact."""

    @property
    @abc.abstractmethod
    def deterministic_sample(self) -> Tensor:
        """Greedy action, ``[..., A]``."""


class StoredActions(Distribution):
    """Distribution over actions as environments store them; mode and mean are the greedy one."""

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, vectors: Distribution, space: ActionSpace) -> None:
        super().__init__(vectors.batch_shape, torch.Size(space.shape), validate_args=False)
        self.vectors, self.space = vectors, space

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        return self.space.from_vector(self.vectors.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return self.vectors.log_prob(self.space.to_vector(value))

    def entropy(self) -> Tensor:
        return self.vectors.entropy()

    @property
    def deterministic_sample(self) -> Tensor:
        return self.space.from_vector(self.vectors.deterministic_sample)

    # A category has no mean, and a squashed Gaussian no mode in closed form.
    mode = mean = deterministic_sample


@dataclass(frozen=True)
class PolicyDistribution(abc.ABC):
    """Map from an actor's parameters ``[..., P]`` to a distribution over actions, without weights.

    Subclasses set the class attributes and write :meth:`_vectors`; ``space`` is the actions'.

    Raises:
        ValueError: if the distribution doesn't fit the space, or an argument is out of its range.

    Example:
        >>> from torchrl.data import Categorical
        >>> from torchrl_amago.modules.distributions import Discrete
        >>> policy_dist = Discrete(ActionSpace.from_spec(Categorical(3)))
        >>> params = torch.tensor([[0.0, 9.0, 0.0]])
        >>> policy_dist(params).deterministic_sample, policy_dist.stored(params).mode
        (tensor([[0., 1., 0.]]), tensor([1]))
    """

    space: ActionSpace

    #: Kinds of action spaces that this distribution fits.
    kinds: ClassVar[tuple[ActionKind, ...]]
    #: True if gradients reach the parameters through samples (`rsample`).
    differentiable: ClassVar[bool]
    #: P / A, unless a subclass writes :attr:`num_params`.
    params_per_number: ClassVar[int]

    def __post_init__(self) -> None:
        if self.space.kind not in self.kinds:
            raise ValueError(
                f"{type(self).__name__} is a distribution over {' or '.join(self.kinds)} actions, "
                f"got {self.space.kind} ones. make_distribution(space) chooses one that fits."
            )

    @property
    def num_params(self) -> int:
        """P, number of parameters for each action."""
        return self.params_per_number * self.space.size

    @abc.abstractmethod
    def _vectors(self, params: Tensor) -> VectorDistribution:
        """Build the distribution over vectors; parameters are at least float32."""

    def __call__(self, params: Tensor) -> VectorDistribution:
        """Build the distribution over action vectors ``[..., A]``, float.

        Parameters ``[..., P]`` of half precision become float32. Raises ValueError for another P.
        """
        return self._vectors(self._checked(params))

    def stored(self, params: Tensor) -> Distribution:
        """Build the distribution over actions as the environment stores them, for policies."""
        return StoredActions(self(params), self.space)

    def clip_action(self, vector: Tensor, policy: VectorDistribution) -> Tensor:
        """Return the vector ``[..., A]`` that critics read for that of a stored action.

        ``policy`` are ``[..., G]`` distributions for the same states, with their forbidden actions.
        """
        return vector

    def _checked(self, params: Tensor) -> Tensor:
        if params.shape[-1] != self.num_params:
            rule = f"{type(self).__name__} needs {self.num_params} parameters in the last dimension"
            raise ValueError(f"{rule}, got the shape {list(params.shape)}.")
        return params.float() if params.dtype in (torch.bfloat16, torch.float16) else params
