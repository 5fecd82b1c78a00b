"""The ablations: what each variant changes, the figures against those by hand, and the whole script, briefly."""

from __future__ import annotations

import sys
from pathlib import Path

import ablations_page as page
import ablations_variants as variants
import numpy as np
import pytest
import torch

from tests.processes import forked
from tests.scripts import import_script, run_script
from torchrl_amago import HLGauss, PopArt, TwoHot
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.modules import DISCOUNTS, FeedForwardEncoder, TransformerEncoder

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {
    "updates_per_round": 2,
    "num_envs": 4,
    "batch_size": 2,
    "d_model": 16,
    "hidden_size": 8,
    "num_layers": 1,
    "eval_trials": 3,
    "eval_interval": 2,
}
# What the baseline is, and what each variant must have instead: all that `describe` reads.
BASELINE = {
    "discounts": DISCOUNTS,
    "codec": PopArt,
    "popart": True,
    "coefficients": (1.0, 0.1),
    "n_step": 1,
    "encoder": TransformerEncoder,
    "takes_actions": False,
    "range": None,
}
CHANGES = {
    "baseline": {},
    "discounts_1": {"discounts": (0.999,)},
    "discounts_3": {"discounts": (0.9, 0.99, 0.999)},
    "no_popart": {"popart": False},
    "online_only": {"coefficients": (1.0, 0.0)},
    "offline_only": {"coefficients": (0.0, 1.0)},
    "two_hot": {"codec": TwoHot, "range": (-55.0, 55.0)},
    "hl_gauss": {"codec": HLGauss, "range": (-55.0, 55.0)},
    "n_step_3": {"n_step": 3},
    "memory_free": {"encoder": FeedForwardEncoder},
}


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return import_script(EXAMPLES / "ablations.py", monkeypatch)


def write_run(folder: Path, returns: list[float], updates: int, seconds: float) -> None:
    """A finished run of trials with two episodes: the first fails, the last succeeds if any returns."""
    folder.mkdir(parents=True)
    trial_return = torch.tensor(returns)
    episode_return = torch.stack([torch.zeros_like(trial_return), trial_return], -1)
    steps = torch.full((len(returns),), 9)
    TrialResults(episode_return, episode_return > 0, trial_return, steps).save(
        folder / "evaluation.npz"
    )
    rows = f"update,seconds_training\n1,0.5\n{updates},{seconds}\n"
    (folder / "progress.csv").write_text(rows)


def describe(trainer, policy) -> dict:
    loss = trainer.loss_module
    codec = loss.value_codec
    bins = getattr(codec, "bins", None)
    if bins is not None and codec.symlog:
        bins = bins.sign() * bins.abs().expm1()
    return {
        "discounts": tuple(round(discount, 6) for discount in loss.discounts.tolist()),
        "codec": type(codec),
        "popart": getattr(codec, "popart", codec).enabled,
        "coefficients": (loss.online_coeff, loss.offline_coeff),
        "n_step": loss.n_step,
        "encoder": type(policy.encoder.module[1]),
        "takes_actions": loss.takes_actions,
        "range": None if bins is None else tuple(round(x) for x in bins[[0, -1]].tolist()),
    }


def test_every_variant_is_tested(ablations):
    assert CHANGES.keys() == ablations.VARIANTS.keys()


@pytest.mark.filterwarnings("ignore:.*constrained_layout")
@pytest.mark.parametrize("variant", CHANGES)
def test_a_variant_trains_with_one_change(ablations, variant, monkeypatch, tmp_path):
    made = []
    make_trainer = variants.make_trainer

    def remember(env, policy, **options):
        made.append((make_trainer(env, policy, **options), policy))
        return made[-1][0]

    monkeypatch.setattr(variants, "make_trainer", remember)
    monkeypatch.setattr(variants, "DEBUG", TINY)
    assert variants.train(variant, tmp_path / variant / "7", 7, updates=2, debug=True) is not None
    assert describe(*made[0]) == {**BASELINE, **CHANGES[variant]}
    assert made[0][0].seed == 7
    # Of the example's 2400 updates, exploration fades over 200,000 steps.
    assert made[0][1].exploration.anneal_frames == 166
    assert page.is_finished(tmp_path / variant / "7", 2)


def test_an_interrupted_run_resumes(ablations, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(variants, "resume_if_asked", lambda args, _: given.append(args))
    monkeypatch.setattr(variants, "final_evaluation", lambda *_: None)
    monkeypatch.setattr("torchrl_amago.AMAGOTrainer.train", lambda _: "finished")
    variants.train("n_step_3", tmp_path, 2, updates=10)
    assert given[0].resume  # if there is something
    assert "--resume" not in given[0].resume_command()


def test_the_table_against_figures_by_hand(ablations, tmp_path, capsys):
    # Seeds' means 1, 2, 3, 4, 15: without the lowest and the highest, 3 on average.
    for seed, mean in enumerate([4.0, 1.0, 15.0, 2.0, 3.0]):
        write_run(tmp_path / "baseline" / str(seed), [mean] * 4, updates=8, seconds=10.0 + seed)
    write_run(tmp_path / "two_hot" / "0", [0.0, 0.0, 0.0, 2.0], updates=8, seconds=5.0)
    variants = ("baseline", "n_step_3", "two_hot")
    args = ablations.Args(run_dir=tmp_path, variants=variants, seeds=tuple(range(5)), updates=8)
    scores = page.read_scores(args)
    assert list(scores) == ["baseline", "two_hot"]
    point, low, high = scores["baseline"].trial_return
    assert point == pytest.approx(3.0)
    # All trials of a seed are alike, so that only the draw of seeds counts.
    draws = np.random.default_rng(1).choice([4.0, 1.0, 15.0, 2.0, 3.0], (100_000, 5))
    expected = np.percentile(np.sort(draws)[:, 1:4].mean(1), [2.5, 97.5])
    np.testing.assert_allclose([low, high], expected, atol=0.35)
    assert scores["baseline"][2:] == pytest.approx((0.0, 1.0, 12.0))
    # One seed, four trials: the sum of four draws of 0, 0, 0, 2, over four.
    assert scores["two_hot"].trial_return == pytest.approx((0.5, 0.0, 1.5))
    page.write_page(args, scores)
    written = (tmp_path / "ablations.md").read_text("utf-8")
    changed = ablations.VARIANTS["two_hot"].change
    assert f"| `two_hot` | {changed} | 1 | 0.500 [0.000, 1.500] | 0.000 | 0.250 | 5 |" in written
    assert "--variants baseline n_step_3 two_hot --seeds 0 1 2 3 4 --updates 8" in written
    assert "| `two_hot` |" in capsys.readouterr().out


def test_one_seed_has_the_interval_of_its_trials(ablations):
    returns = np.random.default_rng(0).normal(4.0, 1.0, size=400)
    point, low, high = page.bootstrap_seeds_and_trials([returns])
    assert point == pytest.approx(returns.mean())
    error = 1.96 * returns.std() / 20
    np.testing.assert_allclose([low, high], [point - error, point + error], atol=0.15 * error)


def test_results_of_another_budget_are_refused(ablations, tmp_path):
    args = ablations.Args(run_dir=tmp_path)
    write_run(args.folder("baseline", 1), [1.0], updates=40, seconds=1.0)
    message = r"the same --updates, got 1000, and .*1 has a result after 40\. Give --updates 40"
    with pytest.raises(ValueError, match=message):
        ablations.train_missing(args)
    with pytest.raises(ValueError, match=message):
        page.read_scores(args)


def test_nothing_to_plot(ablations, tmp_path):
    args = ablations.Args(run_dir=tmp_path, variants=("two_hot",), plot_only=True)
    with pytest.raises(ValueError, match=r"at least one finished run, .* none .*\(two_hot\)"):
        ablations.main(args)


@pytest.mark.filterwarnings("ignore:.*constrained_layout")
def test_debug_run_and_rerun(ablations, tmp_path, monkeypatch, capsys):
    """Each run is a process of its own, here forked from one that has imported the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations.multiprocessing, "get_context", lambda _: forked)

    def run(*variants):
        flags = ["--debug", "--threads", "1", "--updates", "4", "--run-dir", "all"]
        monkeypatch.setattr(sys, "argv", ["ablations.py", *flags, "--variants", *variants])
        ablations.main(ablations.read_command_line())

    run("baseline", "two_hot")
    assert capsys.readouterr().out.count(": training") == 2
    page = (tmp_path / "all" / "ablations.md").read_text("utf-8")
    assert "| `baseline` |" in page
    assert "| `two_hot` |" in page
    picture = tmp_path / "all" / "figures" / "ablations.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = tmp_path / "all" / "two_hot" / "1" / "evaluation.npz"
    written = results.stat().st_mtime_ns
    picture.unlink()
    # A run that fails doesn't keep the others from the page, and is named.
    broken = tmp_path / "all" / "memory_free" / "1"
    broken.mkdir(parents=True)
    (broken / "progress.csv").write_text("update\n20\n")
    with pytest.raises(SystemExit, match="No result.*: all/memory_free/1$"):
        run("two_hot", "memory_free")
    assert "two_hot/1: has finished before, skipped" in capsys.readouterr().out
    assert results.stat().st_mtime_ns == written
    assert picture.exists()


def test_an_unknown_variant_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_script(EXAMPLES / "ablations.py", "--variants", "baseline", "popart_off")
    assert done.returncode == 2
    assert "popart_off" in done.stderr
    assert "no_popart" in done.stderr
    assert not list(tmp_path.glob("runs*"))
