from __future__ import annotations

import csv
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch

from torchrl_amago import plots
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.plots import plot_adaptation_curve, plot_learning_curve, plot_trial_strip


@pytest.fixture
def figure(monkeypatch):
    """The figure drawn last."""
    drawn = []
    finish = plots._finish

    def record(figure, *args, **kwargs):
        drawn.append(figure)
        finish(figure, *args, **kwargs)

    monkeypatch.setattr(plots, "_finish", record)
    monkeypatch.setattr(plots, "_DPI", 20)  # drawing takes most of the time
    return lambda: drawn[-1]


def make_results(rate: list[float], trials: int = 40) -> TrialResults:
    """Exactly the given fraction of the trials succeeds at each episode."""
    rank = (torch.arange(trials) + 0.5) / trials
    success = rank.unsqueeze(-1) < torch.tensor(rate)
    return TrialResults(
        2 * success.float(), success, 2 * success.sum(1).float(), torch.full((trials,), 9)
    )


def lines_of(ax) -> dict[str, list[float]]:
    return {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in ax.get_lines()}


def texts_of(figure) -> list[str]:
    """Return the titles over the columns, then those beside the rows."""
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    return titles + [text.get_text() for ax in figure.axes for text in ax.texts]


def is_png(path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_adaptation_curve_draws_success_by_episode_and_the_reference(tmp_path, figure):
    path = tmp_path / "adaptation_curve.png"
    plot_adaptation_curve(
        make_results([0.5, 0.75, 1.0]), path, reference=[0.6, 0.9, 1.0], reference_label="optimum"
    )
    (ax,) = figure().axes
    lines = lines_of(ax)
    assert lines["agent"] == pytest.approx([0.5, 0.75, 1.0])
    assert lines["optimum"] == [0.6, 0.9, 1.0]
    assert ax.get_lines()[0].get_xdata().tolist() == [1, 2, 3]
    assert any("40 trials" in text.get_text() for text in ax.get_legend().get_texts())
    assert is_png(path)


def test_adaptation_curve_of_returns_of_several_agents(tmp_path, figure):
    results = {"memory": make_results([0.5, 1.0]), "none": make_results([0.5, 0.5, 0.5])}
    plot_adaptation_curve(results, tmp_path / "curve.png", measure="return")
    lines = lines_of(figure().axes[0])
    assert lines["memory"] == pytest.approx([1.0, 2.0])
    assert lines["none"] == pytest.approx([1.0, 1.0, 1.0])


def test_adaptation_curve_pools_seeds(tmp_path, figure):
    seeds = [make_results([0.25, 0.5]), make_results([0.75, 1.0])]
    results = {"memory": seeds, "none": make_results([0.5, 0.5])}
    plot_adaptation_curve(results, tmp_path / "pooled.png")
    drawn = [line.get_ydata().tolist() for line in figure().axes[0].get_lines()]
    assert drawn == [pytest.approx(ys) for ys in ([0.25, 0.5], [0.75, 1], [0.5, 0.75], [0.5, 0.5])]
    assert {"memory, 2 seeds", "none"} <= lines_of(figure().axes[0]).keys()


def test_learning_curve_reads_rows_and_csv_alike(tmp_path, figure):
    rows = [
        {"frames": 10, "train/trial_return": 1.0},
        {"frames": 20, "train/trial_return": 2.0, "eval/trial_return": 3.0, "note": "x"},
        {"frames": 30, "train/trial_return": float("nan"), "eval/success_last": 0.5},
    ]
    with (tmp_path / "progress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["frames", "train/trial_return", "eval/trial_return", "eval/success_last", "note"]
        )
        writer.writeheader()
        writer.writerows(rows)
    for table in (rows, tmp_path / "progress.csv", str(tmp_path / "progress.csv")):
        path = tmp_path / "learning_curve.png"
        plot_learning_curve(table, path, reference={"return per trial": 4.5})
        returns, success = figure().axes
        lines = lines_of(returns)
        assert lines["training"] == [1.0, 2.0]
        assert lines["evaluation"] == [3.0]
        assert set(lines["optimal"]) == {4.5}
        assert lines_of(success) == {"last episode, evaluation": [0.5]}
        assert is_png(path)


def test_learning_curve_marks_places_and_names_its_reference(tmp_path, figure):
    plot_learning_curve(
        [{"update": 10, "eval/trial_return": 1.0}, {"update": 20, "eval/trial_return": 2.0}],
        tmp_path / "learning_curve.png",
        x="update",
        reference={"return per trial": 1.5},
        reference_label="dataset",
        marks={"begins to play": 15},
    )
    (ax,) = figure().axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert set(lines["dataset"].get_ydata()) == {1.5}
    assert set(lines["begins to play"].get_xdata()) == {15}


def test_learning_curve_of_several_runs_and_other_columns(tmp_path, figure):
    runs = {name: [{"update": 1, "loss": height}] for name, height in [("a", 1.0), ("b", 2.0)]}
    plot_learning_curve(
        runs, tmp_path / "loss.png", x="update", panels={"loss": {"loss": "critic"}}
    )
    (ax,) = figure().axes
    assert lines_of(ax) == {"a, critic": [1.0], "b, critic": [2.0]}
    assert ax.get_xlabel() == "update"


def test_learning_curve_of_seeds_is_their_mean_with_a_band(tmp_path, figure):
    def table(offset: float, frames: list[int]) -> list[dict]:
        return [{"frames": f, "eval/trial_return": f / 10 + offset} for f in frames]

    seeds = [table(0.0, [10, 20, 30, 40]), table(1.0, [15, 35]), table(2.0, [10, 40])]
    plot_learning_curve({"agent": seeds, "single": seeds[0]}, tmp_path / "curve.png")
    (ax,) = figure().axes
    lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    # Seen by all between 15 and 35; the other seeds are interpolated.
    np.testing.assert_allclose(lines["agent, evaluation, 3 seeds"], [[20, 3.0], [30, 4.0]])
    assert len(lines["single, evaluation"]) == 4
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((2.0, 5.0))
    plot_learning_curve(seeds, tmp_path / "curve.png")
    assert "evaluation, 3 seeds" in lines_of(figure().axes[0])


def test_learning_curve_needs_its_columns(tmp_path):
    with pytest.raises(ValueError, match=r"needs column 'frames'.*got \['loss', 'update'\].*x="):
        plot_learning_curve([{"update": 1, "loss": 2.0}], tmp_path / "x.png")


def test_trial_strip_has_a_picture_per_step(tmp_path, figure):
    frames = [
        [np.full((4, 4, 3), 10 * a + s, np.uint8) for s in range(n)] for a, n in [(0, 2), (1, 3)]
    ]
    plot_trial_strip(frames, tmp_path / "trial.png", title="trial")
    drawn = [image.get_array()[0, 0, 0] for ax in figure().axes for image in ax.get_images()]
    assert drawn == [0, 1, 10, 11, 12]
    assert texts_of(figure()) == ["start", "step 1", "step 2", "episode 1", "episode 2"]
    assert is_png(tmp_path / "trial.png")


def test_trial_strip_takes_headings_and_titles(tmp_path, figure):
    frames = [[np.zeros((2, 4, 3), np.uint8)] * 2]
    path, headings = tmp_path / "trial.png", ["step 0", "step 99"]
    plot_trial_strip(frames, path, headings=headings, titles=["trial"])
    assert texts_of(figure()) == [*headings, "trial"]
    for wrong in ({"headings": ["step 0"]}, {"titles": ["a", "b"]}):
        with pytest.raises(ValueError, match="zip"):
            plot_trial_strip(frames, path, **wrong)


def test_plots_leave_no_global_state(tmp_path):
    before = mpl.rcParams.copy()
    sys.modules.pop("matplotlib.pyplot", None)
    plot_adaptation_curve(make_results([0.5, 1.0]), tmp_path / "a.png")
    assert "matplotlib.pyplot" not in sys.modules
    assert mpl.rcParams == before
