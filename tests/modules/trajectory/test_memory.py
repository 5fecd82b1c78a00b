"""Memory is right: step by step equals the whole window, wherever and however rollouts run."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector, MultiCollector
from torchrl.envs import InitTracker, ParallelEnv, SerialEnv, TransformedEnv

from tests.modules.trajectory.helpers import (
    StaggeredEnv,
    assert_padding_has_no_effect,
    assert_remembered,
    batched_env,
    make_policy,
    random_trials,
    sequence_states,
    single_env,
    take_steps,
    whole_window,
)
from tests.processes import fork_workers
from torchrl_amago.modules.trajectory import IdentityEncoder, TransformerEncoder


def rollout(env, policy, steps=17, **options):
    return env.rollout(steps, policy, break_when_any_done=False, **options)


def small_encoder(context_length, **options):
    return TransformerEncoder(
        4, context_length=context_length, d_model=8, num_heads=2, num_layers=2, **options
    )


@given(
    batch=st.integers(1, 5),
    steps=st.integers(1, 40),
    context_length=st.sampled_from([1, 2, 7, 64]),
    reset_fraction=st.sampled_from([0.0, 0.05, 0.4]),
    positions=st.sampled_from(["fixed", "rotary"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
@torch.no_grad()
def test_steps_equal_the_window(batch, steps, context_length, reset_fraction, positions, seed):
    torch.manual_seed(seed)
    encoder = small_encoder(context_length, window=context_length, positions=positions).eval()
    trials = random_trials(batch, steps, reset_fraction)
    states, _ = take_steps(encoder, *trials)
    expected = sequence_states(encoder, *trials)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_past_the_ring_several_times_round():
    encoder = small_encoder(5, window=5).eval()
    trials = random_trials(3, 300, reset_fraction=0.02)
    states, _ = take_steps(encoder, *trials)
    torch.testing.assert_close(states, sequence_states(encoder, *trials), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_past_the_window_is_not_a_fresh_window():
    """In a rolled cache deeper layers keep older information, as documented."""
    encoder = small_encoder(4).eval()
    x, time_idx, is_init = random_trials(2, 12, reset_fraction=0.0)
    states, _ = take_steps(encoder, x, time_idx, is_init)
    fresh = sequence_states(encoder, x[:, -4:], time_idx[:, -4:], is_init[:, -4:])
    assert (states[:, -1] - fresh[:, -1]).abs().max() > 1e-3


@torch.no_grad()
def test_bfloat16():
    encoder = small_encoder(8, window=8).eval().bfloat16()
    x, time_idx, is_init = random_trials(3, 12)
    x = x.bfloat16()
    states, _ = take_steps(encoder, x, time_idx, is_init)
    assert states.dtype == torch.bfloat16
    expected = sequence_states(encoder, x, time_idx, is_init)
    torch.testing.assert_close(states, expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(1.5), lambda p: p.detach().mul_(1.5)])
@torch.no_grad()
def test_steps_see_new_weights_however_written(write):
    encoder = small_encoder(8).eval()
    x, time_idx, is_init = random_trials(2, 1)
    take_steps(encoder, x, time_idx, is_init)
    for p in encoder.parameters():
        write(p)
    states, _ = take_steps(encoder, x, time_idx, is_init)
    expected = sequence_states(encoder, x, time_idx, is_init)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["keep", "restart"])
def test_weight_update_in_mid_trial(mode):
    encoder = small_encoder(8, on_weight_update=mode).eval()
    x, time_idx, is_init = random_trials(2, 6, reset_fraction=0.0)
    _, stream = take_steps(encoder, x[:, :3], time_idx[:, :3], is_init[:, :3])
    for p in encoder.parameters():
        p.data.mul_(1.2)
    states, again = take_steps(encoder, x[:, 3:], time_idx[:, 3:], is_init[:, 3:], stream)
    assert torch.equal(again, stream)
    fresh = sequence_states(encoder, x[:, 3:], time_idx[:, 3:], is_init[:, 3:])
    equal = torch.allclose(states, fresh, rtol=1e-5, atol=1e-5)
    assert equal == (mode == "restart")


def test_restart_without_parameters():
    encoder = IdentityEncoder(4, on_weight_update="restart")
    states, _ = take_steps(encoder, *random_trials(2, 3))
    assert states.shape == (2, 3, 4)


# --- rollouts ---


def test_batched_env():
    policy = make_policy()
    data = rollout(batched_env((3, 5, 17, 4)), policy)
    assert data["is_init"].sum(1).flatten().tolist() == [6, 4, 1, 5]
    assert_remembered(policy, data)


def test_two_batch_dimensions():
    encoder = small_encoder(8, window=8).eval()
    x, time_idx, is_init = random_trials(6, 9)
    expected, _ = take_steps(encoder, x, time_idx, is_init)
    stream = None
    for t in range(9):
        td = TensorDict(
            timestep=x[:, t].view(2, 3, 4),
            time_idx=time_idx[:, t].view(2, 3, 1),
            is_init=is_init[:, t].view(2, 3, 1),
            batch_size=[2, 3],
        )
        if stream is not None:
            td["_stream"] = stream
        encoder(td)
        stream = td["_stream"]
        assert stream.shape == (2, 3, 1)
        torch.testing.assert_close(td["state"].view(6, 8), expected[:, t])


def test_evaluation_in_between_with_the_same_policy_and_batch_shape():
    policy = make_policy()
    env, evaluation = batched_env((4, 7)), batched_env((7, 3))
    steps, td = [], env.reset()
    for t in range(12):
        td = policy(td)
        td, following = env.step_and_maybe_reset(td)
        steps.append(td)
        td = following
        if t % 3 == 1:
            assert_remembered(policy, rollout(evaluation, policy, 5))
    assert_remembered(policy, torch.stack(steps, 1))


def test_interleaved_rollouts():
    policy = make_policy()
    envs = [batched_env((4, 7)), batched_env((5, 3)), batched_env((9,))]
    tds, steps = [env.reset() for env in envs], [[], [], []]
    for _ in range(9):
        for i, env in enumerate(envs):
            done, tds[i] = env.step_and_maybe_reset(policy(tds[i]))
            steps[i].append(done)
    for taken in steps:
        assert_remembered(policy, torch.stack(taken, 1))


def test_serial_env():
    policy = make_policy()
    env = SerialEnv(2, [partial(single_env, n) for n in (3, 5)])
    assert_remembered(policy, rollout(env, policy))
    env.close()


def test_serial_env_with_tracker_outside():
    policy = make_policy()
    env = TransformedEnv(SerialEnv(2, [partial(StaggeredEnv, (n,)) for n in (3, 5)]), InitTracker())
    assert_remembered(policy, rollout(env, policy))
    env.close()


@pytest.mark.slow
def test_parallel_env():
    policy = make_policy()
    workers = ParallelEnv(2, [partial(single_env, n) for n in (3, 5)], mp_start_method="forkserver")
    env = TransformedEnv(workers)
    try:
        assert_remembered(policy, rollout(env, policy))
        # On its own it drops the stream between steps, which must not be silent.
        with pytest.warns(UserWarning, match="put TransformedEnv around a ParallelEnv"):
            rollout(workers, policy, 2)
    finally:
        env.close()


def test_collector_over_several_batches():
    policy = make_policy()
    collector = Collector(batched_env((3, 5, 8)), policy, frames_per_batch=18, total_frames=54)
    data = torch.cat(list(collector), 1)
    assert data.shape == (3, 18)
    collector.shutdown()
    assert_remembered(policy, data)


@pytest.mark.slow
def test_multi_collector(monkeypatch):
    fork_workers(monkeypatch)
    policy = make_policy()
    collector = MultiCollector(
        [partial(batched_env, (3, 5, 8))], policy, frames_per_batch=18, total_frames=36, sync=True
    )
    try:
        data = torch.cat([batch.reshape(3, 6).clone() for batch in collector], 1)
    finally:
        collector.shutdown()
    assert_remembered(policy, data)


# --- copies ---


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_start_without_memory_and_leave_the_original_alone(how):
    policy, env = make_policy(), batched_env((9, 5))
    td, steps = env.reset(), []
    for _ in range(3):
        done, td = env.step_and_maybe_reset(policy(td))
        steps.append(done)
    if how == "deepcopy":
        other = copy.deepcopy(policy)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(policy))  # noqa: S301
    else:
        file = io.BytesIO()
        torch.save(policy, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert len(other[1]._streams) == 0
    assert len(policy[1]._streams) == 1
    assert_remembered(other, rollout(env, other, 8))
    # The copy warns of a rollout of the original instead of mixing memories up.
    with pytest.warns(UserWarning, match="is not in this module"):
        other(td.clone())
    for _ in range(6):
        done, td = env.step_and_maybe_reset(policy(td))
        steps.append(done)
    assert_remembered(policy, torch.stack(steps, 1))


def test_nothing_of_the_memory_is_in_the_weights():
    policy = make_policy()
    before = set(policy.state_dict())
    rollout(batched_env((3, 4)), policy, 3)
    assert set(policy.state_dict()) == before
    weights = TensorDict.from_module(policy)
    assert not [key for key in weights.keys(True, True) if "stream" in str(key)]


# --- leaks ---


@torch.no_grad()
def test_nan_of_all_rows_is_gone_after_all_start_anew():
    encoder = small_encoder(6).eval()
    x, time_idx, is_init = random_trials(2, 4, reset_fraction=0.0)
    expected, stream = take_steps(encoder, x, time_idx, is_init)
    _, stream = take_steps(encoder, x * torch.nan, time_idx, is_init, stream)
    states, _ = take_steps(encoder, x, time_idx, is_init, stream)
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize("train", [False, True])
def test_nan_in_padding_has_no_effect(train):
    encoder = small_encoder(10, dropout_emb=0.0, dropout_ff=0.0).train(train)
    assert_padding_has_no_effect(encoder)


# --- the table of streams ---


def test_number_of_streams_is_bounded():
    policy = make_policy(max_streams=3)
    env = batched_env((4, 7))
    for _ in range(6):
        rollout(env, policy, 2)
    assert len(policy[1]._streams) == 3


def test_an_evicted_stream_is_warned_of():
    policy = make_policy(max_streams=1)
    env = batched_env((9, 9))
    td = env.step_mdp(env.step(policy(env.reset())))
    rollout(env, policy, 2)
    with pytest.warns(UserWarning, match="raise max_streams, now 1"):
        policy(td)


def test_a_lost_stream_is_warned_of():
    encoder = small_encoder(4)
    td = TensorDict(
        timestep=torch.zeros(2, 4),
        time_idx=torch.tensor([[0], [1]]),
        is_init=torch.zeros(2, 1, dtype=torch.bool),
        batch_size=[2],
    )
    with pytest.warns(UserWarning, match="'_stream' was lost between steps"):
        encoder(td.clone())
    td["time_idx"].zero_()
    encoder(td)  # made-up input, as collectors probe a policy with


def test_rows_of_two_rollouts_raise():
    policy, env = make_policy(), batched_env((9, 9))
    one, two = policy(env.reset()), policy(env.reset())
    mixed = torch.stack([one[0], two[1]])
    with pytest.raises(ValueError, match="all rows of a step must belong to one rollout"):
        policy(mixed.clone())
    one["_stream"][1] = 0  # just reset
    mixed = torch.stack([one[0], one[1], two[1]])
    with pytest.raises(ValueError, match="all rows of a step must belong to one rollout"):
        policy(mixed)


def test_change_of_batch_size():
    policy, env = make_policy(), batched_env((9, 9, 9))
    td = env.step_mdp(env.step(policy(env.reset())))
    with pytest.raises(
        ValueError, match="batch size must not change between trials.*3 rows, got 2"
    ):
        policy(td[:2])
    start = td[:2].clone()
    start["is_init"].fill_(True)
    stream = policy(start)["_stream"]
    assert (stream != td["_stream"][:2]).all()  # a new rollout; the old one is still there
    policy(td)


def test_reset_streams():
    policy = make_policy()
    rollout(batched_env((4,)), policy, 2)
    policy[1].reset_streams()
    assert len(policy[1]._streams) == 0


def test_memory_made_in_inference_mode_serves_outside():
    policy, env = make_policy(), batched_env((9, 5))
    with torch.inference_mode():
        td = policy(env.reset()).clone()
    td = TensorDict({k: v.clone() for k, v in td.items()}, td.batch_size)
    following = policy(env.step_mdp(env.step(td.clone())))
    data = torch.stack([td, following.select(*td.keys())], 1)
    torch.testing.assert_close(data["state"], whole_window(policy, data), rtol=1e-5, atol=1e-5)
