"""Evaluates answers: under the routed task's prompt, under the right task's, and under none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.answering import Question
from router.errors import InvalidInputError, NoPromptError, TaskOutOfServiceError
from router.interfaces import LanguageModel, PromptedInput
from router.routing import usable_prompt
from router.snapshot import Snapshot
from router.tasks import SoftPrompt
from trainer import metrics
from trainer.evaluate_routing import RoutedText
from trainer.metrics import Interval
from trainer.prompt_quality import same_text
from trainer.register import Progress

DEFAULT_OUTPUT_TOKENS = 64

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Shares of right answers.

    `routed` is under the prompt of the best-scoring task, `routed_with_rejection` counts rows that
    were called unknown as wrong, `oracle` is under the row's own task's prompt, and `no_prompt` has
    that task's set of outputs but no prompt.
    """

    rows: int
    routed: float
    routed_with_rejection: float
    oracle: float
    no_prompt: float


@dataclass(frozen=True, slots=True)
class AnswerEvaluation:
    """What `evaluate_answers` found.

    `mean` is over tasks, `over_rows` over rows; the interval is that of `over_rows.routed` (95 %,
    Wilson). `routing_loss` is what wrong routing costs: the mean's `oracle` less its `routed`.
    """

    base_model: str
    mean: AnswerFigures
    over_rows: AnswerFigures
    over_rows_routed_interval: Interval
    routing_loss: float
    per_task: Mapping[str, AnswerFigures]


@dataclass(frozen=True, slots=True)
class _Right:
    """Which answers to one row are right."""

    task: str
    rejected: bool
    routed: bool
    oracle: bool
    no_prompt: bool


def evaluate_answers(
    snapshot: Snapshot,
    model: LanguageModel,
    decisions: Sequence[RoutedText],
    max_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
    progress: Progress = lambda *_: None,
) -> AnswerEvaluation:
    """Answer the in-scope rows, as they were routed by `decisions`, and compare with their outputs.

    A closed set of outputs is scored, free text of at most `max_output_tokens` is generated. An
    answer is right that is the row's output, apart from case and white space. A row that is routed
    to a task without a prompt gets no answer there.

    Raises:
        InvalidInputError: no row is in scope.
        NoPromptError, TaskOutOfServiceError: a row's own task has no prompt that can be used.
    """
    in_scope = [routed for routed in decisions if routed.row.task is not None]
    if not in_scope:
        raise InvalidInputError("rows", "none is in scope", "give rows of the catalog's tasks")
    questions = _Questions(snapshot, max_output_tokens)
    oracle = [questions.ask(routed.row.text, str(routed.row.task)) for routed in in_scope]
    bare = [questions.ask_bare(routed.row.text, str(routed.row.task)) for routed in in_scope]
    elsewhere = [
        questions.ask_if_prompted(routed.row.text, routed.best)
        for routed in in_scope
        if not routed.is_right
    ]
    answers = iter(_answer(model, [*oracle, *bare, *filter(None, elsewhere)], progress))
    oracle_answers = [next(answers) for _ in oracle]
    bare_answers = [next(answers) for _ in bare]
    other_answers = iter([next(answers) if question else None for question in elsewhere])
    rights = []
    for routed, own, plain in zip(in_scope, oracle_answers, bare_answers, strict=True):
        given = own if routed.is_right else next(other_answers)
        rights.append(
            _Right(
                str(routed.row.task),
                routed.is_rejected,
                given is not None and same_text(given, routed.row.output),
                same_text(own, routed.row.output),
                same_text(plain, routed.row.output),
            )
        )
    return _evaluation(model, rights)


class _Questions:
    """Makes questions for tasks of a snapshot."""

    def __init__(self, snapshot: Snapshot, max_output_tokens: int) -> None:
        self._snapshot = snapshot
        self._max_output_tokens = max_output_tokens

    def ask(self, text: str, task: str) -> Question:
        """The question under the task's prompt."""
        return self._question(text, task, usable_prompt(self._snapshot.task(task)))

    def ask_if_prompted(self, text: str, task: str) -> Question | None:
        """The same, or None where the task has no prompt that can be used."""
        try:
            return self.ask(text, task)
        except (NoPromptError, TaskOutOfServiceError):
            return None

    def ask_bare(self, text: str, task: str) -> Question:
        """The question to the base model alone, with the task's outputs to choose from."""
        return self._question(text, task, None)

    def _question(self, text: str, task: str, prompt: SoftPrompt | None) -> Question:
        outputs = self._snapshot.task(task).record.outputs
        row = PromptedInput(text, None)
        if prompt is not None:
            row = PromptedInput(text, prompt.values, prompt.method)
        return Question(row, outputs, self._max_output_tokens)


def _answer(model: LanguageModel, questions: Sequence[Question], progress: Progress) -> list[str]:
    """The answers, in the order of the questions. Batches are of similar lengths."""
    answers = [""] * len(questions)
    # Prompts of different tasks share batches; scored and generated rows do not.
    order = sorted(
        range(len(questions)),
        key=lambda i: (questions[i].outputs is None, len(questions[i].input.text), i),
    )
    for kind in (False, True):
        chosen = [i for i in order if (questions[i].outputs is None) is kind]
        for start in range(0, len(chosen), _ROWS_AT_ONCE):
            batch = chosen[start : start + _ROWS_AT_ONCE]
            for i, answer in zip(batch, _batch(model, [questions[i] for i in batch]), strict=True):
                answers[i] = answer
            progress("generated" if kind else "scored", "answer", start + len(batch), len(chosen))
    return answers


def _batch(model: LanguageModel, questions: Sequence[Question]) -> list[str]:
    inputs = [question.input for question in questions]
    if questions[0].outputs is None:
        written = model.generate(inputs, questions[0].max_output_tokens)
        return [generation.text for generation in written]
    outputs = [question.outputs or () for question in questions]
    scores = model.score(inputs, outputs)
    return [labels[row.best] for labels, row in zip(outputs, scores, strict=True)]


def _evaluation(model: LanguageModel, rights: Sequence[_Right]) -> AnswerEvaluation:
    tasks = sorted({right.task for right in rights})
    per_task = {task: _figures([right for right in rights if right.task == task]) for task in tasks}
    of_tasks = list(per_task.values())
    mean = AnswerFigures(
        len(rights),
        metrics.mean([figures.routed for figures in of_tasks]),
        metrics.mean([figures.routed_with_rejection for figures in of_tasks]),
        metrics.mean([figures.oracle for figures in of_tasks]),
        metrics.mean([figures.no_prompt for figures in of_tasks]),
    )
    return AnswerEvaluation(
        base_model=f"{model.name} {model.fingerprint[:16]}",
        mean=mean,
        over_rows=_figures(rights),
        over_rows_routed_interval=metrics.wilson_interval(
            sum(right.routed for right in rights), len(rights)
        ),
        routing_loss=mean.oracle - mean.routed,
        per_task=per_task,
    )


def _figures(rights: Sequence[_Right]) -> AnswerFigures:
    rows = len(rights)
    return AnswerFigures(
        rows,
        metrics.share(sum(right.routed for right in rights), rows),
        metrics.share(sum(right.routed and not right.rejected for right in rights), rows),
        metrics.share(sum(right.oracle for right in rights), rows),
        metrics.share(sum(right.no_prompt for right in rights), rows),
    )
