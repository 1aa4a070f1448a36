"""The prompts of the tasks that a new task's inputs are routed to: where tuning may start from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from router.errors import CorruptArtifactError
from router.head import Head
from router.index import CentroidIndex
from router.interfaces import FloatArray, LanguageModel
from router.loading import read_prompt
from router.tasks import PromptMethod, TaskKey
from trainer.initialisation import Start
from trainer.workshop import Workshop

_MOST_TEXTS = 256
_MOST_PROMPTS = 3
_TASKS_OF_A_TEXT = 5


def nearest_prompts(
    workshop: Workshop, texts: Sequence[str], model: LanguageModel, method: PromptMethod
) -> tuple[Start, ...]:
    """The prompts of the live tasks that are nearest to `texts`, the nearest first.

    Only those for this base model and of this method. On a revision of a task, its own prompt is
    one of them. Where none are live, or none has such a prompt, there are none.
    """
    try:
        head = workshop.newest_head()
    except CorruptArtifactError:
        return ()  # publishing compiles it again
    if not head.tasks or not texts:
        return ()
    vectors = workshop.encoder.encode(list(texts[:_MOST_TEXTS])).vectors
    found = []
    for key in nearest_tasks(head, vectors):
        record = workshop.catalog.record(key)
        prompt = record.prompt
        if prompt is None or (prompt.base_model, prompt.method) != (model.fingerprint, method):
            continue
        try:
            values = read_prompt(workshop.artifacts, record)
        except CorruptArtifactError:
            continue  # the task is out of service, which the server and `list` say
        found.append(Start(f"prompt of {key}", values))
        if len(found) == _MOST_PROMPTS:
            break
    return tuple(found)


def nearest_tasks(head: Head, vectors: FloatArray) -> list[TaskKey]:
    """The tasks that the index finds for `vectors` `[B, D]`, by the sum of reciprocal ranks."""
    queries, _ = head.queries(vectors)
    index = CentroidIndex(head.rows, head.row_task)
    _, tasks = index.search(queries, min(_TASKS_OF_A_TEXT, len(head.tasks)))
    votes: defaultdict[int, float] = defaultdict(float)
    for row in tasks.tolist():
        for rank, task in enumerate(row, start=1):
            votes[task] += 1 / rank
    return [head.tasks[task] for task in sorted(votes, key=lambda task: (-votes[task], task))]
