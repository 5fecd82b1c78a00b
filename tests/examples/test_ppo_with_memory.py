"""The on-policy example: its advantages against a computation by hand, and the whole of it, briefly."""

from __future__ import annotations

import itertools
from pathlib import Path

import ppo_parts
import pytest
import torch
from tensordict.nn import TensorDictSequential
from torchrl.collectors import Collector
from torchrl.modules import set_recurrent_mode
from torchrl.objectives.value import GAE

from tests.scripts import import_script
from torchrl_amago import MetaFrozenLake, make_trial_env
from torchrl_amago.trainers import read_progress

PATH = Path(__file__).parents[2] / "examples" / "ppo_with_memory.py"
GAMMA, LAMBDA = 0.9, 0.8


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        yield import_script(PATH, patch)


def collect(example, seq_model: str):
    """Rows `[B, T]` with several trials in each, as the example collects them."""
    torch.manual_seed(0)
    args = example.Args(seq_model=seq_model, d_model=16, num_layers=1)
    env = make_trial_env(MetaFrozenLake(3, batch_size=(6,)), episodes=5)
    env.set_seed(0)
    actor, critic = ppo_parts.make_networks(args, env, horizon=45)
    collector = Collector(
        env, actor, frames_per_batch=6 * 60, total_frames=6 * 60, reset_at_each_iter=True
    )
    batch = next(iter(collector))
    collector.shutdown()
    return actor, critic, batch


def values_by_hand(actor, critic, row, end: int) -> list[float]:
    """Value of every step of the row's trials up to `end`, each trial encoded alone."""
    starts = [t for t in range(end) if row["is_init"][t]] + [end]
    values = []
    for start, stop in itertools.pairwise(starts):
        trial = row[start:stop].select(*actor.in_keys, strict=False)
        with torch.no_grad(), set_recurrent_mode(True):
            value = critic(TensorDictSequential(*actor[:-2])(trial.unsqueeze(0)))["state_value"]
        values += value.flatten().tolist()
    return values


def advantages_by_hand(actor, critic, row) -> list[float]:
    T = len(row)
    values = values_by_hand(actor, critic, row, T)
    # The step after the last one: the trial under way, one step longer.
    start = max(t for t in range(T) if row["is_init"][t])
    inputs = [key for key in actor.in_keys if key != "_stream"]
    longer = torch.cat([row[start:].select(*inputs), row["next"][-1:].select(*inputs)])
    values.append(values_by_hand(actor, critic, longer, len(longer))[-1])
    advantage, out = 0.0, []
    for t in reversed(range(T)):
        goes_on = not row["next", "done"][t]
        delta = float(row["next", "reward"][t]) + GAMMA * goes_on * values[t + 1] - values[t]
        advantage = delta + GAMMA * LAMBDA * goes_on * advantage
        out.append(advantage)
    return out[::-1]


@pytest.mark.parametrize("seq_model", ["transformer", "gru"])
def test_advantages_equal_those_computed_by_hand(example, seq_model):
    actor, critic, batch = collect(example, seq_model)
    assert batch["is_init"][:, 1:].any()
    assert batch["next", "done"].equal(batch["next", "terminated"])
    batch = batch.exclude("timestep", "state", "logits", "_stream")
    value_network = TensorDictSequential(*actor[:-2], critic)
    ppo_parts.add_advantages(
        batch, value_network, GAE(gamma=GAMMA, lmbda=LAMBDA, value_network=None)
    )
    for row in batch.unbind(0):
        expected = torch.tensor(advantages_by_hand(actor, critic, row))
        torch.testing.assert_close(row["advantage"][:, 0], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            row["value_target"], row["advantage"] + row["state_value"], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("seq_model", ["transformer", "gru"])
def test_sequences_give_the_probabilities_that_were_acted_with(example, seq_model):
    actor, _, batch = collect(example, seq_model)
    acted = batch["action_log_prob"]
    with torch.no_grad(), set_recurrent_mode(True):
        learning = actor.get_dist(batch.exclude("timestep", "state", "logits", "_stream"))
    torch.testing.assert_close(learning.log_prob(batch["action"]), acted, rtol=1e-4, atol=1e-5)


def test_debug_run(example, tmp_path, capsys):
    threads = torch.get_num_threads()
    command = ["--debug", "--run-dir", str(tmp_path / "run"), "--seq-model", "gru"]
    example.main([*command, "--threads", str(threads)])
    assert "On 64 held-out trials: greedy trial_return" in capsys.readouterr().out
    names = ["progress.csv", "learning_curve.png", "adaptation_curve.png", "evaluation.npz"]
    names += ["evaluation_sampled.npz"]
    assert all((tmp_path / "run" / name).stat().st_size for name in names)
    progress = read_progress(tmp_path / "run")
    assert progress["frames"].tolist() == [720.0, 1440.0, 2160.0, 2880.0]
    assert all(len(progress[name]) == 4 for name in ("train/trial_return", "loss_objective"))
    with pytest.raises(FileExistsError, match="a new run needs a folder without one"):
        example.main(command)
