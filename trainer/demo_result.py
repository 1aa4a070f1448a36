"""What the demo found, and the claims that are checked on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from router.decision import Decision, Outcome
from router.errors import PromptyardError
from trainer.admission import Registered
from trainer.prompt_quality import same_text

# What must hold, as shares. The figures are those that the project states for this demo.
LEAST_ROUTING = 0.95
LEAST_ANSWERS = 0.80
LEAST_GAIN_OVER_NO_PROMPT = 0.25
LEAST_OUT_OF_SCOPE_REJECTED = 0.85
MOST_IN_SCOPE_REJECTED = 0.05
MOST_SECONDS_TO_SERVE = 2.0


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out input, and the task and output that are right for it."""

    task: str
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What the server made of a held-out input.

    `answer` is what it answered, nothing where the input was rejected; `routed` is the answer under
    the prompt of the best-scoring task, rejected or not, and `oracle` under that of the right task:
    None where that is not served, because its registration was refused.
    """

    row: HeldOut
    decision: Decision
    answer: str
    routed: str
    oracle: str | None

    @property
    def rightly_routed(self) -> bool:
        """Whether the best task is the right one, before rejection."""
        return bool(self.decision.candidates) and (
            self.decision.candidates[0].task.name == self.row.task
        )

    @property
    def right(self) -> bool:
        """Whether the server's answer is right, which a rejected input does not have.

        An input of a task that was refused has no right answer: another task may hit the output by
        chance.
        """
        return self.oracle is not None and same_text(self.answer, self.row.output)

    @property
    def routed_right(self) -> bool:
        """Whether the answer under the routed prompt is right, before rejection."""
        return self.oracle is not None and same_text(self.routed, self.row.output)

    @property
    def oracle_right(self) -> bool:
        """Whether the answer under the right task's prompt is right."""
        return self.oracle is not None and same_text(self.oracle, self.row.output)


@dataclass(frozen=True, slots=True)
class OutOfScope:
    """An out-of-scope text, the task whose domain it is near (or ""), and the decision."""

    input: str
    near: str
    decision: Decision

    @property
    def rejected(self) -> bool:
        """Whether it was kept from every task."""
        return self.decision.outcome is not Outcome.MATCHED


@dataclass(frozen=True, slots=True)
class LiveRegistration:
    """What happened when a task was registered while the server ran.

    `seconds_to_serve` is infinite where it was refused; `failures` then says why.
    """

    task: str
    failures: Mapping[str, PromptyardError]
    seconds_to_serve: float
    answered: Sequence[Answered]
    changed_files: Sequence[str]
    changed_records: Sequence[str]
    old_answers_changed: int
    old_answers: int


@dataclass(slots=True)
class DemoResult:
    """Everything that the demo found, for printing and for the checks."""

    registered: Registered
    tuning_seconds: float
    answered: Sequence[Answered] = ()
    out_of_scope: Sequence[OutOfScope] = ()
    no_prompt: float = 0.0
    prompt_alone: float = 0.0
    tfidf_routing: float = 0.0
    live: LiveRegistration | None = None
    seconds: float = 0.0
    checks: list[tuple[str, str, bool]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return bool(self.checks) and all(holds for _, _, holds in self.checks)

    @property
    def failures(self) -> Mapping[str, PromptyardError]:
        """Why the tasks that were refused were: of the first registration and of the live one."""
        return {**self.registered.failures, **(self.live.failures if self.live else {})}


def check(result: DemoResult) -> list[tuple[str, str, bool]]:
    """(claim, what was found, whether it holds)."""
    answered, live = result.answered, result.live
    if not answered or live is None:
        return [("the demo ran to its end", "no", False)]
    routing = share(a.rightly_routed for a in answered)
    answers = share(a.routed_right for a in answered)
    with_rejection = share(a.right for a in answered)
    rejected = share(row.rejected for row in result.out_of_scope)
    lost = share(a.decision.outcome is not Outcome.MATCHED for a in answered)
    live_routing = share(a.rightly_routed for a in live.answered)
    return [
        (
            "every task was registered",
            f"{len(result.failures)} refused ({', '.join(result.failures)})"
            if result.failures
            else "all",
            not result.failures,
        ),
        (
            f"routing at least {LEAST_ROUTING:.0%} right",
            f"{routing:.1%} (TF-IDF + logistic regression: {result.tfidf_routing:.1%})",
            routing >= LEAST_ROUTING,
        ),
        (
            f"answers under routed prompts at least {LEAST_ANSWERS:.0%} right",
            f"{answers:.1%} ({with_rejection:.1%} with rejected inputs counted as wrong)",
            answers >= LEAST_ANSWERS,
        ),
        (
            f"at least {100 * LEAST_GAIN_OVER_NO_PROMPT:.0f} points over no prompt",
            f"{100 * (answers - result.no_prompt):.1f} points (no prompt: {result.no_prompt:.1%})",
            answers - result.no_prompt >= LEAST_GAIN_OVER_NO_PROMPT,
        ),
        (
            f"at least {LEAST_OUT_OF_SCOPE_REJECTED:.0%} of out-of-scope texts rejected",
            f"{rejected:.1%}",
            rejected >= LEAST_OUT_OF_SCOPE_REJECTED,
        ),
        (
            f"at most {MOST_IN_SCOPE_REJECTED:.0%} of in-scope texts rejected",
            f"{lost:.1%}",
            lost <= MOST_IN_SCOPE_REJECTED,
        ),
        (
            f"the new task served within {MOST_SECONDS_TO_SERVE:.0f} s, without a restart",
            f"{live.seconds_to_serve:.2f} s; {live_routing:.0%} of its held-out inputs reach it",
            live.seconds_to_serve <= MOST_SECONDS_TO_SERVE and live_routing > 0.5,
        ),
        (
            "old prompts and records unchanged by digest",
            f"{len(live.changed_files) + len(live.changed_records)} changed",
            not live.changed_files and not live.changed_records,
        ),
        (
            "old tasks give the same answers as before",
            f"{live.old_answers_changed} of {live.old_answers} changed",
            not live.old_answers_changed,
        ),
    ]


def share(hits: Iterable[bool]) -> float:
    """The share of true values."""
    values = list(hits)
    return sum(values) / len(values) if values else 0.0
