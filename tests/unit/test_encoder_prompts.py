"""Encoder prompts: what they are tuned for, and what they leave alone."""

from __future__ import annotations

import hashlib
import math
from itertools import islice
from random import Random

import numpy as np
import pytest
import torch

from router.backends.onnx_encoder import OnnxMiniLM
from router.interfaces import FloatArray, HalfArray
from trainer.encoder_prompts import (
    LENGTH,
    EncoderPromptJob,
    EncoderPromptTuner,
    TaskPrompting,
    contrastive_loss,
    label_pairs,
)

STEPS = 24


THINGS = ("soup", "train", "lake", "phone", "garden", "window")
PAIRS = (
    ("is the {} cold", "the {} is cold"),
    ("was the {} old", "the {} was old"),
)


def questions_and_statements() -> EncoderPromptJob:
    """Texts of the same words in another order: what they are about does not tell the label."""
    pairs = [(a.format(thing), b.format(thing)) for thing in THINGS for a, b in PAIRS]
    texts = [text for pair in pairs for text in pair]
    return EncoderPromptJob(
        "asks-or-tells", "question or statement", texts, np.array([0, 1] * len(pairs))
    )


@pytest.fixture(scope="module")
def tuner(encoder: OnnxMiniLM) -> EncoderPromptTuner:
    return EncoderPromptTuner(encoder, STEPS)


@pytest.fixture(scope="module")
def job() -> EncoderPromptJob:
    return questions_and_statements()


@pytest.fixture(scope="module")
def prompt(tuner: EncoderPromptTuner, job: EncoderPromptJob) -> HalfArray:
    return tuner.tune(job)


def label_gap(vectors: FloatArray, labels: np.ndarray) -> float:
    """How much closer texts of one label are to each other than to those of the others."""
    cosines = vectors @ vectors.T
    same = labels[:, None] == labels[None]
    others = ~np.eye(len(labels), dtype=np.bool_)
    return float(cosines[same & others].mean() - cosines[~same].mean())


def test_under_its_prompt_texts_of_one_label_come_closer_together(
    encoder: OnnxMiniLM, job: EncoderPromptJob, prompt: HalfArray
) -> None:
    assert prompt.shape == (LENGTH, encoder.prompt_width)
    assert prompt.dtype == np.float16
    plain = encoder.encode(job.texts).vectors[:, -384:]
    prompted = encoder.encode_prompted(job.texts, [prompt] * len(job.texts))[:, -384:]
    before, after = (label_gap(vectors * 3**0.5, job.labels) for vectors in (plain, prompted))
    assert before < 0 < after


def test_the_dimensions_that_are_tuned_are_those_that_the_encoder_names(
    encoder: OnnxMiniLM, tuner: EncoderPromptTuner, job: EncoderPromptJob, prompt: HalfArray
) -> None:
    served = encoder.encode_prompted(job.texts, [prompt] * len(job.texts))
    learner = tuner.learner
    tuned = learner.embed(learner.read(job.texts), torch.from_numpy(prompt.astype(np.float32)))
    named = served[:, encoder.tuned_dimensions] * 3**0.5
    assert np.einsum("bd,bd->b", named, tuned.float().numpy()).min() > 0.99


def test_tuning_changes_no_weight_of_the_encoder_and_is_the_same_every_time(
    tuner: EncoderPromptTuner, job: EncoderPromptJob, prompt: HalfArray
) -> None:
    def digest() -> str:
        found = hashlib.sha256()
        for value in tuner.learner.network.state_dict().values():
            found.update(value.float().numpy().tobytes())
        return found.hexdigest()

    before = digest()
    np.testing.assert_array_equal(tuner.tune(job), prompt)
    assert digest() == before
    assert not any(weights.requires_grad for weights in tuner.learner.network.parameters())


def test_only_the_rows_that_were_asked_for_are_seen(
    tuner: EncoderPromptTuner, encoder: OnnxMiniLM, job: EncoderPromptJob
) -> None:
    rows = np.arange(0, len(job.texts), 2)
    spoiled = EncoderPromptJob(
        job.name,
        job.about,
        [text if row % 2 == 0 else "spoiled" for row, text in enumerate(job.texts)],
        job.labels,
    )
    found = [
        TaskPrompting(tuner, encoder, each, ("asks", "tells")).tune(rows) for each in (job, spoiled)
    ]
    np.testing.assert_array_equal(found[0], found[1])


def test_a_task_without_words_and_with_few_rows_can_be_tuned(tuner: EncoderPromptTuner) -> None:
    found = tuner.tune(EncoderPromptJob("bare", "", ["a", "b", ""], np.array([0, 1, 0])))
    assert np.isfinite(found).all()


def test_progress_names_the_task_and_counts_the_steps(
    tuner: EncoderPromptTuner, job: EncoderPromptJob
) -> None:
    said: list[tuple[str, str, int, int]] = []
    tuner.tune(job, lambda *what: said.append(what))
    assert said[0] == ("asks-or-tells", "encoder prompt", 1, STEPS)
    assert said[-1] == ("asks-or-tells", "encoder prompt", STEPS, STEPS)


def test_the_loss_is_that_of_the_paper_by_hand() -> None:
    vectors = torch.eye(3, 4)
    vectors[1] = vectors[0]
    # Row 0 has cosine 1 to row 1 of its label, and 0 to row 2: share e^10 / (e^10 + 1).
    together = -math.log(math.exp(10) / (math.exp(10) + 1))
    assert contrastive_loss(vectors, torch.tensor([0, 0, 1])).item() == pytest.approx(
        2 * together / 3, rel=1e-2
    )
    # Row 0 and row 2 share a label: each has one of cosine 0, beside row 1.
    apart = -math.log(1 / (math.exp(10) + 1)) + math.log(2)
    assert contrastive_loss(vectors, torch.tensor([0, 1, 0])).item() == pytest.approx(
        apart / 3, rel=1e-2
    )
    assert contrastive_loss(vectors, torch.tensor([0, 1, 2])).item() == 0.0


def test_rows_come_in_pairs_of_a_label_and_all_of_them_in_every_pass() -> None:
    labels = np.arange(60) % 30  # two rows a label
    rows = label_pairs(labels, Random(1))
    for _ in range(3):
        found = list(islice(rows, 60))
        assert sorted(found) == list(range(60))
        assert all(labels[a] == labels[b] for a, b in zip(found[::2], found[1::2], strict=True))
