"""Decisions, rejection policies and explanations on the wire: values <-> proto messages."""

from __future__ import annotations

from router.decision import (
    USE_WITHOUT_POLICY,
    Candidate,
    Decision,
    Outcome,
    ShadowDecision,
    Side,
    Use,
)
from router.errors import InvalidInputError
from router.explanation import ExplainedCandidate, Explanation, ScoreTerm, StoredExample
from router.rejection import OnUnknown, RejectionPolicy
from router.tasks import TaskKey
from router.v1 import decision_pb2, explanation_pb2

_OUTCOMES = {
    Outcome.MATCHED: decision_pb2.OUTCOME_MATCHED,
    Outcome.AMBIGUOUS: decision_pb2.OUTCOME_AMBIGUOUS,
    Outcome.UNKNOWN: decision_pb2.OUTCOME_UNKNOWN,
}
_OUTCOME_VALUES = {message: value for value, message in _OUTCOMES.items()}

_USES = {use: decision_pb2.Use.Value(f"USE_{use.name}") for use in Use}
_USE_VALUES = {message: use for use, message in _USES.items()}

_ACTIONS = {
    OnUnknown.ABSTAIN: decision_pb2.REJECTION_ACTION_ABSTAIN,
    OnUnknown.FALLBACK: decision_pb2.REJECTION_ACTION_FALLBACK,
    OnUnknown.BEST: decision_pb2.REJECTION_ACTION_BEST,
}
_ACTION_VALUES = {message: action for action, message in _ACTIONS.items()}


def decision_message(decision: Decision) -> decision_pb2.Decision:
    """A decision to its message."""
    message = decision_pb2.Decision(
        outcome=_OUTCOMES[decision.outcome],
        score=decision.score,
        margin=decision.margin,
        threshold=decision.threshold,
        revision=decision.revision,
        truncated=decision.truncated,
        candidates=[
            decision_pb2.Candidate(
                task=candidate.task.name,
                task_revision=candidate.task.revision,
                score=candidate.score,
                threshold=candidate.threshold,
            )
            for candidate in decision.candidates
        ],
        use=_USES[decision.use],
        probability=decision.probability,
        side=_side_message(decision.side),
        shadows=[_shadow_message(shadow) for shadow in decision.shadows],
    )
    if decision.task is not None:
        message.task = decision.task.name
        message.task_revision = decision.task.revision
    if decision.used is not None:
        message.used_task = decision.used.name
        message.used_task_revision = decision.used.revision
    return message


def decision_value(message: decision_pb2.Decision) -> Decision:
    """The decision that `decision_message` wrote."""
    outcome = _OUTCOME_VALUES[message.outcome]
    task = _key(message.task, message.task_revision)
    used, use = _key(message.used_task, message.used_task_revision), _USE_VALUES.get(message.use)
    if use is None:  # a server that knows no rejection policies
        used, use = task, USE_WITHOUT_POLICY[outcome]
    return Decision(
        outcome=outcome,
        task=task,
        score=message.score,
        margin=message.margin,
        threshold=message.threshold,
        revision=message.revision,
        truncated=message.truncated,
        candidates=tuple(
            Candidate(TaskKey(item.task, item.task_revision), item.score, item.threshold)
            for item in message.candidates
        ),
        used=used,
        use=use,
        probability=message.probability if message.HasField("probability") else None,
        side=_side_value(message.side) if message.HasField("side") else None,
        shadows=tuple(_shadow_value(shadow) for shadow in message.shadows),
    )


def rejection_message(policy: RejectionPolicy | None) -> decision_pb2.RejectionPolicy | None:
    """A request's policy to its message; None leaves it to the catalog."""
    if policy is None:
        return None
    return decision_pb2.RejectionPolicy(
        action=_ACTIONS[policy.on_unknown], fallback_task=policy.fallback_task
    )


def rejection_value(message: decision_pb2.RejectionPolicy) -> RejectionPolicy | None:
    """The policy of a request, None where it leaves that to the catalog.

    Raises:
        InvalidInputError: no such action, or a fallback without a task's name, or the reverse.
    """
    if not message.action and not message.fallback_task:
        return None
    action = _ACTION_VALUES.get(message.action)
    if action is None:
        raise InvalidInputError(
            "on_unknown.action",
            message.action,
            f"send one of {', '.join(map(decision_pb2.RejectionAction.Name, _ACTION_VALUES))}",
        )
    if (action is OnUnknown.FALLBACK) != bool(message.fallback_task):
        raise InvalidInputError(
            "on_unknown.fallback_task",
            repr(message.fallback_task),
            "name a task where the action is REJECTION_ACTION_FALLBACK, and only there",
        )
    try:
        return RejectionPolicy(action, message.fallback_task)
    except InvalidInputError as error:
        raise InvalidInputError("on_unknown.fallback_task", error.value, error.remedy) from error


def explanation_message(explanation: Explanation) -> explanation_pb2.Explanation:
    """An explanation to its message."""
    return explanation_pb2.Explanation(
        sentence=explanation.sentence,
        candidates=[
            explanation_pb2.ExplainedCandidate(
                task=candidate.task.name,
                task_revision=candidate.task.revision,
                score=candidate.score,
                threshold=candidate.threshold,
                margin=candidate.margin,
                terms=[
                    explanation_pb2.ScoreTerm(name=term.name, value=term.value)
                    for term in candidate.terms
                ],
                examples=[
                    explanation_pb2.StoredExample(row=each.row, similarity=each.similarity)
                    for each in candidate.examples
                ],
            )
            for candidate in explanation.candidates
        ],
        ambiguity_margin=explanation.ambiguity_margin,
        notes=explanation.notes,
    )


def explanation_value(message: explanation_pb2.Explanation) -> Explanation:
    """The explanation that `explanation_message` wrote."""
    return Explanation(
        message.sentence,
        tuple(
            ExplainedCandidate(
                TaskKey(item.task, item.task_revision),
                item.score,
                item.threshold,
                item.margin,
                tuple(ScoreTerm(term.name, term.value) for term in item.terms),
                tuple(StoredExample(each.row, each.similarity) for each in item.examples),
            )
            for item in message.candidates
        ),
        message.ambiguity_margin,
        tuple(message.notes),
    )


def _side_message(side: Side | None) -> decision_pb2.Side | None:
    if side is None:
        return None
    return decision_pb2.Side(
        task=side.challenger.name,
        current_revision=side.current.revision,
        challenger_revision=side.challenger.revision,
        by_challenger=side.by_challenger,
    )


def _side_value(message: decision_pb2.Side) -> Side:
    return Side(
        TaskKey(message.task, message.current_revision),
        TaskKey(message.task, message.challenger_revision),
        message.by_challenger,
    )


def _shadow_message(shadow: ShadowDecision) -> decision_pb2.ShadowDecision:
    return decision_pb2.ShadowDecision(
        shadow_of=shadow.challenger.name,
        shadow_revision=shadow.challenger.revision,
        outcome=_OUTCOMES[shadow.outcome],
        task="" if shadow.task is None else shadow.task.name,
        task_revision=0 if shadow.task is None else shadow.task.revision,
        score=shadow.score,
        differs=shadow.differs,
    )


def _shadow_value(message: decision_pb2.ShadowDecision) -> ShadowDecision:
    return ShadowDecision(
        TaskKey(message.shadow_of, message.shadow_revision),
        _OUTCOME_VALUES[message.outcome],
        _key(message.task, message.task_revision),
        message.score,
        message.differs,
    )


def _key(name: str, revision: int) -> TaskKey | None:
    return TaskKey(name, revision) if name else None
