from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn

from torchrl_amago._files import DamagedError, write_manifest
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.trainers import check_no_existing_run
from torchrl_amago.trainers.checkpoint import CheckpointStore, describe_architecture

ARCHITECTURE = {"loss.weight": "2x3 float32", "loss.bias": "2 float32"}
FACTS = {"architecture": ARCHITECTURE, "settings": {"discounts": [0.9, 0.99]}}


def small_buffer(capacity=20):
    return make_trial_buffer(capacity, slice_length=3, batch_size=2, warn_short=False)


def filled_buffer():
    rb = small_buffer()
    done = (torch.arange(6) % 3 == 2).unsqueeze(-1)
    rb.extend(TensorDict({"x": torch.randn(6, 2), "next": {"done": done}}, [6]))
    return rb


def save(store, update, **state):
    return store.save(update, {"tensor": torch.arange(3.0), **state}, filled_buffer(), FACTS)


@pytest.mark.parametrize("make_buffer", [filled_buffer, small_buffer], ids=["filled", "empty"])
def test_replay_comes_back(tmp_path, make_buffer):
    store, rb, other = CheckpointStore(tmp_path), make_buffer(), small_buffer()
    store.load_replay(store.save(3, {"x": torch.ones(1)}, rb, FACTS), other)
    assert len(rb) == len(other) == other.write_count
    assert not len(rb) or (other[:] == rb[:]).all()


def test_nothing_is_pickled(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    names = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert names == {".json", ".npz", ".bin", ".memmap"}


def test_manifest_lists_every_file(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    there = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file()}
    assert set(manifest["files"]) == there - {"manifest.json"}
    assert manifest["update"] == 1
    assert FACTS.items() <= manifest.items()
    assert {"python", "torch", "torchrl", "tensordict"} <= manifest["versions"].keys()


def test_rotation_keeps_the_last_written(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for update in (1, 2, 3, 10):
        save(store, update)
    assert [path.name for path in store.paths()] == ["update_0000010", "update_0000003"]
    # A run that went back to an older checkpoint must not lose its new ones to the abandoned.
    save(store, 5)
    assert store.latest().name == "update_0000005"
    assert [path.name for path in store.paths()] == ["update_0000005", "update_0000010"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("state.npz", b"", "has 0 bytes"),
        ("replay/manifest.json", None, "is missing"),
        ("manifest.json", b"{", "cannot be read"),
        ("manifest.json", None, "cannot be read"),
    ],
)
def test_damage_is_named_with_the_intact_one(tmp_path, name, content, problem):
    store = CheckpointStore(tmp_path)
    older, newer = save(store, 1), save(store, 2)
    for path, remedy in ((newer, f"intact one is {older}"), (older, "no other intact checkpoint")):
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
        with pytest.raises(DamagedError, match=f"{name} .*{problem}.*{remedy}"):
            store.load(path, FACTS)
        if path is newer:
            assert store.find() == newer  # it is not passed over
            assert store.load(older, FACTS)["tensor"].tolist() == [0.0, 1.0, 2.0]


def test_another_format_is_refused(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    write_manifest(path, manifest | {"format_version": 99})
    with pytest.raises(RuntimeError, match="format version 99, and this code reads 4"):
        CheckpointStore(tmp_path).load(path, FACTS)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (
            {"architecture": {"loss.weight": "4x3 float32", "loss.gain": "2 float32"}},
            "the architecture saved .* 3 entries: loss.weight: 2x3 float32 there, 4x3 float32 here; "
            "loss.bias: 2 float32 there, absent here; loss.gain: absent there",
        ),
        (
            {"settings": {"discounts": (0.9, 0.95)}},
            r"the settings saved .* discounts: \[0.9, 0.99\] there, \[0.9, 0.95\] here",
        ),
    ],
)
def test_other_facts_are_refused(tmp_path, here, expected):
    path = save(CheckpointStore(tmp_path), 1)
    with pytest.raises(ValueError, match=expected):
        CheckpointStore(tmp_path).load(path, {**FACTS, **here})


def test_the_architecture_is_that_of_modules_and_groups():
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    described = describe_architecture({"net": net}, torch.optim.SGD(net.parameters(), lr=1.0))
    assert described["net.0.weight"] == "1x2 float32"
    assert described["net.1.num_batches_tracked"] == "scalar int64"
    assert described["optimizer.group_0"] == "4 parameters"


@pytest.mark.parametrize(
    "name", ["state.pt", "state/state.tdz", "replay/storage/more", "state.npz~"]
)
def test_files_that_are_not_listed_are_refused(tmp_path, name):
    """A reader might prefer them to the verified ones, and unpickle them."""
    path = save(CheckpointStore(tmp_path), 1)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(b"cos\nsystem\n(S'touch planted'\ntR.")
    with pytest.raises(DamagedError, match=f"{name} is not listed in manifest.json"):
        CheckpointStore(tmp_path).load(path, FACTS)


def test_a_users_own_folders_are_never_removed(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    first = save(store, 1)
    backups = [store.folder / "update_0000001_my_backup", store.folder / "update_0000099"]
    for backup in backups:
        shutil.copytree(first, backup)
    for update in (2, 3):
        save(store, update)
    assert all(backup.exists() for backup in backups)
    assert not first.exists()
    assert store.load(store.find(backups[0]), FACTS)["tensor"].tolist() == [0.0, 1.0, 2.0]


def test_a_full_disk_is_explained_and_the_older_checkpoint_intact(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    older = save(store, 1)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"must have room for .*state\.npz: \d+ bytes are free"):
        save(store, 2)
    assert [path.name for path in store.folder.iterdir()] == [older.name]
    assert store.load(older, FACTS)["tensor"].tolist() == [0.0, 1.0, 2.0]


def test_find(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"resuming needs a checkpoint, and .*run has none"):
        store.find()
    path = save(store, 4)
    assert (
        store.find() == store.find(path) == CheckpointStore(tmp_path).find(tmp_path / "run") == path
    )
    with pytest.raises(FileNotFoundError, match="has none"):
        store.find(path.parent / "update_0000077")
    shutil.rmtree(path)
    with pytest.raises(FileNotFoundError, match="has none"):
        store.find()


def test_find_in_a_run_below_a_folder_called_checkpoints(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints/lake")
    with pytest.raises(FileNotFoundError, match=r"lake has none"):
        store.find()
    path = save(store, 4)
    with pytest.raises(FileNotFoundError, match=r"other has none"):
        store.find(tmp_path / "checkpoints/other")
    assert store.find() == store.find(path) == path
    (path / "manifest.json").unlink()
    assert store.find() == store.find(path) == path


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep_checkpoints must be at least 1, got 0"):
        CheckpointStore(tmp_path, keep=0)


@pytest.mark.parametrize("name", ["progress.csv", "checkpoints/update_0000003"])
def test_check_no_existing_run(tmp_path, name):
    check_no_existing_run(tmp_path)
    check_no_existing_run(tmp_path / "not there")
    (tmp_path / "checkpoints").mkdir()  # a run that died before anything was written
    check_no_existing_run(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds {name}. Choose another run_dir, resume"):
        check_no_existing_run(tmp_path)
