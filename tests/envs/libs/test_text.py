"""Text as tokens."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_amago.envs.libs import TextToTokens, Vocabulary

WORDS = ["go", "to", "the", "red", "ball", ",", "7"]


class Speaking(gym.Env):
    """Says one thing at reset, another at each step."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, first, then, space):
        self.first, self.then, self.observation_space = first, then, space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.first, {}

    def step(self, action):
        return self.then, 0.0, False, False, {}


@given(st.lists(st.sampled_from(WORDS), max_size=9))
def test_known_words_come_back(words):
    vocabulary = Vocabulary(WORDS, max_words=9)
    tokens = vocabulary.encode(" ".join(words))
    assert tokens.shape == (9,)
    assert tokens.dtype == np.int64
    assert (tokens[len(words) :] == 0).all()
    assert (tokens < len(vocabulary)).all()
    assert vocabulary.decode(tokens).split() == words
    assert not vocabulary.unknown


def test_unknown_words_are_counted():
    vocabulary = Vocabulary(WORDS, max_words=5)
    assert vocabulary.encode("Go, blue! blue").tolist() == [2, 7, 1, 1, 1]
    vocabulary.encode("blue")
    assert vocabulary.unknown == {"blue": 3, "!": 1}


def test_a_text_that_is_too_long():
    with pytest.raises(ValueError, match="at most max_words=2 words, got 3: 'go to it'"):
        Vocabulary(WORDS, max_words=2).encode("go to it")


def test_vocabulary_of_a_file(tmp_path):
    (tmp_path / "words.txt").write_text("Go\nto\n\ngo\n", "utf-8")
    assert Vocabulary.from_file(tmp_path / "words.txt", 3).words == ("go", "to")


def test_texts_of_a_dictionary():
    space = gym.spaces.Dict(a=gym.spaces.Text(9), b=gym.spaces.Discrete(3), c=gym.spaces.Text(9))
    env = Speaking({"a": "go", "b": 1, "c": "to"}, {"a": "the ball", "b": 2, "c": ""}, space)
    env = TextToTokens(env, Vocabulary(WORDS, 2))
    first, then = env.reset()[0], env.step(0)[0]
    assert (first["a"].tolist(), first["b"], first["c"].tolist()) == ([2, 0], 1, [3, 0])
    assert then["a"].tolist() == [4, 6]
    for observation in (first, then):
        assert env.observation_space.contains(observation)
    one = TextToTokens(env.env, Vocabulary(WORDS, 2), keys=["c"])
    assert one.reset()[0]["a"] == "go"


def test_an_observation_that_is_text():
    env = TextToTokens(Speaking("go", "to", gym.spaces.Text(9)), Vocabulary(WORDS, 2))
    assert env.reset()[0].tolist() == [2, 0]
    assert env.observation_space == gym.spaces.MultiDiscrete([9, 9])


@pytest.mark.parametrize("keys", [None, ["mission"]])
def test_no_text(keys):
    with pytest.raises(ValueError, match="must have Text entries, or entries named by keys, got"):
        TextToTokens(gym.make("CartPole-v1"), Vocabulary(WORDS, 2), keys)
