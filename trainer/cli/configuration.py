"""A file of settings for a command: what flags and environment leave open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router.errors import InvalidInputError
from trainer.cli.console import fail

# These are relative to the file that names them.
_PATHS = frozenset({"home", "tokens", "tls_cert", "tls_key", "tls_client_ca", "decision_log"})
_NOT_IN_A_FILE = frozenset({"config", "check", "as_json", "help"})
_MOST_MIB = 1


def _use(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        known = {str(parameter.name) for parameter in context.command.params} - _NOT_IN_A_FILE
        try:
            # Defaults of the context come after flags and environment, and before the flags' own.
            context.default_map = {**(context.default_map or {}), **read_settings(path, known)}
        except InvalidInputError as error:
            fail(error)
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        envvar="PROMPTYARD_CONFIG",
        is_eager=True,
        callback=_use,
        help="YAML file of settings, named like the flags. Flags win over the environment, the "
        "environment over the file.",
    ),
]


def read_settings(path: Path, known: set[str]) -> dict[str, object]:
    """The settings of a YAML file: one value for each key, which is one of `known`.

    Keys may be written with `-` or `_`. Paths are relative to the file.

    Raises:
        InvalidInputError: it cannot be read, or has a key or a value that cannot be used.
    """
    from router.yaml_file import read_yaml

    document = read_yaml(path, _MOST_MIB)
    if not isinstance(document, dict | None):
        raise InvalidInputError(f"{path}", type(document).__name__, "give lines of 'KEY: VALUE'")
    settings: dict[str, object] = {}
    for key, value in (document or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            keys = ", ".join(sorted(known))
            raise InvalidInputError(f"{path}: {key}", "no such setting", f"the settings are {keys}")
        if not isinstance(value, str | int | float | bool):
            raise InvalidInputError(f"{path}: {key}", value, "give one value, or leave the key out")
        settings[name] = str(path.parent / str(value)) if name in _PATHS else value
    return settings
