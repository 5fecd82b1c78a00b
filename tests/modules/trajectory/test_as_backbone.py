"""Every trajectory encoder as the backbone of TorchRL's own losses, over rows [B, T] with resets inside."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Bounded, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import QValueActor, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, DiscreteSACLoss, DQNLoss
from torchrl.objectives.value import GAE

from torchrl_amago.modules import SEQ_MODELS, MLPTimestepEncoder
from torchrl_amago.modules.timestep import TIMESTEP_ENCODERS

# Updates by hand need no target updater; TorchRL warns of its absence.
# Some operators have no rule for vmap, which then calls them once for each network.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No target network updater"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet"),
]

B, T, ACTIONS = 3, 8, 4
every_encoder = pytest.mark.parametrize("seq_model", sorted(SEQ_MODELS))


def make_encoder(seq_model: str) -> TensorDictSequential:
    torch.manual_seed(0)
    options = {} if seq_model == "identity" else {"d_model": 16, "num_layers": 1}
    return TensorDictSequential(
        MLPTimestepEncoder({"observation": (5,)}, hidden_size=16, num_layers=1, output_size=16),
        SEQ_MODELS[seq_model](16, context_length=T, **options),
    )


def make_steps(num_steps: int) -> TensorDict:
    """Rows whose second trial begins at different steps."""
    is_init = torch.zeros(B, num_steps, 1, dtype=torch.bool)
    time_idx = torch.arange(num_steps).expand(B, -1).unsqueeze(-1).clone()
    for row, start in enumerate((2, 5, num_steps)):
        is_init[row, [0, *([start] if start < num_steps else [])]] = True
        time_idx[row, start:] -= start
    return TensorDict(
        observation=torch.randn(B, num_steps, 5),
        time_idx=time_idx,
        is_init=is_init,
        batch_size=[B, num_steps],
    )


def make_batch() -> TensorDict:
    steps = make_steps(T + 1)
    batch, batch["next"] = steps[:, :-1].clone(), steps[:, 1:].clone()
    done = batch["next", "is_init"].clone()
    batch["next"].update({"done": done, "terminated": done, "reward": torch.randn(B, T, 1)})
    batch["next", "is_init"] = torch.zeros_like(done)
    batch["action"] = torch.randint(ACTIONS, (B, T))
    return batch


def assert_encoder_learns(encoder: TensorDictSequential, loss: TensorDict) -> None:
    params = list(encoder.parameters())
    before = [p.grad for p in params]
    sum(value for name, value in loss.items() if name.startswith("loss")).backward()
    assert before == [None] * len(params)
    assert len(params) >= 6
    for name, p in encoder.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@every_encoder
def test_ppo(seq_model):
    encoder = make_encoder(seq_model)
    size = encoder[1].output_size
    actor = ProbabilisticTensorDictSequential(
        encoder,
        TensorDictModule(nn.Linear(size, ACTIONS), ["state"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"], ["action"], distribution_class=Categorical, return_log_prob=True
        ),
    )
    critic = TensorDictModule(nn.Linear(size, 1), ["state"], ["state_value"])
    batch = make_batch()
    with torch.no_grad(), set_recurrent_mode(True):
        batch["action_log_prob"] = actor.get_dist(batch.copy()).log_prob(batch["action"])
    batch["state_value"], batch["next", "state_value"] = torch.randn(2, B, T, 1)
    GAE(gamma=0.9, lmbda=0.9, value_network=None)(batch)
    loss_module = ClipPPOLoss(actor, critic)
    with set_recurrent_mode(True):
        loss = loss_module(batch)
    assert_encoder_learns(encoder, loss)


@every_encoder
def test_dqn(seq_model):
    encoder = make_encoder(seq_model)
    values = TensorDictModule(
        nn.Linear(encoder[1].output_size, ACTIONS), ["state"], ["action_value"]
    )
    network = TensorDictSequential(encoder, values)
    actor = QValueActor(network, in_keys=network.in_keys, action_space="categorical")
    loss_module = DQNLoss(actor, action_space="categorical", delay_value=True)
    with set_recurrent_mode(True):
        loss = loss_module(make_batch())
    assert_encoder_learns(encoder, loss)


SPECS = {
    "pixels": Bounded(0, 255, shape=(6, 6, 1), dtype=torch.uint8),
    "observation": Unbounded(shape=(5,)),
    "cell": CategoricalSpec(3),
}
TIMESTEP = {  # entries and options of each timestep encoder
    "mlp": (["observation"], {"hidden_size": 16}),
    "cnn": (["pixels", "observation"], {"trunk": "grid", "random_shift": 1}),
    "combined": (list(SPECS), {"entries": {"pixels": {"trunk": "grid"}}}),
}


def make_sac(
    timestep: str, seq_model: str, training: bool, **options
) -> tuple[DiscreteSACLoss, TensorDict]:
    """A loss that calls two critics, memory included, under `torch.vmap`."""
    torch.manual_seed(0)
    keys, timestep_options = TIMESTEP[timestep]
    encoder = TIMESTEP_ENCODERS[timestep].from_specs(
        {key: SPECS[key] for key in keys}, output_size=16, **timestep_options
    )
    sizes = {} if seq_model == "identity" else {"d_model": 16, "num_layers": 1}
    critic = TensorDictSequential(
        encoder,
        SEQ_MODELS[seq_model](16, context_length=T + 1, **sizes),
        TensorDictModule(nn.Linear(16, ACTIONS), ["state"], ["action_value"]),
    ).train(training)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(nn.Linear(5, ACTIONS), ["observation"], ["logits"]),
        ProbabilisticTensorDictModule(
            ["logits"], ["action"], distribution_class=Categorical, return_log_prob=True
        ),
    )
    loss_module = DiscreteSACLoss(
        actor, critic, num_actions=ACTIONS, action_space="categorical", **options
    )
    batch = make_batch()
    for td in (batch, batch["next"]):
        td.update({key: SPECS[key].expand(B, T, *SPECS[key].shape).rand() for key in keys})
    return loss_module, batch


@pytest.mark.parametrize(
    ("timestep", "seq_model"),
    [("mlp", name) for name in sorted(SEQ_MODELS)]
    + [("cnn", "identity"), ("combined", "identity")],
)
def test_ensembles_under_vmap(timestep, seq_model):
    results = []
    for deactivate in (False, True):
        loss_module, batch = make_sac(timestep, seq_model, False, deactivate_vmap=deactivate)
        with set_recurrent_mode(True):
            loss = loss_module(batch)["loss_qvalue"]
        loss.backward()
        grads = {name: p.grad for name, p in loss_module.named_parameters() if p.grad is not None}
        results.append((loss, grads))
    (loss, grads), (expected, expected_grads) = results
    torch.testing.assert_close(loss, expected)
    assert len(grads) > 4
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize(("timestep", "seq_model"), [("mlp", "transformer"), ("cnn", "identity")])
def test_random_numbers_under_vmap(timestep, seq_model):
    loss_module, batch = make_sac(timestep, seq_model, True)
    losses = []
    for _ in range(2):
        with set_recurrent_mode(True):
            losses.append(loss_module(batch)["loss_qvalue"].item())
    assert losses[0] != losses[1]
