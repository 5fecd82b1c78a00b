"""Draw alchemy.png: learning and adaptation with memory and without it, three seeds each.

Run `examples/06_alchemy.py` into runs/gru_SEED and, with `--seq-model feedforward`, into
runs/feedforward_SEED; then `python docs/figures/make_alchemy.py runs`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from make_hero import save_side_by_side

from torchrl_amago.evaluation import TrialResults
from torchrl_amago.plots import plot_adaptation_curve, plot_learning_curve

AGENTS = {"GRU": "gru", "without memory": "feedforward"}


def draw(runs: Path) -> None:
    """Draw both panels from the folders of all runs."""
    folders = {name: sorted(runs.glob(f"{prefix}_*[0-9]")) for name, prefix in AGENTS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        curve, adaptation = Path(scratch) / "curve.png", Path(scratch) / "adaptation.png"
        plot_learning_curve(
            {
                name: [folder / "progress.csv" for folder in seeds]
                for name, seeds in folders.items()
            },
            curve,
            panels={"return per trial": {"eval/trial_return": "evaluation"}},
        )
        results = {
            name: [TrialResults.load(folder / "evaluation.npz") for folder in seeds]
            for name, seeds in folders.items()
        }
        plot_adaptation_curve(results, adaptation, measure="return")
        target = Path(__file__).parent / "alchemy.png"
        save_side_by_side([curve, adaptation], target, height=3.4)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
