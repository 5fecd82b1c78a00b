from __future__ import annotations

import pytest
import torch

from tests.evaluation.scripted import assert_equal
from torchrl_amago.evaluation import EvaluationResults, TrialResults

NAN = float("nan")


def make_results(episode_return) -> TrialResults:
    episode_return = torch.tensor(episode_return)
    return TrialResults(
        episode_return,
        episode_return > 0,
        episode_return.nansum(1),
        torch.arange(1, 1 + len(episode_return)),
    )


def test_summary_uses_each_trials_own_last_episode():
    summary = make_results([[0.0, 1.0, NAN], [1.0, 0.0, 1.0]]).summary()
    assert summary == pytest.approx(
        {
            "trial_return": 1.5,
            "trial_length": 1.5,
            "success": 3 / 5,
            "success_first": 0.5,
            "success_last": 1.0,
        }
    )


def test_measures_mark_episodes_that_did_not_happen():
    results = make_results([[-2.0, 3.0], [1.0, NAN]])
    assert_equal(results.by_episode("success"), [[0, 1], [1, NAN]])
    assert_equal(results.by_episode("return"), [[-2, 3], [1, NAN]])
    assert len(results) == 2
    with pytest.raises(ValueError, match="measure must be one of 'success', 'return', got 'speed'"):
        results.by_episode("speed")


def test_concatenate_fills_up_missing_episodes():
    results = TrialResults.concatenate([make_results([[1.0]]), make_results([[0.0, 2.0]])])
    assert_equal(results.episode_return, [[1, NAN], [0, 2]])
    assert results.episode_success.tolist() == [[True, False], [False, True]]
    assert_equal(results.trial_return, [1, 2])
    assert_equal(results.trial_length, [1, 1])


@pytest.mark.parametrize("name", ["results.npz", "greedy.v1"])
def test_results_come_back_from_a_file(tmp_path, name):
    results = TrialResults(
        episode_return=torch.tensor([[0.0, 1.0], [1.0, float("nan")]]),
        episode_success=torch.tensor([[False, True], [True, False]]),
        trial_return=torch.tensor([1.0, 1.0]),
        trial_length=torch.tensor([12, 8]),
    )
    results.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    loaded = TrialResults.load(tmp_path / name)
    for field in ("episode_return", "episode_success", "trial_return", "trial_length"):
        one, other = getattr(results, field), getattr(loaded, field)
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, equal_nan=True)


def make_both() -> EvaluationResults:
    def results(first: float) -> TrialResults:
        episode_return = torch.tensor([[first, 2.0], [0.0, 0.0]])
        return TrialResults(
            episode_return, episode_return > 0, episode_return.sum(1), torch.tensor([4, 2])
        )

    return EvaluationResults(results(1.0), results(0.0))


def test_both_summaries_in_one_line():
    assert make_both().describe("trial_return", "success") == (
        "On 2 held-out trials: greedy trial_return 1.500, success 0.500; "
        "sampled (as trained, without epsilon) trial_return 1.000, success 0.250"
    )
    assert "trial_length 3.000" in make_both().describe()


def test_both_are_saved(tmp_path):
    make_both().save(tmp_path)
    greedy = TrialResults.load(tmp_path / "evaluation.npz")
    sampled = TrialResults.load(tmp_path / "evaluation_sampled.npz")
    assert greedy.trial_return.tolist() == [3, 0]
    assert sampled.trial_return.tolist() == [2, 0]
