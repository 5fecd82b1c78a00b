"""Draw the pictures of docs/results.md on control, such as cart_pole.png: returns of all seeds.

Train with its commands into runs/cart_pole_SEED, runs/pendulum_SEED and so on; then
`python docs/figures/make_control.py runs`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torchrl_amago.plots import plot_learning_curve

# Name of the folders and the picture: title, dashed line, and its label.
TASKS = {
    "cart_pole": ("CartPole without velocities", 500.0, "most possible"),
    "pendulum": ("Pendulum", -150.0, "good control"),
    "acrobot": ("Acrobot", -72.1, "RL Zoo's DQN"),
    "mountain_car": ("Mountain Car", -110.0, "solved"),
    "lunar_lander": ("LunarLander", 200.0, "solved"),
}


def draw(runs: Path) -> None:
    """Draw a picture of each task."""
    panel = "greedy return"
    for name, (title, line, label) in TASKS.items():
        plot_learning_curve(
            [folder / "progress.csv" for folder in sorted(runs.glob(f"{name}_[0-9]*"))],
            Path(__file__).parent / f"{name}.png",
            panels={panel: {"eval/trial_return": "AMAGO"}},
            reference={panel: line},
            reference_label=label,
            title=title,
        )


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
