"""Evaluates answers: under the routed task's prompt, under the right task's, and under none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from router.answering import Question, choose_labels
from router.errors import InvalidInputError, NoPromptError, TaskOutOfServiceError
from router.interfaces import FloatArray, LanguageModel, PromptedEncoder, PromptedInput
from router.label_classifier import ClassifierInput
from router.routing import usable_prompt
from router.snapshot import Snapshot
from router.tasks import SoftPrompt
from router.templates import fill
from trainer import metrics
from trainer.answer_metrics import Metric, recorded_metric, same_text, score
from trainer.evaluate_routing import RoutedText
from trainer.evaluation_rows import LabelledText
from trainer.metrics import Interval
from trainer.register import Progress

DEFAULT_OUTPUT_TOKENS = 64

_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Scores of answers: shares of right ones, but for a task's figures, which are by its metric.

    `routed` is under the prompt of the best-scoring task, `routed_with_rejection` counts rows that
    were called unknown as wrong, `oracle` is under the row's own task's prompt, `prompt_alone` is
    that without the task's label classifier, and `no_prompt` has the task's set of outputs but
    neither.
    """

    rows: int
    routed: float
    routed_with_rejection: float
    oracle: float
    prompt_alone: float
    no_prompt: float
    metric: Metric = "accuracy"


@dataclass(frozen=True, slots=True)
class AnswerEvaluation:
    """What `evaluate_answers` found.

    `mean` is over tasks, each by its metric, `over_rows` the share of right answers; the interval
    is that of `over_rows.routed` (95 %, Wilson). `routing_loss` is what wrong routing costs: the
    mean's `oracle` less its `routed`.
    """

    base_model: str
    mean: AnswerFigures
    over_rows: AnswerFigures
    over_rows_routed_interval: Interval
    routing_loss: float
    per_task: Mapping[str, AnswerFigures]


@dataclass(frozen=True, slots=True)
class _Answered:
    """The answers to one row; the empty text where there is none."""

    task: str
    expected: str
    rejected: bool
    routed: str
    oracle: str
    prompt_alone: str
    no_prompt: str


def evaluate_answers(
    snapshot: Snapshot,
    model: LanguageModel,
    decisions: Sequence[RoutedText],
    vectors: FloatArray,
    max_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
    progress: Progress = lambda *_: None,
    metric: Metric | None = None,
    encoder: PromptedEncoder | None = None,
) -> AnswerEvaluation:
    """Answer the in-scope rows, as they were routed by `decisions`, and compare with their outputs.

    `vectors` `[B, D]` are the embeddings of the decisions' rows, by `encoder` where that can read
    the encoder prompts of label classifiers.

    A closed set of outputs is scored, free text of at most `max_output_tokens` is generated. An
    answer is right that is the row's output, apart from case and white space. A task's answers are
    scored by the metric that its record names, or by `metric` where one is given. A row that is
    routed to a task without a prompt gets no answer there.

    Raises:
        InvalidInputError: no row is in scope.
        NoPromptError, TaskOutOfServiceError: a row's own task has no prompt that can be used.
    """
    places = [place for place, routed in enumerate(decisions) if routed.row.task is not None]
    in_scope = [decisions[place] for place in places]
    if not in_scope:
        raise InvalidInputError("rows", "none is in scope", "give rows of the catalog's tasks")
    questions = _Questions(snapshot, max_output_tokens)
    oracle = [
        questions.ask(routed.row, str(routed.row.task), vector)
        for routed, vector in zip(in_scope, vectors[places], strict=True)
    ]
    # Where there is no classifier, this is the question that was asked already.
    alone = [replace(question, classified=None) for question in oracle if question.classified]
    bare = [questions.ask_bare(routed.row, str(routed.row.task)) for routed in in_scope]
    elsewhere = [
        questions.ask_if_prompted(routed.row, routed.best, vector)
        for routed, vector in zip(in_scope, vectors[places], strict=True)
        if not routed.is_right
    ]
    asked = [*oracle, *alone, *bare, *filter(None, elsewhere)]
    answers = iter(_answer(model, encoder, asked, progress))
    oracle_answers = [next(answers) for _ in oracle]
    alone_answers = iter([next(answers) for _ in alone])
    bare_answers = [next(answers) for _ in bare]
    other_answers = iter([next(answers) if question else None for question in elsewhere])
    answered = []
    for routed, question, own, plain in zip(
        in_scope, oracle, oracle_answers, bare_answers, strict=True
    ):
        given = own if routed.is_right else next(other_answers)
        answered.append(
            _Answered(
                str(routed.row.task),
                routed.row.output,
                routed.is_rejected,
                given or "",
                own,
                next(alone_answers) if question.classified else own,
                plain,
            )
        )
    tasks = sorted({row.task for row in answered})
    return _evaluation(model, answered, {t: metric or _metric(snapshot, t) for t in tasks})


def _metric(snapshot: Snapshot, task: str) -> Metric:
    prompt = snapshot.task(task).record.prompt
    return "accuracy" if prompt is None else recorded_metric(prompt.metric)


class _Questions:
    """Makes questions for tasks of a snapshot."""

    def __init__(self, snapshot: Snapshot, max_output_tokens: int) -> None:
        self._snapshot = snapshot
        self._max_output_tokens = max_output_tokens

    def ask(self, row: LabelledText, task: str, vector: FloatArray) -> Question:
        """The question under the task's prompt, of a row with the embedding `[D]`."""
        served = self._snapshot.task(task)
        question = self._question(row, task, usable_prompt(served))
        if served.classifier is None:
            return question
        return replace(question, classified=ClassifierInput(served.classifier, row.text, vector))

    def ask_if_prompted(self, row: LabelledText, task: str, vector: FloatArray) -> Question | None:
        """The same, or None where the task has no prompt that can be used."""
        try:
            return self.ask(row, task, vector)
        except (NoPromptError, TaskOutOfServiceError):
            return None

    def ask_bare(self, row: LabelledText, task: str) -> Question:
        """The question to the base model alone, with the task's outputs to choose from."""
        return self._question(row, task, None)

    def _question(self, row: LabelledText, task: str, prompt: SoftPrompt | None) -> Question:
        record = self._snapshot.task(task).record
        text = fill(record.template, row.text, row.context)
        prompted = PromptedInput(text, None)
        if prompt is not None:
            prompted = PromptedInput(text, prompt.values, prompt.method)
        return Question(prompted, record.outputs, self._max_output_tokens)


def _answer(
    model: LanguageModel,
    encoder: PromptedEncoder | None,
    questions: Sequence[Question],
    progress: Progress,
) -> list[str]:
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
            found = _batch(model, encoder, [questions[i] for i in batch])
            for i, answer in zip(batch, found, strict=True):
                answers[i] = answer
            progress("generated" if kind else "scored", "answer", start + len(batch), len(chosen))
    return answers


def _batch(
    model: LanguageModel, encoder: PromptedEncoder | None, questions: Sequence[Question]
) -> list[str]:
    if questions[0].outputs is None:
        inputs = [question.input for question in questions]
        written = model.generate(inputs, questions[0].max_output_tokens)
        return [generation.text for generation in written]
    return [
        (question.outputs or ())[chosen]
        for question, (chosen, _) in zip(
            questions, choose_labels(model, encoder, questions), strict=True
        )
    ]


def _evaluation(
    model: LanguageModel, answered: Sequence[_Answered], metric_of: Mapping[str, Metric]
) -> AnswerEvaluation:
    per_task = {
        task: _figures([row for row in answered if row.task == task], metric)
        for task, metric in metric_of.items()
    }
    of_tasks = list(per_task.values())
    mean = AnswerFigures(
        len(answered),
        metrics.mean([figures.routed for figures in of_tasks]),
        metrics.mean([figures.routed_with_rejection for figures in of_tasks]),
        metrics.mean([figures.oracle for figures in of_tasks]),
        metrics.mean([figures.prompt_alone for figures in of_tasks]),
        metrics.mean([figures.no_prompt for figures in of_tasks]),
    )
    return AnswerEvaluation(
        base_model=f"{model.name} {model.fingerprint[:16]}",
        mean=mean,
        over_rows=_figures(answered, "accuracy"),
        over_rows_routed_interval=metrics.wilson_interval(
            sum(same_text(row.routed, row.expected) for row in answered), len(answered)
        ),
        routing_loss=mean.oracle - mean.routed,
        per_task=per_task,
    )


def _figures(rows: Sequence[_Answered], metric: Metric) -> AnswerFigures:
    expected = [row.expected for row in rows]
    return AnswerFigures(
        len(rows),
        score(metric, [row.routed for row in rows], expected),
        score(metric, ["" if row.rejected else row.routed for row in rows], expected),
        score(metric, [row.oracle for row in rows], expected),
        score(metric, [row.prompt_alone for row in rows], expected),
        score(metric, [row.no_prompt for row in rows], expected),
        metric,
    )
