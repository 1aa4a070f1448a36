"""What callers may be allowed to do."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Role(enum.Enum):
    """What a token may be used for."""

    ROUTE = "route"
    GENERATE = "generate"
    READ = "read"


ROLE_OF_METHOD: Mapping[str, Role] = {
    "Route": Role.ROUTE,
    "BatchRoute": Role.ROUTE,
    "StreamRoute": Role.ROUTE,
    "Generate": Role.GENERATE,
    "GetSoftPrompt": Role.READ,
    "GetStatus": Role.READ,
    "GetTask": Role.READ,
    "ListTasks": Role.READ,
}
"""The role that each method of our services needs. Health and reflection need none."""
