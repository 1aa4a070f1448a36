"""Tuning settings from what a user named; the rest is what suits the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from router.errors import InvalidInputError
from trainer.tuning_settings import TuningSettings

# What suits prefixes where the defaults are chosen for prompts: of 0.01, 0.03 and 0.1, the best on
# the validation rows of the example tasks, 60 steps on the embedded base model.
_OF_METHOD: Mapping[str, Mapping[str, float]] = {"prefix": {"learning_rate": 0.1}}
_NUMBERS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float)}


def tuning_settings(given: Mapping[str, object]) -> TuningSettings:
    """The settings that `given` names, by the names of their fields, over the method's defaults.

    Raises:
        InvalidInputError: no such setting, or a value of another type.
    """
    default = TuningSettings()
    known = {field.name: str(field.type) for field in fields(default)}
    for name, value in given.items():
        if name not in known:
            raise InvalidInputError("tuning setting", name, f"the settings are {', '.join(known)}")
        kinds = _NUMBERS.get(known[name], (str,))
        if not isinstance(value, kinds) or isinstance(value, bool):
            words = {"int": "a whole number", "float": "a number"}
            raise InvalidInputError(
                f"tuning setting {name}", value, f"give {words.get(known[name], 'a text')}"
            )
    of_method = _OF_METHOD.get(str(given.get("method", default.method)), {})
    return replace(default, **{**of_method, **given})  # type: ignore[arg-type]
