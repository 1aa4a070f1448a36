"""A small search of tuning settings: which configurations are tried.

`trainer.tuning` tunes them in shared forward passes; `trainer.successive_halving` stops those that
do worse.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from router.errors import InvalidInputError
from trainer.tuning_options import tuning_settings
from trainer.tuning_settings import TuningSettings, check_tuning

SEARCHED = ("learning_rate", "length", "initialisation", "steps")
MOST_CONFIGURATIONS = 64
_DEFAULT_CONFIGURATIONS = 8
_COUNT = "configurations"


def configurations(given: Mapping[str, object], search: object) -> tuple[TuningSettings, ...]:
    """The settings that a search tries; the first are those that are tuned without a search.

    `given` are the settings that the user named, `search` is what a manifest says under that key:
    true, or a mapping of settings to lists of values, with `configurations` as the number of them
    to try (8). Without lists, settings that the user did not name are searched around what they
    would be. The others are drawn from the grid of all values, without repeats, by the seed.

    Raises:
        InvalidInputError: no such setting, a value that cannot be used, or too many configurations.
    """
    default = tuning_settings(given)
    if search is None or search is False:
        check_tuning([], default)
        return (default,)
    named: Mapping[object, object] = search if isinstance(search, dict) else {}
    if search is not True and not isinstance(search, dict):
        raise InvalidInputError("search", search, "give true, or a mapping of settings to lists")
    count = named.get(_COUNT, _DEFAULT_CONFIGURATIONS)
    if not isinstance(count, int) or not 2 <= count <= MOST_CONFIGURATIONS:
        raise InvalidInputError(f"search: {_COUNT}", count, f"give 2 to {MOST_CONFIGURATIONS}")
    space = _listed(named) or _around(default, given)
    grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    first = {
        name: getattr(default, name) if getattr(default, name) in values else values[0]
        for name, values in space.items()
    }
    others = [point for point in grid if point != first]
    drawn = random.Random(f"search/{default.seed}").sample(others, min(count - 1, len(others)))
    found = tuple(tuning_settings({**given, **point}) for point in (first, *drawn))
    for each in found:
        check_tuning([], each)
    return found


def _listed(named: Mapping[object, object]) -> dict[str, Sequence[object]]:
    lists: dict[str, Sequence[object]] = {}
    for name, values in named.items():
        if name == _COUNT:
            continue
        if name not in SEARCHED:
            known = ", ".join((*SEARCHED, _COUNT))
            raise InvalidInputError("search", name, f"what can be searched is {known}")
        distinct = isinstance(values, list) and all(values.count(each) == 1 for each in values)
        if not isinstance(values, list) or not values or not distinct:
            raise InvalidInputError(f"search: {name}", values, "give a list of different values")
        lists[str(name)] = values
    return lists


def _around(default: TuningSettings, given: Mapping[str, object]) -> dict[str, Sequence[object]]:
    """What is tried where the user lists nothing."""
    rate = default.learning_rate
    space: dict[str, Sequence[object]] = {
        "learning_rate": [float(f"{rate * factor:.6g}") for factor in (0.3, 1, 3)],
        "length": sorted({max(1, default.length // 2), default.length, 2 * default.length}),
        "initialisation": ["examples", "nearest"],
        "steps": [default.steps, 2 * default.steps],
    }
    left = {name: values for name, values in space.items() if name not in given}
    if not left:
        raise InvalidInputError(
            "search",
            f"{', '.join(SEARCHED)} are all given",
            "leave one of them out, or list values under `search` in a manifest",
        )
    return left
