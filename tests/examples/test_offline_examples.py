"""The example that goes from a dataset to an agent, and the script that makes the dataset."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from tests.scripts import import_script, run_script
from torchrl_amago.trainers import read_progress

minari = pytest.importorskip("minari")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def making(monkeypatch):
    return import_script(EXAMPLES / "make_minari_dataset.py", monkeypatch)


@pytest.fixture
def example(making, monkeypatch):
    return import_script(EXAMPLES / "14_offline_to_online.py", monkeypatch)


@pytest.mark.filterwarnings("ignore:.*constrained_layout")
def test_debug_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.keep_freed_memory", lambda: None)
    flags = ("--debug", "--threads", "1", "--run-dir", "run")
    done = run_script(EXAMPLES / "14_offline_to_online.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "pendulum/weak-10-v0: 10 trials of 2000 steps, mean return -" in done.stdout
    assert "On 16 held-out trials: greedy trial_return" in done.stdout
    rows = read_progress(tmp_path / "run")
    assert rows["update"][-1] == 40
    assert rows["frames"][rows["update"] == 20] == 0
    assert rows["frames"][-1] > 0
    assert np.isfinite(rows["loss_actor"]).all()
    assert (tmp_path / "run" / "learning_curve.png").is_file()


TINY = dict(
    run_dir=Path("run"),
    dataset_episodes=2,
    total_updates=4,
    online_after=2,
    updates_per_round=2,
    num_envs=2,
    batch_size=2,
    d_model=16,
    hidden_size=16,
    num_layers=1,
    eval_interval=100,
    final_policy="last",
    eval_trials=4,
    checkpoint_interval=2,
    warmup_updates=2,
)


@pytest.mark.parametrize("loss", ["amago", "amago2"])
def test_resumes_with_the_same_dataset_only(example, making, tmp_path, monkeypatch, loss):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gymnasium.spec("Pendulum-v1"), "max_episode_steps", 40)
    tiny = {**TINY, "loss": loss}
    assert example.train(example.Args(**tiny)) is not None
    more = {**tiny, "total_updates": 6, "resume": True}
    making.make_dataset(making.Args(episodes=3))
    with pytest.raises(ValueError, match="dataset_episodes: 2 there, 3 here"):
        example.train(example.Args(**{**more, "dataset_episodes": 3}))
    assert example.train(example.Args(**more)) is not None
    rows = read_progress(tmp_path / "run")
    assert rows["update"][-1] == 6
    np.testing.assert_array_equal(rows["frames"] > 0, rows["update"] > 2)


def test_any_dataset_that_is_there(example, making, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    making.make_dataset(making.Args(env_id="CartPole-v1", quality="random", episodes=5))
    there = {**TINY, "dataset": "cartpole/random-5-v0", "online_after": 4}
    args = example.Args(**{**there, "env_id": "CartPole-v1"})
    results = example.train(args)
    assert (results.greedy.trial_return >= 8).all()
    assert set(read_progress(tmp_path / "run")["frames"]) == {0}
    with pytest.raises(FileNotFoundError, match="nothing"):
        example.train(example.Args(**{**TINY, "dataset": "here/nothing-v0"}))


def test_a_file_of_d4rl_arrays(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File("hopper_random-v2.hdf5", "w") as file:  # named after one with a published scale
        file["observations"] = rng.normal(size=(60, 3)).astype(np.float32).clip(-1, 1)
        file["actions"] = rng.uniform(-1, 1, size=(60, 1)).astype(np.float32)
        file["rewards"] = np.ones(60, np.float32)
        file["terminals"] = np.zeros(60, bool)
        file["timeouts"] = np.arange(60) % 20 == 19
    there = {**TINY, "dataset": "hopper_random-v2.hdf5", "online_after": 4}
    example.train(example.Args(**there, env_id="Pendulum-v1"))
    score = (
        100 * (19 + 20.272305) / (3234.3 + 20.272305)
    )  # the last step of each leads nowhere known
    said = capsys.readouterr().out
    assert f"mean return of the dataset: 19.000, normalised score {score:.1f}" in said
    assert "mean return of the greedy policy: -" in said
    with pytest.raises(ValueError, match="--env-id"):
        example.train(example.Args(**there))


def test_normalised_scores_of_minari(example):
    from types import SimpleNamespace

    from d4rl_file import normalized_score

    metadata = {"ref_min_score": -10.0, "ref_max_score": 30.0}
    dataset = SimpleNamespace(storage=SimpleNamespace(metadata=metadata))
    assert normalized_score(dataset, 20.0) == 75.0
    metadata.clear()
    assert normalized_score(dataset, 20.0) is None


def test_a_dataset_s_own_environment_is_made_only_if_it_is_trusted(
    example, making, tmp_path, monkeypatch
):
    """Its description names a function that is called."""
    dataset = making.make_dataset(making.Args(env_id="CartPole-v1", quality="random", episodes=1))
    (file,) = (tmp_path / "minari").rglob("metadata.json")
    planted = tmp_path / "planted"
    metadata = json.loads(file.read_text())
    spec = json.loads(metadata["env_spec"])
    spec |= {"entry_point": "pathlib:Path.touch", "kwargs": {"self": str(planted)}}
    file.write_text(json.dumps({**metadata, "env_spec": json.dumps(spec)}))
    there = {**TINY, "dataset": dataset.id, "run_dir": tmp_path / "run", "online_after": 4}
    with pytest.raises(ValueError, match="needs either --env-id or --trust-dataset-env; cartpole/"):
        example.train(example.Args(**there))
    with pytest.raises(ValueError, match="needs either"):
        example.train(example.Args(**there, env_id="CartPole-v1", trust_dataset_env=True))
    assert example.train(example.Args(**there, env_id="CartPole-v1")) is not None
    assert not planted.exists()
    called = []
    monkeypatch.setattr(
        "minari.MinariDataset.recover_environment",
        lambda self: called.append(self.id) or gymnasium.make("CartPole-v1"),
    )
    trusted = {**there, "run_dir": tmp_path / "trusted", "trust_dataset_env": True}
    assert example.train(example.Args(**trusted)) is not None
    assert set(called) == {dataset.id}


def test_qualities(making):
    means = {}
    for env_id in ("Pendulum-v1", "CartPole-v1"):
        for quality in making.NOISE:
            args = making.Args(env_id=env_id, quality=quality, episodes=10)
            dataset = making.make_dataset(args)
            assert dataset.id == args.dataset_id
            means[env_id, quality] = np.mean([np.sum(episode.rewards) for episode in dataset])
    assert means["Pendulum-v1", "random"] < -1000
    assert -700 < means["Pendulum-v1", "weak"] < -250
    assert means["Pendulum-v1", "good"] > -250
    assert means["CartPole-v1", "random"] < 40
    assert 100 < means["CartPole-v1", "weak"] < 400
    assert means["CartPole-v1", "good"] > 450


def test_the_same_seed_makes_the_same_dataset(making):
    def rewards(**options):
        episodes = making.play(making.Args(episodes=2, **options))
        return [reward for episode in episodes for reward in episode.rewards]

    assert rewards() == rewards()
    assert rewards() != rewards(seed=1)
