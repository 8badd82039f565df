"""Geneformer's in-silico perturbation: what happens to a cell's embedding if one gene's rank is changed.

Theodoris et al., Nature 618, 616 (2023). A gene is

* deleted: its token is taken out;
* overexpressed: its token is moved to the front, or put there if the cell lacks it; a cell that fills the model's
  length then loses its last gene;
* activated or inhibited: its token is moved into the middle of the next quartile of ranks, up or down, and from the
  outermost quartile to the front or the end.

The changed gene says nothing about the others, so it is left out of both sides of every comparison: the embeddings
"before" and "after" of a mean pooling are over the genes that stand in both, and so is the mean shift of the genes' own
states. A shift is one minus the cosine, before to after; a shift towards a goal is the gain in the cosine to it.

All perturbations of many cells run in batches, packed, and read only through the layers that the pooling needs.

Legend: B cells, C cells of a group, P perturbations of a batch, R perturbations in all, G genes of all cells together,
S slots of a group's tokens, N those of a batch's, D width.
"""

from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models.base import Inputs, to_device
from cellmill.models.geneformer import PAD, Geneformer
from cellmill.models.packing import Layout
from cellmill.progress import Progress
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import Genes, hash_genes, keep_first, offsets_of, place_within, random_order, spread

Kind = Literal["delete", "overexpress", "activate", "inhibit"]
Test = Literal["signed_rank", "rank_sum"]
SHIFTS = ("cell_shift", "gene_shift", "goal_shift")
NOWHERE = 1 << 40
"""A place behind every token: nothing is taken out, or put in."""


class Changes(NamedTuple):
    """Perturbations: take one token of a cell out, and put one in."""

    cell_R: np.ndarray
    """int64 [R], row of the cell."""
    gene_R: np.ndarray
    """int64 [R]."""
    rank_R: np.ndarray
    """int64 [R], the gene's rank before, 0 the highest; -1 if the cell lacks it."""
    out_R: np.ndarray
    """int64 [R], the rank that is taken out, or `NOWHERE`."""
    in_R: np.ndarray
    """int64 [R], the rank that the gene has afterwards, or `NOWHERE`."""
    asked_R: np.ndarray
    """bool [R], whether it was asked for."""
    random_R: np.ndarray
    """bool [R], whether it is one of the cell's random genes."""


def perturb(
    model: Geneformer,
    cells: CellBatch,
    kind: Kind,
    genes: np.ndarray | None = None,
    *,
    pooling: str | None = None,
    goal: np.ndarray | None = None,
    n_random: int = 0,
    seed: int = 0,
    feature_ids: list[str] | None = None,
    tokens_per_batch: int = 32_768,
    progress: bool = True,
) -> pa.Table:
    """Perturb single genes of every cell.

    Parameters
    ----------
    model
        A Geneformer, on any device; its mode is left as it was.
    cells
        B cells.
    kind
        What is done to the gene.
    genes
        Vocabulary ids; by default each cell's own genes. A gene that a cell lacks can only be overexpressed.
    pooling
        One of the model's; by default as in its papers, ``mean`` (V1) or ``cls_last`` (V2).
    goal
        float32 [D], the embedding of a goal state (`centroid`).
    n_random
        Genes of each cell, chosen by `seed` and the cell alone, that are perturbed as background (`summarise`).
    feature_ids
        Names of the genes, for the table.
    tokens_per_batch
        Tokens that go through the model at once; more is faster on a GPU until its memory is full.
    progress
        False keeps silent.

    Returns
    -------
    pa.Table
        One row a perturbation: ``joinid``, ``gene``, ``feature_id`` (if given), ``kind``, ``rank`` (null if the cell
        lacks the gene), ``n_genes``, ``cell_shift``, ``gene_shift`` (mean over the genes), ``goal_shift`` (null without
        a goal), ``asked``, ``random``. A shift is null where no other gene is left to compare.

    Raises
    ------
    CellmillError
        If the model, the kind, the genes, the pooling or the goal are not as above, or there is nothing to perturb.
    """
    pooling = _pooling(model, pooling)
    if kind not in get_args(Kind):
        raise CellmillError(f"there is no perturbation '{kind}'; take one of {', '.join(get_args(Kind))}")
    genes = None if genes is None else np.unique(np.asarray(genes, dtype=np.int64))
    if genes is not None and len(genes) and not 0 <= genes[0] <= genes[-1] < model.n_genes:
        raise CellmillError(f"genes to perturb must be ids from 0 to {model.n_genes - 1}; map them with the vocabulary")
    if goal is not None and np.shape(goal) != (model.sizes.width,):
        raise CellmillError(f"the goal has shape {np.shape(goal)}, not ({model.sizes.width},); make it with centroid")
    inputs = model.embed_inputs(cells)
    n_genes_B = inputs["layout"].lengths - 2 * model.n_around
    changes = _plan(model, cells, inputs, n_genes_B, kind, genes, n_random, seed)
    if not len(changes.cell_R):
        raise CellmillError("no cell has a gene to perturb; give genes that the cells express")

    shifts_R3 = _run(model, cells, n_genes_B, changes, pooling, goal, tokens_per_batch, progress)
    columns = {"joinid": cells.joinids[changes.cell_R], "gene": changes.gene_R.astype(np.int32)}
    if feature_ids is not None:
        columns["feature_id"] = pa.array(np.asarray(feature_ids, dtype=object)[changes.gene_R])
    columns["kind"] = pa.array([kind] * len(changes.cell_R)).dictionary_encode()
    columns["rank"] = pa.array(changes.rank_R.astype(np.int32), mask=changes.rank_R < 0)
    columns["n_genes"] = n_genes_B[changes.cell_R].astype(np.int32)
    columns |= {name: pa.array(shifts_R3[:, i], from_pandas=True) for i, name in enumerate(SHIFTS)}
    return pa.table(columns | {"asked": changes.asked_R, "random": changes.random_R})


@torch.inference_mode()
def centroid(
    model: Geneformer, cells: CellBatch, pooling: str | None = None, tokens_per_batch: int = 32_768
) -> np.ndarray:
    """float32 [D], the mean embedding of cells in a goal state; arguments as for `perturb`."""
    pooling = _pooling(model, pooling)
    if not len(cells):
        raise CellmillError("there are no cells in the goal state; give some")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total_D = torch.zeros(model.sizes.width, dtype=torch.float64, device=device)
    for rows in _batches(model.token_lengths(cells), tokens_per_batch):
        inputs = to_device(model.embed_inputs(cells.take(rows)), device)
        total_D += model.embed_cells(inputs, pooling).double().sum(0)
    model.train(was_training)
    return (total_D / len(cells)).float().cpu().numpy()


def summarise(table: pa.Table, *, shift: str = "cell_shift", test: Test = "signed_rank") -> pa.Table:
    """Per gene, the mean shifts over cells, and whether they differ from those of random genes.

    Parameters
    ----------
    table
        Of `perturb`, with random genes (``n_random``).
    shift
        The column that is tested.
    test
        ``signed_rank``: Wilcoxon's, of the differences between the gene's shift in a cell and the mean of the cell's
        other random genes, so that cells of few genes, which shift more, do not count for the gene.
        ``rank_sum``: of the gene's shifts against those of all other random genes, as in the paper.

    Returns
    -------
    pa.Table
        One row for each gene that was asked for, by falling absolute difference: ``gene`` (and ``feature_id``),
        ``n_cells``, the mean of every shift, ``difference`` (mean of the gene minus that of the random genes it was
        held against), ``p_value`` (two-sided), ``q_value`` (Benjamini-Hochberg); null where there is nothing to test.

    Raises
    ------
    CellmillError
        If the test or the column is unknown, or there are no random genes.
    """
    if test not in get_args(Test) or shift not in SHIFTS:
        raise CellmillError(
            f"test is one of {', '.join(get_args(Test))} and shift one of {', '.join(SHIFTS)}; change it"
        )
    random_R = table["random"].to_numpy()
    if not random_R.any():
        raise CellmillError("the table holds no random genes to compare with; perturb with n_random, such as 50")
    from scipy import stats

    shifts = {name: table[name].to_numpy() for name in SHIFTS}
    value_R = shifts[shift]
    random_R &= np.isfinite(value_R)
    _, cell_R = np.unique(table["joinid"].to_numpy(), return_inverse=True)
    others_R = _mean_of_others(value_R, random_R, cell_R)
    genes_G, gene_R = np.unique(table["gene"].to_numpy(), return_inverse=True)
    asked_R = table["asked"].to_numpy()

    rows = []
    order_R = np.argsort(gene_R, kind="stable")
    for gene, of_gene in zip(genes_G, np.split(order_R, np.cumsum(np.bincount(gene_R))[:-1]), strict=True):
        used = of_gene[asked_R[of_gene]]
        if not len(used):
            continue
        row = {"gene": gene, "n_cells": len(used), "first": used[0], "difference": np.nan, "p_value": np.nan}
        row |= {name: values[used].mean() for name, values in shifts.items()}
        used = used[np.isfinite(value_R[used])]
        if test == "rank_sum":
            background = value_R[random_R & (gene_R != gene_R[of_gene[0]])]
            if len(used) and len(background):
                row["difference"] = value_R[used].mean() - background.mean()
                row["p_value"] = stats.ranksums(value_R[used], background).pvalue
        else:
            differences = (value_R - others_R)[used[np.isfinite(others_R[used])]]
            if len(differences):
                row["difference"] = differences.mean()
                row["p_value"] = stats.wilcoxon(differences).pvalue if differences.any() else 1.0
        rows.append(row)

    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}
    if not columns:
        raise CellmillError("the table holds no perturbation that was asked for; perturb with genes")
    columns["q_value"] = np.full(len(rows), np.nan)
    tested = np.isfinite(columns["p_value"])
    columns["q_value"][tested] = stats.false_discovery_control(columns["p_value"][tested])
    first = columns.pop("first")
    by_difference = np.argsort(-np.abs(np.nan_to_num(columns["difference"])), kind="stable")
    made = {name: pa.array(values[by_difference], from_pandas=True) for name, values in columns.items()}
    if "feature_id" in table.column_names:
        made = {"gene": made.pop("gene"), "feature_id": table["feature_id"].take(first[by_difference])} | made
    return pa.table(made)


def write(path: Path, table: pa.Table) -> None:
    """Write a table of `perturb` or `summarise` as parquet, whole or not at all."""
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _pooling(model: Geneformer, pooling: str | None) -> str:
    if not isinstance(model, Geneformer):
        raise CellmillError(f"a {type(model).__name__} has no ranks of genes to perturb; give a Geneformer")
    return model.check_pooling(pooling or ("mean" if model.sizes.version == "V1" else "cls_last"))


def _plan(
    model: Geneformer,
    cells: CellBatch,
    inputs: Inputs,
    n_genes_B: np.ndarray,
    kind: Kind,
    genes: np.ndarray | None,
    n_random: int,
    seed: int,
) -> Changes:
    """What is taken out and put in, for every asked and every random gene of each cell."""
    own_offsets = offsets_of(n_genes_B)
    gene_G = inputs["tokens"].numpy()[inputs["layout"].index(own_offsets, model.n_around)] - model.n_specials
    key_G = spread(np.arange(len(cells)), own_offsets) * model.n_genes + gene_G
    if genes is None:
        asked = key_G
    else:
        asked = (np.arange(len(cells))[:, None] * model.n_genes + genes).ravel()
        asked = asked if kind == "overexpress" else np.intersect1d(asked, key_G)
    own = Genes(cells.joinids, own_offsets, gene_G)
    shuffled_G = random_order(own_offsets, hash_genes(own, "geneformer random genes", seed))
    random = key_G[shuffled_G[keep_first(own_offsets, n_random)[0]]]

    key_R = np.union1d(asked, random)
    cell_R, gene_R = np.divmod(key_R, model.n_genes)
    by_key = np.argsort(key_G)
    keys, ranks = np.append(key_G[by_key], len(cells) * model.n_genes), np.append(place_within(own_offsets)[by_key], -1)
    found_R = np.searchsorted(keys, key_R)
    has_R = keys[found_R] == key_R
    rank_R = np.where(has_R, ranks[found_R], -1)
    n_R = n_genes_B[cell_R]
    full_R = n_R == model.sizes.max_length - 2 * model.n_around
    out_R = np.where(has_R, rank_R, np.where(full_R, n_R - 1, NOWHERE))
    return Changes(
        cell_R, gene_R, rank_R, out_R, _new_rank(kind, rank_R, n_R), np.isin(key_R, asked), np.isin(key_R, random)
    )


def _new_rank(kind: Kind, rank_R: np.ndarray, n_R: np.ndarray) -> np.ndarray:
    """int64 [R], where the gene stands afterwards among its cell's genes."""
    if kind == "delete":
        return np.full_like(rank_R, NOWHERE)
    if kind == "overexpress":
        return np.zeros_like(rank_R)
    quartile_R = 4 * rank_R // n_R + (1 if kind == "inhibit" else -1)
    middle_R = (2 * quartile_R + 1) * n_R // 8
    return np.where(quartile_R < 0, 0, np.where(quartile_R > 3, n_R - 1, middle_R))


def _batches(lengths: np.ndarray, tokens_per_batch: int):
    """Rows in batches of at most `tokens_per_batch` tokens, or of one row, from the longest to the shortest."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    start = 0
    while start < len(order):
        done = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, done + tokens_per_batch, side="right")), start + 1)
        yield order[start:stop]
        start = stop


@torch.inference_mode()
def _run(
    model: Geneformer,
    cells: CellBatch,
    n_genes_B: np.ndarray,
    changes: Changes,
    pooling: str,
    goal: np.ndarray | None,
    tokens_per_batch: int,
    progress: bool,
) -> np.ndarray:
    """float32 [R, 3], the `SHIFTS` of all perturbations, NaN where there is none."""
    device = next(model.parameters()).device
    depth, first = model.depth(pooling), model.n_around
    goal_D = None if goal is None else F.normalize(torch.as_tensor(goal, dtype=torch.float32, device=device), dim=0)
    length_R = n_genes_B[changes.cell_R] + 2 * first
    length_R += (changes.in_R < NOWHERE).astype(int) - (changes.out_R < NOWHERE)
    starts_B1 = np.searchsorted(changes.cell_R, np.arange(len(cells) + 1))
    shifts_R3 = np.full((len(changes.cell_R), len(SHIFTS)), np.nan, np.float32)
    was_training, n_done = model.training, 0
    model.eval()
    with Progress("perturbing genes", len(cells), show=progress) as bar:
        for group in _batches(n_genes_B + 2 * first, tokens_per_batch):
            inputs = to_device(model.embed_inputs(cells.take(group)), device)
            tokens_S, group_layout = inputs["tokens"], inputs["layout"]
            before_SD = model.encode(tokens_S, group_layout, depth).float()
            of_group = np.concatenate([np.arange(*starts_B1[[cell, cell + 1]]) for cell in group])
            row_R = np.repeat(np.arange(len(group)), starts_B1[group + 1] - starts_B1[group])
            for rows in _batches(length_R[of_group], tokens_per_batch):
                at = of_group[rows]
                numbers = (group_layout.starts[row_R[rows]], changes.out_R[at] + first, changes.in_R[at] + first)
                numbers += (changes.gene_R[at] + model.n_specials,)
                numbers = (torch.from_numpy(part).to(device) for part in numbers)
                layout = model.packing.layout(length_R[at]).to(device)
                tokens_N, source_N, same_N = _change(tokens_S, layout, *numbers, model.n_specials)
                after_ND = model.encode(tokens_N, layout, depth).float()
                shifts_P3 = _shifts(before_SD[source_N], after_ND, same_N, layout, pooling, goal_D)
                shifts_R3[at] = shifts_P3.cpu().numpy()
            n_done += len(group)
            bar.update(n_done)
    model.train(was_training)
    return shifts_R3


def _change(
    tokens_S: Tensor, layout: Layout, start_P: Tensor, out_P: Tensor, in_P: Tensor, token_P: Tensor, n_specials: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The perturbed cells' tokens [N]; the slot where each stood before; whether it is a gene that stands in both.

    `start_P` is the cell's first slot in `tokens_S`; `out_P` and `in_P` are places within the cell.
    """
    row_N, place_N = layout.rows_N.clamp(max=len(layout) - 1), layout.places_N
    in_N = in_P[row_N]
    is_new_N = place_N == in_N
    kept_N = place_N - (place_N > in_N).long()
    source_N = start_P[row_N] + kept_N + (kept_N >= out_P[row_N])
    source_N = source_N.clamp(max=len(tokens_S) - 1)  # of a new token behind all others, which has none
    tokens_N = torch.where(is_new_N, token_P[row_N], tokens_S[source_N]).masked_fill(~layout.used_N, PAD)
    return tokens_N, source_N, (tokens_N >= n_specials) & ~is_new_N


def _shifts(
    before_ND: Tensor, after_ND: Tensor, same_N: Tensor, layout: Layout, pooling: str, goal_D: Tensor | None
) -> Tensor:
    """float32 [P, 3], the `SHIFTS`."""
    n_P1 = layout.sum(same_N[:, None])
    gene_P = (layout.sum(_one_minus_cosine(before_ND, after_ND)[:, None], same_N) / n_P1)[:, 0]
    if pooling.startswith("cls"):
        before_PD, after_PD = before_ND[layout.starts_B], after_ND[layout.starts_B]
    else:
        before_PD, after_PD = layout.sum(before_ND, same_N) / n_P1, layout.sum(after_ND, same_N) / n_P1
    goal_P = torch.full_like(gene_P, torch.nan)
    if goal_D is not None:
        goal_P = (F.normalize(after_PD, dim=1) - F.normalize(before_PD, dim=1)) @ goal_D
    return torch.stack([_one_minus_cosine(before_PD, after_PD), gene_P, goal_P], dim=1)


def _one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Over the last axis, from the difference of the unit vectors: exact also where the cosine rounds to one."""
    return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).square().sum(-1) / 2


def _mean_of_others(value_R: np.ndarray, random_R: np.ndarray, cell_R: np.ndarray) -> np.ndarray:
    """float64 [R], mean over the cell's random perturbations without the row's own; NaN where there is no other."""
    own_R = np.where(random_R, value_R, 0).astype(np.float64)
    sums_B, counts_B = np.bincount(cell_R, own_R), np.bincount(cell_R, random_R)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums_B[cell_R] - own_R) / (counts_B[cell_R] - random_R)
