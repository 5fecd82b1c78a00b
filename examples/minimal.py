"""The whole method in one loop: learn to adapt to an unknown lake within five episodes.

    python examples/minimal.py        # about five minutes on two CPU cores

No trainer, no command line: environment, policy, loss, replay buffer, collector, optimiser and
targets are TorchRL components, and the loop below is all that joins them.
"""

import torch
from torchrl.objectives import SoftUpdate

from torchrl_amago import (
    MetaFrozenLake,
    TrialCollector,
    amago_loss,
    evaluate,
    make_optimizer,
    make_policy,
    make_trial_buffer,
    make_trial_env,
)
from torchrl_amago.envs import bayes_optimal_success

SEED, NUM_ENVS, ROUNDS, UPDATES_PER_ROUND = 1, 64, 120, 20
TRIAL = 5 * 9  # steps: five episodes of at most nine

torch.manual_seed(SEED)
env = make_trial_env(MetaFrozenLake(3, batch_size=(NUM_ENVS,)), episodes=5)
policy = make_policy(
    env,
    context_length=TRIAL,
    seq_model_options={"d_model": 64, "num_layers": 2, "num_heads": 4},
    timestep_options={"hidden_size": 256, "output_size": 64},
    exploration={"anneal_frames": 200_000},
)
loss = amago_loss(policy)
buffer = make_trial_buffer(capacity=120_000, slice_length=TRIAL, batch_size=32)
optimizer, targets = make_optimizer(loss, learning_rate=5e-4), SoftUpdate(loss, tau=0.01)
round_frames = NUM_ENVS * TRIAL  # every lake is played for a trial
collector = TrialCollector(
    env,
    policy,
    frames_per_batch=round_frames,
    total_frames=ROUNDS * round_frames,
    replay_buffer=buffer,
)

for _ in collector:
    policy.exploration.step(round_frames)
    for _ in range(UPDATES_PER_ROUND):
        losses = loss(buffer.sample())
        (losses["loss_actor"] + losses["loss_qvalue"]).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        targets.step()

results = evaluate(policy, env, trials_per_env=4, seed=10_000)
optimum = bayes_optimal_success(3, 5).expected_return
print(f"trial return {results.summary()['trial_return']:.2f}, the exact optimum is {optimum:.2f}")
