"""Every seam of the read path on one page. A seam exists only where two implementations ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from router.decision import Decision
from router.tasks import PromptMethod, TaskKey

FloatArray = NDArray[np.float32]
HalfArray = NDArray[np.float16]

FinishReason = Literal["stop", "length", "label"]

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

    @property
    def window(self) -> int:
        """How many tokens of a text are read; what is beyond is cut off."""

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that each text will cost, after truncation to the window."""

    def encode(self, texts: Sequence[str]) -> Embeddings:
        """Embed `texts` `[B]` to unit vectors `[B, D]`."""


class PromptedLearner(Protocol):
    """An encoder's frozen network for gradients through encoder prompts: torch tensors."""

    def start(self, text: str, length: int) -> Any:  # noqa: ANN401 - a torch tensor
        """A prompt `[P, W]` to start from: what the network makes of a text, repeated.

        Raises:
            InvalidInputError: a text without words.
        """

    def read(self, texts: Sequence[str]) -> list[Any]:
        """Of each text, what no prompt changes, cut to what a step can take."""

    def embed(
        self,
        read: Sequence[Any],
        prompt: Any,  # noqa: ANN401 - a torch tensor
    ) -> Any:  # noqa: ANN401 - a torch tensor
        """Unit vectors `[B, H]` of texts that were `read`, under `prompt`; differentiable in it."""


@runtime_checkable
class PromptedEncoder(Protocol):
    """An encoder that can also read texts under encoder prompts. Thread-safe."""

    @property
    def prompt_width(self) -> int:
        """W, the numbers of each virtual token of an encoder prompt."""

    @property
    def tuned_dimensions(self) -> slice:
        """Those of D that hold what prompts are tuned by: what `PromptedLearner.embed` returns."""

    def encode_prompted(self, texts: Sequence[str], prompts: Sequence[HalfArray]) -> FloatArray:
        """Embed each text under its encoder prompt `[P, W]` to unit vectors `[B, D]`.

        A row's vector does not depend on the other rows of its batch (up to float32 rounding);
        their prompts may have other lengths.

        Raises:
            IncompatibleModelError: a prompt is of another width.
        """

    def for_gradients(self) -> PromptedLearner:
        """The same network, to tune encoder prompts with."""


def prompted_encoder(encoder: Encoder) -> PromptedEncoder | None:
    """`encoder`, if it can read encoder prompts."""
    return encoder if isinstance(encoder, PromptedEncoder) else None


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


RunningRow = TypeVar("RunningRow")


@dataclass(frozen=True, slots=True)
class Written(Generic[RunningRow]):
    """What a step made of one row: text that became final, and the answer where it has ended.

    The pieces of a row concatenate to its `Generation.text`.
    """

    row: RunningRow
    piece: str
    generation: Generation | None


class RunningBatch(Protocol[RunningRow]):
    """Answers that a base model is writing, all by one token a step.

    Rows join and leave between steps, and what is written for a row depends on no other row.
    Belongs to one thread at a time.
    """

    def __len__(self) -> int:
        """Rows that are being written."""

    def prepare(self, item: PromptedInput, max_new_tokens: int) -> RunningRow:
        """A row that can join. Where the window is short, it writes fewer tokens.

        Raises:
            PromptyardError: this row cannot be answered.
        """

    def join(self, rows: Sequence[RunningRow]) -> int:
        """Read the first ones of `rows`, as many as there is room for; returns how many.

        It is at least one where the batch is empty. None has joined where an error is raised.
        """

    def step(self) -> list[Written[RunningRow]]:
        """Write the next token of every row. Rows whose answer has ended leave.

        The batch cannot be used any more where an error is raised.
        """

    def drop(self, row: RunningRow) -> None:
        """Let a row leave before it has ended."""


class LanguageModel(Protocol):
    """A frozen base model. Thread-safe.

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

    def start_batch(self) -> RunningBatch[Any]:
        """An empty batch of greedy answers, for rows to join. There may be several."""

    def generate(self, inputs: Sequence[PromptedInput], max_new_tokens: int) -> list[Generation]:
        """Greedy answers, one per row: what a running batch writes for them."""


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
        """So many items of a queue (`routing`, `scoring`, ...) were worked on together."""

    def cache_used(self, *, hits: int, misses: int) -> None:
        """So many texts of a batch had a remembered embedding, so many did not."""

    def decided(self, decision: Decision) -> None:
        """A text was routed."""

    def compared(self, side: ComparedSide, revision: TaskKey, decision: Decision) -> None:
        """One side of a challenge decided on a text: `revision`, of the task that is challenged."""

    def shadow_differed(self, challenger: TaskKey) -> None:
        """The outcome or the task of a shadow's decision was not that of the current revision's."""
