"""Draw hero.png: a trial beside the adaptation curves of an agent with memory and one without.

Run `examples/00_meta_frozen_lake.py` into runs/memory and, with `--seq-model feedforward`, into
runs/no_memory; then `python docs/figures/make_hero.py runs/memory runs/no_memory`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.image import imread

from torchrl_amago.envs import bayes_optimal_success
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.plots import plot_adaptation_curve

HERO = Path(__file__).parent / "hero.png"


def draw(memory: Path, no_memory: Path) -> None:
    """Draw the picture from the folders of two runs."""
    with tempfile.TemporaryDirectory() as folder:
        curve = Path(folder) / "curve.png"
        plot_adaptation_curve(
            {
                "Transformer": TrialResults.load(memory / "evaluation.npz"),
                "without memory": TrialResults.load(no_memory / "evaluation.npz"),
            },
            curve,
            reference=bayes_optimal_success(3, 5).success_by_episode,
            reference_label="exact optimum",
            title="Success by episode at an unknown lake",
        )
        save_side_by_side([memory / "trial.png", curve], HERO, height=5.2)


def save_side_by_side(files: list[Path], path: Path, height: float) -> None:
    """Join pictures of one height in inches."""
    pictures = [imread(file) for file in files]
    widths = [picture.shape[1] / picture.shape[0] for picture in pictures]
    figure = Figure(figsize=(height * sum(widths), height), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=widths)
    for ax, picture in zip(axes, pictures, strict=True):
        ax.imshow(picture, interpolation="lanczos")
        ax.set_axis_off()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
