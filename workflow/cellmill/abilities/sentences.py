"""What scMulan says: the cell types of cells, and cells of given metadata; both for many cells at once.

Both are greedy or drawn as in the paper's description: words that were said are banned, generation may be restricted to
the likeliest words (`top_k`), and the probability of <E> is scaled (`end_scale`, the paper's gamma).
Since words have no position, sentences of any length go on side by side, and what was read is kept (a KV cache).

Legend: B cells of a batch, C cells in all, S steps, W words that may be said: <E> and the genes, N genes of all cells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellmill.errors import CellmillError
from cellmill.models.base import to_device
from cellmill.models.packing import uniform
from cellmill.models.scmulan import CELL_TYPE, END, Scmulan, last_words
from cellmill.progress import Progress
from cellmill.randomness import uniform as random_shares
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import offsets_of
from cellmill.views.scmulan import N_BINS

MAX_SHARE = 1 - 1e-6
"""Draws stay below the whole probability, also after float32 has rounded."""


class Annotation(NamedTuple):
    """The cell types that a model says."""

    names: list[str]
    """[C]."""
    codes: np.ndarray
    """int64 [C], the type's place in ``model.categories["cell_type"]``."""
    probabilities: np.ndarray
    """float32 [C], of the type among all cell types (among the others, where a coarse type was said before)."""


class GeneratedCells(NamedTuple):
    """Generated cells as ragged arrays, as in `cellmill.shards.batch.CellBatch`, with bins instead of counts."""

    offsets: np.ndarray
    """int64 [C + 1]; cell c owns ``offsets[c]:offsets[c + 1]``."""
    genes: np.ndarray
    """int32 [N], vocabulary ids, ascending within a cell."""
    bins: np.ndarray
    """int32 [N], 0..10: bin b ends at b tenths of the cell's largest log1p(CP10k), which the model does not say."""
    ended: np.ndarray
    """bool [C], whether the model ended the cell by <E>; the others ran into the limit."""


def annotate(model: Scmulan, cells: CellBatch, *, batch_size: int = 16, progress: bool = True) -> Annotation:
    """The cell type of every cell: the likeliest word after its genes and <PCT>, and a finer one if the model adds it.

    Parameters
    ----------
    model
        Trained on annotated cells; it stays on its device.
    cells
        C cells in the model's vocabulary. Their own `codes` are not looked at.
    batch_size
        Cells at once; those of similar length are put together. Each keeps 2 x layers x width x words floats (430 MB at
        most in the published size), so raise it on a GPU that has the room; on a CPU more gain nothing.
    progress
        False keeps silent.

    Raises
    ------
    CellmillError
        If the model knows no cell types.
    """
    _check_words(model)
    order_C = np.argsort(-cells.lengths, kind="stable")
    codes_C, probabilities_C = np.empty(len(cells), np.int64), np.empty(len(cells), np.float32)
    with _speaking(model) as device, Progress("annotating", len(cells), show=progress) as bar:
        for start in range(0, len(cells), batch_size):
            rows_B = order_C[start : start + batch_size]
            types = model.decode_types(to_device(model.embed_inputs(cells.take(rows_B)), device))
            codes_C[rows_B] = types.codes_B.cpu().numpy()
            probabilities_C[rows_B] = types.probability_B.cpu().numpy()
            bar.update(start + len(rows_B))
    known = model.categories.get(CELL_TYPE, [])
    return Annotation([known[code] for code in codes_C], codes_C, probabilities_C)


def generate(
    model: Scmulan,
    words: dict[str, str],
    n: int,
    *,
    seed: int,
    top_k: int | None = None,
    end_scale: float = 1.0,
    limit: int | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> GeneratedCells:
    """Generate cells of given metadata, word by word.

    Parameters
    ----------
    model
        A trained model; it stays on its device.
    words
        The value of each obs column that the cells are to have, such as ``{"cell_type": "B cell"}``; at least one.
    n
        Number of cells, C.
    seed
        Decides every draw, with the cell's number and the step: cell i is the same whatever `n` and the batches are,
        but for rounding.
    top_k
        Draw among so many of the likeliest words; by default among all.
    end_scale
        Factor of the probability of <E>: below 1 cells become longer.
    limit
        Words of a sentence at most, metadata included; by default the model's longest.
    batch_size
        Cells at once. Each keeps 2 x layers x width x limit floats (330 MB in the published size).
    progress
        False keeps silent.

    Raises
    ------
    CellmillError
        If a column or value is unknown to the model, or an option is out of bounds.
    """
    _check_words(model)
    prompt_L = _prompt(model, words)
    limit = model.sizes.max_length if limit is None else limit
    if limit <= len(prompt_L):
        raise CellmillError(f"limit {limit} leaves no room behind the {len(prompt_L)} words of the prompt; raise it")
    if (top_k is not None and top_k < 1) or end_scale <= 0 or n < 0:
        raise CellmillError(
            f"cannot generate n={n} cells with top_k={top_k} and end_scale={end_scale}: take n of at least 0, "
            "top_k of at least 1 and end_scale above 0"
        )
    said = []
    with _speaking(model) as device, Progress("generating", n, show=progress) as bar:
        for start in range(0, n, batch_size):
            cells_B = np.arange(start, min(start + batch_size, n))
            prompt_BL = prompt_L.to(device).expand(len(cells_B), -1)
            said.append(_say(model, prompt_BL, cells_B, limit - len(prompt_L), seed, top_k, end_scale))
            bar.update(start + len(cells_B))
    return _ragged(model, said)


def _check_words(model: Scmulan) -> None:
    if not isinstance(model, Scmulan):
        raise CellmillError(f"a {type(model).__name__} says no words; give a model of the architecture scmulan")


@contextmanager
def _speaking(model: Scmulan) -> Iterator[torch.device]:
    """The model in evaluation mode, without gradients; its device."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)


def _prompt(model: Scmulan, words: dict[str, str]) -> Tensor:
    """int64 [L], the tokens of `words` as a training sentence begins: cell types behind the other metadata."""
    if not words:
        raise CellmillError(f"name at least one word to generate from, of {', '.join(model.categories) or 'no column'}")
    for column, value in words.items():
        if column not in model.categories:
            raise CellmillError(
                f"the model has no words of the column '{column}'; take some of {', '.join(model.categories)}"
            )
        if value not in model.categories[column]:
            known = ", ".join(model.categories[column][:5])
            raise CellmillError(f"the model has no word '{value}' of the column '{column}'; it knows {known}, ...")
    columns = sorted(words, key=lambda column: (column == CELL_TYPE, model.obs_columns.index(column)))
    return torch.tensor([model.first_word[c] + model.categories[c].index(words[c]) for c in columns])


def _say(
    model: Scmulan, prompt_BL: Tensor, cells_B: np.ndarray, n_steps: int, seed: int, top_k: int | None, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B, S], the tokens that were said (<E> and all behind it 0), and their bins."""
    n_words = 1 + model.n_gene_words  # <E> and the genes are the first tokens
    tokens_BS, bins_BS = np.zeros((2, len(cells_B), n_steps), np.int64)
    layout = uniform(*prompt_BL.shape).to(prompt_BL.device)
    prompt_N = prompt_BL.flatten()
    h_ND, cache = model.read({"tokens": prompt_N, "values": torch.zeros_like(prompt_N), "layout": layout}, n_steps)
    state_BD = h_ND.index_select(0, last_words(layout))
    banned_BW = torch.zeros(len(cells_B), n_words, dtype=torch.bool, device=prompt_BL.device)
    banned_BW[:, 1:] = model.gene_T()[1:n_words] < 0
    rows_B = np.arange(len(cells_B))  # of the cells that are not at their end
    for step in range(n_steps):
        shares_B = random_shares("scmulan generate", seed, cells_B[rows_B], step)
        logits_BW = model.logits(state_BD)[:, :n_words].masked_fill(banned_BW, -torch.inf)
        token_B = _draw(logits_BW, torch.from_numpy(shares_B).to(logits_BW), top_k, scale)
        values_BT = model.bins(state_BD)
        bin_B = values_BT.gather(1, token_B.unsqueeze(1)).squeeze(1).clamp(0, N_BINS).round().long()
        tokens_BS[rows_B, step] = token_B.cpu().numpy()
        bins_BS[rows_B, step] = bin_B.cpu().numpy()
        going_B = token_B != END
        if not going_B.all():
            rows_B = rows_B[going_B.cpu().numpy()]
            if not len(rows_B):
                break
            token_B, bin_B, banned_BW = token_B[going_B], bin_B[going_B], banned_BW[going_B]
            cache.keep(going_B)
        banned_BW = banned_BW.scatter(1, token_B.unsqueeze(1), True)
        if step + 1 < n_steps:
            state_BD = model.read_further(token_B, bin_B, cache)
    return tokens_BS, bins_BS


def _draw(logits_BW: Tensor, shares_B: Tensor, top_k: int | None, end_scale: float) -> Tensor:
    """int64 [B], the word at the share of the cumulated probabilities."""
    if top_k is not None and top_k < logits_BW.shape[1]:
        least_B1 = logits_BW.topk(top_k, 1).values[:, -1:]
        logits_BW = logits_BW.masked_fill(logits_BW < least_B1, -torch.inf)
    p_BW = logits_BW.softmax(1)
    p_BW[:, END] *= end_scale
    below_BW = p_BW.cumsum(1)
    return (below_BW <= shares_B.clamp(max=MAX_SHARE).unsqueeze(1) * below_BW[:, -1:]).sum(1)


def _ragged(model: Scmulan, said: list[tuple[np.ndarray, np.ndarray]]) -> GeneratedCells:
    """The said words without <E>, genes ascending."""
    gene_T = model.gene_T().cpu().numpy()
    lengths, genes, bins, ended = [], [], [], []
    for tokens_BS, bins_BS in said:
        gene_BS = np.where(tokens_BS == END, np.iinfo(np.int32).max, gene_T[tokens_BS])
        order_BS = np.argsort(gene_BS, axis=1)
        is_gene_BS = np.take_along_axis(tokens_BS, order_BS, 1) != END
        lengths.append(is_gene_BS.sum(1))
        genes.append(np.take_along_axis(gene_BS, order_BS, 1)[is_gene_BS])
        bins.append(np.take_along_axis(bins_BS, order_BS, 1)[is_gene_BS])
        ended.append(~is_gene_BS[:, -1])
    parts = [np.concatenate(part) if part else np.empty(0) for part in (lengths, genes, bins, ended)]
    offsets = offsets_of(parts[0].astype(np.int64))
    return GeneratedCells(offsets, parts[1].astype(np.int32), parts[2].astype(np.int32), parts[3].astype(bool))
