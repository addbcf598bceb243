"""Central differences of an untouched model: a directional derivative, and how far it can be trusted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tests.float64 import crossings

STEPS = (1e-4, 1e-7, 1e-8, 1e-9)
_ENOUGH = 2  # steps that cross no kink: one to take, a smaller one to hold it against

Evaluation = Callable[[np.ndarray], tuple[float, Sequence[torch.Tensor]]]


@dataclass(frozen=True)
class Difference:
    """(S(x + h d) - S(x - h d)) / 2h, and how many kinks lie between its points and x."""

    step: float
    slope: float
    crossings: int


@dataclass(frozen=True)
class Sweep:
    """Differences along one direction, from the largest step down to the second that crosses no kink."""

    differences: tuple[Difference, ...]

    @property
    def smooth(self) -> list[Difference]:
        """The differences that cross no kink; the first has the largest step, so the least rounding error."""
        return [difference for difference in self.differences if not difference.crossings]

    @property
    def slope(self) -> float:
        return self.smooth[0].slope

    @property
    def uncertainty(self) -> float:
        """How far the next smaller step disagrees, relatively."""
        first, second = self.smooth[:_ENOUGH]
        return abs(first.slope / second.slope - 1)

    def __str__(self) -> str:
        lines = [f"  h = {d.step:.0e}  slope {d.slope: .10e}  {d.crossings} kinks" for d in self.differences]
        return "\n".join(lines)


def sweep(score: Evaluation, x: np.ndarray, direction: np.ndarray, steps: Sequence[float] = STEPS) -> Sweep:
    """Central differences along a direction, with ever smaller steps; `score` gives S and the sides of the kinks."""
    _, here = score(x)
    found: list[Difference] = []
    for step in sorted(steps, reverse=True):
        ahead, ahead_sides = score(x + step * direction)
        behind, behind_sides = score(x - step * direction)
        kinks = crossings(ahead_sides, here) + crossings(behind_sides, here)
        found.append(Difference(step, (ahead - behind) / (2 * step), kinks))
        if sum(not difference.crossings for difference in found) == _ENOUGH:
            return Sweep(tuple(found))
    raise AssertionError(f"every step crosses a kink:\n{Sweep(tuple(found))}")


def random_direction(x: np.ndarray, seed: int) -> np.ndarray:
    """A random direction as long as x, float64: a step along it is relative to x."""
    direction = np.random.default_rng(seed).standard_normal(x.shape)
    return direction * np.linalg.norm(x) / np.linalg.norm(direction)
