"""Challengers: a second revision of a task, tried on live traffic beside the current one."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from router.errors import InvalidInputError
from router.tasks import TaskKey

# Each one is a head more to compile at every publish, and a search more for every text.
MAX_CHALLENGERS = 4
SHADOW = "shadow"

_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{0,6})?)%|(0?\.[0-9]{1,8})")


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenger of a task: the revision `revision`, which answers `share` of the request keys.

    A share of None is a shadow: it decides, and never answers.

    Raises:
        InvalidInputError: a share that is not over 0 and at most 1.
    """

    task: str
    revision: int
    share: float | None

    def __post_init__(self) -> None:
        if self.share is not None and not (math.isfinite(self.share) and 0 < self.share <= 1):
            raise InvalidInputError(
                f"share of the challenger {self.key}", self.share, "give more than 0, at most 1"
            )

    @property
    def key(self) -> TaskKey:
        """The challenging revision."""
        return TaskKey(self.task, self.revision)

    @property
    def share_text(self) -> str:
        """`10%` or `shadow`."""
        return SHADOW if self.share is None else f"{self.share * 100:g}%"

    def answers(self, request_key: str) -> bool:
        """Whether the challenger answers the requests of this key; never those without a key.

        A key stays on its side in every process, and also when the share grows. Another challenger
        of the task divides the keys anew.
        """
        if self.share is None or not request_key:
            return False
        drawn = hashlib.blake2b(f"{self.key}\0{request_key}".encode(), digest_size=8).digest()
        return int.from_bytes(drawn) < self.share * 2**64


def parse_share(text: str, field: str = "challenger") -> float | None:
    """`10%` or `0.1` to a share; `shadow` to None.

    Raises:
        InvalidInputError: it is neither, or not over 0 % and at most 100 %.
    """
    if text == SHADOW:
        return None
    found = _SHARE.fullmatch(text)
    if found is not None:
        share = float(found[1]) / 100 if found[1] else float(found[2])
        if 0 < share <= 1:
            return share
    raise InvalidInputError(
        field, repr(text[:40]), "give a share like 10% or 0.1, at most 100%, or shadow"
    )
