"""Tries challengers on live traffic: asks them, says who answers, and compares.

Which texts are a challenger's does not depend on who answers: those that the current head *or* the
challenger's finds its task for, so that the decisions of both sides can be compared, and texts that
only the challenger would match are tried, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from router.challengers import Challenge
from router.decision import Decision, Outcome, ShadowDecision, Side, Use
from router.interfaces import ComparedSide, Embeddings, Observer
from router.snapshot import Snapshot


def with_challengers(
    snapshot: Snapshot,
    embeddings: Embeddings,
    decisions: Sequence[Decision],
    request_keys: Sequence[str],
    top_k: int,
    observer: Observer,
) -> list[Decision]:
    """The decisions to answer with, one per row of `embeddings` `[B, D]`.

    `decisions` are those of the snapshot's own head, and `request_keys` say who answers where a
    challenger shares the texts. No rejection policy is applied: see `Snapshot.apply`.
    """
    challengers = list(snapshot.challengers.values())
    if not challengers:
        return list(decisions)
    theirs = [each.snapshot.decide(embeddings, top_k) for each in challengers]
    return [
        _answer(
            snapshot,
            current,
            [(each.challenge, made[row]) for each, made in zip(challengers, theirs, strict=True)],
            request_key,
            observer,
        )
        for row, (current, request_key) in enumerate(zip(decisions, request_keys, strict=True))
    ]


def named(snapshot: Snapshot, name: str, request_key: str, observer: Observer) -> Decision:
    """The decision of a request that names its task, and so is not routed.

    Raises:
        TaskNotFoundError: the snapshot has no task of that name.
    """
    answering, side = snapshot, None
    challenger = snapshot.challengers.get(name)
    if challenger is not None and challenger.challenge.share is not None:
        side = _side(snapshot, challenger.challenge, request_key)
        answering = challenger.snapshot if side.by_challenger else snapshot
    key = answering.task(name).record.key
    decision = Decision(
        Outcome.MATCHED,
        key,
        math.nan,
        math.nan,
        answering.head.thresholds[answering.head.tasks.index(key)],
        snapshot.revision,
        truncated=False,
        used=key,
        use=Use.NAMED,
        side=side,
    )
    if side is not None:
        observer.compared(_side_name(side, request_key), key, decision)
    return decision


def _answer(
    snapshot: Snapshot,
    current: Decision,
    asked: Sequence[tuple[Challenge, Decision]],
    request_key: str,
    observer: Observer,
) -> Decision:
    concerned = [
        (challenge, theirs)
        for challenge, theirs in asked
        if _names(current, challenge.task) or _names(theirs, challenge.task)
    ]
    if not concerned:
        return current
    # A text is in one split: that of the task that it is routed to, if that has a challenger.
    concerned.sort(key=lambda pair: not _names(current, pair[0].task))
    answer, side, shadows = current, None, []
    for challenge, theirs in concerned:
        mine = snapshot.task(challenge.task).record.key
        if challenge.share is None:
            differs = _verdict(current) != _verdict(theirs)
            shadows.append(
                ShadowDecision(challenge.key, theirs.outcome, theirs.task, theirs.score, differs)
            )
            observer.compared("current", mine, current)
            observer.compared("shadow", challenge.key, theirs)
            if differs:
                observer.shadow_differed(challenge.key)
        elif side is None:
            side = _side(snapshot, challenge, request_key)
            answer = theirs if side.by_challenger else current
            observer.compared(
                _side_name(side, request_key), challenge.key if side.by_challenger else mine, answer
            )
    return replace(answer, side=side, shadows=tuple(shadows))


def _side(snapshot: Snapshot, challenge: Challenge, request_key: str) -> Side:
    current = snapshot.task(challenge.task).record.key
    return Side(current, challenge.key, challenge.answers(request_key))


def _side_name(side: Side, request_key: str) -> ComparedSide:
    if side.by_challenger:
        return "challenger"
    return "current" if request_key else "no_key"


def _names(decision: Decision, task: str) -> bool:
    return decision.task is not None and decision.task.name == task


def _verdict(decision: Decision) -> tuple[Outcome, str]:
    return decision.outcome, "" if decision.task is None else decision.task.name
