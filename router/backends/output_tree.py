"""The candidate outputs of a row as one tree, which a decoder reads in one pass.

A node is a prefix of outputs. What several outputs begin with is read once, and the states of an
input are there once for all of its candidates, however many there are. Each node sees its
ancestors alone (the tree attention of SpecInfer, Miao et al. 2024, section 4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.backends.rows import batches

Output = tuple[int, ...]
_Integers = NDArray[np.int64]

# Of one tree: every node is compared with every other. More outputs are several trees.
_MAX_NODES = 256
# Sets of outputs whose trees are kept: labels come with every row.
_MAX_TREES = 512


@dataclass(frozen=True, slots=True, eq=False)
class OutputTree:
    """Prefixes of outputs `[N]`, the empty one first, and what is asked of each.

    `tokens` are the last of each prefix (0 of the empty one), `depths` their numbers of tokens;
    `ancestors` `[N, N]` says which a prefix begins with, itself included. Token `steps[m]` of
    output `outputs[m]` is `targets[m]` and comes after prefix `nodes[m]`.
    """

    tokens: _Integers
    depths: _Integers
    ancestors: NDArray[np.bool_]
    outputs: _Integers
    steps: _Integers
    nodes: _Integers
    targets: _Integers

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """Trees `[B]` in one tensor, `[B, N]` with padding, for the decoder.

    `rows` `[B]` says whose they are. `real` `[n]` are the nodes of all B * N that are no padding.
    Token m of the outputs is `targets[m]`, comes after `nodes[m]` of the real ones, and belongs at
    `places[m]` of the table of all outputs and steps.
    """

    rows: Sequence[int]
    ids: Tensor
    depths: Tensor
    ancestors: Tensor
    real: Tensor
    nodes: Tensor
    targets: Tensor
    places: Tensor


def tree_of(outputs: tuple[Output, ...]) -> OutputTree:
    """The tree of token sequences, none of which is empty.

    Not kept is that of an output so long that it is alone in its tree: memory would have no bound.
    """
    return _kept_tree(outputs) if sum(map(len, outputs)) <= _MAX_NODES else _grow(outputs)


@lru_cache(_MAX_TREES)
def _kept_tree(outputs: tuple[Output, ...]) -> OutputTree:
    return _grow(outputs)


def _grow(outputs: tuple[Output, ...]) -> OutputTree:
    number_of: dict[Output, int] = {(): 0}
    parents, tokens = [0], [0]
    asked: list[tuple[int, int, int, int]] = []
    for output, ids in enumerate(outputs):
        for step, target in enumerate(ids):
            prefix = ids[:step]
            if prefix not in number_of:
                number_of[prefix] = len(tokens)
                parents.append(number_of[prefix[:-1]])
                tokens.append(prefix[-1])
            asked.append((output, step, number_of[prefix], target))
    ancestors = np.eye(len(tokens), dtype=np.bool_)
    for node in range(1, len(tokens)):  # parents come before their children
        ancestors[node] |= ancestors[parents[node]]
    columns = np.array(asked, np.int64).T
    depths = ancestors.sum(1) - 1
    return OutputTree(np.array(tokens, np.int64), depths, ancestors, *columns)


def tree_batches(
    candidates: Sequence[Sequence[Output]], start_id: int, max_nodes: int, max_padding: int
) -> Iterator[TreeBatch]:
    """The outputs of all rows, in batches of trees of similar size, on the CPU.

    A batch has at most `max_nodes` when padded, `max_padding` of them padding.
    """
    width = max(len(ids) for row in candidates for ids in row)
    owners: list[int] = []
    firsts: list[int] = []
    trees: list[OutputTree] = []
    begin = 0
    for row, outputs in enumerate(candidates):
        for chunk in _chunks(outputs, min(_MAX_NODES, max_nodes)):
            owners.append(row)
            firsts.append(begin)
            trees.append(tree_of(chunk))
            begin += len(chunk)
    for batch in batches([len(tree) for tree in trees], max_nodes, max_padding):
        chosen = [trees[i] for i in batch]
        first = np.array([firsts[i] for i in batch])
        yield _together([owners[i] for i in batch], chosen, first, start_id, width)


def _chunks(outputs: Sequence[Output], most: int) -> Iterator[tuple[Output, ...]]:
    """`outputs` in their order, in parts of at most `most` tokens (or of one output)."""
    chunk: list[Output] = []
    size = 0
    for ids in outputs:
        if chunk and size + len(ids) > most:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(ids)
        size += len(ids)
    if chunk:
        yield tuple(chunk)


def _together(
    rows: Sequence[int], trees: Sequence[OutputTree], first: _Integers, start_id: int, width: int
) -> TreeBatch:
    sizes = np.array([len(tree) for tree in trees])
    shape = len(trees), int(sizes.max())
    ids = np.zeros(shape, np.int64)
    depths = np.zeros(shape, np.int64)
    # Padding sees itself: a row of a mask that allows nothing would make what is not a number.
    ancestors = np.broadcast_to(np.eye(shape[1], dtype=np.bool_), (*shape, shape[1])).copy()
    for place, tree in enumerate(trees):
        size = len(tree)
        ids[place, :size] = tree.tokens
        depths[place, :size] = tree.depths
        ancestors[place, :size, :size] = tree.ancestors
    ids[:, 0] = start_id
    asked = [len(tree.nodes) for tree in trees]
    of_tree = np.repeat(np.arange(len(trees)), asked)
    outputs, steps, nodes, targets = (
        np.concatenate([getattr(tree, name) for tree in trees])
        for name in ("outputs", "steps", "nodes", "targets")
    )
    begins = sizes.cumsum() - sizes
    return TreeBatch(
        rows,
        ids=torch.from_numpy(ids),
        depths=torch.from_numpy(depths),
        ancestors=torch.from_numpy(ancestors),
        real=torch.from_numpy(np.flatnonzero(np.arange(shape[1]) < sizes[:, None])),
        nodes=torch.from_numpy(begins[of_tree] + nodes),
        targets=torch.from_numpy(targets),
        places=torch.from_numpy((first[of_tree] + outputs) * width + steps),
    )
