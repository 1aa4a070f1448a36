"""The command that looks at a task's soft prompt: inspect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from router.settings import DEFAULT_BASE_MODEL
from trainer.cli.console import (
    AsJson,
    BaseModel,
    Home,
    err,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from router.interfaces import LanguageModel
    from router.tasks import PromptSummary, TaskRecord, TrainingCurve, TriedSettings
    from trainer.inspection import Inspection

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 60
_SIMILAR_SHOWN = 10


def add_to(app: typer.Typer) -> None:
    """Mount the command."""
    app.command("inspect")(inspect)


def inspect(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The task's name.")],
    revision: Annotated[
        int | None, typer.Option(help="A revision of the task. Default: the live one.")
    ] = None,
    near: Annotated[
        int, typer.Option(min=1, max=100, help="Vocabulary tokens to show for each virtual token.")
    ] = 5,
    home: Home = None,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Look at a task's soft prompt: what it is near to, how its tuning went, where it came from.

    promptyard inspect refunds

    Shown are the vocabulary tokens nearest to each virtual token (of the method prompt, where its
    base model can be loaded), lengths, the cosine with the prompts of other tasks, the training
    curve, scores on the validation rows, and the lineage. What the nearest tokens say is a hint and
    no explanation: tuned vectors lie between tokens.
    """
    with errors_for_people(as_json):
        from router.artifacts import ArtifactReader
        from router.catalog import ARTIFACTS_FOLDER, CatalogReader
        from trainer.cli.chosen_task import prompted_record

        folder = home_folder(home)
        record, prompt = prompted_record(folder, name, revision)
        with CatalogReader(folder) as catalog:
            live = catalog.live(catalog.newest_revision())
            others = [catalog.record(key) for key in live if key.name != name]

        from trainer.inspection import inspect_prompt

        found = inspect_prompt(
            ArtifactReader(folder / ARTIFACTS_FOLDER),
            record,
            others,
            _base_model(base_model, prompt),
            near,
        )
        if as_json:
            print_json(_document(record, prompt, found))
        else:
            _show(record, prompt, found)


def sparkline(values: Sequence[float], width: int = _MOST_BARS) -> str:
    """Values as a line of bars from the least to the greatest, at most `width` of them."""
    block = -(-len(values) // width) or 1
    means = [
        sum(values[i : i + block]) / len(values[i : i + block])
        for i in range(0, len(values), block)
    ]
    if not means:
        return ""
    least, span = min(means), max(means) - min(means)
    steps = len(_BARS) - 1
    return "".join(_BARS[round((value - least) / span * steps) if span else 0] for value in means)


def _base_model(name: str | None, prompt: PromptSummary) -> LanguageModel | None:
    """The base model, if it is the prompt's; a prefix needs none."""
    if prompt.method != "prompt":
        return None
    from router.bootstrap import load_base_model
    from router.errors import PromptyardError

    try:
        model = load_base_model(name, device="cpu")
    except PromptyardError as error:
        err.print(f"no nearest tokens: {error}", highlight=False, markup=False)
        return None
    if model is not None and model.fingerprint != prompt.base_model:
        err.print(
            f"no nearest tokens: the prompt belongs to {prompt.base_model_name}"
            f" ({prompt.base_model[:12]}); give it with --base-model",
            highlight=False,
            markup=False,
        )
    return model


def _lineage(record: TaskRecord, prompt: PromptSummary) -> dict[str, object]:
    return {
        "registered": record.created_at,
        "record": record.sha256,
        "prompt file": prompt.sha256,
        "data": record.data.sha256,
        "rows": f"{record.data.train_rows} to tune, {record.data.validation_rows} to validate",
        "initialisation": prompt.settings.get("initialisation", "not recorded"),
        "started from": prompt.settings.get("started_from", "not recorded"),
        "seed": prompt.settings.get("seed", "not recorded"),
        "settings": ", ".join(
            f"{name} {prompt.settings[name]}"
            for name in ("learning_rate", "length", "steps", "rows_per_step")
            if name in prompt.settings
        )
        or "not recorded",
        "base model": f"{prompt.base_model_name} {prompt.base_model}",
        "encoder": record.encoder,
        "versions": ", ".join(f"{name} {number}" for name, number in prompt.versions.items())
        or "not recorded",
    }


def _document(record: TaskRecord, prompt: PromptSummary, found: Inspection) -> dict[str, object]:
    return {
        "name": record.name,
        "revision": record.revision,
        "sha256": record.sha256,
        "created_at": record.created_at,
        "data": asdict(record.data),
        "encoder": record.encoder,
        "prompt": {**asdict(prompt), "bytes": prompt.tokens * prompt.width * 4},
        "norms": found.norms,
        "layer_norms": found.layer_norms,
        "vocabulary_norm": found.vocabulary_norm,
        "near_tokens": None
        if found.near_tokens is None
        else [[asdict(token) for token in tokens] for tokens in found.near_tokens],
        "similar": [
            {"task": s.task.name, "task_revision": s.task.revision, "cosine": s.cosine}
            for s in found.similar
        ],
    }


def _show(record: TaskRecord, prompt: PromptSummary, found: Inspection) -> None:
    size = prompt.tokens * prompt.width * 4
    out.print(
        f"{record.key}: {prompt.method} of {prompt.tokens} virtual tokens, {size / 1024:.1f} KB",
        highlight=False,
        markup=False,
    )
    scores = ", ".join(f"{name} {score:.1%}" for name, score in prompt.scores.items())
    out.print(f"{prompt.metric} on validation rows: {scores}", highlight=False, markup=False)
    _show_curve(prompt.curve)
    if found.near_tokens is not None:
        vocabulary = found.vocabulary_norm or 1.0
        print_table(
            ["token", "length", "nearest in the vocabulary (cosine)"],
            [
                [number, norm / vocabulary, "  ".join(f"{t.token} {t.cosine:.2f}" for t in tokens)]
                for number, (norm, tokens) in enumerate(
                    zip(found.norms, found.near_tokens, strict=True), start=1
                )
            ],
            title="virtual tokens (length: of a usual token's embedding)",
        )
    if found.layer_norms:
        print_table(
            ["layer", "keys", "values"],
            [[number, *norms] for number, norms in enumerate(found.layer_norms, start=1)],
            title="mean lengths",
        )
    if found.similar:
        print_table(
            ["task", "cosine"],
            [[str(s.task), s.cosine] for s in found.similar[:_SIMILAR_SHOWN]],
            title="prompts of other tasks",
        )
    if prompt.search:
        print_table(
            ["settings", "steps", prompt.metric, "loss", ""],
            [_tried(each) for each in prompt.search],
            title="search on the validation rows",
        )
    print_table(["", ""], [[key, value] for key, value in _lineage(record, prompt).items()])


def _tried(each: TriedSettings) -> list[object]:
    words = ", ".join(f"{name}={value}" for name, value in each.settings.items())
    if each.score is None or each.loss is None:
        return [f"{words}: {each.problem}", each.steps, "-", "-", ""]
    chosen = "chosen" if each.chosen else ""
    return [words, each.steps, f"{each.score:.1%}", f"{each.loss:.3f}", chosen]


def _show_curve(curve: TrainingCurve | None) -> None:
    if curve is None or not curve.losses:
        return
    out.print(
        f"training loss   {sparkline(curve.losses)}  {curve.losses[0]:.3f} to "
        f"{curve.losses[-1]:.3f} in {len(curve.losses) * curve.steps_per_loss} steps",
        highlight=False,
        markup=False,
    )
    if curve.validated_at:
        out.print(
            f"validation loss {sparkline(curve.validation_losses)}  "
            + ", ".join(
                f"{score:.0%} at {step}"
                for step, score in zip(curve.validated_at, curve.validation_scores, strict=True)
            ),
            highlight=False,
            markup=False,
        )
