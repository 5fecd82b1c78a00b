"""Policies: parts that fit an environment's specs, one forward, foreign parts, errors."""

from __future__ import annotations

import copy
import pickle
import shutil

import pytest
import torch
from tensordict import assert_close
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch._dynamo.testing import CompileCounterWithBackend
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import LSTMModule, set_recurrent_mode

from tests.toy_env import ACTIONS, Toy
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.envs import MetaFrozenLake, make_trial_env
from torchrl_amago.modules import (
    SEQ_MODELS,
    ActionSampler,
    Actor,
    MLPTimestepEncoder,
    Policy,
    TransformerEncoder,
    make_critic,
    make_policy,
)
from torchrl_amago.modules.distributions import Discrete

SMALL = {
    "context_length": 12,
    "seq_model_options": {"d_model": 16, "num_heads": 2, "num_layers": 1},
    "timestep_options": {"hidden_size": 16, "output_size": 16},
    "actor_options": {"hidden_size": 16},
}


def make_env(rows: int = 3, **options):
    lake = MetaFrozenLake(batch_size=(rows,), seed=0, **options)
    return make_trial_env(lake, episodes=3)


@pytest.mark.parametrize("categorical", [True, False])
def test_rolls_out_and_fits_the_specs(categorical):
    env = make_env(categorical_action_encoding=categorical)
    check_env_specs(env)
    policy = make_policy(env, exploration={"anneal_frames": 100}, **SMALL)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(20, policy, break_when_any_done=False)
    assert rollout["action"].shape == ((3, 20) if categorical else (3, 20, 5))
    assert env.action_spec.is_in(rollout["action"][:, 0])
    assert {"action", "_stream", "_epsilon_scale"} <= set(rollout.keys())
    assert not {"timestep", "state", "action_params", "logits"} & set(rollout.keys())


def test_reads_observations_and_the_previous_step_but_no_bookkeeping():
    policy = make_policy(make_env(), **SMALL)
    keys = policy.encoder.timestep.in_keys
    assert keys == ["observation", "soft_reset", "trial_progress", "prev_reward", "prev_action"]
    horizon_env = make_trial_env(MetaFrozenLake(batch_size=(2,)), horizon=20, show_progress=False)
    keys = make_policy(horizon_env, **SMALL).encoder.timestep.in_keys
    assert keys == ["observation", "soft_reset", "prev_reward", "prev_action"]
    chosen = make_policy(make_env(), obs_keys=["observation"], **SMALL).encoder.timestep.in_keys
    assert chosen == ["observation", "prev_reward", "prev_action"]


def test_greedy_is_the_mode_of_the_discount_acted_with():
    env = make_env(rows=8)
    policy = make_policy(env, discounts=(0.5, 0.9, 0.99), **SMALL)
    td = env.reset()
    with set_exploration_type(ExplorationType.DETERMINISTIC), set_recurrent_mode(False):
        params = policy.actor(policy.encoder(td.clone()))["action_params"]
        assert torch.equal(policy(td.clone())["action"], params[:, -1].argmax(-1))
        policy.act_with(0.5)
        assert torch.equal(policy(td.clone())["action"], params[:, 0].argmax(-1))
    with pytest.raises(ValueError, match=r"discount to act with must be one of .*0.99, got 0.7"):
        policy.act_with(0.7)


def test_own_parts():
    env = make_env()
    encoder = MLPTimestepEncoder({"observation": (2,)}, hidden_size=8, output_size=6)

    def seq_model(input_size, *, context_length):
        return TransformerEncoder(
            input_size, context_length=context_length, d_model=8, num_heads=2, num_layers=1
        )

    policy = make_policy(env, context_length=5, timestep_encoder=encoder, seq_model=seq_model)
    assert policy.state_size == 8
    assert policy(env.reset())["action"].shape == (3,)
    critic = make_critic(policy, num_critics=2, hidden_size=8)
    td = policy.encoder(env.reset())
    assert critic(td)["action_value"].shape == (3, 2, 7, 5)


def test_an_evaluation_in_between_leaves_the_rollout_alone():
    env, other = make_env(), make_env(rows=2)
    policy = make_policy(env, **SMALL)

    def act(interrupt: bool) -> torch.Tensor:
        env.set_seed(0)
        td, actions = env.reset(), []
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            for _ in range(10):
                td = policy(td)
                actions.append(td["action"].clone())
                if interrupt:
                    other.rollout(3, policy)
                _, td = env.step_and_maybe_reset(td)
        return torch.stack(actions)

    assert torch.equal(act(interrupt=False), act(interrupt=True))


@pytest.mark.parametrize("actor", ["mlp", "residual"])
@pytest.mark.parametrize("kind", ACTIONS)
def test_every_action_space(kind, actor):
    env = make_trial_env(Toy(ACTIONS[kind]), horizon=10)
    options = {} if actor == "residual" else SMALL["actor_options"]
    policy = make_policy(
        env, actor=actor, exploration={"anneal_frames": 100}, **{**SMALL, "actor_options": options}
    )
    for exploration_type in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(exploration_type):
            actions = env.rollout(12, policy, break_when_any_done=False)["action"]
        assert env.action_spec_unbatched.is_in(actions)
    critic = make_critic(policy, hidden_size=8)
    state = torch.zeros(3, policy.state_size)
    if kind in ("categorical", "one_hot"):
        assert critic(state).shape == (3, 4, 7, 4)
    vector = torch.zeros(2, 3, 7, policy.distribution.space.size)
    takes_actions = make_critic(policy, takes_actions=True, hidden_size=8)
    assert takes_actions(state, vector).shape == (2, 3, 4, 7)


def test_an_action_mask_is_obeyed_by_policy_and_exploration():
    env = make_trial_env(Toy(Categorical(4), mask=True), horizon=10)
    always = {"start_of_trial": (1.0, 1.0), "end_of_trial": (1.0, 1.0), "scale_power": 0.0}
    options = {"action_mask_key": "action_mask", "obs_keys": ["observation"]}
    for exploration in (None, always):
        policy = make_policy(
            env, actor_obs_keys=["observation"], exploration=exploration, **options, **SMALL
        )
        for exploration_type in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
            with set_exploration_type(exploration_type):
                actions = env.rollout(40, policy, break_when_any_done=False)["action"]
            assert set(actions.unique().tolist()) <= {1, 2}
    with pytest.raises(KeyError, match=r"the actor reads \['mask'\], but"):
        make_policy(env, action_mask_key="mask", **SMALL)


def test_dict_and_unbounded_actions_raise():
    env = make_env()

    def with_action(spec):
        class Other(TransformedEnv):
            @property
            def full_action_spec_unbatched(self):
                return Composite(action=spec)

        return Other(env)

    with pytest.raises(ValueError, match="supports Categorical.* got Composite"):
        make_policy(with_action(Composite(left=Categorical(2))), **SMALL)
    with pytest.raises(ValueError, match="must have finite bounds, got Unbounded"):
        make_policy(with_action(Unbounded(shape=(2,))), **SMALL)


def test_missing_entries_and_unknown_names_raise():
    with pytest.raises(KeyError, match="'prev_reward', 'prev_action'.* not among"):
        make_policy(MetaFrozenLake(batch_size=(2,)), **SMALL)
    with pytest.raises(KeyError, match="'colour'.* not among the environment's observations"):
        make_policy(make_env(), obs_keys=["colour"], **SMALL)
    with pytest.raises(ValueError, match=r"seq_model must be one of \[.*'transformer'\].* 'elman'"):
        make_policy(make_env(), seq_model="elman", **{**SMALL, "seq_model_options": {}})


def test_a_step_is_the_parts_in_a_row():
    env = make_env(rows=4)
    policy = make_policy(env, exploration={"anneal_frames": 100}, **SMALL)
    row = TensorDictSequential(*copy.deepcopy(policy).children())
    with set_exploration_type(ExplorationType.RANDOM):
        rollouts = []
        for act in (policy, row):
            env.set_seed(0)
            torch.manual_seed(0)
            rollouts.append(env.rollout(25, act, break_when_any_done=False))
    both = [r.select(*rollouts[0].keys(True, True)) for r in rollouts]
    assert_close(*(r.exclude("_stream", ("next", "_stream")) for r in both))
    assert (rollouts[0]["_stream"] > 0).all()


def test_an_observation_named_like_a_part_of_the_step_is_kept():
    env = make_env()
    policy = make_policy(env, **SMALL)
    td = env.reset().set("state", torch.full((3, 2), 5.0))
    assert (policy(td)["state"] == 5.0).all()


@pytest.mark.parametrize("memory", [False, True])
def test_foreign_parts(memory):
    env = make_env()
    if memory:
        lstm = LSTMModule(2, 8, in_key="observation", out_key="state")
        env = env.append_transform(lstm.make_tensordict_primer())
        encoder = lstm
    else:
        encoder = TensorDictModule(torch.nn.Linear(2, 8), ["observation"], ["state"])
    head = torch.nn.Sequential(torch.nn.Linear(8, 2 * 5), torch.nn.Unflatten(-1, (2, 5)))
    actor = TensorDictModule(head, ["state"], ["action_params"])
    distribution = Discrete(ActionSpace.from_spec(Categorical(5)))
    policy = Policy(encoder, actor, distribution, discounts=(0.9, 0.99))
    rollout = env.rollout(6, policy, break_when_any_done=False)
    assert rollout["action"].shape == (3, 6)
    assert not {"state", "action_params", "logits"} & set(rollout.keys())
    if memory:
        hidden = rollout["recurrent_state_h"]
        assert not hidden[:, 0].any()
        assert torch.equal(hidden[:, 1:], rollout["next", "recurrent_state_h"][:, :-1])
        assert hidden[:, 1:].abs().sum(-1).min() > 0
    assert policy.settings["discount"] == 0.99
    policy = Policy(encoder, TensorDictModule(Actor(8, 5, 2), ["state"], ["action_params"]),
                    distribution, discounts=(0.9, 0.99))  # fmt: skip
    assert make_critic(policy)(torch.zeros(3, 8)).shape == (3, 4, 2, 5)


def test_steps_have_no_gradient_and_sequences_have():
    env = make_env()
    policy = make_policy(env, **SMALL)
    with torch.enable_grad():
        policy.select_out_keys("action", "logits")
        assert not policy(env.reset())["logits"].requires_grad
        steps = env.rollout(3, policy.reset_out_keys(), break_when_any_done=False)
        with set_recurrent_mode(True):
            out = policy(steps.select(*policy.in_keys))
        assert out["logits"].requires_grad
        assert out["action"].shape == (3, 3)


@pytest.mark.parametrize("seq_model", ["gru", "feedforward"])
def test_entries_that_travel_with_a_rollout_are_no_inputs(seq_model):
    env = make_env()
    options = {**SMALL, "seq_model_options": {"d_model": 16}}
    policy = make_policy(env, seq_model=seq_model, exploration={}, **options)
    handed_on = {"_epsilon_scale"} | ({"_stream"} if seq_model == "gru" else set())
    assert set(policy.out_keys) == {"action"} | handed_on
    for module in policy.modules():
        assert not {"_stream", "_epsilon_scale"} & set(getattr(module, "in_keys", ()))
    step = env.reset()
    assert set(step.select(*policy.in_keys).keys()) | {"action"} == {"action", *policy.in_keys}
    assert policy(step.select(*policy.in_keys))["action"].shape == (3,)


def test_steps_by_keywords():
    env = make_env()
    policy = make_policy(env, exploration={}, **SMALL)
    twin, td, carried = copy.deepcopy(policy), env.reset(), {}
    for t in range(4):
        inputs = {key: td[key] for key in policy.in_keys}
        results = []
        for act in (lambda: policy(**inputs, **carried), lambda: twin(td)):  # noqa: B023
            torch.manual_seed(t)
            with set_exploration_type(ExplorationType.RANDOM):
                results.append(act())
        outputs = dict(zip(policy.out_keys, results[0], strict=True))
        assert torch.equal(outputs["action"], td["action"])
        torch.testing.assert_close(outputs["_epsilon_scale"], td["_epsilon_scale"])
        carried = {key: value for key, value in outputs.items() if key.startswith("_")}
        _, td = env.step_and_maybe_reset(td)
        carried = {key: torch.where(td["is_init"], 0, value) for key, value in carried.items()}
    timestep, trajectory = policy.encoder.timestep, policy.encoder.trajectory
    embedding = timestep(**{key: td[key] for key in timestep.in_keys})
    time = {"time_idx": td["time_idx"], "is_init": td["is_init"]}
    state, stream = trajectory(embedding, **time, _stream=carried["_stream"])
    assert state.shape == (3, 16)
    assert torch.equal(stream.unique(), carried["_stream"].unique())


WEIGHTS = {"actor": "module.mlp.out.bias", "encoder": "module.0.mlp.out.bias"}


@pytest.mark.parametrize("where", ["observation", "actor", "encoder"])
def test_nan_is_never_acted_on(where):
    env = make_env()
    policy = make_policy(env, **SMALL)
    td = env.reset()
    policy(td.clone())
    if where == "observation":
        td["observation"][1] = torch.nan
        match = r"from NaN, got it in rows \[\[1\]\]: the step's entries \['observation'.* hold NaN"
    else:
        getattr(policy, where).get_parameter(WEIGHTS[where]).data.view(-1)[-1] = torch.nan
        match = r"rows \[\[0\], \[1\], \[2\]\]: all entries of the step are finite, so the weights"
    with pytest.raises(ValueError, match=match):
        policy(td)
    assert "action" not in td


@pytest.mark.parametrize("seq_model", sorted(SEQ_MODELS))
@torch.no_grad()
def test_acts_in_half_precision(seq_model):
    env = make_env(rows=8)
    sizes = {} if seq_model == "identity" else {"d_model": 16}
    options = {**SMALL, "seq_model": seq_model, "seq_model_options": sizes}
    policy = make_policy(env, **options).reset_out_keys()
    half = copy.deepcopy(policy).to(torch.bfloat16)
    td, steps, carried = env.reset(), [], {}
    for _ in range(10):
        low = half(td.select(*policy.in_keys).update(carried))
        carried = (
            {"_stream": low["_stream"]} if seq_model not in ("identity", "feedforward") else {}
        )
        td = policy(td)
        steps.append((td["logits"], low["logits"].float()))
        _, td = env.step_and_maybe_reset(td)
    exact, low = (torch.stack(logits) for logits in zip(*steps, strict=True))
    torch.testing.assert_close(low, exact, rtol=0.1, atol=0.1)
    assert low.isfinite().all()
    critic = make_critic(half, takes_actions=True, hidden_size=8)
    vector = torch.zeros(8, 1, 5)
    assert critic.module(torch.zeros(8, policy.state_size).bfloat16(), vector).isfinite().all()
    assert critic.module.discounts.dtype == torch.float32


def test_more_outputs_than_the_action():
    env = make_env()
    policy = make_policy(env, **SMALL).reset_out_keys()
    out = policy(env.reset())
    assert out["state"].shape == (3, 16)
    assert out["action"].shape == (3,)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_policy_acts_the_same_and_copies():
    env = make_env(rows=4)
    plain = make_policy(env, **{**SMALL, "context_length": 70}).eval()
    policy = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("eager")
    policy.compile(backend=counter)
    for again in (False, True):
        warm = counter.frame_count
        actions = []
        for act in (plain, policy):
            env.set_seed(0)
            torch.manual_seed(0)
            actions.append(env.rollout(90, act, break_when_any_done=False)["action"])
        assert torch.equal(*actions)
        assert 1 <= counter.frame_count <= 3
        assert not again or counter.frame_count == warm
    for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):  # noqa: S301
        torch.manual_seed(0)
        assert copied(env.reset())["action"].shape == (4,)
        assert counter.frame_count == warm


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_policy_writes_all_parts_and_calls_hooks():
    env = make_env()
    policy = make_policy(env, **SMALL).eval().reset_out_keys()
    hooked, compiled = copy.deepcopy(policy), copy.deepcopy(policy)
    seen = []
    hooked.actor.register_forward_hook(lambda *args: seen.append(1))
    step = env.reset()
    expected = policy(step.clone())
    for other in (hooked, compiled):
        other.compile(backend="eager")
        out = other(step.clone())
        assert set(out.keys()) == set(expected.keys())
        for key in ("timestep", "state", "action_params"):
            torch.testing.assert_close(out[key], expected[key])
    assert seen == [1]


def test_encoders_with_a_forward_of_their_own_are_called():
    class Loud(TransformerEncoder):
        def forward(self, tensordict):
            out = super().forward(tensordict)
            return out.set("state", torch.full_like(out["state"], 7.0))

    env = make_env()
    policy = make_policy(env, seq_model=Loud, **SMALL).reset_out_keys()
    seen = []
    policy.encoder.timestep.register_forward_hook(lambda *args: seen.append(1))
    policy.actor.register_forward_hook(lambda m, args, out: seen.append(out["state"].mean()))
    policy(env.reset())
    assert seen == [1, 7.0]


def test_actors_and_samplers_of_ones_own_are_called():
    class Third(TensorDictModule):
        def forward(self, tensordict, *args, **kwargs):
            out = super().forward(tensordict, *args, **kwargs)
            params = torch.zeros_like(out["action_params"])
            params[..., 2] = 99.0
            return out.set("action_params", params)

    class Fourth(ActionSampler):
        def forward(self, tensordict):
            return super().forward(tensordict).update({"action": torch.full((20,), 4)})

    step = make_env(rows=20).reset()
    policy = make_policy(make_env(), **SMALL)
    actor = policy.actor
    policy.actor = Third(actor.module, in_keys=actor.in_keys, out_keys=actor.out_keys)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert (policy(step.clone())["action"] == 2).all()
        policy.sampler = Fourth(policy.distribution)
        assert (policy(step.clone())["action"] == 4).all()


@pytest.mark.parametrize("part", ["encoder", "actor", "sampler", "exploration"])
def test_hooks_are_called(part):
    policy = make_policy(make_env(), exploration={}, **SMALL)
    seen = []
    getattr(policy, part).register_forward_hook(lambda *args: seen.append(1))
    policy(make_env().reset())
    assert seen == [1]


def test_a_finished_distribution_must_fit():
    env = make_env()
    five, nine = (Discrete(ActionSpace.from_spec(Categorical(n))) for n in (5, 9))
    assert make_policy(env, distribution=five, **SMALL).distribution is five
    with pytest.raises(ValueError, match="distribution is over actions of "):
        make_policy(env, distribution=nine, **SMALL)
    with pytest.raises(
        ValueError, match="distribution_options go with a part .* finished Discrete"
    ):
        make_policy(env, distribution=five, distribution_options={"clip_low": 0.01}, **SMALL)


def test_arguments_without_use_are_errors():
    env = make_env()
    with pytest.raises(TypeError, match="unexpected keyword argument 'action_gain'"):
        make_critic(make_policy(env, **SMALL), action_gain=8.0)
    encoder = MLPTimestepEncoder({"observation": (2,)}, output_size=16)
    options = {key: value for key, value in SMALL.items() if key != "timestep_options"}
    for ignored in ({"timestep_options": {"hidden_size": 3}}, {"obs_keys": ["observation"]}):
        with pytest.raises(
            ValueError, match=f"{next(iter(ignored))} go with a part that make_policy"
        ):
            make_policy(env, timestep_encoder=encoder, **options, **ignored)
    module = TensorDictModule(torch.nn.Linear(2, 16), ["observation"], ["timestep"])
    with pytest.raises(AttributeError, match="no attribute 'output_size'"):
        make_policy(env, timestep_encoder=module, **options)
    with pytest.raises(ValueError, match="num_discounts must be at least 1, got 0"):
        make_policy(env, discounts=(), **SMALL)
    with pytest.raises(ValueError, match=r"discounts must be one or more numbers in \(0, 1\)"):
        make_policy(env, discounts=(0.9, 1.5), **SMALL)
    box = make_trial_env(Toy(ACTIONS["continuous"]), horizon=10)
    with pytest.raises(ValueError, match="action_mask_key='observation' masks discrete actions"):
        make_policy(box, action_mask_key="observation", **SMALL)
    with pytest.raises(ValueError, match="list the values of a single discrete action only"):
        make_critic(make_policy(box, **SMALL), takes_actions=False)
