"""What a task's own rows say of an input's label: a linear classifier on the input's embedding.

A small base model reads less from an input than the frozen encoder puts into its embedding, above
all where an encoder prompt tells the encoder what the task's labels are about. So a label is chosen
by both: its score is

    prompt_weight * log p(label | input, soft prompt) + rows[label] . [embedding ; 1]

a product of two experts, as language models are combined with their nearest stored examples
(Khandelwal et al. 2020, arXiv:1911.00172; with tuned prompts: Chen et al. 2022, arXiv:2205.14704).
The embedding is the one under the task's encoder prompt or, where it has none, the one that the
input was routed by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.interfaces import FloatArray, HalfArray, PromptedEncoder


@dataclass(frozen=True, slots=True, eq=False)
class LabelEvidence:
    """What a classifier says of one input: `scores` `[C]`, in nats up to what all labels share."""

    scores: FloatArray
    prompt_weight: float

    def best(self, log_probabilities: FloatArray) -> int:
        """The label chosen with the base model's log-probabilities `[C]`, the first of equals."""
        return int(np.argmax(self.prompt_weight * log_probabilities + self.scores))


@dataclass(frozen=True, slots=True, eq=False)
class LabelClassifier:
    """Rows `[C, D + 1]` float32, in the order of the task's outputs.

    They are for embeddings under the `encoder_prompt` `[P, W]`, or for plain ones where it is None.
    """

    rows: FloatArray
    prompt_weight: float
    encoder_prompt: HalfArray | None = None

    def evidence(self, vector: FloatArray) -> LabelEvidence:
        """What this says of an input with the embedding `[D]`, under the prompt if it has one."""
        return LabelEvidence(self.rows[:, :-1] @ vector + self.rows[:, -1], self.prompt_weight)


@dataclass(frozen=True, slots=True, eq=False)
class ClassifierInput:
    """What a task's classifier reads of one input: its plain embedding `[D]`, or its text.

    `vector` may be None where the classifier has an encoder prompt.
    """

    classifier: LabelClassifier
    text: str
    vector: FloatArray | None


def read_evidence(
    inputs: Sequence[ClassifierInput | None], encoder: PromptedEncoder | None
) -> list[LabelEvidence | None]:
    """What the classifiers say of their inputs; None where there is none.

    Texts whose task has an encoder prompt are embedded under it, all in one call of `encoder`;
    without an encoder that can do that, nothing is said of them.
    """
    found: list[LabelEvidence | None] = [None] * len(inputs)
    texts, prompts, prompted = [], [], []
    for place, item in enumerate(inputs):
        if item is None:
            continue
        prompt = item.classifier.encoder_prompt
        if prompt is not None:
            texts.append(item.text)
            prompts.append(prompt)
            prompted.append((place, item.classifier))
        elif item.vector is not None:
            found[place] = item.classifier.evidence(item.vector)
    if encoder is not None and texts:
        vectors = encoder.encode_prompted(texts, prompts)
        for (place, classifier), vector in zip(prompted, vectors, strict=True):
            found[place] = classifier.evidence(vector)
    return found
