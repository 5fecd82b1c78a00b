"""Settings of the PPO example."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchrl_amago.modules import SEQ_MODELS


@dataclass
class Args:
    """Meta-FrozenLake with PPO."""

    run_dir: Path = Path("runs/ppo_with_memory")
    """Folder for everything this run writes."""
    debug: bool = False
    """A short run with a small network, a test of the installation."""
    size: int = 3
    """Cells on each side of the lake."""
    episodes: int = 5
    """Episodes in a trial."""
    hold_out_layouts: bool = False
    """Keep a quarter of all layouts out of training, and evaluate on those alone."""
    seed: int = 1
    """Seed of everything: networks, lakes, actions, batches."""
    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """Trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model; other networks are four times as wide."""
    num_layers: int = 2
    """Layers of the sequence model."""
    num_envs: int = 128
    """Lakes played together, in each round for the steps of the longest trial."""
    rounds: int = 100
    """Rounds of collecting and learning."""
    epochs: int = 4
    """Passes over the data of a round."""
    batch_size: int = 32
    """Rows in a batch."""
    learning_rate: float = 5e-4
    """Step size of AdamW."""
    eval_interval: int = 5
    """Rounds between evaluations."""
    eval_trials: int = 1024
    """Trials in the last evaluation, on held-out lakes; a quarter of it in those before."""
    threads: int = 2
    """CPU threads."""


DEBUG = dict(
    rounds=4, num_envs=16, batch_size=8, d_model=32, num_layers=1, eval_interval=2, eval_trials=64
)
