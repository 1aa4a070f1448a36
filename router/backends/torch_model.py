"""What seq2seq and causal base models share: scoring candidate outputs, and greedy answers."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router.backends.prompted_network import PromptedNetwork
from router.backends.rows import Row, batches, padded, sent, token_losses
from router.backends.running_batch import TorchRunningBatch, mixes_lengths
from router.backends.started import Started
from router.backends.text_pieces import Detokenizer, RowWriter
from router.interfaces import FloatArray, Generation, PromptedInput, Scores

# Bound memory: positions that one forward pass may hold, and logits (64 M floats are 256 MB). A GPU
# has more of it, and each pass takes it milliseconds however short it is.
_MAX_BATCH_POSITIONS = {"cpu": 8192, "cuda": 65_536}
_MAX_LOGITS = {"cpu": 64_000_000, "cuda": 256_000_000}
# Padding that costs more than one more forward pass.
_MAX_BATCH_PADDING = {"cpu": 1024, "cuda": 16_384}
_MAX_OUTPUT_PADDING = {"cpu": 64, "cuda": 8192}


class TorchLanguageModel(PromptedNetwork):
    """A frozen Hugging Face model behind `router.interfaces.LanguageModel`. Thread-safe."""

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        fingerprint: str,
    ) -> None:
        super().__init__(network, tokenizer, name=name, fingerprint=fingerprint)
        self._detokenizer = Detokenizer(tokenizer)
        self._one_batch_at_a_time = threading.Lock()

    # ---- what the two architectures do differently

    @abstractmethod
    def _start(self, rows: Sequence[Row]) -> Started:
        """Read the inputs of `rows`."""

    @abstractmethod
    def _continue(self, started: Started, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits `[N, V]` after output tokens `ids` `[B, T]` (right-padded).

        Those at `positions` `[N]` of all B * T, in rising order.
        """

    @abstractmethod
    def _advance(self, started: Started, ids: Tensor) -> Started:
        """The batch after one more output token a row, `ids` `[B, 1]`.

        Rows may have written more and less; what each was fed before stays as it is.
        """

    @abstractmethod
    def negative_log_likelihood(
        self, rows: Sequence[Row], outputs: Sequence[Sequence[int]]
    ) -> Tensor:
        """-log p(output | prompt, input) per row `[B]` in nats, differentiable in the prompts.

        One forward pass; padding and memory are the caller's care. `outputs[i]` comes from
        `tokenize_output`.
        """

    def text_states(self, texts: Sequence[str]) -> Tensor | None:  # noqa: ARG002 - overridden
        """The encoder's mean state of each text without a prompt, `[B, H]`, float32.

        None where there is no encoder.
        """
        return None

    # ---- scoring

    def score(
        self, inputs: Sequence[PromptedInput], outputs: Sequence[Sequence[str]]
    ) -> list[Scores]:
        """Log-probability of each candidate output, per row: `outputs[i]` `[C_i]` -> `[C_i]`."""
        ids_of = {text: self.tokenize_output(text) for texts in outputs for text in texts}
        candidates = [[ids_of[text] for text in texts] for texts in outputs]
        longest = [max((len(ids) for ids in row), default=1) for row in candidates]
        rows = self.rows_of(inputs, longest)
        return [
            Scores(values, len(text.ids), tuple(len(ids) - 1 for ids in labels), text.truncated)
            for values, labels, (_, text) in zip(
                self.score_rows([row for row, _ in rows], candidates), candidates, rows, strict=True
            )
        ]

    def score_rows(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[FloatArray]:
        """`score` for rows and outputs that are token ids already: any number, in batches."""
        scores: list[FloatArray] = [np.zeros(0, np.float32) for _ in rows]
        lengths = [len(row) for row in rows]
        bounds = _MAX_BATCH_POSITIONS[self._kind], _MAX_BATCH_PADDING[self._kind]
        for batch in batches(lengths, *bounds):
            found = self._score_batch([rows[i] for i in batch], [candidates[i] for i in batch])
            for i, values in zip(batch, found, strict=True):
                scores[i] = values
        return scores

    def _score_batch(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[FloatArray]:
        """The scores of one batch, or of its halves where the device's memory is full."""
        try:
            with torch.no_grad(), self._one_batch_at_a_time:
                return [found.cpu().numpy() for found in self.log_likelihoods(rows, candidates)]
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside of the handler, whose traceback keeps the tensors of the failed pass alive.
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return [
            *self._score_batch(rows[:half], candidates[:half]),
            *self._score_batch(rows[half:], candidates[half:]),
        ]

    def log_likelihoods(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[Tensor]:
        """Log p of each row's candidate outputs: `candidates[i]` `[C_i]` -> `[C_i]`, in nats.

        Each input is read once and its cache repeated for its candidates. Differentiable in the
        prompts. One batch; memory is the caller's care.
        """
        losses = self.output_token_losses(rows, candidates)
        totals = -losses[:, 0] - losses[:, 1:].sum(1)
        return list(torch.split(totals, [len(row) for row in candidates]))

    def output_token_losses(
        self, rows: Sequence[Row], candidates: Sequence[Sequence[tuple[int, ...]]]
    ) -> Tensor:
        """-log p of each token of each candidate output, `[sum of C_i, T]`; 0 after its end.

        Otherwise as `log_likelihoods`.
        """
        row_of = [i for i, row in enumerate(candidates) for _ in row]
        outputs = [ids for row in candidates for ids in row]
        if not outputs:
            return torch.zeros(0, 1, device=self.device)
        started = self._start(rows)
        first = started.next_logits.float().log_softmax(-1)
        # The end token is never fed: nothing is predicted after it.
        following = [len(ids) - 1 for ids in outputs]
        longest = max(following)
        losses = first.new_zeros(len(outputs), 1 + longest)
        losses[:, 0] = -first[self._numbers(row_of), self._numbers([ids[0] for ids in outputs])]
        if not longest:
            return losses
        places, found = [], []
        for batch in self._alike(following):
            width = following[batch[0]]
            steps = [(row, i, step) for row, i in enumerate(batch) for step in range(following[i])]
            logits = self._continue(
                started.select(self._numbers([row_of[i] for i in batch])),
                padded([outputs[i][:-1] for i in batch], 0, self.device),
                self._numbers([row * width + step for row, _, step in steps]),
            )
            targets = self._numbers([outputs[i][step + 1] for _, i, step in steps])
            found.append(token_losses(logits, targets))
            places += [i * (1 + longest) + 1 + step for _, i, step in steps]
        flat = losses.flatten().scatter(0, self._numbers(places), torch.cat(found))
        return flat.view(losses.shape)

    def _alike(self, following: Sequence[int]) -> Iterator[list[int]]:
        """Indices of what has tokens to feed, in batches of similar length, the longest first."""
        some = [i for i, tokens in enumerate(following) if tokens]
        for batch in batches([following[i] for i in some], *self._most_outputs):
            yield [some[place] for place in batch]

    @property
    def _most_outputs(self) -> tuple[int, int]:
        """Tokens of outputs that one pass may read, and how many of them may be padding."""
        most = _MAX_LOGITS[self._kind] // self.vocabulary_size
        return max(1, most), _MAX_OUTPUT_PADDING[self._kind]

    def _numbers(self, values: Sequence[int]) -> Tensor:
        return sent(torch.tensor(values), self.device)

    @property
    def _kind(self) -> str:
        return "cpu" if self.device.type == "cpu" else "cuda"

    # ---- generation

    def start_batch(self) -> TorchRunningBatch:
        """An empty batch of greedy answers; see `router.interfaces.RunningBatch`."""
        return TorchRunningBatch(self)

    def generate(self, inputs: Sequence[PromptedInput], max_new_tokens: int) -> list[Generation]:
        """Greedy answers, one per row: any number, as many at a time as memory allows.

        Where the window is short, half of what the prompt leaves of it is kept for the answer.
        """
        batch = TorchRunningBatch(self, in_pieces=False)
        rows = batch.prepare_all(inputs, max_new_tokens)
        # Rows of similar length share forward passes.
        waiting = sorted(rows, key=lambda row: -row.positions)
        answers: dict[int, Generation] = {}
        most = 0
        while waiting or len(batch):
            if waiting and len(batch) <= most // 2:  # to read one row takes as long as a few
                del waiting[: batch.join(waiting)]
                most = len(batch)
            for written in batch.step():
                if written.generation is not None:
                    answers[id(written.row)] = written.generation
        return [answers[id(row)] for row in rows]

    @cached_property
    def mixes_lengths(self) -> bool:
        """Whether rows that have written more and less can take a step together."""
        return mixes_lengths(self)

    def writer(self, limit: int, in_pieces: bool) -> RowWriter:
        """The writer of an answer of at most `limit` tokens."""
        return RowWriter(self._detokenizer, self.end_ids, limit, in_pieces=in_pieces)

    def room_for_answer(self, row: PromptedInput) -> int:
        """Tokens that an answer to `row` may have: half of what a short window leaves."""
        left = self.window - (0 if row.prompt is None else len(row.prompt))
        return max(1, left // 2 if self.shares_window else self.window - 1)

    def read_batch(self, rows: Sequence[Row]) -> Started:
        """Read the inputs of `rows`, without gradients."""
        with torch.no_grad(), self._one_batch_at_a_time:
            return self._start(rows)

    def advance_batch(self, started: Started, ids: Tensor) -> Started:
        """The batch after one more output token a row, `ids` `[B]`, without gradients."""
        with torch.no_grad(), self._one_batch_at_a_time:
            return self._advance(started, ids[:, None])
