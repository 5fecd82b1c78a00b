"""Every trajectory encoder as the backbone of TorchRL's losses, over rows with resets inside."""

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
from torchrl.modules import NormalParamExtractor, QValueActor, TanhNormal, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, CQLLoss, DiscreteSACLoss, DQNLoss, REDQLoss, TD3Loss
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


def make_encoder(seq_model: str, **options) -> TensorDictSequential:
    torch.manual_seed(0)
    sizes = {} if seq_model == "identity" else {"d_model": 16, "num_layers": 1}
    return TensorDictSequential(
        MLPTimestepEncoder({"observation": (5,)}, hidden_size=16, num_layers=1, output_size=16),
        SEQ_MODELS[seq_model](16, context_length=T, **sizes, **options),
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


class StateActionValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(18, 1)

    def forward(self, state, action):
        return self.linear(torch.cat([state, action], -1))


def continuous_loss(cls, seq_model: str, **options):
    """A loss that stacks steps and next steps, actors and their targets, all under `torch.vmap`."""
    torch.manual_seed(0)
    head = nn.Linear(16, 2)
    actor = TensorDictSequential(
        make_encoder(seq_model), TensorDictModule(head, ["state"], ["action"])
    )
    if cls is not TD3Loss:
        head = nn.Sequential(nn.Linear(16, 4), NormalParamExtractor())
        actor = ProbabilisticTensorDictSequential(
            make_encoder(seq_model),
            TensorDictModule(head, ["state"], ["loc", "scale"]),
            ProbabilisticTensorDictModule(
                ["loc", "scale"], ["action"], distribution_class=TanhNormal, return_log_prob=True
            ),
        )
    critic = TensorDictSequential(
        make_encoder(seq_model),
        TensorDictModule(StateActionValue(), ["state", "action"], ["state_action_value"]),
    )
    spec = Bounded(-1, 1, shape=(2,))
    return cls(actor.eval(), critic.eval(), action_spec=spec, **options)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@every_encoder
@pytest.mark.parametrize("cls", [TD3Loss, CQLLoss, REDQLoss])
def test_steps_and_next_steps_under_vmap(double, cls, seq_model):
    batch, results = make_batch(), []
    batch["action"] = torch.rand(B, T, 2) * 2 - 1
    for deactivate in (False, True):
        loss_module = continuous_loss(cls, seq_model, deactivate_vmap=deactivate)
        torch.manual_seed(0)
        out = loss_module(batch.clone())
        sum(value for name, value in out.items() if name.startswith("loss")).backward()
        grads = {name: p.grad for name, p in loss_module.named_parameters() if p.grad is not None}
        results.append((out.select("loss_qvalue", "loss_actor").to_dict(), grads))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert len(results[0][1]) > 8


TRANSFORMERS = {
    "plain": {},
    "clipped": {"logit_clip": 0.5},
    "sinks": {"window": 3, "num_sinks": 1, "sink_bias": 0.5},
    "learned": {"positions": "learned", "max_positions": T + 2},
    "never several trials": {"segments": "never"},
}
BACKBONES = {(name, ""): {} for name in SEQ_MODELS} | {
    ("transformer", name): options for name, options in TRANSFORMERS.items()
}


def estimate(value_network, batch, **options):
    estimator = GAE(gamma=0.9, lmbda=0.9, value_network=value_network, **options)
    return estimator(batch.clone())["advantage"]


@pytest.mark.parametrize("backbone", BACKBONES, ids=" ".join)
@pytest.mark.parametrize("masked", [False, True])
def test_gae_under_vmap(backbone, masked):
    encoder = make_encoder(backbone[0], **BACKBONES[backbone])
    values = TensorDictModule(nn.Linear(16, 1), ["state"], ["state_value"])
    network, batch = TensorDictSequential(encoder, values).eval(), make_batch()
    if masked:
        batch["collector", "mask"] = torch.arange(T) < torch.tensor([T, 5, 1])[:, None]
        batch["next", "collector", "mask"] = batch["collector", "mask"]
    with set_recurrent_mode(True):
        found, expected = (estimate(network, batch, deactivate_vmap=d) for d in (False, True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_vmap_cannot_do_says_so():
    network = TensorDictSequential(
        make_encoder("gru"), TensorDictModule(nn.Linear(16, 1), ["state"], ["state_value"])
    )
    with pytest.raises(RuntimeError, match="got a single step of a .*deactivate_vmap=True"):
        estimate(network, make_batch())
    with (
        set_recurrent_mode(True),
        pytest.raises(RuntimeError, match="statistics of inputs can't follow.*deactivate_vmap"),
    ):
        estimate(network.train(), make_batch(), differentiable=True)
    free, batch = TensorDictSequential(make_encoder("feedforward"), network[1]).eval(), make_batch()
    torch.testing.assert_close(*(estimate(free, batch, deactivate_vmap=d) for d in (False, True)))
