"""Changes of a catalog's policy."""

from __future__ import annotations

from dataclasses import replace

from router.compiling import HEAD_KINDS
from router.errors import InvalidInputError
from router.tasks import Policy
from trainer.commands import PolicyChange


def changed_policy(policy: Policy, change: PolicyChange) -> Policy:
    """`policy` with `change` applied.

    Raises:
        InvalidInputError: no such head, or a rate outside of [0, 0.5].
    """
    named = {
        "head": change.head,
        "false_reject_rate": change.false_reject_rate,
        "ambiguous_rate": change.ambiguous_rate,
        "on_unknown": None if change.on_unknown is None else str(change.on_unknown),
        "cascade": change.cascade,
    }
    policy = replace(policy, **{k: v for k, v in named.items() if v is not None})  # type: ignore[arg-type]
    if policy.head not in HEAD_KINDS:
        raise InvalidInputError("head", policy.head, f"choose one of {', '.join(HEAD_KINDS)}")
    for name in ("false_reject_rate", "ambiguous_rate"):
        if not 0 <= getattr(policy, name) <= 0.5:
            raise InvalidInputError(name, getattr(policy, name), "give a share from 0 to 0.5")
    return policy
