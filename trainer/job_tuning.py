"""One task and the configurations that it is tuned with; the best is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from router.backends.torch_model import TorchLanguageModel
from router.errors import PromptyardError
from router.tasks import TriedSettings
from trainer.successive_halving import survivors
from trainer.task_tuning import TaskTuning
from trainer.tuned_prompt import TunedPrompt, TuningFailure
from trainer.tuning_settings import TuningJob, TuningSettings


class JobTuning:
    """The tunings of one job: with every one of `configurations`, and each of its seeds.

    `tried` are those that could begin. A single one is no search, and is stopped by nobody.
    """

    def __init__(
        self,
        model: TorchLanguageModel,
        job: TuningJob,
        configurations: Sequence[TuningSettings],
    ) -> None:
        self._is_search = len(configurations) > 1
        self._settings = [
            replace(each, seed=each.seed + more)
            for each in configurations
            for more in range(each.seeds)
        ]
        self.tried: list[TaskTuning] = []
        self._failures: dict[int, TuningFailure] = {}
        for number, settings in enumerate(self._settings):
            baselines = self.tried[0].baselines if self.tried else None
            try:
                self.tried.append(TaskTuning(model, job, settings, baselines))
            except PromptyardError as error:
                self._failures[number] = TuningFailure(
                    job.name, f"{error.field}: {error.value}", error.remedy
                )
        if len(self._settings) > 1:
            begun = [n for n in range(len(self._settings)) if n not in self._failures]
            for number, task in zip(begun, self.tried, strict=True):
                task.run = f"{job.name}.{number + 1}"  # its row in what `inspect` shows

    def stop_worse(self) -> int:
        """Stop the configurations that do worse than others at the same point; how many it were."""
        if not self._is_search or not self.tried:
            return 0
        left = survivors(self.tried, self.tried[0].settings.validations)
        worse = [task for task in self.tried if task.is_running and task not in left]
        for task in worse:
            task.stop()
        return len(worse)

    def refitted(self, model: TorchLanguageModel) -> TaskTuning | None:
        """The best one on all rows, from its start again; None where that is not wanted."""
        return self._best.refitted(model) if self.tried else None

    def result(
        self, model: TorchLanguageModel, seconds: float, refitted: TaskTuning | None
    ) -> TunedPrompt | TuningFailure:
        """What became of the job; the prompt is that of `refitted`, where there is one."""
        if not self.tried:
            return self._failures[0]
        best = self._best
        result = best.result(seconds, refitted, best.probabilities(model))
        if not self._is_search or isinstance(result, TuningFailure):
            return result
        return replace(result, search=self._told())

    @property
    def _best(self) -> TaskTuning:
        return max(self.tried, key=lambda task: task.quality)

    def _told(self) -> tuple[TriedSettings, ...]:
        documents = [asdict(settings) for settings in self._settings]
        differ = [key for key in documents[0] if len({str(each[key]) for each in documents}) > 1]
        best = self._best
        begun = iter(self.tried)
        told = []
        for number, document in enumerate(documents):
            settings = {key: document[key] for key in differ}
            failure = self._failures.get(number)
            if failure is not None:
                told.append(TriedSettings(settings, problem=failure.reason))
            else:
                told.append(_tried(settings, next(begun), best))
        return tuple(told)


def _tried(
    settings: Mapping[str, float | int | str], task: TaskTuning, best: TaskTuning
) -> TriedSettings:
    if task.problem:
        return TriedSettings(settings, task.steps, problem=task.problem)
    score, loss = round(task.quality.score, 4), round(-task.quality.minus_loss, 4)
    return TriedSettings(settings, task.steps, score, loss, chosen=task is best)
