"""Two processes as ranks on gloo: the updates of one process, the trainer, stops and errors."""

from __future__ import annotations

import json

import pytest
import torch

from tests.processes import forked
from tests.scaling import ranks_jobs as jobs
from torchrl_amago.progress import read_progress
from torchrl_amago.scaling import Ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    """What both ranks saw in all jobs of one pair of processes."""
    processes = [forked.Process(target=jobs.run_rank, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
            pytest.fail("the ranks hang")
    results = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]
    assert [result.get("error") for result in results] == [None, None]
    return results


@pytest.mark.parametrize("name", jobs.LOSSES)
def test_two_ranks_equal_one(ranks, name):
    """After 20 updates, or 5; the first rank has 8 of 62 steps, in 2 of 6 slices."""
    jobs.prepare()
    alone, (first, second) = jobs.updates(Ranks(), name), (result[name] for result in ranks)
    assert first["state"].keys() == alone["state"].keys()
    for key, value in alone["state"].items():
        found = first["state"][key]
        torch.testing.assert_close(found, second["state"][key], rtol=0, atol=0, msg=key)
        scale = float(value.abs().max()) if value.numel() else 0.0
        # Batch normalisation leaves no gradient but rounding to the bias before it.
        atol = max(1e-5 * scale, 1e-9 if name == "normalized states" else 0.0)
        torch.testing.assert_close(found, value, rtol=0, atol=atol, msg=key)
    bins = "popart." if name in ("amago2", "relative bins") else ""
    assert alone["state"][f"value_codec.{bins}mu"].any()
    # Of the same weights; those of the last update have drifted apart by rounding.
    for key, value in alone["first"].items():
        found = first["first"][key]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6, check_dtype=False, msg=key)
        assert first["first"][key].equal(second["first"][key])


@pytest.mark.parametrize("kind", ["data", "loss"])
def test_nonfinite_numbers_of_one_rank_stop_all_before_anything_changes(ranks, folder, kind):
    for rank, result in enumerate(ranks):
        assert "must be finite" in (message := result["nonfinite"][kind])
        assert (folder / "nonfinite" / ("", "rank_1")[rank] / "nonfinite_batch").exists()
        assert result["nonfinite"]["weights"]
        if kind == "data":  # found before the forward, which moves statistics
            assert "rank 1: ('next', 'reward') (1 of 8 steps)" in message
            assert result["nonfinite"]["unchanged"]


def test_a_run_of_two_ranks(ranks, folder):
    first, second = (result["run"] for result in ranks)
    assert (first["outcome"], first["updates"], first["frames"]) == ("finished", 8, 288)
    assert {n: second[n] for n in ("outcome", "updates", "frames")} == {
        n: first[n] for n in ("outcome", "updates", "frames")
    }
    assert_same(first, second)
    # The shares of a batch of 5, of trials that each rank draws for itself.
    assert {size for size, _ in first["rows"]} == {3}
    assert {size for size, _ in second["rows"]} == {2}
    drawn = [
        [number for _, numbers in one["rows"] for number in numbers[:2]] for one in (first, second)
    ]
    assert drawn[0] != drawn[1]
    assert first["draw"] != second["draw"]


def test_another_number_of_ranks_goes_on(ranks, folder):
    """Two ranks went on to update 12, and one process does to update 16."""
    first, second = (result["resumed"] for result in ranks)
    assert (first["outcome"], first["updates"]) == ("finished", 12)
    assert len(first["rows"]) == len(second["rows"]) == 4
    assert_same(first, second)
    assert first["draw"] != second["draw"]
    manifest = json.loads((folder / "run/checkpoints/update_0000012/manifest.json").read_text())
    assert (manifest["options"]["ranks"], manifest["options"]["batch_size"]) == (2, 5)
    alone = jobs.train(Ranks(), folder / "run", resume=True, total_updates=16)
    assert (alone["outcome"], alone["updates"]) == ("finished", 16)
    rows = read_progress(folder / "run")
    assert rows["update"].tolist() == [2, 4, 6, 8, 10, 12, 14, 16]  # each once, by the first rank
    assert rows["eval/x"][[1, 3, 5]].tolist() == [1.0, 1.0, 1.0]
    assert not (folder / "run/rank_1").exists()


def test_ranks_of_two_machines_have_the_same_trials(ranks):
    first, second = (result["machines"] for result in ranks)
    assert first["resumed"]["frames"] == second["resumed"]["frames"] > 300  # some were evicted
    assert first["number"].tolist() == second["number"].tolist()
    assert first["length"].tolist() == second["length"].tolist()
    for key, value in first["steps"].items(True, True):
        assert value.equal(second["steps"][key])
        assert value.equal(second["copy"][key]), key  # by a folder that had none of them
    assert_same(first["resumed"], second["resumed"])


def test_a_signal_to_one_rank_stops_all_behind_the_same_update(ranks, folder):
    """SIGTERM came twice, as from a batch system and from torchrun."""
    assert [result["preempted"]["outcome"] for result in ranks] == ["preempted", "preempted"]
    assert [result["preempted"]["updates"] for result in ranks] == [3, 3]
    alone = jobs.train(Ranks(), folder / "preempted", resume=True, total_updates=5)
    assert (alone["outcome"], alone["updates"]) == ("finished", 5)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("rows", "ValueError", "must be at least their number, got 1 rows for 2 ranks"),
        ("used", "FileExistsError", "a new run needs a folder without one"),
        ("missing", "FileNotFoundError", "resuming needs a checkpoint"),
        ("folders", "ValueError", "the ranks of a machine must read one folder"),
    ],
)
def test_errors_are_those_of_all_ranks(ranks, name, kind, message):
    for result in ranks:
        assert result["errors"][name][0] == kind
        assert message in result["errors"][name][1]


def test_alone():
    ranks = Ranks.from_environment()
    assert ranks == Ranks(rank=0, size=1)
    assert ranks.share(3) == 3
    assert [Ranks(rank, 3).share(8) for rank in range(3)] == [3, 3, 2]
    x = torch.ones(2)
    assert ranks.sum(x)[0] is x
    assert (ranks.gather(1), ranks.broadcast(1), ranks.agree("a", "ab")) == ([1], 1, "a")
    with pytest.raises(KeyError, match="'a'"):
        ranks.on_first(lambda: {}["a"])


def assert_same(first: dict, second: dict) -> None:
    """The ranks' weights, targets, statistics and moments are bitwise the same."""
    for key, value in first["loss"].items():
        assert value.equal(second["loss"][key]), key
    for number, moments in first["moments"].items():
        for key, value in moments.items():
            assert value.equal(second["moments"][number][key]), key
