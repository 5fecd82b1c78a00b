from __future__ import annotations

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.checkpoint import GlobalRNGState

from torchrl_amago.data import make_trial_buffer
from torchrl_amago.files import DamagedError, write_manifest
from torchrl_amago.trainers import CheckpointStore, describe_architecture, refuse_existing_run

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


def test_generators_come_back(tmp_path):
    store, rb = CheckpointStore(tmp_path), filled_buffer()
    path = store.save(3, {"rng": GlobalRNGState().state_dict()}, rb, FACTS)
    expected = torch.rand(5)
    torch.rand(3)
    GlobalRNGState().load_state_dict(store.load(path, FACTS)["rng"])
    assert torch.equal(torch.rand(5), expected)


def test_replay_comes_back(tmp_path):
    store, rb = CheckpointStore(tmp_path), filled_buffer()
    path = store.save(3, {"x": torch.ones(1)}, rb, FACTS)
    other = small_buffer()
    store.load_replay(path, other)
    assert (other[:] == rb[:]).all()
    assert other.write_count == 6


def test_an_empty_replay_can_be_saved(tmp_path):
    store = CheckpointStore(tmp_path)
    path = store.save(0, {"x": torch.ones(1)}, small_buffer(), FACTS)
    other = small_buffer()
    store.load_replay(path, other)
    assert len(other) == 0


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


def test_saving_again_replaces(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1, which=1)
    path = save(store, 1, which=2)
    assert store.load(path, FACTS)["which"] == 2
    assert [p.name for p in store.folder.iterdir()] == ["update_0000001"]


def test_a_failed_save_leaves_the_old(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 1, which=1)
    with pytest.raises(TypeError):
        save(store, 1, which=object())
    assert store.load(path, FACTS)["which"] == 1
    save(store, 2)
    assert not [p for p in store.folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("name", ["state.npz", "replay/manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_named_with_the_intact_one(tmp_path, name, damage):
    store = CheckpointStore(tmp_path)
    older, newer = save(store, 1), save(store, 2)
    file = newer / name
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "truncate":
        file.write_bytes(content[:middle])
    elif damage == "flip":
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()
    message = {"truncate": f"has {middle} bytes", "flip": "has changed", "delete": "is missing"}
    with pytest.raises(RuntimeError, match=f"{name} {message[damage]}.*intact one is {older}"):
        store.load(newer, FACTS)
    assert store.load(older, FACTS)["tensor"].tolist() == [0.0, 1.0, 2.0]


def test_no_intact_one_left(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 1)
    (path / "manifest.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"cannot be read.*no other intact checkpoint"):
        store.load(store.find(), FACTS)


def test_an_unreadable_checkpoint_is_not_passed_over(tmp_path):
    store = CheckpointStore(tmp_path)
    older, newer = save(store, 1), save(store, 2)
    (newer / "manifest.json").unlink()
    with pytest.raises(RuntimeError, match=f"intact one is {older}"):
        store.load(store.find(), FACTS)


def test_another_format_is_refused(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    manifest = json.loads((path / "manifest.json").read_text())
    write_manifest(path, manifest | {"format_version": 99})
    with pytest.raises(RuntimeError, match="format version 99, and this code reads 3"):
        CheckpointStore(tmp_path).load(path, FACTS)


def test_another_architecture_is_refused(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    here = {"loss.weight": "4x3 float32", "loss.gain": "2 float32"}
    expected = (
        "3 entries: loss.weight: 2x3 float32 in the checkpoint, 4x3 float32 here; "
        "loss.bias: 2 float32 in the checkpoint, absent here; loss.gain: absent in the checkpoint"
    )
    with pytest.raises(ValueError, match=expected):
        CheckpointStore(tmp_path).load(path, {**FACTS, "architecture": here})


def test_other_settings_are_refused(tmp_path):
    path = save(CheckpointStore(tmp_path), 1)
    expected = (
        r"into the settings .* discounts: \[0.9, 0.99\] in the checkpoint, \[0.9, 0.95\] here"
    )
    with pytest.raises(ValueError, match=expected):
        CheckpointStore(tmp_path).load(path, {**FACTS, "settings": {"discounts": (0.9, 0.95)}})


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


def test_describe_architecture_sees_modules_and_groups():
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    described = describe_architecture({"net": net}, torch.optim.SGD(net.parameters(), lr=1.0))
    assert described["net.0.weight"] == "1x2 float32"
    assert described["net.1.num_batches_tracked"] == "scalar int64"
    assert described["optimizer.group_0"] == "4 parameters"


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
def test_refuse_existing_run(tmp_path, name):
    refuse_existing_run(tmp_path)
    refuse_existing_run(tmp_path / "not there")
    (tmp_path / "checkpoints").mkdir()  # a run that died before anything was written
    refuse_existing_run(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match=f"holds {name}. Choose another run_dir, resume"):
        refuse_existing_run(tmp_path)
