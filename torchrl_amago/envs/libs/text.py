"""Text observations as tokens: a vocabulary, and the wrapper that uses it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_counts

PADDING, UNKNOWN = 0, 1
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


class Vocabulary:
    """Words and their numbers: 0 is padding, 1 any unknown word, the others follow in order.

    Texts are split into words, numbers and punctuation marks, in lower case.

    Args:
        words: the words that are known; of several that are equal, the first counts.
        max_words: length L of an encoded text.

    Raises:
        ValueError: from :meth:`encode`, for a longer text.

    Example:
        >>> vocabulary = Vocabulary("go to the red ball".split(), max_words=6)
        >>> vocabulary.encode("Go to the blue ball.").tolist(), len(vocabulary)
        ([2, 3, 4, 1, 6, 1], 7)
        >>> vocabulary.unknown
        Counter({'blue': 1, '.': 1})
    """

    def __init__(self, words: Iterable[str], max_words: int) -> None:
        check_counts("It is the length of the longest text.", max_words=max_words)
        self.words = tuple(dict.fromkeys(word.lower() for word in words))
        self.max_words = max_words
        self._number = {word: number for number, word in enumerate(self.words, UNKNOWN + 1)}
        #: Unknown words of all texts encoded so far, with their counts.
        self.unknown: Counter[str] = Counter()

    @classmethod
    def from_file(cls, path: str | Path, max_words: int) -> Vocabulary:
        """Read the words from a text file with one on each line."""
        return cls(Path(path).read_text("utf-8").split(), max_words)

    def __len__(self) -> int:
        return len(self.words) + 2

    def encode(self, text: str) -> np.ndarray:
        """Return the text's tokens, int64 ``[L]``, padded on the right."""
        words = _WORD.findall(text.lower())
        if len(words) > self.max_words:
            raise ValueError(
                f"a text must have at most max_words={self.max_words} words, got {len(words)}: "
                f"{text[:80]!r}. Make the vocabulary with a larger max_words."
            )
        self.unknown.update(word for word in words if word not in self._number)
        tokens = np.full(self.max_words, PADDING, np.int64)
        tokens[: len(words)] = [self._number.get(word, UNKNOWN) for word in words]
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the words of tokens, without padding."""
        names = ("", "?", *self.words)
        return " ".join(names[token] for token in tokens if token != PADDING)


class TextToTokens(gym.ObservationWrapper):
    """Environment whose text is encoded: ``MultiDiscrete`` tokens ``[L]`` in place of ``Text``.

    Of a ``Dict`` observation, the entries in ``keys`` are encoded. A ``combined`` timestep encoder
    reads them with ``entries={key: {"kind": "tokens", "padding_token": 0}}``.

    Args:
        env: the environment.
        vocabulary: words to know.
        keys: entries of texts; default those with a ``Text`` space, or the observation itself.

    Raises:
        ValueError: if the environment has no text.

    Example:
        >>> space = gym.spaces.Dict(mission=gym.spaces.Text(20), observation=gym.spaces.Box(0, 1))
        >>> env = gym.wrappers.TransformObservation(
        ...     gym.make("CartPole-v1"),
        ...     lambda _: {"mission": "balance it", "observation": np.zeros(1)}, space)
        >>> env = TextToTokens(env, Vocabulary(["balance", "it"], max_words=3))
        >>> env.reset()[0]["mission"]
        array([2, 3, 0])
    """

    def __init__(
        self, env: gym.Env, vocabulary: Vocabulary, keys: Iterable[str] | None = None
    ) -> None:
        super().__init__(env)
        self.vocabulary, space = vocabulary, env.observation_space
        tokens = gym.spaces.MultiDiscrete(np.full(vocabulary.max_words, len(vocabulary)))
        if isinstance(space, gym.spaces.Text):
            self.keys, self.observation_space = None, tokens
            return
        entries = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {}
        texts = [key for key, entry in entries.items() if isinstance(entry, gym.spaces.Text)]
        self.keys = tuple(texts if keys is None else keys)
        if not self.keys or not set(self.keys) <= entries.keys():
            raise ValueError(
                "an environment with text must have Text entries, or entries named by keys, got "
                f"{space} and keys={keys}."
            )
        self.observation_space = gym.spaces.Dict(entries | dict.fromkeys(self.keys, tokens))

    def observation(self, observation: Any) -> Any:
        """Encode the texts of an observation."""
        if self.keys is None:
            return self.vocabulary.encode(observation)
        encoded = {key: self.vocabulary.encode(observation[key]) for key in self.keys}
        return {**observation, **encoded}
