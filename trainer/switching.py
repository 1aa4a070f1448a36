"""Switches a catalog to another encoder: every live task is embedded again from its kept texts.

Each gets a next revision that differs in its embeddings, and in the label classifier that was
fitted to them, under an encoder prompt where it had one before and the new encoder reads them; soft
prompts do not depend on the encoder. Older revisions stay as they are, for the encoder that made
them. A task whose texts were not kept cannot be embedded again, so that the switch is refused as a
whole: a catalog belongs to one encoder.
"""

from __future__ import annotations

from dataclasses import replace

from router.errors import InvalidInputError, RefusedError
from router.kept_texts import KeptText, kept_texts
from router.tasks import TaskRecord
from trainer.catalog_writer import now
from trainer.classifier_fitting import ClassifierFitter, LabelledTask
from trainer.register import Progress, embed, store_rows
from trainer.workshop import Published, Workshop

SWITCH_ACTION = "switch_encoder"


def switch_encoder(workshop: Workshop, progress: Progress = lambda *_: None) -> Published:
    """Publish the live tasks as the workshop's encoder embeds them, in one catalog revision.

    Raises:
        InvalidInputError: nothing was published yet, or with this encoder; or there are
            challengers, whose heads are of the other one.
        RefusedError: the texts of a task were not kept.
        CorruptArtifactError: kept texts are damaged.
        CatalogBusyError: another registration came in between.
    """
    catalog = workshop.catalog
    newest = catalog.newest_revision()
    if not newest:
        raise InvalidInputError("home", workshop.home, "register a task with that encoder first")
    if catalog.revision(newest).encoder == workshop.encoder.fingerprint:
        raise InvalidInputError("encoder", workshop.encoder.name, "the catalog is of it already")
    challengers = [str(stored.challenge.key) for stored in catalog.challengers(newest)]
    if challengers:
        raise InvalidInputError(
            "challengers", ", ".join(challengers), "promote or end them before the switch"
        )
    records = [catalog.record(key) for key in catalog.live(newest)]
    without = [record.name for record in records if not record.texts_sha256]
    if without:
        raise RefusedError(
            "texts",
            f"not kept of {', '.join(without)}",
            "register these again with --revise --keep-text, with the encoder that the catalog is"
            " of, and then switch; or register all of them in another --home",
        )
    texts = {record.name: kept_texts(workshop.artifacts, record) for record in records}
    classifiers = ClassifierFitter(workshop, progress)
    embedded = tuple(
        _embedded(workshop, each, texts[each.name], classifiers, progress) for each in records
    )
    return workshop.publish(
        SWITCH_ACTION,
        records=embedded,
        live={record.name: record.revision for record in embedded},
        other_encoder=True,
    )


def _embedded(
    workshop: Workshop,
    record: TaskRecord,
    texts: list[KeptText],
    classifiers: ClassifierFitter,
    progress: Progress,
) -> TaskRecord:
    """The next revision of a task: the same, by the workshop's encoder."""
    inputs = [text.input for text in texts]
    vectors = embed(workshop, record.name, inputs, progress).vectors
    classifier = None
    if record.classifier is not None and record.outputs is not None:
        classifier = classifiers.stored(
            LabelledTask(
                record.name,
                record.instruction,
                record.outputs,
                inputs,
                [text.output for text in texts],
            ),
            vectors,
            with_encoder_prompt=record.classifier.encoder_prompt_tokens > 0,
        )
    return replace(
        record,
        revision=workshop.catalog.newest_record(record.name) + 1,
        created_at=now(),
        encoder=workshop.encoder.fingerprint,
        embeddings_sha256=store_rows(workshop, vectors),
        classifier=classifier,
    )
