"""A class given on the command line, by index or by name."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from graphgbp.errors import RequestError, TargetError

_SHOWN = 5


def find_class(given: str, names: Sequence[str] | None) -> int:
    """The index of a class; names are matched without regard to case.

    Raises TargetError for a name that no class has (near matches shown), that two have (both indices shown), or a
    number that names one class and numbers another; RequestError where no names are known.
    """
    named = [index for index, name in enumerate(names or ()) if name.casefold() == given.casefold()]
    number = int(given) if re.fullmatch(r"[+-]?\d+", given) else None
    candidates = named if number is None or number in named else [*named, number]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        indices = " and ".join(map(str, candidates))
        raise TargetError(f"'{given}' may be class {indices}; give the index")
    if names is None:
        raise RequestError(f"no class names are known to find '{given}' in; give its index, or --classes FILE")
    near = _near(given, names)
    raise TargetError(f"no class is named '{given}'; {f'near it are {near}' if near else 'give its index'}")


def _near(given: str, names: Sequence[str]) -> str:
    folded = {name.casefold(): index for index, name in reversed(list(enumerate(names)))}
    containing = [name for name in folded if given.casefold() in name]
    similar = get_close_matches(given.casefold(), folded, n=_SHOWN, cutoff=0.6)
    found = list(dict.fromkeys([*similar, *containing]))[:_SHOWN]
    return ", ".join(f"'{names[folded[name]]}' ({folded[name]})" for name in found)
