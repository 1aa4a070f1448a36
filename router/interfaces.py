"""Every seam of the read path on one page. A seam exists only where two implementations ship."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from router.decision import Decision
from router.tasks import PromptMethod, TaskKey

FloatArray = NDArray[np.float32]

FinishReason = Literal["stop", "length", "label", "cancelled"]

# Who decided, of a task that has a challenger. `no_key`: the current revision, as the request had
# no key by which to choose.
ComparedSide = Literal["current", "challenger", "shadow", "no_key"]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors `[B, D]`; per row `[B]`, whether the text was cut to the encoder's window."""

    vectors: FloatArray
    truncated: NDArray[np.bool_]


class Encoder(Protocol):
    """A frozen sentence encoder. Implementations are thread-safe and deterministic.

    A row's vector does not depend on the other rows of its batch (up to float32 rounding).
    """

    @property
    def name(self) -> str:
        """What a person calls it, e.g. `all-MiniLM-L6-v2`."""

    @property
    def fingerprint(self) -> str:
        """Weights digest, pooling, layers, window, runtime and precision, as one line."""

    @property
    def dimension(self) -> int:
        """D."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text will cost, after truncation to the window."""

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, D]`."""


@dataclass(frozen=True, slots=True)
class PromptedInput:
    """One row for the base model: a text and the soft prompt `[P, W]` in front of it (or none)."""

    text: str
    prompt: FloatArray | None
    method: PromptMethod = "prompt"


@dataclass(frozen=True, slots=True)
class Generation:
    """What the base model wrote for one row."""

    text: str
    finish_reason: FinishReason
    input_tokens: int
    output_tokens: int
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Log-probabilities `[C]` (nats) of the candidate outputs of one row, and what it took.

    `output_tokens` `[C]` do not count the end token, as those of a `Generation` do not.
    """

    log_probabilities: FloatArray
    input_tokens: int
    output_tokens: tuple[int, ...]
    truncated: bool

    @property
    def best(self) -> int:
        """The index of the most probable output, the first of equals."""
        return int(np.argmax(self.log_probabilities))


class LanguageModel(Protocol):
    """A frozen base model.

    Rows of one batch may carry different prompts of different methods and lengths.
    """

    @property
    def name(self) -> str:
        """What a person calls it: the folder's or the hub's name."""

    @property
    def fingerprint(self) -> str:
        """Digest of configuration, weights and tokenizer: a prompt belongs to exactly one."""

    @property
    def hidden_size(self) -> int:
        """H, the width of a soft prompt of the method `prompt`."""

    def score(
        self, inputs: Sequence[PromptedInput], outputs: Sequence[Sequence[str]]
    ) -> list[Scores]:
        """Log-probability of each candidate output, per row: `outputs[i]` `[C_i]` -> `[C_i]`.

        The sum over the output's tokens and the end token, in nats.
        """

    def generate(
        self,
        inputs: Sequence[PromptedInput],
        max_new_tokens: int,
        on_piece: Callable[[int, str], None] | None = None,
        cancelled: Callable[[int], bool] | None = None,
    ) -> list[Generation]:
        """Greedy answers, one per row.

        `on_piece(row, text)` is called as text becomes final (the pieces of a row concatenate to
        its `Generation.text`); a row for which `cancelled(row)` turns true stops at the next step.
        """


class Observer(Protocol):
    """Is told what the server does, for its metrics. Thread-safe, quick, and raises nothing."""

    def of(self, tenant: str) -> Observer:
        """The observer of a tenant; of the home's own catalog for the empty name."""

    def forget(self) -> None:
        """The tenant is not served any more: what was counted for it may be dropped."""

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with the gRPC status `code` (`OK`, `NOT_FOUND`, ...)."""

    def stage_ended(self, stage: str, seconds: float) -> None:
        """A stage of the work (`routing_wait`, `routing_encode`, ...) took that long."""

    def batch_ended(self, queue: str, items: int) -> None:
        """So many items of a queue (`routing`, `answering`) were worked on together."""

    def cache_used(self, *, hits: int, misses: int) -> None:
        """So many texts of a batch had a remembered embedding, so many did not."""

    def decided(self, decision: Decision) -> None:
        """A text was routed."""

    def compared(self, side: ComparedSide, revision: TaskKey, decision: Decision) -> None:
        """One side of a challenge decided on a text: `revision`, of the task that is challenged."""

    def shadow_differed(self, challenger: TaskKey) -> None:
        """The outcome or the task of a shadow's decision was not that of the current revision's."""
