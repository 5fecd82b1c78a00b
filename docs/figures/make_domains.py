"""Draw domains.png: learning curves of outside environments, one panel for each, all seeds.

Train with the commands of docs/results.md into runs/NAME_SEED, then
`python docs/figures/make_domains.py runs`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from torchrl_amago.progress import read_progress

# Folder of the runs: title, the return of chance, and one that is best or nearly so.
TASKS = {
    "repeat": ("POPGym RepeatPreviousEasy", -0.5, 1.0),
    "memory_chain": ("gymnax MemoryChain", -0.3, 1.0),
    "autoencode": ("POPGym AutoencodeEasy", -0.5, 1.0),
}


def draw(runs: Path) -> None:
    """Draw returns of training's trials, with their noise, over steps of the environment."""
    figure = Figure(figsize=(3.1 * len(TASKS), 2.7), layout="constrained")
    axes = figure.subplots(1, len(TASKS))
    for ax, (name, (title, chance, best)) in zip(axes, TASKS.items(), strict=True):
        for folder in sorted(runs.glob(f"{name}_*")):
            rows = read_progress(folder)
            points = [
                (frames, value)
                for frames, value in zip(rows["frames"], rows["train/trial_return"], strict=True)
                if value == value  # rows without a finished trial hold NaN
            ]
            ax.plot(*zip(*points, strict=True), label=f"seed {folder.name.rpartition('_')[2]}")
        ax.axhline(best, color="grey", linestyle="--", linewidth=1)
        ax.set_ylim(chance - 0.1, best + 0.1)
        ax.set(title=title, xlabel="steps")
        ax.xaxis.set_major_formatter(EngFormatter())
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return in training")
    axes[0].legend(frameon=False)
    figure.savefig(Path(__file__).parent / "domains.png", dpi=120)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
