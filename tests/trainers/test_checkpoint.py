from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.data import TensorDictReplayBuffer

from tests.data.trials import full, make_buffer, make_trial, stock_buffer
from torchrl_amago._files import DamagedError, write_manifest
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.trainers import check_no_existing_run
from torchrl_amago.trainers.checkpoint import REPLAY, CheckpointStore

SETTINGS = {"discounts": [0.9, 0.99]}


def state_of(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    return {"loss": net.state_dict(), "optimizer": {"optimizer": optimizer.state_dict()}}


STATE = state_of(nn.Linear(3, 2))
OTHER_SHAPES = (
    "differ in 3 entries: loss.weight: 2x3 float32 there, 4x3 float32 here; "
    "loss.bias: 2 float32 there, absent here; optimizer.group_0: 2 parameters there, 1"
)
OTHER_DISCOUNTS = r"differ in 1 entries: discounts: \[0.9, 0.99\] there, \[0.9, 0.95\] here"


def save(store, update):
    return store.save(update, STATE, make_buffer([3, 3]), {"settings": SETTINGS})


def assert_loads(path):
    loaded = CheckpointStore.load(path, STATE, SETTINGS)
    assert torch.equal(loaded["loss"]["weight"], STATE["loss"]["weight"])


def test_replay_comes_back(tmp_path):
    for rb in (make_buffer([3, 3]), empty := make_buffer()):
        other = make_buffer()
        other.loads(CheckpointStore(tmp_path).save(3, STATE, rb, {}) / REPLAY)
        assert len(rb) == len(other) == other.write_count
        assert rb is empty or (other[:] == rb[:]).all()


@pytest.mark.parametrize("buffer", [TensorDictReplayBuffer, TrialReplayBuffer])
def test_a_stock_storage_is_saved_once_it_has_a_step(tmp_path, buffer):
    store = CheckpointStore(tmp_path)
    rb, other = (stock_buffer(slice_length=3, buffer=buffer) for _ in range(2))
    assert not (store.save(0, STATE, rb, {}) / REPLAY).exists()
    rb.extend(make_trial(4))
    other.loads(store.save(3, STATE, rb, {}) / REPLAY)
    assert (other[:] == rb[:]).all()


def test_manifest_lists_every_file_and_nothing_is_pickled(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    there = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json"}
    assert (manifest["update"], manifest["settings"]) == (1, SETTINGS)
    assert {"python", "torch", "torchrl", "tensordict"} <= manifest["versions"].keys()
    assert {name.rpartition(".")[2] for name in there} == {"json", "npz", "bin", "memmap"}


def test_rotation_keeps_the_last_written_and_a_users_own_folders(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    first = save(store, 1)
    backups = [store.folder / "update_0000001_my_backup", store.folder / "update_0000099"]
    for backup in backups:
        shutil.copytree(first, backup)
    for update in (2, 3, 10):
        save(store, update)
    shutil.rmtree(backups[1])
    assert [path.name for path in store.paths()] == ["update_0000010", "update_0000003"]
    # A run that went back to an older checkpoint must not lose its new ones to the abandoned.
    save(store, 5)
    assert [path.name for path in store.paths()] == ["update_0000005", "update_0000010"]
    assert_loads(store.find(backups[0]))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("state.npz", b"", "has 0 bytes"),
        ("replay/manifest.json", None, "is missing"),
        ("manifest.json", b"{", "cannot be read"),
        ("manifest.json", None, "cannot be read"),
        # A reader might prefer files that are not listed to the verified ones, and unpickle them.
        ("state.pt", b"planted", "is not listed in manifest.json"),
        ("state/state.tdz", b"planted", "is not listed in manifest.json"),
    ],
)
def test_damage_is_named_with_the_intact_one(tmp_path, name, content, problem):
    store = CheckpointStore(tmp_path)
    older, newer = save(store, 1), save(store, 2)
    for path, remedy in ((newer, f"intact one is {older}"), (older, "no other intact checkpoint")):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).unlink(missing_ok=True)
        if content is not None:
            (path / name).write_bytes(content)
        with pytest.raises(DamagedError, match=f"{name} .*{problem}.*{remedy}"):
            store.load(path, STATE, SETTINGS)
        if path is newer:
            assert store.find() == newer  # it is not passed over
            assert_loads(older)


def test_another_format_is_refused(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    write_manifest(path, manifest | {"format_version": 99})
    with pytest.raises(DamagedError, match="format version 99, and this code reads 6"):
        CheckpointStore.load(path, STATE, SETTINGS)


@pytest.mark.parametrize(
    ("state", "settings", "expected"),
    [
        (STATE | {"mine": {}}, SETTINGS, "differ in 1 entries: mine: absent there, present here"),
        (state_of(nn.Linear(3, 4, bias=False)), SETTINGS, OTHER_SHAPES),
        (STATE, {"discounts": (0.9, 0.95)}, OTHER_DISCOUNTS),
    ],
    ids=["parts", "architecture", "settings"],
)
def test_other_parts_shapes_and_settings_are_refused(tmp_path, state, settings, expected):
    path = save(CheckpointStore(tmp_path), 1)
    with pytest.raises(ValueError, match=expected):
        CheckpointStore.load(path, state, settings)


def test_a_full_disk_is_explained_and_the_older_checkpoint_intact(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    older = save(store, 1)
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"must have room for .*state\.npz: \d+ bytes are free"):
        save(store, 2)
    assert [path.name for path in store.folder.iterdir()] == [older.name]
    assert_loads(older)


@pytest.mark.parametrize("run", ["run", "checkpoints/lake"])
def test_find(tmp_path, run):
    store = CheckpointStore(tmp_path / run)
    with pytest.raises(FileNotFoundError, match=rf"resuming needs a checkpoint, and .*{run} has"):
        store.find()
    path = save(store, 4)
    assert store.find() == store.find(path) == path
    assert CheckpointStore(tmp_path).find(tmp_path / run) == path
    for missing in (path.parent / "update_0000077", tmp_path / "checkpoints/other"):
        with pytest.raises(FileNotFoundError, match="has none"):
            store.find(missing)
    (path / "manifest.json").unlink()
    assert store.find() == store.find(path) == path
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="has none"):
        store.find()


@pytest.mark.parametrize("name", ["progress.csv", "checkpoints/update_0000003"])
def test_check_no_existing_run(tmp_path, name):
    check_no_existing_run(tmp_path / "not there")
    check_no_existing_run(tmp_path)
    (tmp_path / "checkpoints").mkdir()  # a run that died before anything was written
    check_no_existing_run(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds {name}. Choose another run_dir, resume"):
        check_no_existing_run(tmp_path)
