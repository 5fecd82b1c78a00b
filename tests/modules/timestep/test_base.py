"""The contract of timestep encoders: padding and hidden entries have no influence."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch._dynamo.testing import CompileCounter
from torchrl.modules import set_recurrent_mode

from tests.modules.timestep.entries import MAKERS, SPECS, make_batch
from torchrl_amago.modules import TimestepEncoder
from torchrl_amago.modules.timestep import flatten_and_join

every_encoder = pytest.mark.parametrize("name", sorted(MAKERS))


def poison(td: TensorDict, where: torch.Tensor) -> TensorDict:
    """Worst that a dtype can hold, where asked."""
    td = td.clone()
    for key in SPECS:
        value = td[key]
        if value.is_floating_point():
            value[where] = float("nan")
        elif value.dtype != torch.bool:
            value[where] = torch.iinfo(value.dtype).max
    return td


@every_encoder
@pytest.mark.parametrize("compiling", [False, True])
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_what_padding_holds_changes_nothing(name, compiling, lengths):
    torch.manual_seed(0)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    clean = make_batch(len(lengths), 4)
    results = []
    encoder = MAKERS[name]()
    with pytest.MonkeyPatch.context() as patch, set_recurrent_mode(True):
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        for td in (clean, poison(clean, ~mask)):
            other = copy.deepcopy(encoder)
            td["collector", "mask"] = mask
            torch.manual_seed(1)
            out = other(td)["timestep"]
            out[mask].square().sum().backward()
            state = dict(other.named_buffers())
            state |= {n: p.grad for n, p in other.named_parameters()}
            results.append((out[mask], out, state))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[1][1].isfinite().all()
    for entry, value in results[0][2].items():
        torch.testing.assert_close(value, results[1][2][entry], msg=entry)
        assert value.isfinite().all(), entry


@every_encoder
def test_real_steps_alone_or_with_padding_give_the_same(name, monkeypatch):
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    td = make_batch(3, 6)
    td["collector", "mask"] = mask
    one = MAKERS[name]()
    other = copy.deepcopy(one)
    with set_recurrent_mode(True):
        torch.manual_seed(1)
        compact = one(td.clone())["timestep"]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        torch.manual_seed(1)
        whole = other(td.clone())["timestep"]
    torch.testing.assert_close(compact[mask], whole[mask])
    for entry, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(entry), msg=entry)


@every_encoder
@pytest.mark.parametrize(
    ("switches", "hidden"),
    [
        ({}, set()),
        ({"hide_prev_reward": True}, {"prev_reward"}),
        ({"hide_prev_step": True}, {"prev_reward", "prev_action"}),
        ({"hide_prev_reward": True, "hide_prev_step": True}, {"prev_reward", "prev_action"}),
    ],
)
def test_what_is_hidden_has_no_influence(name, switches, hidden):
    encoder, td = MAKERS[name](**switches).eval(), make_batch(2, 3)
    out = encoder(td.clone())["timestep"]
    for key in ("prev_reward", "prev_action"):
        for value in (td[key] + 1.0, torch.full_like(td[key], float("nan"))):
            changed = encoder(td.clone().set(key, value))["timestep"]
            assert torch.equal(changed, out) == (key in hidden)
    # Rollouts may read and encode apart.
    (place,) = (i for i, key in enumerate(encoder.in_keys) if key == "prev_reward")
    assert bool(encoder.read(td)[place].any()) != ("prev_reward" in hidden)


@every_encoder
def test_hiding_keeps_the_parameters(name):
    one, other = MAKERS[name](), MAKERS[name](hide_prev_step=True)
    other.load_state_dict(one.state_dict())


def test_hiding_under_other_names():
    class Sum(TimestepEncoder):
        def encode(self, inputs, mask):
            return sum(inputs)

    shapes = {"r": (1,), ("last", "a"): (1,)}
    names = {"prev_reward_key": "r", "prev_action_key": ("last", "a")}
    td = TensorDict({"r": torch.ones(2, 1), ("last", "a"): torch.ones(2, 1)}, batch_size=[2])
    for switch, expected in (("hide_prev_reward", 1.0), ("hide_prev_step", 0.0)):
        encoder = Sum(shapes, 1, **{switch: True}, **names)
        assert encoder(td.clone())["timestep"].eq(expected).all()
    with pytest.raises(
        ValueError, match=r"\['prev_reward'\] can only be hidden .* prev_reward_key"
    ):
        Sum(shapes, 1, hide_prev_reward=True)


@every_encoder
def test_every_step_alone(name):
    """No step sees another one, in either mode, whatever the batch's shape."""
    encoder, td = MAKERS[name]().eval(), make_batch(3, 4)
    whole = encoder(td.clone())["timestep"]
    one_by_one = torch.stack([encoder(step)["timestep"] for step in td.clone().unbind(1)], 1)
    torch.testing.assert_close(whole, one_by_one)
    single = encoder(td[1, 2].clone())["timestep"]
    torch.testing.assert_close(single, whole[1, 2])


@every_encoder
def test_compiles_without_breaks_and_once(name):
    encoder, batch = MAKERS[name](), make_batch(3, 4)
    # The first calls of tensordict's methods fill caches.
    batch["collector", "mask"] = torch.arange(4) < torch.tensor([[4], [2], [1]])
    eager = copy.deepcopy(encoder)
    torch._dynamo.reset()
    counter = CompileCounter()

    def run(module, *inputs):
        td = TensorDict(dict(zip(module.in_keys, inputs, strict=True)), batch_size=[3, 4])
        return module(td.set(module.mask_key, batch["collector", "mask"]))["timestep"]

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    eager.eval(), encoder.eval()
    with set_recurrent_mode(True):
        for _ in range(3):
            inputs = [batch[key] for key in encoder.in_keys]
            mask = batch["collector", "mask"]
            torch.testing.assert_close(compiled(encoder, *inputs)[mask], run(eager, *inputs)[mask])
            batch = make_batch(3, 4).set(("collector", "mask"), mask)
        encoder.train()
        for _ in range(3):
            compiled(encoder, *inputs)
    assert counter.frame_count == 2


@every_encoder
def test_bf16_autocast_stays_close(name):
    encoder, td = MAKERS[name]().eval(), make_batch(4, 3)
    exact = encoder(td.clone())["timestep"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(td)["timestep"]
    torch.testing.assert_close(rough.float(), exact, rtol=2e-2, atol=2e-2)


@every_encoder
def test_weights_say_the_precision(name):
    encoder = MAKERS[name]().double()
    assert encoder(make_batch(2))["timestep"].dtype == torch.float64


@every_encoder
def test_copies_and_checkpoints_carry_everything(name):
    encoder, td = MAKERS[name](), make_batch(3, 2)
    with set_recurrent_mode(True):
        encoder(td.clone())  # moves statistics
    fresh = MAKERS[name]()
    fresh.load_state_dict(encoder.state_dict())
    expected = encoder(td.clone())["timestep"]
    for other in (fresh, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert torch.equal(other(td.clone())["timestep"], expected)


@every_encoder
def test_a_mask_may_have_a_last_dimension(name):
    encoder, td = MAKERS[name]().eval(), make_batch(2, 4)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    with set_recurrent_mode(True):
        expected = encoder(td.copy().set(("collector", "mask"), mask))["timestep"]
        out = encoder(td.copy().set(("collector", "mask"), mask.unsqueeze(-1)))["timestep"]
    assert torch.equal(out, expected)


@every_encoder
def test_one_step_without_batch_dimensions(name):
    encoder, td = MAKERS[name](), make_batch()
    with set_recurrent_mode(True):
        assert encoder(td)["timestep"].shape == (encoder.output_size,)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_entries_come_in_the_precision_of_the_weights(precision):
    class Linear(TimestepEncoder):
        def __init__(self, shapes, output_size):
            super().__init__(shapes, output_size)
            self.linear = torch.nn.Linear(4, output_size)

        def encode(self, inputs, mask):
            return self.linear(flatten_and_join(inputs, self.shapes))

    shapes = {"position": (2,), "speed": (), "cell": ()}
    td = TensorDict(
        position=torch.rand(3, 2, dtype=torch.float64),
        speed=torch.rand(3),
        cell=torch.arange(3),
        batch_size=[3],
    )
    encoder = Linear(shapes, 5).to(precision)
    x = torch.stack((*td["position"].unbind(-1), td["speed"], td["cell"]), -1).to(precision)
    torch.testing.assert_close(encoder(td)["timestep"], encoder.linear(x))
