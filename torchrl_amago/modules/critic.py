"""Critic ensembles: all members, discounts and actions in one batched pass.

Legend: C critics, G discounts, A action size, D state size, H hidden size, O outputs of one value,
M steps, K action samples of a step, R rows of a batched product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.modules.functional import symlog

from torchrl_amago._cpu import in_chunks
from torchrl_amago._validation import check_choice, check_counts, check_fractions, check_positive
from torchrl_amago.modules._dropout import check_dropout, dropout
from torchrl_amago.modules._input_norm import PreciseBuffers
from torchrl_amago.modules._layers import make_activation
from torchrl_amago.modules._settings import Configurable


class EnsembleLinear(Configurable, nn.Module):
    """One linear layer per ensemble member: ``[R, in]`` or ``[C, R, in]`` -> ``[C, R, out]``.

    Example:
        >>> EnsembleLinear(4, 8, 3)(torch.zeros(5, 8)).shape
        torch.Size([4, 5, 3])
    """

    def __init__(self, num_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_members, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_members, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as torch.nn.Linear does."""
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            x = x.expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class CriticEnsemble(Configurable, nn.Module):
    """Base of critics: an ensemble of MLPs, and the outputs of a value.

    Args:
        input_size: features of the first layer.
        num_values: number of values in a row of a member's output.
        num_critics: C.
        num_outputs: O, outputs of each value (a codec's bins); None for one, without a dimension.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        activation: see :class:`~torchrl_amago.modules.TimestepEncoder`.
        norm: ``"layer"`` normalises each hidden layer before its activation, without weights, which
            steadies values (arXiv 2407.04811); ``"first"`` the first one alone, which leaves what
            is small in a state more to say; ``"none"`` is the published form.
        dropout: rate after each hidden layer, in [0, 1).
    """

    not_settings = frozenset({"action_gain"})  # only of a critic's first weights

    def __init__(
        self,
        input_size: int,
        num_values: int,
        num_critics: int = 4,
        *,
        num_outputs: int | None = None,
        hidden_size: int = 256,
        num_layers: int = 2,
        activation: str = "leaky_relu",
        norm: Literal["none", "first", "layer"] = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts("Use 2, as published.", num_layers=num_layers)
        check_choice("norm", norm, ("none", "first", "layer"))
        check_dropout(dropout=dropout)
        self.norm = norm
        self.num_critics, self.num_outputs, self.dropout = num_critics, num_outputs, dropout
        #: Dimensions of one predicted value: ``()`` or ``(O,)``.
        self.event_shape = torch.Size(() if num_outputs is None else (num_outputs,))
        sizes = [input_size] + [hidden_size] * num_layers
        self.hidden = nn.ModuleList(
            EnsembleLinear(num_critics, size_in, size_out)
            for size_in, size_out in itertools.pairwise(sizes)
        )
        self.out = EnsembleLinear(num_critics, hidden_size, num_values * self.event_shape.numel())
        self._first_output: dict[str, Tensor | None] = {}
        self.activation = make_activation(activation)
        if isinstance(self.activation, (nn.LeakyReLU, nn.ReLU)):
            # Their backward needs the result alone, and the input is as large as all layers.
            self.activation.inplace = True

    def reset_parameters(self) -> None:
        """Draw all layers anew, then call :meth:`set_output` again."""
        # The layers too: TensorDictModule passes the call on, so that it comes twice.
        for layer in (*self.hidden, self.out):
            layer.reset_parameters()
        self.set_output(**self._first_output)

    @torch.no_grad()
    def set_output(self, *, slope: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Start a value's outputs proportional to a slope ``[O]``, and from a bias ``[O]``.

        Call it before a loss copies the critic.
        """
        self._first_output = {"slope": slope, "bias": bias}
        num_outputs = self.event_shape.numel()
        if slope is not None:
            first_CHV1 = self.out.weight.unflatten(-1, (-1, num_outputs))[..., :1]
            self.out.weight.copy_((first_CHV1 * slope.to(first_CHV1)).flatten(2))
        if bias is not None:
            self.out.bias.unflatten(-1, (-1, num_outputs)).copy_(bias)

    def absorb_scale(
        self, params: TensorDictBase, weight_G: Tensor, bias_G: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Multiply values by a weight and add a bias, in the last layer's parameters in place.

        Return the weight and bias, ``[G]``, that remain to be applied to values.
        """
        # All discounts share the outputs, so that the mean of the weights can be absorbed.
        factor = weight_G.log().mean().exp()
        for parameter in params["out"].values():
            parameter.data.mul_(factor)
        return weight_G / factor, bias_G

    def _activate(self, x: Tensor, is_first: bool = False) -> Tensor:
        """Apply norm, activation and dropout; `x` may be overwritten."""
        if self.norm == "layer" or (self.norm == "first" and is_first):
            x = nn.functional.layer_norm(x, x.shape[-1:])
        return dropout(self.activation(x), self.dropout, self.training)

    def _after_first(self, hidden_CRH: Tensor) -> Tensor:
        """Turn the first hidden layer's activations into the last layer's outputs."""
        for layer in self.hidden[1:]:
            hidden_CRH = self._activate(layer(hidden_CRH))
        return self.out(hidden_CRH)


class DiscreteCritic(CriticEnsemble):
    """Ensemble of MLPs from a state to the value of every action under every discount.

    ``[*B, D]`` -> ``[*B, C, G, A]``, or ``[*B, C, G, A, O]`` if `num_outputs` is given. Other
    arguments: see :class:`CriticEnsemble`.

    Example:
        >>> DiscreteCritic(8, num_actions=5, num_discounts=7)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 4, 7, 5])
    """

    def __init__(
        self,
        state_size: int,
        num_actions: int,
        num_discounts: int,
        num_critics: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(state_size, num_discounts * num_actions, num_critics, **options)
        self.num_discounts, self.num_actions = num_discounts, num_actions

    def absorb_scale(
        self, params: TensorDictBase, weight_G: Tensor, bias_G: Tensor
    ) -> tuple[Tensor, Tensor]:
        for parameter in params["out"].values():
            value_XGA = parameter.data.unflatten(-1, (self.num_discounts, -1))
            value_XGA.mul_(weight_G.unsqueeze(-1))
        params["out", "bias"].data.unflatten(-1, (self.num_discounts, -1)).add_(bias_G[:, None])
        return torch.ones_like(weight_G), torch.zeros_like(bias_G)

    def forward(self, state: Tensor) -> Tensor:
        state_MD = state.reshape(-1, state.shape[-1])
        hidden_CMH = self._activate(self.hidden[0](state_MD), is_first=True)
        value_MCX = self._after_first(hidden_CMH).transpose(0, 1)
        shape = (self.num_critics, self.num_discounts, self.num_actions, *self.event_shape)
        return value_MCX.reshape(*state.shape[:-1], *shape)


def discount_feature(discounts: Tensor) -> Tensor:
    """Compute ``symlog(1 / (1 - discount))``, the horizon on a log scale, up to a million steps."""
    return symlog(1.0 / (1.0 - discounts).clamp(1e-6, 1.0))


class ActionCritic(CriticEnsemble, PreciseBuffers):
    """Ensemble of MLPs from a state and an action to the action's value under every discount.

        value_cg = mlp_c(state, symlog(1 / (1 - discount_g)), action)

    The first layer's product with the state is computed once for all samples and discounts.

    Args:
        discounts: the policy's G discounts.
        clip_actions: bound on an action's numbers, so that their gradient is 0 beyond (0.999 in the
            public AMAGO code); None for none.
        action_gain: factor of the first weights of an action's numbers, for critics that overlook
            an action among many numbers of a state (``docs/value_codecs.md``).
        options: other arguments, see :class:`CriticEnsemble`.

    Shapes:
        state ``[*B, D]``, action ``[*K, *B, G, A]``, or ``[*K, *B, 1, A]`` if it is the same for
        all discounts -> ``[*K, *B, C, G]``, or ``[*K, *B, C, G, O]`` if `num_outputs` is given.
        ``*K`` are any number of dimensions of samples, also none. Other shapes raise ValueError.

    Example:
        >>> critic = ActionCritic(8, action_size=2, discounts=[0.9, 0.99, 0.999])
        >>> critic(torch.zeros(5, 8), torch.zeros(16, 5, 3, 2)).shape
        torch.Size([16, 5, 4, 3])
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        discounts: Sequence[float],
        num_critics: int = 4,
        *,
        clip_actions: float | None = 0.999,
        action_gain: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(state_size + 1 + action_size, 1, num_critics, **options)
        check_counts("Give the policy's discounts.", num_discounts=len(discounts))
        for discount in discounts:
            check_fractions("Give the policy's discounts.", discount=discount)
        if clip_actions is not None:
            check_positive("Use None for actions as they are.", clip_actions=clip_actions)
        check_positive("Use 1 for weights as torch draws them.", action_gain=action_gain)
        self.state_size, self.action_size, self.action_gain = state_size, action_size, action_gain
        self._weigh_actions()
        self.num_discounts, self.clip_actions = len(discounts), clip_actions
        self.register_buffer("discounts", torch.tensor(discounts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._weigh_actions()

    @torch.no_grad()
    def _weigh_actions(self) -> None:
        self.hidden[0].weight[:, -self.action_size :] *= self.action_gain

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        samples, batch, G = self._samples(state, action), state.shape[:-1], self.num_discounts
        state_MD = state.reshape(batch.numel(), self.state_size)
        action_KMGA = action.reshape(samples.numel(), batch.numel(), *action.shape[-2:])
        action_KMGA = action_KMGA.expand(-1, -1, G, -1)
        value_KMCGO = in_chunks(self._values, state_MD, action_KMGA, dim=1)
        return value_KMCGO.reshape(*samples, *batch, self.num_critics, G, *self.event_shape)

    def _values(self, state_MD: Tensor, action_KMGA: Tensor) -> Tensor:
        """Return values ``[K, M, C, G, O]``."""
        first = self.hidden[0]
        state_weight, weight = first.weight.split([self.state_size, 1 + self.action_size], 1)
        C, H = self.num_critics, weight.shape[-1]
        shape_KMG = action_KMGA.shape[:-1]
        action_KMGA = action_KMGA.to(weight.dtype)  # vectors of stored actions are float32
        if self.clip_actions is not None:
            action_KMGA = action_KMGA.clamp(-self.clip_actions, self.clip_actions)
        feature_G1 = discount_feature(self.discounts).unsqueeze(-1).to(action_KMGA.dtype)
        x_KMGI = torch.cat([feature_G1.expand(*shape_KMG, 1), action_KMGA], -1)
        bias_C1H = first.bias.unsqueeze(1)
        of_state_CMH = torch.baddbmm(bias_C1H, state_MD.expand(C, -1, -1), state_weight)
        of_rest_CRH = torch.bmm(x_KMGI.flatten(0, -2).expand(C, -1, -1), weight)
        # Nothing large is changed through a view: autograd would copy its whole gradient for that.
        hidden_CKMGH = self._activate(
            of_rest_CRH.view(C, *shape_KMG, H) + of_state_CMH[:, None, :, None], is_first=True
        )
        value_CRO = self._after_first(hidden_CKMGH.flatten(1, -2))
        return value_CRO.view(C, *shape_KMG, self.event_shape.numel()).permute(1, 2, 0, 3, 4)

    def _samples(self, state: Tensor, action: Tensor) -> torch.Size:
        """Return the dimensions of samples, ``*K``."""
        num_samples = max(action.ndim - state.ndim - 1, 0)
        batches = [(*state.shape[:-1], G, self.action_size) for G in (1, self.num_discounts)]
        if state.shape[-1] != self.state_size or action.shape[num_samples:] not in batches:
            raise ValueError(
                f"this critic reads states [*B, {self.state_size}] and actions [*K, *B, "
                f"{self.num_discounts} or 1, {self.action_size}], samples *K first, got "
                f"{tuple(state.shape)} and {tuple(action.shape)}."
            )
        return action.shape[:num_samples]
