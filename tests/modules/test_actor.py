"""Actor heads: inputs besides the state, forbidden actions, and the residual form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.nn import functional as F

from torchrl_amago.modules.actor import Actor, ActorHead, ActorModule, ResidualActor, forbid

D, P, G = 6, 5, 3
ACTORS = {
    "mlp": lambda **options: Actor(D, P, G, hidden_size=8, **options),
    "residual": lambda **options: ResidualActor(
        D, P, G, feature_size=8, residual_size=12, **options
    ),
}


@pytest.fixture(params=ACTORS)
def make_actor(request):
    return ACTORS[request.param]


def float64_residual(actor: ResidualActor, x: torch.Tensor) -> torch.Tensor:
    """By hand, with two layer norms in each block."""
    weights = {name: p.double() for name, p in actor.named_parameters()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = linear(F.leaky_relu(linear(x.double(), "embed.hidden.0")), "embed.out")
    for block in ("blocks.0", "blocks.1"):
        inner = F.leaky_relu(norm(linear(x, f"{block}.0"), f"{block}.1"))
        x = x + norm(linear(inner, f"{block}.3"), f"{block}.4")
    return linear(x, "out").unflatten(-1, (G, P))


def test_residual_actor_by_hand():
    actor, x = ACTORS["residual"](), torch.randn(4, 7, D)
    for p in actor.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # norms' gains and biases too
    torch.testing.assert_close(actor(x).double(), float64_residual(actor, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_shapes(make_actor, batch):
    assert make_actor()(torch.randn(*batch, D)).shape == (*batch, G, P)
    actor = make_actor(observation_sizes=[4, 1], masks_actions=True)
    observations = torch.randn(*batch, 2, 2), torch.randn(batch)
    mask = torch.ones(*batch, P, dtype=torch.bool)
    assert actor(torch.randn(*batch, D), *observations, mask).shape == (*batch, G, P)


def test_outputs_are_grouped_by_discount(make_actor):
    """A bias on one discount's parameters moves those alone."""
    actor, x = make_actor(), torch.randn(2, D)
    out = actor.mlp.out if isinstance(actor, Actor) else actor.out
    before = actor(x)
    out.bias.data.view(G, P)[1] += 1.0
    difference = torch.zeros(2, G, P)
    difference[:, 1] = 1.0
    torch.testing.assert_close(actor(x) - before, difference)


def test_observations_join_the_state(make_actor):
    """As if the state held them, whatever their shape and dtype."""
    actor = make_actor(observation_sizes=[6, 2])
    state = torch.randn(3, 4, D)
    image, numbers = torch.randint(0, 255, (3, 4, 2, 3), dtype=torch.uint8), torch.randn(3, 4, 2)
    wide = torch.cat([state, image.flatten(2).float(), numbers], -1)
    torch.testing.assert_close(
        actor(state, image, numbers), actor.head(wide).unflatten(-1, (G, P)), rtol=0, atol=0
    )
    assert not torch.equal(actor(state, image, numbers), actor(state, image, -numbers))


@given(
    batch=st.lists(st.integers(1, 3), max_size=2), allowed=st.integers(1, 2**P - 1), data=st.data()
)
def test_mask(batch, allowed, data):
    """Forbidden parameters are -inf; the others and their gradients are as without a mask."""
    actor = ACTORS[data.draw(st.sampled_from(sorted(ACTORS)))](masks_actions=True)
    mask = torch.tensor([bool(allowed >> i & 1) for i in range(P)]).expand(*batch, P)
    state = torch.randn(*batch, D)
    params, free = actor(state, mask), actor(state, torch.ones_like(mask))
    everywhere = mask.unsqueeze(-2).expand_as(params)
    assert (params[~everywhere] == -torch.inf).all()
    assert torch.equal(params[everywhere], free[everywhere])
    weights = list(actor.parameters())
    log_probs = params.log_softmax(-1)[everywhere]
    assert torch.isfinite(log_probs).all()
    among_allowed = free[..., mask.reshape(-1, P)[0]].log_softmax(-1).flatten()
    for got, expected in zip(
        torch.autograd.grad(log_probs.square().sum(), weights),
        torch.autograd.grad(among_allowed.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_in_a_tensordict_module(make_actor):
    actor = make_actor(observation_sizes=[2], masks_actions=True)
    keys = ["state", ("goal", "xy"), "action_mask"]
    mask = torch.rand(3, 4, P) < 0.5
    mask[..., 0] = True
    td = TensorDict(
        state=torch.randn(3, 4, D),
        goal=TensorDict(xy=torch.randn(3, 4, 2)),
        action_mask=mask,
        batch_size=[3, 4],
    )
    expected = actor(td["state"], td["goal", "xy"], mask)
    for kind in (TensorDictModule, ActorModule):
        module = kind(actor, keys, ["action_params"])
        assert torch.equal(module(td.copy())["action_params"], expected)
        by_keyword = module(state=td["state"], goal_xy=td["goal", "xy"], action_mask=mask)
        assert torch.equal(by_keyword, expected)


def test_a_step_without_numbers_leaves_the_others_alone(make_actor):
    """Padding may hold anything."""
    actor = make_actor(observation_sizes=[2])
    state, observation = torch.randn(4, D), torch.randn(4, 2)
    whole = actor(state, observation)
    state[1], observation[2] = torch.nan, torch.nan
    broken = actor(state, observation)
    assert torch.equal(broken[[0, 3]], whole[[0, 3]])
    assert broken[[1, 2]].isnan().all()


def test_compiles_without_graph_break(make_actor):
    actor = make_actor(observation_sizes=[2], masks_actions=True)
    inputs = torch.randn(4, D), torch.randn(4, 2), torch.arange(P).expand(4, P) > 1
    compiled = torch.compile(actor, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), actor(*inputs))


def test_autocast(make_actor):
    actor = make_actor(observation_sizes=[2], masks_actions=True)
    inputs = torch.randn(9, D), torch.randn(9, 2), torch.arange(P).expand(9, P) > 1
    with torch.autocast("cpu"):
        params = actor(*inputs)
    assert params.dtype == torch.bfloat16
    torch.testing.assert_close(params.float(), actor(*inputs), rtol=2e-2, atol=2e-2)


def test_own_head():
    class Zero(ActorHead):
        def head(self, x):
            return x.new_zeros(*x.shape[:-1], self.output_size)

    actor = Zero(D, P, G, observation_sizes=(2,))
    assert (actor.input_size, actor.output_size) == (D + 2, G * P)
    assert actor(torch.randn(4, D), torch.randn(4, 2)).shape == (4, G, P)
    with pytest.raises(TypeError, match="abstract"):
        ActorHead(D, P, G)


def test_wrong_inputs(make_actor):
    state, mask = torch.randn(4, D), torch.ones(4, P, dtype=torch.bool)
    with pytest.raises(ValueError, match="reads 0 tensors after the state, got 1"):
        make_actor()(state, mask)
    actor = make_actor(observation_sizes=[2], masks_actions=True)
    with pytest.raises(ValueError, match="reads 2 tensors after the state, got 1"):
        actor(state, torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"hold 2 numbers .* got the shape \(4, 3\)"):
        actor(state, torch.randn(4, 3), mask)
    with pytest.raises(ValueError, match=r"a batch of \(4,\), got the shape \(2, 4\)"):
        actor(state, torch.randn(2, 4), mask)
    with pytest.raises(ValueError, match=r"bool of shape \(4, 5\), got torch.float32"):
        actor(state, torch.randn(4, 2), mask.float())
    with pytest.raises(ValueError, match=r"of shape \(4, 5\), got torch.bool of shape \(4, 4\)"):
        actor(state, torch.randn(4, 2), mask[:, 1:])


def test_a_mask_must_allow_something():
    mask = torch.ones(2, 3, P, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(
        ValueError, match="allow at least one action in each row, .* got a row of only"
    ):
        forbid(torch.zeros(2, 3, G, P), mask)


def test_each_part_of_a_mask_must_allow_something():
    params = torch.zeros(1, G, P)
    mask = torch.tensor([[True, True, False, False, False]])
    assert forbid(params, torch.zeros_like(mask), ()).isinf().all()  # bits
    with pytest.raises(ValueError, match="and in each part of an action, got a row of only False"):
        forbid(params, mask, (2, 3))
    mask[0, 4] = True
    assert forbid(params, mask, (2, 3)).isinf().sum() == 2 * G
    actor = Actor(D, P, G, masks_actions=True, mask_parts=(2, 3))
    with pytest.raises(ValueError, match="each part"):
        actor(torch.zeros(1, D), ~mask)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        ResidualActor(D, P, G, num_blocks=0)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        Actor(D, P, G, num_layers=0)
    with pytest.raises(ValueError, match="norm must be one of"):
        ResidualActor(D, P, G, norm="batch")
