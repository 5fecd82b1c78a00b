"""A policy's step by torch.export: the same actions as the policy's, also after saving."""

from __future__ import annotations

import io

import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tests.toy_env import ACTIONS, Toy
from torchrl_amago.envs import MetaFrozenLake, make_trial_env
from torchrl_amago.modules import SEQ_MODELS, Policy, TransformerEncoder, make_policy

# torch.export's own, while it saves and loads.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CONSTANT = sorted(set(SEQ_MODELS) - {"transformer"})


def build(env, seq_model: str, **options) -> Policy:
    torch.manual_seed(0)
    sizes = {} if seq_model == "identity" else {"d_model": 16, "num_layers": 2}
    options = {"timestep_options": {"hidden_size": 16, "output_size": 16}, **options}
    policy = make_policy(
        env, context_length=12, seq_model=seq_model, seq_model_options=sizes, **options
    )
    with torch.no_grad():
        for p in policy.parameters():  # the past must matter visibly
            p.add_(0.1 * torch.randn_like(p))
    return policy


def assert_same_actions(policy: Policy, act, env, num_steps: int = 20) -> None:
    """Step by step beside the policy, through the ends of trials."""
    step, td, resets = policy.step_module(), env.reset(), 0
    states = step.initial_states(env.batch_size.numel() or 1)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(num_steps):
            action, states = act(step.inputs_of(td), states)
            td = policy(td)
            assert torch.equal(action, td["action"])
            _, td = env.step_and_maybe_reset(td)
            resets += int(td["is_init"].sum())
    assert resets > 0


@pytest.mark.parametrize("seq_model", CONSTANT)
def test_exported_steps_are_the_policys(seq_model):
    env = make_trial_env(MetaFrozenLake(batch_size=(3,), seed=0), horizon=12)
    policy = build(env, seq_model, exploration={}).act_with(0.9)
    step = policy.step_module()
    inputs, states = step.inputs_of(env.reset()), step.initial_states(3)
    file = io.BytesIO()
    torch.export.save(torch.export.export(step, (inputs, states)), file)
    file.seek(0)
    assert_same_actions(policy, torch.export.load(file).module(), env)


def test_any_number_of_rows():
    env, one, five = (
        make_trial_env(MetaFrozenLake(batch_size=(n,), seed=0), horizon=12) for n in (3, 1, 5)
    )
    policy = build(env, "gru")
    step, rows = policy.step_module(), torch.export.Dim("rows")
    inputs, states = step.inputs_of(env.reset()), step.initial_states(3)
    shapes = ({key: {0: rows} for key in inputs}, tuple({0: rows} for _ in states))
    program = torch.export.export(step, (inputs, states), dynamic_shapes=shapes).module()
    for other in (five, one):
        assert_same_actions(policy, program, other)


@pytest.mark.parametrize("kind", ACTIONS)
def test_every_action_space(kind):
    env = make_trial_env(Toy(ACTIONS[kind]), horizon=10)
    policy = build(env, "lstm")
    assert_same_actions(policy, policy.step_module(), env)


def test_masks_and_observations_that_the_actor_reads():
    env = make_trial_env(Toy(ACTIONS["categorical"], mask=True), horizon=10)
    policy = build(env, "gru", action_mask_key="action_mask", actor_obs_keys=["observation"])
    step = policy.step_module()
    assert list(step.keys)[-2:] == ["time_idx", "is_init"]
    inputs = step.inputs_of(env.reset())
    program = torch.export.export(step, (inputs, step.initial_states(len(inputs["is_init"]))))
    assert_same_actions(policy, program.module(), env)


def test_later_changes_of_the_policy_leave_it_alone():
    env = make_trial_env(MetaFrozenLake(batch_size=(3,), seed=0), horizon=12)
    policy = build(env, "mamba")
    step = policy.step_module()
    inputs, states = step.inputs_of(env.reset()), step.initial_states(3)
    before = step(inputs, states)
    for p in policy.parameters():
        p.data.normal_()
    after = step(inputs, states)
    assert torch.equal(before[0], after[0])
    torch.testing.assert_close(before[1], after[1], rtol=0, atol=0)
    assert not any(state.any() for state in states)  # what came in isn't written


def test_policies_that_cannot_be_exported_raise():
    env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=3)
    with pytest.raises(ValueError, match="TransformerEncoder has a RingCache. Use seq_model='gru'"):
        make_policy(env, context_length=12).step_module()
    policy = build(env, "gru")
    policy.encoder.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="Encoder has hooks or a forward of its own"):
        policy.step_module()
    assert issubclass(SEQ_MODELS["transformer"], TransformerEncoder)
