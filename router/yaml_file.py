"""Reads the YAML files that people write: manifests, settings, tokens."""

from __future__ import annotations

from pathlib import Path

import yaml

from router.errors import InvalidInputError


def read_yaml(path: Path, most_mib: int) -> object:
    """What a file of at most `most_mib` MiB says; None where it is empty.

    Its content is not repeated in errors: it may hold secrets.

    Raises:
        InvalidInputError: it cannot be read, is larger, or is no YAML in UTF-8.
    """
    try:
        if path.stat().st_size > most_mib << 20:
            raise InvalidInputError(f"{path}", f"over {most_mib} MiB", "give a smaller file")
        document: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(
            f"{path}", error.strerror or error, "check the path and the file"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"{path}", f"the byte {error.object[error.start]:#04x}", "save the file as UTF-8"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-13-45; [[[[[...
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise InvalidInputError(f"{path}", f"no YAML{where}", "give a YAML file") from error
    return document
