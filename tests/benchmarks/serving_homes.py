"""Homes to serve in benchmarks, made of the example tasks, and the texts to ask them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from router.backends.torch_model import TorchLanguageModel
from router.interfaces import Encoder
from router.loading import CLASSIFIER_TENSOR, PROMPT_TENSOR
from router.tasks import ClassifierSummary, PromptSummary, TaskRecord
from tests.catalogs import new_record
from trainer.commands import RegisterTask
from trainer.data import Example, read_labelled
from trainer.demo import EXAMPLES
from trainer.label_classifier import PROMPT_WEIGHT, fit_classifier
from trainer.manifest import read_manifest
from trainer.register import register
from trainer.tuning_settings import TuningSettings
from trainer.workshop import Workshop

PROMPT_TOKENS = 20
_SCORES = {"prompt": 0.0, "majority": 0.0, "no_prompt": 0.0, "instruction": 0.0}


def routing_home(home: Path, encoder: Encoder) -> Path:
    """A home with the example tasks, for routing only."""
    with Workshop(home, encoder) as workshop:
        register_for_routing(workshop, example_requests())
    return home


def answering_home(home: Path, encoder: Encoder, base_model: TorchLanguageModel) -> Path:
    """A home with 16 tasks that answer: the examples, and six of them once more as free text."""
    examples = example_requests()
    texts = [
        replace(request, name=f"{request.name}-text", free_text=True)
        for request in examples[: 16 - len(examples)]
    ]
    with Workshop(home, encoder) as workshop:
        register_with_untuned_prompts(workshop, [*examples, *texts], base_model)
    return home


def register_for_routing(workshop: Workshop, requests: Sequence[RegisterTask]) -> None:
    """Register tasks without prompts, all in one publish and whatever they take of one another."""
    wanted = [replace(request, with_prompt=False) for request in requests]
    result = register(workshop, wanted, None, TuningSettings(), gate_limit=1.0)
    for error in result.failures.values():
        raise error


def register_with_untuned_prompts(
    workshop: Workshop, requests: Sequence[RegisterTask], base_model: TorchLanguageModel
) -> None:
    """Register or revise tasks; prompts are the instructions' embeddings, beside classifiers.

    They cost what tuned prompts cost to serve, and minutes less to make. Their answers are not
    looked at.
    """
    records = tuple(_answering(workshop, request, base_model) for request in requests)
    action = "revise" if all(record.revision > 1 for record in records) else "register"
    workshop.publish(action, records=records, live={r.name: r.revision for r in records})


def _answering(
    workshop: Workshop, request: RegisterTask, base_model: TorchLanguageModel
) -> TaskRecord:
    """The record of the next revision, its rows, prompt and (closed outputs) classifier stored."""
    examples = read_labelled(request.data).examples
    inputs = [each.input for each in examples]
    outputs = None if request.free_text else tuple(sorted({each.output for each in examples}))
    record = new_record(
        workshop,
        request.name,
        revision=workshop.catalog.newest_record(request.name) + 1,
        texts=inputs,
        description=request.description,
        instruction=request.instruction,
        outputs=outputs,
    )
    start = " ".join([request.instruction, *(outputs or ())])
    values = base_model.text_embeddings(start, PROMPT_TOKENS).detach().cpu().numpy()
    prompt = PromptSummary(
        sha256=workshop.artifacts.write_tensors({PROMPT_TENSOR: values.astype(np.float32)}),
        tokens=PROMPT_TOKENS,
        hidden_size=values.shape[1],
        base_model=base_model.fingerprint,
        base_model_name=base_model.name,
        metric="accuracy",
        scores=_SCORES,
        settings={"steps": 0},
        steps=0,
        seconds=0.0,
    )
    classifier = None
    if outputs is not None:
        vectors = workshop.encoder.encode(inputs).vectors
        label_vectors = workshop.encoder.encode(outputs).vectors
        fitted = fit_classifier(vectors, [each.output for each in examples], outputs, label_vectors)
        if fitted is not None:
            sha256 = workshop.artifacts.write_tensors({CLASSIFIER_TENSOR: fitted.rows})
            classifier = ClassifierSummary(sha256, PROMPT_WEIGHT, fitted.accuracy)
    return replace(record, prompt=prompt, classifier=classifier)


def example_requests() -> list[RegisterTask]:
    """The tasks of the demo, the one that it registers live included."""
    manifests = (EXAMPLES / "manifest.yaml", EXAMPLES / "live.yaml")
    return [request for manifest in manifests for request in read_manifest(manifest)]


def write_examples(path: Path, rows: Sequence[Example]) -> Path:
    """A labelled file of these rows."""
    lines = [json.dumps({"input": row.input, "output": row.output}) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def held_out(names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """(text, task) of the rows that no example task was registered with, the tasks in turn."""
    rows = []
    for path in sorted((EXAMPLES / "heldout").glob("*.jsonl")):
        if not names or path.stem in names:
            lines = path.read_text(encoding="utf-8").splitlines()
            rows += [(n, json.loads(line)["input"], path.stem) for n, line in enumerate(lines)]
    return [(text, task) for _, text, task in sorted(rows)]


def short_texts() -> list[str]:
    """Held-out texts of at most 15 words."""
    return [text for text, _ in held_out() if len(text.split()) <= 15]
