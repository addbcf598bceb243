"""Arithmetic of sizes: an int where known, else a symbol; None where nothing is known.

Equal values get equal symbols as far as that can be told: a product is spelled `(a*b*3)`, factors sorted and the number
last, a sum `(a+3)`, a quotient `(a//2)`.
"""

import math
from collections import Counter
from collections.abc import Sequence

Dim = int | str
Open = int | str | None


def times(a: Open, b: Open) -> Open:
    return None if a is None or b is None else _spell(_factors(a) + _factors(b), _number(a) * _number(b))


def over(a: Open, b: Open) -> Open:
    """a // b, for sizes"""
    exact = quotient(a, b)
    if exact is not None or a is None or b is None or min(_number(a), _number(b) - 1) < 0:
        return exact
    return a // b if isinstance(a, int) and isinstance(b, int) else f"({a}//{b})"


def quotient(a: Open, b: Open) -> Open:
    """a / b where it is known to leave no remainder."""
    if a is None or b is None or min(_number(a), _number(b) - 1) < 0 or _number(a) % _number(b):
        return None
    rest = Counter(_factors(a))
    rest.subtract(_factors(b))
    return None if min(rest.values(), default=0) < 0 else _spell(list(rest.elements()), _number(a) // _number(b))


def plus(a: Open, b: Open) -> Open:
    if a is None or b is None or (isinstance(a, str) and isinstance(b, str)):
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    symbol, number = (a, b) if isinstance(a, str) else (b, a)
    return f"({symbol}{number:+d})" if number else symbol


def minus(a: Open, b: Open) -> Open:
    if a is not None and a == b:
        return 0
    return plus(a, -b) if isinstance(b, int) else None


def equal(a: Open, b: Open) -> Open:
    """1 or 0 where that is known; a symbol is never negative."""
    if a is None or b is None:
        return None
    if a == b or (isinstance(a, int) and isinstance(b, int)):
        return int(a == b)
    return 0 if any(isinstance(size, int) and size < 0 for size in (a, b)) else None


def chosen(condition: Open, a: Open, b: Open) -> Open:
    if isinstance(condition, int):
        return a if condition else b
    return a if a == b else None


def product(sizes: Sequence[Open]) -> Open:
    found: Open = 1
    for size in sizes:
        found = times(found, size)
    return found


def reshaped(shape: Sequence[Dim] | None, target: Sequence[Open], allowzero: bool) -> list[Open]:
    """Reshape: 0 stands for the input's size, -1 for the rest."""
    given = list(target)
    if not allowzero and 0 in given:
        given = [_at(shape, axis) if size == 0 else size for axis, size in enumerate(given)]
    if -1 in given:
        others = product([size for size in given if size != -1])
        given[given.index(-1)] = None if shape is None else quotient(product(shape), others)
    return given


def expanded(shape: Sequence[Dim] | None, target: Sequence[Open]) -> list[Open] | None:
    """Expand: each size is the input's or the target's, whichever is not 1."""
    if shape is None:
        return None
    rank = max(len(shape), len(target))
    pairs = zip((1,) * (rank - len(shape)) + tuple(shape), (1,) * (rank - len(target)) + tuple(target), strict=True)
    return [_broadcast(a, b) for a, b in pairs]


def _broadcast(a: Open, b: Open) -> Open:
    if a == b or b == 1 or (isinstance(a, int) and a > 1):
        return a
    return b if a == 1 or (isinstance(b, int) and b > 1) else None


def _at(shape: Sequence[Dim] | None, axis: int) -> Open:
    return shape[axis] if shape is not None and axis < len(shape) else None


def _spell(symbols: list[str], number: int) -> Dim:
    if number == 0 or not symbols:
        return number
    parts = [*sorted(symbols), *([str(number)] if number != 1 else [])]
    return parts[0] if len(parts) == 1 else f"({'*'.join(parts)})"


def _factors(size: Dim) -> list[str]:
    """The symbols of a product."""
    parts = _parts(size) if isinstance(size, str) else []
    return [part for part in parts if len(parts) == 1 or not part.isdigit()]


def _number(size: Dim) -> int:
    """The number in a product."""
    if isinstance(size, int):
        return size
    parts = _parts(size)
    return math.prod(int(part) for part in parts if len(parts) > 1 and part.isdigit())


def _parts(symbol: str) -> list[str]:
    """What is multiplied in `(a*b*3)`; the symbol itself where it is no product."""
    if not (symbol.startswith("(") and symbol.endswith(")")):
        return [symbol]
    parts, depth = [""], 0
    for letter in symbol[1:-1]:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0 or (depth == 0 and letter in "+-/,;"):
            return [symbol]
        if depth == 0 and letter == "*":
            parts.append("")
        else:
            parts[-1] += letter
    return parts if len(parts) > 1 and all(parts) else [symbol]
