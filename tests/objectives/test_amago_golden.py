"""The whole update against numbers recorded from the public AMAGO code.

Differences by design are supplied by the test: clipping by a norm that counts the frozen critic
copy, targets synchronised before the optimiser step, a filter from other samples than the online
term's. Random draws are the recorded ones.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Bounded, Categorical
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import SoftUpdate

from tests.golden_utils import GoldenCase, assert_close, cases
from tests.golden_weights import actor_weights, critic_weights, encoder_weights, popart_buffers
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import (
    ActionCritic,
    Actor,
    DiscreteCritic,
    GRUEncoder,
    HLGauss,
    MLPTimestepEncoder,
    PopArt,
    TrajectoryEncoder,
    TransformerEncoder,
    TwoHot,
    ValueCodec,
)
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions import make_distribution
from torchrl_amago.objectives import AMAGOLoss, amago, exponential_filter
from torchrl_amago.objectives.functional import expected_value

# One update by hand needs no target updater; TorchRL warns of its absence.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

RECORDED = {"_advantage": "mid/advantage", "_imitation_weight": "mid/filter"}
NETWORKS = ("encoder", "actor", "target_actor", "critic", "target_critic")
UPDATE_CASES = [
    "agents/agent_discrete_train",
    "agents/agent_discrete_eval_nstep3_exp",
    "agents/agent_discrete_bc",
    "agents/agent_discrete_offline_only",
    "agents/agent_discrete_gru",
    "agents/agent_continuous_train",
    "agents/agent_continuous_eval_k_nopopart",
    "agents/multitask_discrete_train",
    "agents/multitask_discrete_online",
    "agents/multitask_continuous_train",
    "agents/multitask_continuous_online_hlgauss",
]
THREE_UPDATES = [
    "agents/agent_discrete_3_updates",
    "agents/agent_continuous_3_updates",
    "agents/multitask_continuous_3_updates",
]


def build_loss(case: GoldenCase, compact: bool = True) -> AMAGOLoss:
    hp = case.hyperparameters
    num_discounts, action_size = len(hp["gammas"]), case["batch/actions"].shape[-1]
    shapes = {
        "observation": (case["batch/obs_observation"].shape[-1],),
        "prev_reward": (1,),
        "prev_action": (action_size,),
    }
    timestep = MLPTimestepEncoder(
        shapes,
        hidden_size=hp["tstep"]["d_hidden"],
        num_layers=hp["tstep"]["n_layers"],
        output_size=hp["tstep"]["d_output"],
    )
    trajectory = build_trajectory_encoder(case)
    size = trajectory.output_size
    spec = Categorical(action_size) if hp["discrete"] else Bounded(-1.0, 1.0, shape=(action_size,))
    distribution = make_distribution(ActionSpace.from_spec(spec))
    codec = build_codec(case)
    takes_actions = hp["cls"] == "MultiTaskAgent" or not hp["discrete"]
    options = {"num_critics": hp["num_critics"], "hidden_size": hp["critic_d_hidden"]}
    if takes_actions:
        bins = codec.event_shape.numel() if codec.event_shape else None
        critic = ActionCritic(size, action_size, hp["gammas"], num_outputs=bins, **options)
    else:
        critic = DiscreteCritic(size, action_size, num_discounts, **options)
    actor = Actor(size, distribution.num_params, num_discounts, hidden_size=hp["actor_d_hidden"])
    policy = SimpleNamespace(
        encoder=TensorDictSequential(timestep, trajectory),
        actor=TensorDictModule(actor, in_keys=["state"], out_keys=["action_params"]),
        distribution=distribution,
        discounts=hp["gammas"],
    )
    critic_keys = ["state", "action_vector"] if takes_actions else ["state"]
    loss = AMAGOLoss(
        policy,
        TensorDictModule(critic, in_keys=critic_keys, out_keys=["action_value"]),
        codec,
        num_target_critics=hp["num_critics_td"],
        n_step=hp["n_step"],
        reward_scale=hp["reward_multiplier"],
        online_coeff=hp["online_coeff"],
        offline_coeff=hp["offline_coeff"],
        critic_coeff=hp["critic_loss_weight"],
        advantage_filter=build_filter(hp),
        num_target_actions=hp["K_c"],
        num_policy_actions=hp["K_a"],
        use_target_actor=hp["use_target_actor"],
        compact=compact,
    )
    load_weights(loss, case, "w/")
    return loss.train(hp["mode"] == "train")


def build_filter(hp: dict):
    if hp["fake_filter"]:
        return None
    if hp["fbc_filter_func"] == "binary_filter":
        return "binary"
    highest = hp["head"].get("exp_filter.clip_adv_high")
    return partial(exponential_filter, advantage_range=(None, highest))


def build_codec(case: GoldenCase) -> ValueCodec:
    hp = case.hyperparameters
    num_discounts = len(hp["gammas"])
    popart = PopArt(num_discounts, enabled=hp["popart_enabled"])
    if hp["cls"] == "Agent":
        return popart
    head = {name.rpartition(".")[2]: value for name, value in hp["head"].items()}
    codec = HLGauss if head.get("label_type") == "hlgauss" else TwoHot
    codec = codec(
        num_discounts,
        num_bins=hp["num_bins"],
        min_return=head.get("min_return", -100_000.0),
        max_return=head.get("max_return", 100_000.0),
        symlog=hp["use_symlog"],
        popart=popart,
    )
    assert_close(codec.bins, case["bin_vals"])
    return codec


def build_trajectory_encoder(case: GoldenCase) -> TrajectoryEncoder:
    hp, traj = case.hyperparameters, case.hyperparameters["traj"]
    if hp["encoder"] == "gru":
        return GRUEncoder(
            hp["tstep"]["d_output"],
            d_model=traj["d_output"],
            hidden_size=traj["d_hidden"],
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
    for name, weights in recorded_weights(case, prefix).items():
        flat = getattr(loss, name).flatten_keys(".")
        assert learned(flat) == set(weights), learned(flat) ^ set(weights)
        for entry, value in weights.items():
            flat[entry].data.copy_(value)
    for name, value in popart_buffers(case, f"{prefix}popart.").items():
        popart_of(loss).get_buffer(name).copy_(value)


def learned(flat: TensorDict) -> set[str]:
    """Entries that the reference keeps in its state dict: all but the critics' discounts."""
    return {name for name, _ in flat.items() if not name.endswith("discounts")}


def recorded_weights(case: GoldenCase, prefix: str) -> dict[str, dict[str, torch.Tensor]]:
    weights = {
        "encoder": encoder_weights(case, prefix),
        "actor": actor_weights(case, f"{prefix}actor."),
        "target_actor": actor_weights(case, f"{prefix}target_actor."),
        "critic": critic_weights(case, f"{prefix}critics."),
        "target_critic": critic_weights(case, f"{prefix}target_critics."),
    }
    return {f"{name}_network_params": weights[name] for name in NETWORKS}


def popart_of(loss: AMAGOLoss) -> PopArt:
    return getattr(loss.value_codec, "popart", loss.value_codec)


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
        action=stored_actions(case),
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


def stored_actions(case: GoldenCase) -> torch.Tensor:
    action = case["batch/actions"]
    return action.argmax(-1) if case.hyperparameters["discrete"] else action


def supply_draws(
    monkeypatch, loss: AMAGOLoss, case: GoldenCase, compact: bool = True, prefix: str = ""
) -> None:
    """Let every random draw be the recorded one."""
    key = f"{prefix}rand/critic_subset_idx_0"
    if key not in case:
        return
    mask = make_batch(case)["collector", "mask"]

    def here(x, first):
        """Select the steps that count, from `first` on, of a recorded `[..., B, T + 1, ...]`."""
        x = x[:, :, first : first + mask.shape[1]]
        return x[:, mask] if compact else x

    subset = case[key].squeeze(-1)
    subset = subset[mask] if compact else subset
    monkeypatch.setattr(amago, "draw_critic_subset", lambda *args: subset)
    hp, draws = case.hyperparameters, deque()
    num_policy, num_target = hp["K_a"], hp["K_c"]
    names = [name.removeprefix(prefix) for name in case if name.startswith(f"{prefix}rand/")]
    record = {name: case[prefix + name] for name in names}
    if hp["cls"] == "Agent":
        if "rand/normal_eps_0" not in record:
            return
        eps = [record[f"rand/normal_eps_{i}"] for i in range(num_policy + num_target)]
        draws.append(here(torch.stack(eps[:num_policy]), 0))
        draws.append(here(torch.stack(eps[num_policy:]), 1))
        replace_noise(monkeypatch, "standard_normal", draws)
        return
    kind = "onehot_sample" if hp["discrete"] else "action_sample"
    at_next = here(record[f"rand/{kind}_0"], 1)
    if samples_of_its_own(case):
        # We use the online term's samples for V as well.
        name, ours = (
            ("gumbel_noise", "gumbel") if hp["discrete"] else ("normal_eps", "standard_normal")
        )
        eps = torch.stack([record[f"rand/{name}_{i}"] for i in range(num_policy)])
        replace_noise(monkeypatch, ours, deque([here(eps, 0)]))
        weight = case[f"{prefix}mid/filter"].squeeze(-1)[:, : mask.shape[1]]
        weight = weight[mask] if compact else weight
        monkeypatch.setattr(loss, "_imitation_weight", lambda advantage: weight)
        draws.append(at_next)
    else:
        draws.extend([here(record[f"rand/{kind}_1"], 0), at_next])
    replace_samples(monkeypatch, loss, draws)


def samples_of_its_own(case: GoldenCase) -> bool:
    """True if the reference draws other actions for V than for the online term."""
    return (
        case.hyperparameters["cls"] == "MultiTaskAgent" and case.hyperparameters["online_coeff"] > 0
    )


def replace_noise(monkeypatch, name: str, draws: deque) -> None:
    original = getattr(noise, name)

    def recorded(shape, like):
        # The estimate of the entropy draws a single sample of its own.
        if draws and shape == draws[0].shape:
            return draws.popleft()
        return original(shape, like)

    monkeypatch.setattr(noise, name, recorded)


def replace_samples(monkeypatch, loss: AMAGOLoss, draws: deque) -> None:
    vectors = type(loss.distribution(torch.zeros(loss.distribution.num_params)))
    original = vectors.sample

    def recorded(self, sample_shape=()):
        return draws.popleft() if len(sample_shape) else original(self, sample_shape)

    monkeypatch.setattr(vectors, "sample", recorded)


def supply_frozen_critics(monkeypatch, loss: AMAGOLoss, case: GoldenCase) -> None:
    """The copy of the critics that values the policy's actions, where it isn't a copy."""
    if case.hyperparameters["maximized_critics"] == "copy":
        return
    weights = critic_weights(case, "w/maximized_critics.")
    frozen = loss.critic_network_params.data.clone().flatten_keys(".")
    for name, value in weights.items():
        frozen[name].copy_(value)
    frozen = frozen.unflatten_keys(".")
    monkeypatch.setattr(loss, "_frozen", lambda params: frozen)


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
    supply_draws(monkeypatch, loss, case, compact)
    supply_frozen_critics(monkeypatch, loss, case)
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
        assert_close(popart_of(loss).get_buffer(name), value, msg=name)
    after = encoder_weights(case, "after_forward/")
    buffers = loss.encoder_network_params.flatten_keys(".")
    assert bool(after) == (case.hyperparameters["mode"] == "train")
    for name, value in after.items():
        assert_close(buffers[name], value, msg=name)


@pytest.mark.parametrize("case", cases(*UPDATE_CASES), ids=str)
def test_intermediate_values(case, monkeypatch):
    """TD targets, states and unreduced losses, on real steps."""
    loss = build_loss(case, compact=False)
    loss.reduction = "none"
    supply_draws(monkeypatch, loss, case, compact=False)
    supply_frozen_critics(monkeypatch, loss, case)
    seen = {}

    def spy(name):
        original = getattr(loss, name)

        def wrapper(*args, **kwargs):
            seen[name] = original(*args, **kwargs)
            return seen[name]

        monkeypatch.setattr(loss, name, wrapper)

    for name in ("_encode", "_td_target", "_online_values", *RECORDED):
        spy(name)
    batch = make_batch(case)
    out = loss(batch)
    mask = batch["collector", "mask"]
    states = torch.cat([mask[:, :1], mask], 1)
    assert_close(seen["_encode"][states], case["mid/s_rep"][states])
    assert_close(out["loss_actor"][mask], case["mid/actor_loss_unmasked"].squeeze(-1)[mask])
    if loss.uses_critic:
        assert_close(seen["_td_target"][mask], case["mid/td_target"].squeeze(2, -1)[mask])
        for name in ("_advantage", "_imitation_weight"):
            if name == "_advantage" and samples_of_its_own(case):
                continue
            expected = case[RECORDED[name]].squeeze(-1)[:, : mask.shape[1]]
            # An advantage is a small difference of large values: its noise is theirs.
            scale = loss.value_codec.decode(seen["_online_values"][0].detach()).abs().max()
            assert_close(seen[name][mask], expected[mask], scale=scale, msg=name)
    else:
        assert "_td_target" not in seen


DISCRETE = [name for name in UPDATE_CASES + THREE_UPDATES if "agent_discrete" in name]


@pytest.mark.parametrize("case", cases(*DISCRETE), ids=str)
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
            if ours.endswith("_std"):
                # The reference estimates the spread of the population behind the critics.
                expected = expected * (1.0 - 1.0 / case.hyperparameters["num_critics"]) ** 0.5
            assert_close(out[ours][mask], expected[mask], msg=ours, scale=scale)
            compared += 1
    assert compared >= 5


class FrozenCopy:
    """The reference's frozen copy of the critics, which values the policy's actions.

    It is synchronised with the targets, before the optimiser step, and so lags one step behind.
    """

    def __init__(self, loss: AMAGOLoss, monkeypatch) -> None:
        self.loss = loss
        self.synchronise()
        monkeypatch.setattr(loss, "_frozen", lambda params: self.params)
        online_values = loss._online_values

        def with_lagging_critics(inputs, action, policy):
            prediction, value = online_values(inputs, action, policy)
            if not loss.takes_actions:
                listed = loss._predict(self.params, inputs["state"].detach())
                value = expected_value(loss.value_codec.raw_value(listed), policy.probs)
            return prediction, value

        monkeypatch.setattr(loss, "_online_values", with_lagging_critics)

    def synchronise(self) -> None:
        self.params = self.loss.critic_network_params.data.clone()


@pytest.mark.parametrize("case", cases(*THREE_UPDATES), ids=str)
def test_three_updates(case, monkeypatch):
    loss = build_loss(case)
    target_update = SoftUpdate(loss, tau=case.hyperparameters["tau"])
    load_weights(loss, case, "w/")  # SoftUpdate starts by copying the online weights
    frozen = FrozenCopy(loss, monkeypatch)
    params = [p for p in loss.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-3)
    batch = make_batch(case)
    for step in range(3):
        with monkeypatch.context() as patch:
            supply_draws(patch, loss, case, prefix=f"step{step}/")
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
    for part, weights in recorded_weights(case, prefix).items():
        params = getattr(loss, part).flatten_keys(".")
        assert weights
        for name, value in weights.items():
            # AdamW turns a rounding difference of a gradient near 0 into a step of up to lr.
            torch.testing.assert_close(params[name].data, value, rtol=1e-4, atol=1e-4)
    for name, value in popart_buffers(case, f"{prefix}popart.").items():
        assert_close(popart_of(loss).get_buffer(name), value, msg=name)


@pytest.mark.parametrize("case", cases(*[n for n in UPDATE_CASES if "multitask" in n]), ids=str)
def test_advantage_from_recorded_samples(case, monkeypatch):
    """AMAGO-2's filter, also if the reference draws other actions for it than online."""
    loss = build_loss(case, compact=False)
    hp, batch = case.hyperparameters, make_batch(case)
    kind = "onehot_sample" if hp["discrete"] else "action_sample"
    steps = batch.shape[1]
    replace_samples(monkeypatch, loss, deque([case[f"rand/{kind}_1"][:, :, :steps]]))
    loss.online_coeff = 0.0
    if loss.training:
        # The recorded states follow an update of the inputs' statistics; estimates make none.
        with set_recurrent_mode(True):
            loss._encode_states(loss._read(batch, compact=False))
    out = loss.estimates(batch, filter_space="raw")
    mask = batch["collector", "mask"]
    expected = case["mid/advantage"].squeeze(-1)[:, :steps]
    scale = out["q_value"].abs().max()
    assert_close(out["advantage"][mask], expected[mask], scale=scale)
    assert_close(out["filter"][mask], case["mid/filter"].squeeze(-1)[:, :steps][mask])
