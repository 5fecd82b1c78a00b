"""The waits of an update and of a policy's step for a GPU, counted on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from tests.synchronisations import synchronisations
from tests.toy_env import ACTIONS, Toy
from torchrl_amago import amago_loss, make_policy, make_trial_env
from torchrl_amago._cpu import cpu_paths
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.modules.trajectory import RingCache
from torchrl_amago.objectives import LOSSES
from torchrl_amago.trainers import FiniteOptimizationStepper, NonFiniteError, make_optimizer

ROWS, T = 4, 12
SIZES = dict(
    timestep_options={"hidden_size": 16, "output_size": 16},
    actor_options={"hidden_size": 16},
)


def make_parts(
    actions="categorical", loss="amago", seq_model="transformer", preset="robust", **sizes
):
    env = make_trial_env(Toy(ACTIONS[actions], ROWS), horizon=10**6)
    policy = make_policy(
        env,
        context_length=T,
        seq_model=seq_model,
        seq_model_options={} if seq_model == "identity" else {"d_model": 16, **sizes},
        exploration={},
        **SIZES,
    )
    loss = LOSSES[loss](policy, preset=preset, critic_options={"hidden_size": 16})
    loss.target_update = SoftUpdate(loss, tau=0.1)
    batch = env.rollout(T, break_when_any_done=False)
    mask = torch.arange(T) < torch.tensor([[T], [T], [5], [1]])
    batch["collector"] = TensorDict(mask=mask, batch_size=[ROWS, T])
    return env, policy, loss, batch


def trainer_of(loss, optimizer=None):
    optimizer = optimizer or make_optimizer(loss)
    return SimpleNamespace(loss_module=loss, optimizer=optimizer, replay_buffer=None)


@pytest.mark.parametrize(
    ("actions", "loss", "seq_model"),
    [("categorical", "amago", seq_model) for seq_model in SEQ_MODELS]
    + [("continuous", loss, "transformer") for loss in LOSSES]
    + [("categorical", "amago2", "transformer")],
)
def test_an_update_waits_once(actions, loss, seq_model):
    *_, loss, batch = make_parts(actions, loss, seq_model)
    trainer, stepper = trainer_of(loss), FiniteOptimizationStepper(1.0)
    batch = loss.check(batch)
    stepper.step(trainer, batch)  # AdamW makes its state
    with synchronisations() as found:
        stepper.step(trainer, batch)
        loss.target_update.step()
    assert found == {"_local_scalar_dense": 1}  # is all finite?
    with synchronisations() as found:
        loss(batch)
    assert found == {}


@pytest.mark.parametrize("seq_model", SEQ_MODELS)
def test_a_step_does_not_wait(seq_model):
    env, policy, *_ = make_parts(seq_model=seq_model)
    step = policy(env.reset())
    with synchronisations():
        policy(step)  # its stream is known from here on
    with synchronisations() as found:
        for _ in range(3):
            step["is_init"] = torch.rand(ROWS, 1) < 0.5
            step = policy(step)
    assert found == {}


@pytest.mark.filterwarnings("ignore:No target network updater")  # it can't be on that device
@pytest.mark.parametrize("actions", ["categorical", "continuous"])
def test_a_loss_needs_no_data(actions):
    """On the meta device nothing can be read, and tensors of a CPU can't be mixed in."""
    env = make_trial_env(Toy(ACTIONS[actions], ROWS), horizon=10**6)
    policy = make_policy(env, context_length=T, seq_model_options={"d_model": 16}, **SIZES)
    batch = env.rollout(T, break_when_any_done=False)
    batch["collector"] = TensorDict(mask=torch.ones(ROWS, T).bool(), batch_size=[ROWS, T])
    loss = amago_loss(policy.to("meta"))
    out = loss(loss.check(batch).to("meta"))
    (out["loss_actor"] + out["loss_qvalue"]).backward()
    assert all(p.grad.device.type == "meta" for p in policy.parameters() if p.requires_grad)


def test_a_checked_batch_gives_the_same_losses():
    *_, loss, batch = make_parts()
    loss.eval()
    torch.manual_seed(0)
    expected = loss(batch.clone())
    checked = loss.check(batch.clone())
    torch.manual_seed(0)
    found = loss(checked)
    assert all(torch.equal(found[key], expected[key]) for key in expected.keys())  # noqa: SIM118


def test_a_check_splits_trials_and_finds_bad_data():
    *_, loss, batch = make_parts()
    two = batch.clone()
    two["is_init"][0, 4] = True
    assert loss.check(two).shape == (ROWS + 1, T)
    bad = batch.clone()
    bad["action"][1, 2] = 9
    with pytest.raises(ValueError, match="1 stored actions"):
        loss.check(bad)


def test_what_is_not_finite_changes_no_weight(tmp_path):
    # RunningScale would move what the second update has changed into the last layers.
    *_, loss, batch = make_parts(preset="paper")
    trainer, stepper = trainer_of(loss), FiniteOptimizationStepper(1.0, dump_dir=tmp_path)
    batch = loss.check(batch)
    with cpu_paths(False):
        stepper.step(trainer, batch)
        stepper.step(trainer, batch)
        before = {name: p.clone() for name, p in loss.named_parameters()}
        steps = [int(state["step"]) for state in trainer.optimizer.state.values()]
        batch["next", "reward"][0, 0] = torch.inf
        with pytest.raises(NonFiniteError, match="'loss_qvalue' "):
            stepper.step(trainer, batch)
    assert not hasattr(trainer.optimizer, "found_inf")  # else it would stop all later steps
    assert all(torch.equal(p, before[name]) for name, p in loss.named_parameters())
    assert steps == [int(state["step"]) for state in trainer.optimizer.state.values()]


def test_a_ring_hides_what_it_does_not_zero():
    """NaN in a trial is gone with it, as on a CPU."""
    cpu, gpu = (RingCache(1, 2, 2, 4, context_length=5, num_sinks=1) for _ in range(2))
    torch.manual_seed(0)
    for step in range(20):
        rows = torch.rand(2) < 0.2
        key, value, query = torch.randn(3, 2, 2, 4)
        out = []
        for cache, enabled in ((cpu, True), (gpu, False)):
            with cpu_paths(enabled):
                cache.clear(rows)
                cache.advance()
                cache.mark_sinks(torch.tensor([step, step]))
                bad = torch.where(torch.tensor(step == 7), torch.nan, key)
                cache.write(0, bad if cache is gpu else key, value)
                out.append(cache.attend(0, query))
        if step == 8:
            rows = torch.ones(2, dtype=torch.bool)
            for cache in (cpu, gpu):
                with cpu_paths(cache is cpu):
                    cache.clear(rows)
        elif step != 7:
            torch.testing.assert_close(*out)


def test_a_stream_is_read_where_another_wrote_it():
    env, policy, *_ = make_parts()
    with cpu_paths(False):
        one, other = policy(env.reset()), policy(env.reset())
        numbers = [int(td["_stream"][0]) for td in (one, other)]
        assert numbers[0] != numbers[1]
        for td, number in ((one, numbers[0]), (other, numbers[1]), (one.clone(), numbers[0])):
            td["is_init"] = torch.zeros(ROWS, 1, dtype=torch.bool)
            assert int(policy(td)["_stream"][0]) == number
