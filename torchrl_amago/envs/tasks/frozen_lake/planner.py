"""The best possible agent on Meta-FrozenLake, computed exactly.

The belief of an agent is the set of lakes that agree with the cells it has stepped on. Planning
over beliefs (a Bayes-adaptive MDP, `Duff 2002
<https://scholarworks.umass.edu/dissertations/AAI3039353/>`_) is exact on small lakes, by
enumeration, and gives the upper bound of adaptation curves.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any, NamedTuple

import torch

from torchrl_amago._validation import check_counts
from torchrl_amago.envs.tasks.frozen_lake.layouts import enumerate_lakes
from torchrl_amago.envs.tasks.grid_task import move_table

# Digits to which two plans count as equally good: rounding errors stay far below, and real
# differences far above.
_DIGITS = 11

# Success probability at each episode left, and the cell to walk to next.
_Plan = tuple[tuple[float, ...], int | None]


class BayesOptimum(NamedTuple):
    """The expected results of the Bayes-optimal agent."""

    expected_return: float  # undiscounted, of a trial: the number of successful episodes
    success_by_episode: tuple[float, ...]  # sums up to the return; see LakePlanner for ties


class Belief(NamedTuple):
    """The cells known to be safe and those known to be holes, as bit masks over cells."""

    safe: int
    holes: int

    def with_safe(self, cell: int) -> Belief:
        return Belief(self.safe | 1 << cell, self.holes)

    def with_hole(self, cell: int) -> Belief:
        return Belief(self.safe, self.holes | 1 << cell)


class LakePlanner:
    """Exact planner for k episodes at an unknown lake (no hard mode, no recovery, no slips).

    Only stepping on an unknown cell teaches anything. So a plan walks over known cells to the goal
    or to an unknown cell, or gives the episode up. With belief b, position x, t steps and k
    episodes left::

        V(b, x, t, k) = max of  1 + V(b, start, T, k-1)                  goal within t steps
                                p V(b + u safe, u, t - d, k)
                                  + (1-p) V(b + u hole, start, T, k-1)   each unknown u within t
                                V(b, start, T, k-1)                      give up

    where d is the number of steps to u and p its probability of being safe given b. Of plans with
    the same expected return, the one more likely to succeed in the first episode where they differ
    is taken, which decides ``success_by_episode``, not ``expected_return``.

    Args:
        size: cells per side, 2 to 4 (five episodes take 0.1 s on 3x3, a minute and 2 GB on 4x4),
            ValueError for others.
        episodes: episodes per trial, k.
        max_episode_steps: steps per episode, T. Defaults to size*size, as in ``MetaFrozenLake``.
        prior: ``p_safe`` and ``layouts`` of :func:`enumerate_lakes`, both known to the agent.

    Examples:
        >>> planner = LakePlanner(size=2, episodes=2)
        >>> [round(p, 4) for p in planner.optimum().success_by_episode]
        [0.8333, 1.0]
    """

    def __init__(
        self, size: int = 3, episodes: int = 5, max_episode_steps: int | None = None, **prior: Any
    ) -> None:
        self._mass = _belief_mass(size, **prior)
        steps = size * size if max_episode_steps is None else max_episode_steps
        check_counts("The standard has 5, of 9 steps.", episodes=episodes, max_episode_steps=steps)
        self.size, self.episodes, self.max_episode_steps = size, episodes, steps
        self._goal = size * size - 1
        self._neighbours = move_table(size).T.tolist()
        self._plan = cache(self._best_plan)
        self._distances = cache(self._distances_over_safe)

    @property
    def start_belief(self) -> Belief:
        """The belief before a trial: the start and the goal are no holes."""
        return Belief(1 | 1 << self._goal, 0)

    def optimum(self) -> BayesOptimum:
        """Solve the whole trial."""
        success, _ = self._plan(self.start_belief, 0, self.max_episode_steps, self.episodes)
        return BayesOptimum(sum(success), success)

    def target(self, belief: Belief, cell: int, steps_left: int, episodes_left: int) -> int | None:
        """Return the cell to walk to next, the goal or an unknown one; None gives the episode up.

        ``episodes_left`` counts the current one.
        """
        return self._plan(belief, cell, steps_left, episodes_left)[1]

    def _best_plan(self, belief: Belief, cell: int, steps_left: int, episodes_left: int) -> _Plan:
        if episodes_left == 0:
            return (), None
        distances = self._distances(belief.safe, cell)
        later = self._next_episode(belief, episodes_left)
        if distances.get(self._goal, steps_left + 1) <= steps_left:
            # Nothing beats a way that is known: every episode left will succeed.
            return (1.0, *later), self._goal
        plans = [((0.0, *later), None)]
        for cell, distance in sorted(distances.items()):
            known = (belief.safe | belief.holes) >> cell & 1
            if not known and distance <= steps_left:
                success = self._step_on(belief, cell, steps_left - distance, episodes_left)
                plans.append((success, cell))
        # Expected return, then success at the first episode, the second one, ...
        return max(plans, key=lambda plan: [round(p, _DIGITS) for p in (sum(plan[0]), *plan[0])])

    def _step_on(
        self, belief: Belief, cell: int, steps_left: int, episodes_left: int
    ) -> tuple[float, ...]:
        if_safe, if_hole = belief.with_safe(cell), belief.with_hole(cell)
        p_safe = self._probability(if_safe) / self._probability(belief)
        safe = fell = (0.0,) * episodes_left
        if p_safe > 0.0:
            safe, _ = self._plan(if_safe, cell, steps_left, episodes_left)
        if p_safe < 1.0:
            fell = (0.0, *self._next_episode(if_hole, episodes_left))
        return tuple(p_safe * p + (1.0 - p_safe) * q for p, q in zip(safe, fell, strict=True))

    def _next_episode(self, belief: Belief, episodes_left: int) -> tuple[float, ...]:
        return self._plan(belief, 0, self.max_episode_steps, episodes_left - 1)[0]

    def _probability(self, belief: Belief) -> float:
        """Return the prior probability of the lakes that agree with a belief."""
        code, digit = 0, 1
        for cell in range(1, self._goal):
            code += digit * ((belief.safe >> cell & 1) + 2 * (belief.holes >> cell & 1))
            digit *= 3
        return self._mass[code]

    def _distances_over_safe(self, safe: int, start: int) -> dict[int, int]:
        """Count the steps to every cell that can be entered from a way over safe cells."""
        distances, queue = {start: 0}, deque([start])
        while queue:
            cell = queue.popleft()
            for neighbour in self._neighbours[cell]:
                if neighbour not in distances:
                    distances[neighbour] = distances[cell] + 1
                    if safe >> neighbour & 1 and neighbour != self._goal:
                        queue.append(neighbour)
        return distances


def bayes_optimal_success(
    size: int = 3, episodes: int = 5, max_episode_steps: int | None = None, **prior: Any
) -> BayesOptimum:
    """Compute the exact optimum of k episodes at an unknown lake; see :class:`LakePlanner`.

    Examples:
        >>> optimum = bayes_optimal_success(size=3, episodes=5, max_episode_steps=9)
        >>> round(optimum.expected_return, 2), round(optimum.success_by_episode[0], 3)
        (4.5, 0.576)
    """
    return LakePlanner(size, episodes, max_episode_steps, **prior).optimum()


def _belief_mass(size: int, **prior: Any) -> list[float]:
    """Compute every belief's prior probability, by its base-3 code (unknown, safe, hole)."""
    holes, probability = enumerate_lakes(size, **prior)
    free = size * size - 2
    pattern = (holes.flatten(1)[:, 1:-1].long() << torch.arange(free)).sum(-1)
    mass = torch.zeros(2**free, dtype=torch.float64).index_put_((pattern,), probability)
    # Bit i is axis free-1-i of this view: the last cell comes first, as in the code. Unknown is the
    # sum of safe and hole, so that one addition along each axis gives all 3**free entries.
    mass = mass.view((2,) * free)
    for axis in range(free):
        mass = torch.cat([mass.sum(axis, keepdim=True), mass], axis)
    return mass.flatten().tolist()
