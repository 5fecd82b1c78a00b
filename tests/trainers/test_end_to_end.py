"""The real parts together: lakes, policies with memory, AMAGOLoss, evaluation, every stop."""

from __future__ import annotations

import random
import shutil
import signal
import time

import gymnasium as gym
import pytest
import torch
from torchrl.envs import GymWrapper

from tests.processes import forked
from tests.trainers.test_amago_resume import assert_same_run, finish, signal_at
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data.collector import TrialCollector
from torchrl_amago.data.mixture import TrialMixture
from torchrl_amago.envs import MetaFrozenLake, make_trial_env
from torchrl_amago.evaluation import HeldOutEvaluator
from torchrl_amago.modules import make_policy
from torchrl_amago.trainers import Intervals, load_policy, make_trainer, read_progress

TOTAL = 14


def lake(rows):
    base = MetaFrozenLake(batch_size=(rows,), max_episode_steps=4)
    return make_trial_env(base, episodes=2)


def cart_poles(rows):
    autoreset = gym.vector.AutoresetMode.DISABLED
    envs = gym.vector.SyncVectorEnv(
        [lambda: gym.make("CartPole-v1", max_episode_steps=4)] * rows, autoreset_mode=autoreset
    )
    base = GymWrapper(envs, categorical_action_encoding=True)
    return make_trial_env(base, episodes=2, repeat="seed")


def make_run(
    run_dir,
    make_env=lake,
    *,
    weights_seed=0,
    total_updates=TOTAL,
    seq_model="transformer",
    loss="amago",
    num_envs=6,
    discounts=(0.9, 0.99),
    seed=3,
    replay=lambda rb: rb,
    loss_options=None,
    **options,
):
    torch.manual_seed(weights_seed)
    env, held_out = make_env(num_envs), make_env(4)
    sizes = {"d_model": 16, **({"num_heads": 2} if seq_model == "transformer" else {})}
    policy = make_policy(
        env,
        context_length=6,  # shorter than the trials: memory rolls over
        seq_model=seq_model,
        seq_model_options={**sizes, **options},
        timestep_options={"hidden_size": 16, "output_size": 16},
        discounts=discounts,
        exploration={"anneal_frames": 500},
    )
    rb = make_trial_buffer(200, slice_length=6, batch_size=4, warn_short=False)
    held_out = HeldOutEvaluator(policy, held_out, seed=7)
    return make_trainer(
        env,
        policy,
        trial_length=8,
        round_steps=3,  # rounds end within trials
        total_updates=total_updates,
        updates_per_round=3,
        run_dir=run_dir,
        replay_buffer=replay(rb),
        learning_rate=1e-3,
        loss=loss,
        loss_options=loss_options,
        critic_options={"hidden_size": 16},
        evaluator=lambda: held_out.evaluate(4),
        intervals=Intervals(log=2, evaluate=5, checkpoint=5),
        warmup_updates=5,
        progress_bar=False,
        seed=seed,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(make_run(tmp_path_factory.mktemp("run") / "whole"))


@pytest.mark.parametrize(
    "stops",
    [
        [(1, signal.SIGINT), (7, signal.SIGTERM), (13, signal.SIGINT)],
        [(1, signal.SIGTERM), (9, signal.SIGINT), (10, signal.SIGHUP), (11, signal.SIGTERM)],
    ],
)
def test_stopped_by_signals(uninterrupted, tmp_path, stops):
    for number, (stop, name) in enumerate(stops):
        trainer = make_run(tmp_path, weights_seed=number).resume(missing_ok=True)
        signal_at(trainer, stop, name)
        is_interrupt = name == signal.SIGINT
        assert trainer.train() == ("interrupted" if is_interrupt else "preempted")
        saved = int(trainer.checkpoints.latest().name[-7:])
        assert saved == (stop // 5 * 5 if is_interrupt else stop)
    assert_same_run(uninterrupted, finish(make_run(tmp_path, weights_seed=9).resume()))


def test_stopped_while_collecting(uninterrupted, tmp_path):
    trainer = make_run(tmp_path)
    update = trainer.monitor.update

    def preempt():
        update()
        if trainer.counts.updates == 6:
            signal.raise_signal(signal.SIGTERM)

    trainer.monitor.update = preempt
    assert trainer.train() == "preempted"
    assert trainer.counts.updates == 6
    assert_same_run(uninterrupted, finish(make_run(tmp_path, weights_seed=9).resume()))


def test_checkpoints_leave_the_run_alone(uninterrupted, tmp_path):
    trainer = make_run(tmp_path)
    trainer.intervals = Intervals(log=2, evaluate=5, checkpoint=1000)
    a, b = uninterrupted[0], finish(trainer)[0]
    # Evaluations have rollouts too, whose memories are not saved.
    saved = trainer.components["rollouts"].state_dict()["collector"]["in_progress"]
    assert len(saved["memories"]["0"]["streams"]) == 1
    named = [name for name in a if name.startswith(("loss.", "replay.", "next."))]
    assert len(named) > 50
    assert all(torch.equal(a[name], b[name]) for name in named if torch.is_tensor(a[name]))


def test_resumed_after_its_end(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    assert_same_run(uninterrupted, finish(make_run(tmp_path / "run", weights_seed=9).resume()))


def run_or_resume(run_dir, weights_seed):
    torch.set_num_threads(1)
    make_run(run_dir, weights_seed=weights_seed).resume(missing_ok=True).train()


def modification_times(folder):
    try:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    except FileNotFoundError:  # removed meanwhile
        return None


def test_killed_again_and_again(uninterrupted, tmp_path):
    """With SIGKILL, whatever the process is about, once it has begun to write."""
    rng = random.Random(0)
    for number in range(3):
        before = modification_times(tmp_path)
        process = forked.Process(target=run_or_resume, args=(tmp_path, number))
        process.start()
        while process.is_alive() and modification_times(tmp_path) in (before, None):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.join()
    torch.set_num_threads(1)
    last = make_run(tmp_path, weights_seed=9).resume(missing_ok=True)
    assert_same_run(uninterrupted, finish(last))
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]


@pytest.mark.parametrize(
    "options",
    [
        {"seq_model": "gru", "loss": "amago2"},
        {"seq_model": "mamba", "on_weight_update": "restart"},
    ],
    ids=str,
)
def test_other_memories(tmp_path, options):
    options = {"total_updates": 9, **options}
    whole = finish(make_run(tmp_path / "whole", **options))
    first = make_run(tmp_path / "parts", **options)
    signal_at(first, 7, signal.SIGTERM)
    assert first.train() == "preempted"
    parts = make_run(tmp_path / "parts", weights_seed=5, **options)
    assert_same_run(whole, finish(parts.resume()))


@pytest.mark.parametrize("make_env", [cart_poles, lake], ids=["gymnasium", "other number of rows"])
def test_trials_that_cannot_go_on_end_and_the_run_says_so(tmp_path, make_env, monkeypatch):
    lines = []
    monkeypatch.setattr("torchrl_amago.trainers._components.torchrl_logger.info", lines.append)
    first = make_run(tmp_path, make_env, num_envs=6)
    signal_at(first, 4, signal.SIGTERM)
    assert first.train() == "preempted"
    num_envs = 6 if make_env is cart_poles else 4
    second = make_run(tmp_path, make_env, num_envs=num_envs, total_updates=6)
    assert second.resume().train() == "finished"
    assert any("trials in progress" in line and "end" in line for line in lines)


def test_seed_repeated_gymnasium_task(tmp_path):
    """Its state can't be saved; checkpoints end its trials, in the uninterrupted run as well."""
    whole = finish(make_run(tmp_path / "whole", cart_poles, total_updates=7))
    make_run(tmp_path / "parts", cart_poles, total_updates=5).train()
    parts = make_run(tmp_path / "parts", cart_poles, total_updates=7, weights_seed=5)
    assert_same_run(whole, finish(parts.resume()))


def test_a_mixture_goes_on_in_mid_trial(tmp_path):
    def mix(online):
        offline = make_trial_buffer(100, slice_length=6, batch_size=4, warn_short=False)
        env = lake(4)
        env.set_seed(0)
        collector = TrialCollector(env, env.rand_action, replay_buffer=offline, frames_per_batch=64)
        next(iter(collector))
        return TrialMixture(
            {"data": offline, "online": online},
            {"data": 0.5, "online": 0.5},
            online="online",
            batch_size=4,
        )

    torch.manual_seed(1)
    data_seed = torch.get_rng_state()

    def make(run_dir, **options):
        torch.set_rng_state(data_seed)
        torch.manual_seed(0)
        return make_run(run_dir, replay=mix, **options)

    whole = finish(make(tmp_path / "whole", total_updates=9))
    first = make(tmp_path / "run", total_updates=9)
    signal_at(first, 7, signal.SIGTERM)
    assert first.train() == "preempted"
    assert_same_run(whole, finish(make(tmp_path / "run", total_updates=9).resume()))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"discounts": (0.9, 0.95)}, r"policy.discounts: \[0.9, 0.99\] .*, \[0.9, 0.95\] here"),
        ({"positions": "rotary"}, "policy.trajectory.positions"),
        ({"window": 3}, "policy.trajectory.window"),
        ({"loss_options": {"n_step": 3}}, "loss.n_step: 1 there, 3 here"),
    ],
    ids=str,
)
def test_settings_that_no_shape_reveals_are_refused(uninterrupted, tmp_path, changed, named):
    run_dir, other = uninterrupted[1], make_run(tmp_path, **changed)
    with pytest.raises(ValueError, match=named):
        other.resume(run_dir)
    if "loss_options" not in changed:
        with pytest.raises(ValueError, match=named.removeprefix("policy.").partition(" .*")[0]):
            load_policy(run_dir / "policy.npz", other.policy)


def test_rows_have_the_metrics_of_training_and_evaluation(uninterrupted):
    rows = read_progress(uninterrupted[1])
    for name in ("trial_return", "trial_length", "success_first", "success_last"):
        assert (rows[f"eval/{name}"][rows["update"] % 5 == 0] >= 0).all()
        assert (rows[f"train/{name}"] >= 0).any()
    assert {"loss_actor", "loss_qvalue", "entropy", "td_error"} <= rows.keys()
