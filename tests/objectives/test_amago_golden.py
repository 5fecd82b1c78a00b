"""The whole update against numbers recorded from the public AMAGO code.

Where we differ on purpose, the test supplies the reference's choice: recorded critic subsets, clipping
by a norm that counts the frozen critic copy, targets synchronised before the optimiser step.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.objectives import SoftUpdate

from tests.golden_utils import GoldenCase, assert_close, cases
from tests.golden_weights import actor_weights, critic_weights, encoder_weights, popart_buffers
from torchrl_amago.modules import (
    Actor,
    DiscreteCritic,
    GRUEncoder,
    MLPTimestepEncoder,
    TrajectoryEncoder,
    TransformerEncoder,
)
from torchrl_amago.objectives import AMAGOLoss, amago

# One update by hand needs no target updater; TorchRL warns of its absence.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

FILTERS = {"binary_filter": "binary", "exp_filter": "exponential"}
UPDATE_CASES = [
    "agents/agent_discrete_train",
    "agents/agent_discrete_eval_nstep3_exp",
    "agents/agent_discrete_bc",
    "agents/agent_discrete_offline_only",
    "agents/agent_discrete_gru",
]


def build_loss(case: GoldenCase, compact: bool = True) -> AMAGOLoss:
    hp = case.hyperparameters
    num_discounts, num_actions = len(hp["gammas"]), case["batch/actions"].shape[-1]
    shapes = {
        "observation": (case["batch/obs_observation"].shape[-1],),
        "prev_reward": (1,),
        "prev_action": (num_actions,),
    }
    timestep = MLPTimestepEncoder(
        shapes,
        hidden_size=hp["tstep"]["d_hidden"],
        num_layers=hp["tstep"]["n_layers"],
        output_size=hp["tstep"]["d_output"],
    )
    trajectory = build_trajectory_encoder(case)
    size = trajectory.output_size
    actor = Actor(size, num_actions, num_discounts, hidden_size=hp["actor_d_hidden"])
    critic = DiscreteCritic(
        size, num_actions, num_discounts, hp["num_critics"], hidden_size=hp["critic_d_hidden"]
    )
    loss = AMAGOLoss(
        TensorDictSequential(timestep, trajectory),
        TensorDictModule(actor, in_keys=["state"], out_keys=["action_params"]),
        TensorDictModule(critic, in_keys=["state"], out_keys=["action_value"]),
        discounts=hp["gammas"],
        num_target_critics=hp["num_critics_td"],
        n_step=hp["n_step"],
        reward_scale=hp["reward_multiplier"],
        online_coeff=hp["online_coeff"],
        offline_coeff=hp["offline_coeff"],
        critic_coeff=hp["critic_loss_weight"],
        advantage_filter=None if hp["fake_filter"] else FILTERS[hp["fbc_filter_func"]],
        use_target_actor=hp["use_target_actor"],
        compact=compact,
    )
    load_weights(loss, case, "w/")
    return loss.train(hp["mode"] == "train")


def build_trajectory_encoder(case: GoldenCase) -> TrajectoryEncoder:
    hp, traj = case.hyperparameters, case.hyperparameters["traj"]
    if hp["encoder"] == "gru":
        return GRUEncoder(
            hp["tstep"]["d_output"],
            d_model=traj["d_output"],
            d_hidden=traj["d_hidden"],
            num_layers=traj["n_layers"],
        )
    return TransformerEncoder(
        hp["tstep"]["d_output"],
        context_length=hp["max_seq_len"],
        d_model=traj["d_model"],
        num_heads=traj["n_heads"],
        d_ff=traj["d_ff"],
        num_layers=traj["n_layers"],
        dropout_ff=0.0,
        dropout_emb=0.0,
    )


def load_weights(loss: AMAGOLoss, case: GoldenCase, prefix: str) -> None:
    def copy(params, weights):
        flat = params.flatten_keys(".")
        assert set(flat.keys()) == set(weights), set(flat.keys()) ^ set(weights)
        for name, value in weights.items():
            flat[name].data.copy_(value)

    copy(loss.encoder_network_params, encoder_weights(case, prefix))
    copy(loss.actor_network_params, actor_weights(case, f"{prefix}actor."))
    copy(loss.target_actor_network_params, actor_weights(case, f"{prefix}target_actor."))
    copy(loss.critic_network_params, critic_weights(case, f"{prefix}critics."))
    copy(loss.target_critic_network_params, critic_weights(case, f"{prefix}target_critics."))
    for name, value in popart_buffers(case, f"{prefix}popart.").items():
        loss.value_codec.get_buffer(name).copy_(value)


def make_batch(case: GoldenCase) -> TensorDict:
    """The recorded batch in our layout: root and next, and a mask in place of a magic number."""
    steps = {
        "observation": case["batch/obs_observation"],
        "prev_reward": case["batch/rl2s"][..., :1],
        "prev_action": case["batch/rl2s"][..., 1:],
        "time_idx": case["batch/time_idxs"],
    }
    lengths = torch.tensor(case.hyperparameters["seq_lengths"])
    B, T = case["batch/rews"].shape[:2]
    return TensorDict(
        **{key: value[:, :-1] for key, value in steps.items()},
        is_init=torch.zeros(B, T, 1, dtype=torch.bool),
        action=case["batch/actions"].argmax(-1),
        next=TensorDict(
            **{key: value[:, 1:] for key, value in steps.items()},
            is_init=torch.zeros(B, T, 1, dtype=torch.bool),
            reward=case["batch/rews"],
            terminated=case["batch/dones"],
            batch_size=[B, T],
        ),
        collector=TensorDict(mask=torch.arange(T) < lengths[:, None], batch_size=[B, T]),
        batch_size=[B, T],
    )


def supply_subset(monkeypatch, case: GoldenCase, compact: bool = True, prefix: str = "") -> None:
    key = f"{prefix}rand/critic_subset_idx_0"
    if key in case:
        subset = case[key].squeeze(-1)
        if compact:
            subset = subset[make_batch(case)["collector", "mask"]]
        monkeypatch.setattr(amago, "draw_critic_subset", lambda *args: subset)


def grads_of(loss: AMAGOLoss, case: GoldenCase) -> dict[str, torch.Tensor]:
    """Every gradient by our name, `None` (a part the loss leaves alone) as zeros."""
    out = {}
    for part in ("encoder", "actor", "critic"):
        params = getattr(loss, f"{part}_network_params").flatten_keys(".")
        for name, p in params.items():
            if p.requires_grad:
                out[f"{part}.{name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return out


def recorded_grads(case: GoldenCase) -> dict[str, torch.Tensor]:
    parts = {
        "encoder": encoder_weights(case, "grad/"),
        "actor": actor_weights(case, "grad/actor."),
        "critic": critic_weights(case, "grad/critics."),
    }
    return {f"{part}.{n}": v for part, named in parts.items() for n, v in named.items()}


@pytest.mark.parametrize("case", cases(*UPDATE_CASES), ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_losses_gradients_and_statistics(case, compact, monkeypatch):
    loss = build_loss(case, compact)
    supply_subset(monkeypatch, case, compact)
    batch = make_batch(case)
    out = loss(batch)
    weight = case.hyperparameters["critic_loss_weight"]
    assert_close(out["loss_actor"], case["out/actor_loss"])
    assert_close(out["loss_qvalue"], weight * case["out/critic_loss"])
    assert_close(out["loss_actor"] + out["loss_qvalue"], case["out/loss"])
    (out["loss_actor"] + out["loss_qvalue"]).backward()
    grads, expected = grads_of(loss, case), recorded_grads(case)
    missing = {n for n in grads if n not in expected}
    assert not any(grads[n].any() for n in missing), "gradient where the reference has none"
    assert len(expected) > 20
    for name, value in expected.items():
        assert_close(grads[name], value, msg=name)
    for name, value in popart_buffers(case, "after_forward/popart.").items():
        assert_close(loss.value_codec.get_buffer(name), value, msg=name)
    after = encoder_weights(case, "after_forward/")
    buffers = loss.encoder_network_params.flatten_keys(".")
    assert bool(after) == (case.hyperparameters["mode"] == "train")
    for name, value in after.items():
        assert_close(buffers[name], value, msg=name)


@pytest.mark.parametrize("case", cases(*UPDATE_CASES), ids=str)
def test_intermediate_values(case, monkeypatch):
    """TD targets, states and unreduced losses, on real steps."""
    loss = build_loss(case, compact=False)
    supply_subset(monkeypatch, case, compact=False)
    seen = {}

    def spy(name):
        original = getattr(loss, name)

        def wrapper(*args, **kwargs):
            seen[name] = original(*args, **kwargs)
            return seen[name]

        monkeypatch.setattr(loss, name, wrapper)

    for name in ("_encode", "_td_target", "_imitation_weight", "_advantage", "_actor_term"):
        spy(name)
    batch = make_batch(case)
    loss(batch)
    mask = batch["collector", "mask"]
    states = torch.cat([mask[:, :1], mask], 1)
    assert_close(seen["_encode"][states], case["mid/s_rep"][states])
    assert_close(seen["_actor_term"][mask], case["mid/actor_loss_unmasked"].squeeze(-1)[mask])
    if loss.uses_critic:
        assert_close(seen["_td_target"][mask], case["mid/td_target"].squeeze(2, -1)[mask])
        assert_close(seen["_advantage"][mask], case["mid/advantage"].squeeze(-1)[mask])
        assert_close(seen["_imitation_weight"][mask], case["mid/filter"].squeeze(-1)[mask])
    else:
        assert "_td_target" not in seen


@pytest.mark.parametrize("case", cases(*UPDATE_CASES), ids=str)
def test_estimates(case):
    loss = build_loss(case).eval()
    batch = make_batch(case)
    out = loss.estimates(batch, filter_space="normalized")
    mask = batch["collector", "mask"]
    names = {
        "q_value": "q_sa",
        "value": "v_s",
        "advantage": "advantage",
        "q_value_std": "q_sa_std",
        "value_std": "v_s_std",
    }
    if not case.hyperparameters["fake_filter"]:
        names["filter"] = "filter_weights"
    compared = 0
    for ours, theirs in names.items():
        if f"eval/get_values/{theirs}" in case:
            expected = case[f"eval/get_values/{theirs}"].squeeze(-1)
            # An advantage is a small difference of large values: its noise is theirs.
            scale = case["eval/get_values/q_sa"].abs().max() if ours == "advantage" else None
            assert_close(out[ours][mask], expected[mask], msg=ours, scale=scale)
            compared += 1
    assert compared >= 5


class FrozenCopy:
    """The reference's frozen copy of the critics, which values the policy's actions.

    It is synchronised with the targets, before the optimiser step, and so lags one step behind.
    """

    def __init__(self, loss: AMAGOLoss, monkeypatch) -> None:
        self.loss, self.expected, self.states = loss, amago.expected_value, None
        self.synchronise()
        action_values = loss._action_values

        def remember_states(state, params):
            if params is loss.critic_network_params:
                self.states = state.detach()
            return action_values(state, params)

        def with_lagging_critic(q, probs):
            if q.requires_grad or not probs.requires_grad:
                return self.expected(q, probs)
            return self.expected(action_values(self.states, self.params), probs)

        monkeypatch.setattr(loss, "_action_values", remember_states)
        monkeypatch.setattr(amago, "expected_value", with_lagging_critic)

    def synchronise(self) -> None:
        self.params = self.loss.critic_network_params.data.clone()


@pytest.mark.parametrize("case", cases("agents/agent_discrete_3_updates"), ids=str)
def test_three_updates(case, monkeypatch):
    loss = build_loss(case)
    target_update = SoftUpdate(loss, tau=case.hyperparameters["tau"])
    load_weights(loss, case, "w/")  # SoftUpdate starts by copying the online weights
    frozen = FrozenCopy(loss, monkeypatch)
    params = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-3)
    batch = make_batch(case)
    for step in range(3):
        supply_subset(monkeypatch, case, prefix=f"step{step}/")
        optimizer.zero_grad()
        out = loss(batch)
        total = out["loss_actor"] + out["loss_qvalue"]
        total.backward()
        assert_close(out["loss_actor"], case[f"step{step}/out/actor_loss"])
        assert_close(total, case[f"step{step}/out/loss"])
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        assert_close(norm, case[f"step{step}/out/grad_norm_trainable"])
        recorded_norm = case[f"step{step}/out/grad_norm_all_parameters"]
        for p in params:
            p.grad.mul_((1.0 / (recorded_norm + 1e-6)).clamp(max=1.0))
        target_update.step()
        frozen.synchronise()
        optimizer.step()
        if step in (0, 2):
            _compare_all_weights(loss, case, f"after_step{step}/")


def _compare_all_weights(loss: AMAGOLoss, case: GoldenCase, prefix: str) -> None:
    parts = {
        "encoder_network_params": encoder_weights(case, prefix),
        "actor_network_params": actor_weights(case, f"{prefix}actor."),
        "target_actor_network_params": actor_weights(case, f"{prefix}target_actor."),
        "critic_network_params": critic_weights(case, f"{prefix}critics."),
        "target_critic_network_params": critic_weights(case, f"{prefix}target_critics."),
    }
    for part, weights in parts.items():
        params = getattr(loss, part).flatten_keys(".")
        assert weights
        for name, value in weights.items():
            # AdamW turns a rounding difference of a gradient near 0 into a step of up to lr.
            torch.testing.assert_close(params[name].data, value, rtol=1e-4, atol=1e-4)
    for name, value in popart_buffers(case, f"{prefix}popart.").items():
        assert_close(loss.value_codec.get_buffer(name), value, msg=name)
