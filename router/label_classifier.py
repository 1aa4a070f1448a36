"""What a task's own rows say of an input's label: a linear classifier on the input's embedding.

A small base model reads less from an input than the frozen encoder has put into the embedding that
the input was routed by. So a label is chosen by both: its score is

    prompt_weight * log p(label | input, soft prompt) + rows[label] . [embedding ; 1]

a product of two experts, as language models are combined with their nearest stored examples
(Khandelwal et al. 2020, arXiv:1911.00172; with tuned prompts: Chen et al. 2022, arXiv:2205.14704).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from router.interfaces import FloatArray


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
    """Rows `[C, D + 1]` float32, in the order of the task's outputs."""

    rows: FloatArray
    prompt_weight: float

    def evidence(self, vector: FloatArray) -> LabelEvidence:
        """What this says of an input with the embedding `[D]`."""
        return LabelEvidence(self.rows[:, :-1] @ vector + self.rows[:, -1], self.prompt_weight)
