"""All recorded agents, loaded whole: every network gives the reference's numbers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from tests.compat.recorded import agent_weights, build_loss, build_policy, inputs_of
from tests.golden_utils import GoldenCase, assert_close, cases
from torchrl_amago.compat import load_amago_weights

AGENTS = pytest.mark.parametrize("case", cases("agents/*"), ids=str)
# One pass by hand needs no target updater; TorchRL warns of its absence.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")


def recorded(case: GoldenCase, name: str) -> torch.Tensor:
    """Return an entry of the first recorded update."""
    return case[name if name in case else f"step0/{name}"]


def is_recorded(case: GoldenCase, name: str) -> bool:
    """False for the critics of behaviour cloning, and the target actor of some agents."""
    return name in case or f"step0/{name}" in case


@AGENTS
def test_the_policy_encodes_and_acts_alike(case):
    policy = build_policy(case)
    load_amago_weights(agent_weights(case), policy)
    inputs = inputs_of(case)
    real = inputs["collector", "mask"]
    policy.train(case.hyperparameters["mode"] == "train")
    with set_recurrent_mode(True):
        out = policy.actor(policy.encoder(inputs.clone()))
    assert_close(out["timestep"][real], recorded(case, "mid/tstep_emb")[real])
    assert_close(out["state"][real], recorded(case, "mid/s_rep")[real])
    assert_close(out["action_params"][real], recorded(case, "mid/actor_dist_params")[real])


@AGENTS
def test_greedy_actions_are_alike(case):
    policy = build_policy(case).eval()
    load_amago_weights(agent_weights(case), policy)
    inputs = inputs_of(case)
    real = inputs["collector", "mask"]
    greedy = set_exploration_type(ExplorationType.DETERMINISTIC)
    with torch.no_grad(), set_recurrent_mode(True), greedy:
        action = policy(inputs)["action"]
    expected = case["eval/greedy_actions"]
    if case.hyperparameters["discrete"]:
        expected = expected.squeeze(-1)
    assert_close(action[real].float(), expected[real].float())


@AGENTS
def test_heads_and_statistics_of_the_loss_are_alike(case):
    policy = build_policy(case)
    loss = build_loss(case, policy)
    load_amago_weights(agent_weights(case), policy, loss)
    state = recorded(case, "mid/s_rep")
    assert is_recorded(case, "mid/actor_dist_params")
    heads = {
        "mid/actor_dist_params": loss.actor_network_params,
        "mid/target_actor_dist_params": loss.target_actor_network_params,
    }
    for name, params in heads.items():
        if not is_recorded(case, name):
            continue
        with params.to_module(loss.actor_network):
            out = loss.actor_network(TensorDict(state=state, batch_size=state.shape[:2]))
        assert_close(out["action_params"], recorded(case, name), msg=name)
    if is_recorded(case, "mid/target_critics_out_0"):
        _compare_critics(loss, case, state)


def _compare_critics(loss, case, state) -> None:
    expected = recorded(case, "mid/target_critics_out_0")
    steps = expected.shape[2]
    raw = _critic_outputs(loss, loss.target_critic_network_params, case, state[:, 1 : steps + 1])
    if loss.takes_actions:
        bins = expected.shape[-1] > 1
        expected = expected if bins else expected.squeeze(-1)
        assert_close(raw.log_softmax(-1) if bins else raw, expected)
        value = loss.value_codec.decode(raw).mean(0)
    else:
        probs = recorded(case, "mid/a_prime")[0, :, 1 : steps + 1]
        raw = (raw * probs.unsqueeze(-3)).sum(-1)
        assert_close(raw, expected[0].squeeze(-1))
        value = loss.value_codec.decode(raw)
    assert_close(value, recorded(case, "mid/q_target_next").squeeze(-1))


def _critic_outputs(loss, params, case, state_BTD) -> torch.Tensor:
    inputs = {"state": state_BTD}
    if loss.takes_actions:
        inputs["action_vector"] = chosen_actions(case)[:, :, 1 : state_BTD.shape[1] + 1]
    with params.to_module(loss.critic_network):
        return loss.critic_network(TensorDict(inputs))["action_value"]


def chosen_actions(case: GoldenCase) -> torch.Tensor:
    """Return the TD target's actions, ``[K, B, T + 1, G, A]``."""
    names = ("mid/a_prime", "rand/onehot_sample_0", "rand/action_sample_0")
    name = next(n for n in names if is_recorded(case, n))
    return recorded(case, name)


@AGENTS
def test_every_weight_is_accounted_for(case):
    policy = build_policy(case)
    loss = build_loss(case, policy)
    weights = agent_weights(case)
    report = load_amago_weights(weights, policy, loss)
    assert report.loaded.keys() | report.unused.keys() == weights.keys()
    assert not report.loaded.keys() & report.unused.keys()
    assert report.unused
    assert all(name.startswith("maximized_critics.") for name in report.unused)
    assert len(set(report.loaded.values())) == len(report.loaded)
    bins = {"value_codec.bins", "value_codec.num_outside"}
    known = {"critic.discounts", "target_critic.discounts"} if loss.takes_actions else set()
    is_amago2 = case.hyperparameters["cls"] == "MultiTaskAgent"
    assert set(report.kept) == known | (bins if is_amago2 else set())
