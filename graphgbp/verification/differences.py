"""Central differences of a score along directions, and how far each can be trusted."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from graphgbp.equivalence import Feeds
from graphgbp.verification.parts import norm

RANDOM_DIRECTIONS = 3

Score = Callable[[Feeds], float]


@dataclass(frozen=True)
class Precision:
    """How differences are taken: steps relative to the point, and what error is allowed.

    Where steps are `large` a score that has saturated looks smooth: there a slope is settled by its own measure.
    """

    words: str
    steps: tuple[float, ...]
    tolerance: float
    large: bool

    def is_settled(self, slope: float, last: float, bend: float, scale: float) -> bool:
        """Whether the slopes ahead and behind, which differ by `bend`, agree, and that of the step before."""
        return max(bend, abs(slope - last)) <= self.tolerance / 2 * (min(abs(slope), scale) if self.large else scale)


DOUBLE = Precision("in double precision", (1e-7, 1e-8, 1e-9), 1e-4, large=False)
STRAIGHT_THROUGH = replace(DOUBLE, words=f"{DOUBLE.words}, straight through what is rounded")
FLOAT32 = Precision("in float32", (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4), 5e-2, large=True)


@dataclass(frozen=True)
class Difference:
    """A slope of the score as measured, and as the gradient in question claims it.

    `scale` is what an error is relative to: the claimed slope, or what the gradient's length lets expect along a
    random direction where that is more. `settled` says that no kink lies in between: the slopes ahead and behind agree.
    """

    direction: str
    measured: float
    claimed: float
    scale: float
    step: float
    settled: bool

    @property
    def error(self) -> float:
        return abs(self.measured - self.claimed) / self.scale

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "error": self.error}


def differences(score: Score, point: Feeds, gradient: Feeds, precision: Precision) -> list[Difference]:
    """The slope along several directions as long as `point`, each by the first step that crosses no kink.

    Along the gradient itself any scaling shows, along random directions any missing or foreign part of it; they are
    drawn so that each of several tensors counts alike. A slope that contradicts the gradient must come out at two
    steps, lest kinks that balance, or rounding, pass for one. What is 0 in the point is held where nothing else helps:
    a max pooling over rectified values has ties there, and no derivative.
    """
    here = score(point)
    found = []
    for name, direction in _directions(point, gradient):
        measured = _measure(score, here, point, gradient, name, direction, precision)
        if not measured.settled and any((x == 0).any() for x in point.values()):
            held = {key: x * (point[key] != 0) for key, x in direction.items()}
            measured = _measure(score, here, point, gradient, f"{name}, zeros held", held, precision)
        found.append(measured)
    return found


def moves(score: Score, point: Feeds, precision: Precision) -> bool:
    """Whether the score changes along a random direction by more than rounding does."""
    here, step = score(point), precision.steps[0]
    rng = np.random.default_rng(2)
    direction = {key: rng.standard_normal(x.shape) for key, x in point.items()}
    stretch = (norm(point) or 1.0) / norm(direction)
    ahead = score({key: x + step * stretch * direction[key] for key, x in point.items()})
    return abs(ahead - here) > 1e-3 * step * abs(here)


def _measure(
    score: Score, here: float, point: Feeds, gradient: Feeds, name: str, direction: Feeds, precision: Precision
) -> Difference:
    stretch = (norm(point) or 1.0) / (norm(direction) or 1.0)
    d = {key: x * stretch for key, x in direction.items()}
    claimed = sum(float(np.sum(gradient[key] * d[key])) for key in d)
    scale = max(abs(claimed), _expected(gradient, d))
    slope = np.inf
    for step in precision.steps:
        last = slope
        ahead, behind = (score({key: x + sign * step * d[key] for key, x in point.items()}) for sign in (1, -1))
        slope, bend = (ahead - behind) / (2 * step), abs(ahead + behind - 2 * here) / step
        wrong = abs(slope - claimed) > precision.tolerance * scale
        if settled := precision.is_settled(slope, last if wrong or precision.large else slope, bend, scale):
            break
    return Difference(name, slope, claimed, scale, step, settled)


def _expected(gradient: Feeds, direction: Feeds) -> float:
    """How large a slope a direction of these lengths has, if it is a random one."""
    terms = (norm({key: x}) * norm({key: gradient[key]}) / np.sqrt(x.size) for key, x in direction.items())
    return float(np.sqrt(sum(term**2 for term in terms)))


def _directions(point: Feeds, gradient: Feeds) -> Iterator[tuple[str, Feeds]]:
    yield "the gradient", gradient
    if norm(point):
        yield "the input", point
    rng = np.random.default_rng(2)
    sizes = {key: norm({key: x}) or 1.0 for key, x in gradient.items()}
    for index in range(RANDOM_DIRECTIONS):
        yield f"random {index + 1}", {key: rng.standard_normal(x.shape) / sizes[key] for key, x in point.items()}
