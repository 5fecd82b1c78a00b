"""The board hands on each version once, and only to workers that fit."""

from __future__ import annotations

import pytest
import torch

from tests.scaling.lakes import small_policy
from torchrl_amago.scaling._exchange import Board


def test_a_worker_gets_weights_and_exploration(tmp_path):
    learner, worker = small_policy(), small_policy()
    with torch.no_grad():
        for weight in learner.parameters():
            weight.add_(1.0)
    learner.exploration.step(300)
    reader = Board(tmp_path, worker)
    assert not reader.update()
    Board(tmp_path, learner).publish(7)
    assert reader.update()
    assert (reader.version, reader.is_last) == (7, False)
    for name, weight in learner.state_dict().items():
        if isinstance(weight, torch.Tensor):
            assert worker.state_dict()[name].equal(weight)
    assert worker.exploration.frames == 300
    assert not reader.update()
    Board(tmp_path, learner).publish(8, is_last=True)
    assert reader.update()
    assert (reader.version, reader.is_last) == (8, True)


def test_a_damaged_board_leaves_the_older_policy(tmp_path, caplog):
    board = Board(tmp_path, small_policy())
    board.publish(1)
    board.file.write_bytes(board.file.read_bytes()[:-100])
    assert not board.update()


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        (dict(d_model=16), {"size": 3}, "8 there, 16 here"),
        (dict(size=3), {"size": 4}, "size: 3 there, 4 here"),
    ],
)
def test_a_worker_of_another_task_or_network_is_refused(tmp_path, policy, settings, message):
    Board(tmp_path, small_policy(), {"size": 3}).publish(1)
    reader = Board(tmp_path, small_policy(**policy), settings)
    with pytest.raises(ValueError, match=message):
        reader.update()
