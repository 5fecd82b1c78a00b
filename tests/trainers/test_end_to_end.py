"""The real parts together: lakes, policies with memory, AMAGOLoss, evaluation, every stop."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest
import torch

from tests.data.trials import even_mixture, make_buffer
from tests.offline.formats import vector_env
from tests.processes import forked
from tests.trainers.test_amago_resume import assert_same_run, finish, stop_by_signal
from torchrl_amago import HeldOutEvaluator, MetaFrozenLake, TrialCollector, make_trial_env
from torchrl_amago.modules import make_policy
from torchrl_amago.trainers import Intervals, load_policy, make_trainer, read_progress

TOTAL = 14
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
STOPS = [[(1, INT), (7, TERM), (13, INT)], [(1, TERM), (9, INT), (10, HUP), (11, TERM)]]


def lake(rows):
    return make_trial_env(MetaFrozenLake(batch_size=(rows,), max_episode_steps=4), episodes=2)


def cart_poles(rows):
    return vector_env("CartPole-v1", 4, rows, "terminated", episodes=2, repeat="seed")


def small_policy(env, memory=None, **options):
    sizes = {"hidden_size": 16, "output_size": 16}
    options |= {"timestep_options": sizes, "exploration": {"anneal_frames": 500}}
    return make_policy(env, seq_model_options={"d_model": 16, **(memory or {})}, **options)


def make_run(
    run_dir, make_env=lake, *, num_envs=6, weights_seed=0, seq_model="transformer", memory=None,
    discounts=(0.9, 0.99), replay=lambda rb: rb, **options,
):  # fmt: skip
    torch.manual_seed(weights_seed)
    env = make_env(num_envs)
    model = {"seq_model": seq_model, "memory": memory, "discounts": discounts}
    policy = small_policy(env, context_length=6, **model)  # memory rolls over: trials are longer
    rb = make_buffer(capacity=200, slice_length=6, batch_size=4)
    held_out = HeldOutEvaluator(policy, make_env(4), seed=7)
    # Rounds end within trials.
    defaults = dict(
        trial_length=8, round_steps=3, updates_per_round=3, total_updates=TOTAL, seed=3,
        learning_rate=1e-3, warmup_updates=5, critic_options={"hidden_size": 16},
        intervals=Intervals(log=2, evaluate=5, checkpoint=5), progress_bar=False,
        evaluator=lambda: held_out.evaluate(4), replay_buffer=replay(rb),
    )  # fmt: skip
    return make_trainer(env, policy, run_dir=run_dir, **(defaults | options))


def mix(online):
    """Mix the run's own trials half and half with others, the same at every call."""
    torch.manual_seed(1)
    offline, env = make_buffer(slice_length=6, batch_size=4), lake(4)
    env.set_seed(0)
    next(iter(TrialCollector(env, env.rand_action, replay_buffer=offline, frames_per_batch=64)))
    return even_mixture({"data": offline, "online": online}, 4, online="online")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(make_run(tmp_path_factory.mktemp("run") / "whole"))


@pytest.mark.parametrize("stops", STOPS)
def test_stopped_by_signals(uninterrupted, tmp_path, stops):
    for number, (stop, name) in enumerate(stops):
        trainer = make_run(tmp_path, weights_seed=number).resume(missing_ok=True)
        stop_by_signal(trainer, stop, name)
        saved = int(trainer.checkpoints.latest().name[-7:])
        assert saved == (stop // 5 * 5 if name == INT else stop)
    assert_same_run(uninterrupted, finish(make_run(tmp_path, weights_seed=9).resume()))


def test_stopped_while_collecting(uninterrupted, tmp_path):
    trainer = make_run(tmp_path)
    update = trainer.monitor.update

    def preempt():
        update()
        if trainer.counts.updates == 6:
            signal.raise_signal(TERM)

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


def run_or_resume(run_dir):
    torch.set_num_threads(1)
    # Other weights than at the start, once a checkpoint has those of the run.
    weights_seed = len(list(run_dir.glob("checkpoints/update_*")))
    return finish(make_run(run_dir, weights_seed=weights_seed).resume(missing_ok=True))


def modification_times(folder):
    try:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    except FileNotFoundError:  # removed meanwhile
        return None


def test_killed_again_and_again(uninterrupted, tmp_path):
    """With SIGKILL, whatever the process is about, once it has begun to write."""
    rng = random.Random(0)
    for _ in range(3):
        before = modification_times(tmp_path)
        process = forked.Process(target=run_or_resume, args=(tmp_path,))
        process.start()
        while process.is_alive() and modification_times(tmp_path) in (before, None):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.join()
    assert_same_run(uninterrupted, run_or_resume(tmp_path))
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        (7, {"seq_model": "gru", "loss": "amago2"}),
        (7, {"seq_model": "mamba", "memory": {"on_weight_update": "restart"}}),
        (7, {"replay": mix}),
        # Its state can't be saved: checkpoints end its trials, in the uninterrupted run as well.
        (5, {"make_env": cart_poles}),
    ],
    ids=["gru", "mamba", "mixture", "seed-repeated gymnasium task"],
)
def test_other_parts(tmp_path, stop, options):
    options = {"total_updates": 9, **options}
    whole = finish(make_run(tmp_path / "whole", **options))
    stop_by_signal(make_run(tmp_path / "parts", **options), stop, TERM)
    assert_same_run(whole, finish(make_run(tmp_path / "parts", weights_seed=5, **options).resume()))


@pytest.mark.parametrize(("make_env", "num_envs"), [(cart_poles, 6), (lake, 4)])
def test_the_run_says_that_trials_end_here(tmp_path, make_env, num_envs, monkeypatch):
    lines = []
    monkeypatch.setattr("torchrl_amago.trainers._components.torchrl_logger.info", lines.append)
    stop_by_signal(make_run(tmp_path, make_env), 4, TERM)
    second = make_run(tmp_path, make_env, num_envs=num_envs, total_updates=6)
    assert second.resume().train() == "finished"
    assert any("trials in progress" in line and "end" in line for line in lines)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"discounts": (0.9, 0.95)}, r"policy.discounts: \[0.9, 0.99\] .*, \[0.9, 0.95\] here"),
        ({"memory": {"positions": "rotary"}}, "policy.trajectory.positions"),
        ({"memory": {"window": 3}}, "policy.trajectory.window"),
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
