"""scMulan's view: a cell as a sentence of words, each a token and a value: gene words, metadata words, a task, an end.

A gene's value is the linear bin 1..10 of its log1p(CP10k) between 0 and the cell's largest among the model's genes,
right-closed; every other word has the value 0. In training genes stand in random order, as nothing but the causal mask
tells a word's place. Three tasks are trained:

* generate: metadata and cell types, then the genes (to be predicted) and <E>;
* annotate: the genes, <PCT>, then the cell types (to be predicted) and <E>;
* describe: the genes, the task's token, then the other metadata (to be predicted) and <E>.

In training a sentence is as long as the context at most: genes that find no room are left out, a random part of them,
and where genes were to be predicted, <E> is not, since the cell does not end there. How often each task is trained is
not published; here a cell's tasks are equally frequent. A cell without cell type words is not annotated, one without
other metadata not described: nothing is known that could be asked for. A part of the sentences to be generated may go
without the words in front (`unprompted`), so that genes are also continued from genes alone.

Legend: B cells, V genes, G genes of the model, N words of all sentences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cellmill.randomness import below, hash64
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import (
    argsort_within,
    hash_genes,
    join,
    keep_first,
    log1p_cp10k,
    offsets_of,
    random_order,
    select,
    spread,
)

N_BINS = 10
GENERATE, ANNOTATE, DESCRIBE = 0, 1, 2
CONTEXT = 1550


@dataclass(frozen=True)
class Tokens:
    """The model's token set.

    Attributes
    ----------
    gene_V
        int32 [V], the token of each gene of the vocabulary; -1 where the model does not have it.
    end, annotate, describe
        <E> and the task tokens; the defaults are those of the published set.
    """

    gene_V: np.ndarray
    end: int = 0
    annotate: int = 2206
    describe: int = 2207


class Words(NamedTuple):
    """Metadata words of cells."""

    offsets: np.ndarray
    """int64 [B + 1]."""
    tokens: np.ndarray
    """int32, cell after cell."""


class Sentences(NamedTuple):
    """Words of all cells."""

    offsets: np.ndarray
    """int64 [B + 1]."""
    tokens: np.ndarray
    """int32 [N]."""
    values: np.ndarray
    """int32 [N], bins 1..10 of genes, 0 of other words."""
    targets_B: np.ndarray
    """int64 [B], the words at the end of each sentence that are to be predicted, <E> among them."""
    task_B: np.ndarray
    """int64 [B], `GENERATE`, `ANNOTATE` or `DESCRIBE`."""
    ends_B: np.ndarray
    """bool [B], whether <E> is to be predicted: not where genes are and some found no room."""


def bin_values(cells: CellBatch) -> np.ndarray:
    """int32 [N], the bin 1..10 of each gene's log1p(CP10k) up to the cell's largest."""
    values_N = log1p_cp10k(cells)
    values_N /= spread(_largest(cells.offsets, values_N), cells.offsets)
    values_N *= np.float32(N_BINS)
    return np.clip(np.ceil(values_N), 1, N_BINS).astype(np.int32)


def largest_values(cells: CellBatch, tokens: Tokens) -> np.ndarray:
    """float32 [B], the edge of bin 10: the largest log1p(CP10k) among the model's genes; 1 where there is none."""
    known, _ = _known(cells, tokens)
    return _largest(known.offsets, log1p_cp10k(known))


def embed(cells: CellBatch, tokens: Tokens, *, limit: int = CONTEXT) -> Sentences:
    """The genes by falling token (reverse alphabetical in the published set), then <PCT>, which asks for the cell type.

    Parameters
    ----------
    cells
        B cells.
    tokens
        The model's token set.
    limit
        Words that a sentence has at most.
    """
    known, token_N = _known(cells, tokens)
    order_N = argsort_within(known.offsets, ~token_N.view(np.uint32))
    task = Words(np.arange(len(cells) + 1), np.full(len(cells), tokens.annotate, np.int32))
    genes, bins_N = _gene_words(known, token_N, order_N, limit - 1)
    by_cell = np.zeros(len(cells), np.int64), np.full(len(cells), ANNOTATE), np.zeros(len(cells), bool)
    return _sentences([], genes, bins_N, [task], *by_cell)


def pretrain(
    cells: CellBatch,
    tokens: Tokens,
    *,
    cell_types: Words,
    metadata: Words,
    seed: int,
    step: int | None,
    limit: int = CONTEXT,
    unprompted: float = 0.0,
) -> Sentences:
    """Sentences with genes in random order, each cell with a task of its own.

    Parameters
    ----------
    cells
        B cells.
    tokens
        The model's token set.
    cell_types
        Cell type words of the cells, coarse ones before fine ones.
    metadata
        The other metadata words: organ, region, age, sex, technology, ...
    seed, step
        Keys of the draws; `step` is None in validation.
    limit
        Words that a sentence has at most.
    unprompted
        Share of the generated sentences that start with the genes.
    """
    keys = (seed, -1 if step is None else step)
    task_B = _tasks(
        hash64("scmulan task", *keys, cells.joinids), np.diff(cell_types.offsets), np.diff(metadata.offsets)
    )
    generate_B, annotate_B, describe_B = (task_B == task for task in (GENERATE, ANNOTATE, DESCRIBE))
    prompted_B = generate_B & ~below(hash64("scmulan prompt", *keys, cells.joinids), unprompted)
    front = [_only(metadata, prompted_B), _only(cell_types, prompted_B)]
    task_tokens_B = np.where(annotate_B, tokens.annotate, tokens.describe).astype(np.int32)
    answers = [_only(cell_types, annotate_B), _only(metadata, describe_B)]
    every = np.arange(len(cells) + 1)
    task = _only(Words(every, task_tokens_B), ~generate_B)
    behind = [task, *answers, Words(every, np.full(len(cells), tokens.end, np.int32))]

    known, token_N = _known(cells, tokens)
    order_N = random_order(known.offsets, hash_genes(known, "scmulan genes", *keys))
    others_B = sum(np.diff(words.offsets) for words in [*front, *behind])
    genes, bins_N = _gene_words(known, token_N, order_N, limit - others_B)
    targets_B = np.where(generate_B, np.diff(genes.offsets), 0) + sum(np.diff(words.offsets) for words in answers) + 1
    ends_B = ~generate_B | (np.diff(genes.offsets) == known.lengths)
    return _sentences(front, genes, bins_N, behind, targets_B, task_B, ends_B)


def _largest(offsets: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """[B], the largest of each cell's values; 1 for a cell without any."""
    largest_B = np.ones(len(offsets) - 1, np.float32)
    filled_B = np.diff(offsets) > 0
    if filled_B.any():
        largest_B[filled_B] = np.maximum.reduceat(values_N, offsets[:-1][filled_B])
    return largest_B


def _tasks(hash_B: np.ndarray, n_types_B: np.ndarray, n_metadata_B: np.ndarray) -> np.ndarray:
    """int64 [B], one of the tasks that the cell has words for."""
    typed_B, described_B = n_types_B > 0, n_metadata_B > 0
    choice_B = hash_B % (np.uint64(1) + typed_B + described_B).astype(np.uint64)
    return np.where(choice_B == 0, GENERATE, np.where((choice_B == 1) & typed_B, ANNOTATE, DESCRIBE))


def _known(cells: CellBatch, tokens: Tokens) -> tuple[CellBatch, np.ndarray]:
    """The genes that the model has, and their tokens."""
    token_N = tokens.gene_V[cells.genes.astype(np.int64)]
    known_N = token_N >= 0
    known = select(cells, known_N)
    return known, token_N if known is cells else token_N[known_N]


def _gene_words(
    cells: CellBatch, token_N: np.ndarray, order_N: np.ndarray, room: int | np.ndarray
) -> tuple[Words, np.ndarray]:
    """The first gene words of an order that fit into `room`, and their bins."""
    first, offsets = keep_first(cells.offsets, np.maximum(room, 0))
    index = order_N[first]
    return Words(offsets, token_N[index]), bin_values(cells)[index]


def _only(words: Words, kept_B: np.ndarray) -> Words:
    """The words of some cells; the others have none."""
    return Words(offsets_of(np.diff(words.offsets) * kept_B), words.tokens[spread(kept_B, words.offsets)])


def _sentences(
    front: list[Words], genes: Words, bins_N: np.ndarray, behind: list[Words], *by_cell: np.ndarray
) -> Sentences:
    """All words of a cell one after the other; `by_cell` are the other fields."""
    parts = [*front, genes, *behind]
    offsets, places = join([words.offsets for words in parts])
    tokens, values = np.empty(offsets[-1], np.int32), np.zeros(offsets[-1], np.int32)
    for words, place in zip(parts, places, strict=True):
        tokens[place] = words.tokens
    values[places[len(front)]] = bins_N
    return Sentences(offsets, tokens, values, *by_cell)
