"""Inverted actuators: signs by trial, at a hidden step, and who may have them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from torchrl_amago.envs.libs import InvertedActuators


def lopsided():
    """Four actuators; the bounds of the first are not around zero."""
    env = gym.make("Pendulum-v1")
    low, high = np.array([1, -1, -1, -1], np.float32), np.array([3, 1, 1, 1], np.float32)
    space = gym.spaces.Box(low, high)
    return gym.wrappers.TransformAction(env, lambda action: action[1:2], space)


def test_mirrored_about_the_centre():
    env = InvertedActuators(lopsided(), probability=1.0)
    env.reset(seed=0)
    np.testing.assert_allclose(env.action(np.array([1.5, 0.5, -1, 0])), [2.5, -0.5, 1, 0])
    assert env.task_id == 1


def test_each_actuator_has_its_own_sign():
    env = InvertedActuators(lopsided(), inversion="each")
    env.reset(seed=0)
    signs = []
    for _ in range(200):
        env.reset()
        signs.append(env.signs)
    assert {tuple(sign) for sign in signs} == {
        tuple(sign) for sign in np.array(np.meshgrid(*[[-1.0, 1.0]] * 4)).reshape(4, -1).T
    }
    assert abs(np.mean(signs)) < 0.2


def test_a_task_is_kept_and_seeded():
    env = InvertedActuators("Pendulum-v1")
    for same in ({}, InvertedActuators.SAME_TASK):
        drawn = []
        env.reset(seed=1)
        for _ in range(50):
            env.reset(options=same)
            drawn.append(float(env.signs))
        assert len(set(drawn)) == (1 if same else 2)
    first = [env.reset(seed=2)[1]["task_id"] for _ in range(3)]
    assert len(set(first)) == 1


def test_changes_at_a_hidden_step():
    env = InvertedActuators("Pendulum-v1", probability=0.0, change_within=10)
    env.reset(seed=0)
    changes = set()
    for _ in range(100):
        env.reset()
        received = []
        for _ in range(12):
            received.append(float(env.action(np.array([1.0], np.float32))[0]))
            env.step(np.array([0.0], np.float32))
        change = received.index(-1.0)
        assert received == [1.0] * change + [-1.0] * (12 - change)
        changes.add(change)
    assert changes == set(range(10))


def test_discrete_actions_have_no_sign():
    with pytest.raises(ValueError, match="bounded numbers, got Discrete"):
        InvertedActuators("CartPole-v1")
