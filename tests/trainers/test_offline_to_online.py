"""First updates on data alone, then rounds of collecting, in one run that resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.trials import even_mixture, make_buffer, seeded
from tests.trainers.test_amago_resume import TOTAL, assert_same_run, fingerprint, stop_by_signal
from tests.trainers.tiny import make_trainer
from torchrl_amago.trainers import read_progress


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Trials that another run has collected."""
    trainer = make_trainer(tmp_path_factory.mktemp("data") / "run", total_updates=8)
    trainer.train()
    return trainer.replay_buffer[:].clone()


def make_offline_trainer(run_dir, data, online_after=9, generator=None, **options):
    def mix(online):
        offline = make_buffer(slice_length=5)
        offline.extend(data)
        options = {"anneal_updates": 5, "online": "online", "generator": generator}
        return even_mixture({"data": offline, "online": online}, 3, **options)

    options = {"total_updates": TOTAL, "online_after": online_after, **options}
    return make_trainer(run_dir, replay=mix, **options)


def frames_by_update(trainer):
    frames = []
    trainer.callbacks.append(lambda trainer: frames.append(trainer.counts.frames))
    trainer.train()
    return frames


def test_nothing_is_collected_before_the_switch(tmp_path, data):
    trainer = make_offline_trainer(tmp_path, data)
    before = trainer.replay_buffer.buffers["data"][:].clone()
    frames = frames_by_update(trainer)
    assert frames[:9] == [0] * 9
    # Then 4 updates a round, though the first round completes too few trials for a new run.
    assert frames[9:14] == [12, 12, 12, 12, 24]
    assert len(frames) == TOTAL
    assert torch.equal(trainer.replay_buffer.buffers["data"][:]["action"], before["action"])
    rows = read_progress(tmp_path)
    fractions = dict(zip(rows["update"].tolist(), rows["fraction/online"].tolist(), strict=True))
    assert fractions[4] == fractions[8] == 0
    assert fractions[24] == pytest.approx(0.5)
    assert rows["frames"][rows["update"] == 8] == 0
    assert rows["trials"][-1] == trainer.monitor.trials > 0


def test_never_online(tmp_path, data):
    trainer = make_offline_trainer(tmp_path, data, online_after=TOTAL)
    assert frames_by_update(trainer) == [0] * TOTAL
    assert trainer.exploration.frames == 0
    assert len(trainer.online_buffer) == 0
    assert np.isfinite(read_progress(tmp_path)["loss_actor"]).all()


def test_a_plain_buffer_needs_data_and_is_written_to_after_the_switch(tmp_path, data):
    options = {"total_updates": 12, "online_after": 6, "capacity": 200}
    message = "sampling needs at least 1 trials, and the buffer has 0"
    with pytest.raises(RuntimeError, match=message):
        make_trainer(tmp_path / "without data", **options).train()
    trainer = make_trainer(tmp_path / "with data", **options)
    trainer.replay_buffer.extend(data)
    assert frames_by_update(trainer)[:7] == [0] * 6 + [12]
    assert len(trainer.replay_buffer) > len(data)


@pytest.mark.parametrize(("stops", "own_generator"), [((8, 20), True), ((14,), False)])
def test_resumes_exactly_but_not_with_other_data(tmp_path, data, stops, own_generator):
    def make(run_dir, data=data, **options):
        options["generator"] = seeded(7) if own_generator else None
        return make_offline_trainer(run_dir, data, **options)

    def finish(trainer):
        assert trainer.train() == "finished"
        mixture, trainer.replay_buffer = trainer.replay_buffer, trainer.online_buffer
        state = fingerprint(trainer)
        trainer.replay_buffer = mixture
        state |= {f"mixed.{key}": value for key, value in mixture.sample().items(True, True)}
        return state | mixture.state_dict()["ready_at"], trainer.run_dir

    whole = finish(make(tmp_path / "whole"))
    for number, stop in enumerate(stops):
        stop_by_signal(make(tmp_path / "run", weights_seed=number).resume(missing_ok=True), stop)
        torch.manual_seed(999)
    assert_same_run(whole, finish(make(tmp_path / "run", weights_seed=2).resume()))
    first_trial = data[: int(data["next", "done"].flatten().int().argmax()) + 1]
    message = "must have the data and the generator that it was saved with"
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", first_trial).resume()
