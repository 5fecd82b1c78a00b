"""Offline data: readers of trajectories, and `load_trials`, which writes them into a buffer."""

from torchrl_amago.envs import RecordedEnv
from torchrl_amago.offline.load import OfflineReport, load_trials
from torchrl_amago.offline.readers import (
    TrajectorySource,
    read_amago,
    read_d4rl,
    read_minari,
    read_torchrl,
)
from torchrl_amago.offline.showdown_logs import ShowdownLogs, read_showdown_logs
from torchrl_amago.offline.trajectory import Trajectory, TrajectoryError

__all__ = [
    "OfflineReport", "RecordedEnv", "ShowdownLogs", "Trajectory", "TrajectoryError",
    "TrajectorySource", "load_trials", "read_amago", "read_d4rl", "read_minari",
    "read_showdown_logs", "read_torchrl",
]  # fmt: skip
