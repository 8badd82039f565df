"""The common yardstick: every model is asked for the same hidden genes of the same held-out cells (docs/yardstick.md).

Losses of different objectives cannot be compared. Here each model sees the same cells without some of the genes that
they express, and says of those, and of as many that they do not express, how likely each is detected and at what value.

Legend: B cells, Q genes asked of a cell, H = Q / 2 of them hidden, V genes in the vocabulary, D data sets, N nonzeros,
P hidden genes of all cells together.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cellmill.checkpoints import build_model, load_checkpoint
from cellmill.device import best_device
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import spread_batches
from cellmill.gene_map import GeneMap
from cellmill.models.base import CellModel, GeneStatistics, Imputed, to_device
from cellmill.progress import Progress
from cellmill.recipes import ModelRecipe
from cellmill.scores import row
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.views.ragged import Genes, hash_genes, keep_first, log1p_cp10k, offsets_of, random_order, select
from cellmill.vocabulary import Vocabulary

SEED = 0
"""Every model and every seed of it is asked the same, so that intervals over seeds are of training alone."""
HELD_OUT_CELLS = 2048
"""At most so many held-out cells are asked, evenly spread."""
CALIBRATION_CELLS = 256
"""At most so many training cells, and a sixteenth of them, are asked to learn a model's unit."""
SURVEYED_CELLS = 20_000
SURVEYED_NONZEROS = 60_000_000
"""What of a split is read for gene means and for which genes its data sets measure, evenly spread."""
HIDDEN_SHARE = 0.15
MAX_HIDDEN = 256
STEP = 16
"""A multiple of this is hidden, so that many cells are asked equally many genes and no query needs padding."""

METRICS = {"pearson": True, "mse": False, "mse_uncalibrated": False, "pearson_residual": True, "auroc": True}
"""Metric to whether higher is better."""
_READ = 32
_COMPARED = 64


class Survey(NamedTuple):
    """What training cells say of each gene, and which genes each data set measures."""

    datasets: list[str]
    mean_V: np.ndarray
    """float32 [V], mean log1p(CP10k) over the training cells that express the gene; over all genes where none does."""
    detection_V: np.ndarray
    """float32 [V], share of the training cells that express the gene."""
    measured_DV: np.ndarray
    """bool [D, V], whether a cell of the data set expresses the gene."""


class Asked(NamedTuple):
    """Cells that are asked equally many genes, half of them hidden, half true zeros, in ascending order of ids."""

    cells: CellBatch
    """What is visible."""
    genes_BQ: np.ndarray
    """int64 [B, Q], vocabulary ids."""
    truth_BQ: np.ndarray
    """float32 [B, Q], log1p(CP10k); 0 for the true zeros."""


@dataclass(frozen=True)
class Questions:
    """What is asked in one run, of models and baselines alike."""

    survey: Survey
    calibration: list[Asked]
    """Training cells, from which a model's unit is learnt."""
    held_out: list[Asked]

    @property
    def n_cells(self) -> int:
        """Held-out cells that are asked."""
        return sum(len(asked.cells) for asked in self.held_out)


Answer = Callable[[Asked], Imputed]


def n_sampled(shards: Shards, split: str) -> int:
    """Cells of a split that a survey reads: at most `SURVEYED_CELLS`, and about `SURVEYED_NONZEROS` nonzeros."""
    parts = shards.manifest["splits"].get(split, [])
    nonzeros = sum(part["nonzeros"] for part in parts) / max(sum(part["cells"] for part in parts), 1)
    return max(1, min(SURVEYED_CELLS, int(SURVEYED_NONZEROS / max(nonzeros, 1))))


def survey(shards: Shards) -> Survey:
    """Gene means and detection rates of the training cells, and the genes that each data set measures.

    Shards do not say which genes a data set measured. A gene that one of its cells expresses was; other genes are not
    asked for as zeros, since to know them is to know the data set. Of large splits a sample is read.
    """
    datasets = sorted(set().union(*(shards.datasets(split) for split in shards.splits)))
    n_cells, nonzero_V, sum_V = 0, np.zeros(shards.n_genes, np.int64), np.zeros(shards.n_genes)
    measured_DV = np.zeros((len(datasets), shards.n_genes), bool)
    for split in ("train", "validation"):
        for cells in spread_batches(shards, split, _READ, n_sampled(shards, split), {"dataset_id": datasets}):
            measured_DV[cells.codes["dataset_id"][cells.cell_of], cells.genes] = True
            if split == "train":
                n_cells += len(cells)
                nonzero_V += np.bincount(cells.genes, minlength=shards.n_genes)
                sum_V += np.bincount(cells.genes, log1p_cp10k(cells), minlength=shards.n_genes)
    mean_V = np.full(shards.n_genes, sum_V.sum() / max(nonzero_V.sum(), 1))
    np.divide(sum_V, nonzero_V, out=mean_V, where=nonzero_V > 0)
    return Survey(datasets, mean_V.astype(np.float32), (nonzero_V / n_cells).astype(np.float32), measured_DV)


def questions(shards: Shards) -> Questions:
    """Draw what is asked: of at most `HELD_OUT_CELLS` held-out cells, and of training cells for the calibration.

    Raises
    ------
    CellmillError
        If the corpus has no split ``train`` or ``validation``, or no cell of one can be asked.
    """
    found = survey(shards)
    n_calibration = min(CALIBRATION_CELLS, -(-shards.n_cells("train") // 16))
    asked = {}
    for split, n_cells in (("train", n_calibration), ("validation", HELD_OUT_CELLS)):
        batches = spread_batches(shards, split, _READ, n_cells, {"dataset_id": found.datasets})
        asked[split] = _grouped([group for cells in batches for group in ask(cells, found.measured_DV)])
        if not asked[split]:
            raise CellmillError(
                f"no cell of the split '{split}' of {shards.folder} can be asked for hidden genes: each has fewer than "
                f"{int(np.ceil(STEP / HIDDEN_SHARE))} expressed, or fewer than {STEP} unexpressed genes; "
                "choose deeper cells or a larger vocabulary"
            )
    return Questions(found, asked["train"], asked["validation"])


def ask(cells: CellBatch, measured_DV: np.ndarray, seed: int = SEED) -> list[Asked]:
    """Hide genes of every cell and choose as many of its true zeros, each by (`seed`, joinid, gene).

    `HIDDEN_SHARE` of a cell's genes are hidden, at most `MAX_HIDDEN` and no more than it has zeros, rounded down to a
    multiple of `STEP`. Cells for which this is 0 are left out.

    Parameters
    ----------
    cells
        Whole cells, with the codes of their data sets in ``codes["dataset_id"]``.
    measured_DV
        bool [D, V]; a gene that the cell's data set did not measure is no true zero.

    Returns
    -------
    list of Asked
        One for each number of genes asked, in ascending order.
    """
    candidate_BV = measured_DV[cells.codes["dataset_id"]]  # indexing copies
    candidate_BV[cells.cell_of, cells.genes] = False
    cell_Z, gene_Z = np.nonzero(candidate_BV)
    zero_offsets = offsets_of(np.bincount(cell_Z, minlength=len(cells)))
    zeros = Genes(cells.joinids, zero_offsets, gene_Z.astype(np.int32))
    hidden_B = np.minimum(
        np.minimum((HIDDEN_SHARE * cells.lengths).astype(np.int64), MAX_HIDDEN), np.diff(zero_offsets)
    )
    hidden_B -= hidden_B % STEP

    hidden_P = _drawn(cells, hidden_B, "yardstick hidden", seed)
    visible_N = np.ones(len(cells.genes), bool)
    visible_N[hidden_P] = False
    visible = select(CellBatch(cells.joinids, cells.offsets, cells.genes, cells.counts, cells.totals), visible_N)
    genes_P, truth_P = cells.genes[hidden_P], log1p_cp10k(cells)[hidden_P]
    zeros_P = zeros.genes[_drawn(zeros, hidden_B, "yardstick zeros", seed)]
    asked = []
    for n_hidden in np.unique(hidden_B[hidden_B > 0]):
        of_group_B = hidden_B == n_hidden
        of_group_P = np.repeat(of_group_B, hidden_B)
        hidden_BH, zero_BH = (genes[of_group_P].reshape(-1, n_hidden) for genes in (genes_P, zeros_P))
        truth_BH = truth_P[of_group_P].reshape(-1, n_hidden)
        genes_BQ = np.concatenate([hidden_BH, zero_BH], axis=1).astype(np.int64)
        truth_BQ = np.concatenate([truth_BH, np.zeros_like(truth_BH)], axis=1)
        order_BQ = genes_BQ.argsort(axis=1)  # so that the order of the genes asked says nothing
        genes_BQ, truth_BQ = (np.take_along_axis(matrix, order_BQ, axis=1) for matrix in (genes_BQ, truth_BQ))
        asked.append(Asked(visible.take(np.flatnonzero(of_group_B)), genes_BQ, truth_BQ))
    return asked


def _drawn(cells: CellBatch | Genes, n_B: np.ndarray, purpose: str, seed: int) -> np.ndarray:
    """int64 [P], places of `n_B` random genes of each cell."""
    order_N = random_order(cells.offsets, hash_genes(cells, purpose, seed))
    return order_N[keep_first(cells.offsets, n_B)[0]]


def _grouped(parts: list[Asked]) -> list[Asked]:
    """Those that are asked equally many genes joined; the longest cells first, so that little is padded."""
    groups = []
    for n_asked in sorted({part.genes_BQ.shape[1] for part in parts}):
        same = [part for part in parts if part.genes_BQ.shape[1] == n_asked]
        cells = CellBatch.concatenate([part.cells for part in same])
        order = np.argsort(-cells.lengths, kind="stable")
        genes_BQ, truth_BQ = (np.concatenate([part[i] for part in same])[order] for i in (1, 2))
        groups.append(Asked(cells.take(order), genes_BQ, truth_BQ))
    return groups


def batches(asked: list[Asked], batch_size: int) -> Iterator[Asked]:
    """The same cells, at most `batch_size` at a time."""
    for group in asked:
        for start in range(0, len(group.cells), batch_size):
            stop = min(start + batch_size, len(group.cells))
            yield Asked(group.cells.slice(start, stop), group.genes_BQ[start:stop], group.truth_BQ[start:stop])


def answers_of(model: CellModel, gene_map: GeneMap | None = None) -> Answer:
    """How a model answers: in evaluation mode and float32, at most `CellModel.impute_cells` cells at once.

    A model with a vocabulary of its own sees the cells through `gene_map`; of a gene that it does not know it is taken
    to think what it thinks of the others that the cell was asked for, on the mean.
    """
    device = best_device()
    model.to(device).eval()

    def answer(asked: Asked) -> Imputed:
        parts = []
        with torch.inference_mode():
            for part in batches([asked], model.impute_cells):
                cells, genes_BQ = part.cells, part.genes_BQ
                if gene_map:
                    cells = gene_map.apply(cells)  # totals stay the whole cell's, as for every model
                    known_BQ = gene_map.gene_V[genes_BQ] >= 0
                    # an unknown gene stands for one that is asked for anyway: what else is asked stays the same
                    stand_in_B = genes_BQ[np.arange(len(genes_BQ)), known_BQ.argmax(1)]
                    genes_BQ = gene_map.gene_V[np.where(known_BQ, genes_BQ, stand_in_B[:, None])].clip(min=0)
                inputs = to_device(model.impute_inputs(cells, genes_BQ.astype(np.int64)), device)
                answers = [tensor.float().cpu() for tensor in model.impute(inputs)]
                if gene_map:
                    answers = [_mean_where_unknown(answer_BQ, torch.from_numpy(known_BQ)) for answer_BQ in answers]
                parts.append(answers)
        return Imputed(*map(torch.cat, zip(*parts, strict=True)))

    return answer


def _mean_where_unknown(answer_BQ: torch.Tensor, known_BQ: torch.Tensor) -> torch.Tensor:
    mean_B = (answer_BQ * known_BQ).sum(1) / known_BQ.sum(1).clamp(min=1)
    return torch.where(known_BQ, answer_BQ, mean_B[:, None])


class _Answers(NamedTuple):
    """What was answered about a batch: only values of hidden genes are judged, and all detections."""

    genes_BH: np.ndarray
    truth_BH: np.ndarray
    value_BH: np.ndarray
    above_B: np.ndarray
    """float64 [B], the area under the ROC curve."""


def _collect(answer: Answer, asked: list[Asked], batch_size: int) -> list[_Answers]:
    collected = []
    for batch in batches(asked, batch_size):
        value_BQ, detection_BQ = (np.asarray(matrix, dtype=np.float64) for matrix in answer(batch))
        for matrix_BQ in (value_BQ, detection_BQ):
            if matrix_BQ.shape != batch.genes_BQ.shape:
                raise CellmillError(
                    f"asked for {batch.genes_BQ.shape} genes, the model answered with {matrix_BQ.shape} numbers; "
                    "impute must return one for each cell and gene of genes_BQ"
                )
            if not np.isfinite(matrix_BQ).all():
                raise _NotFiniteError
        hidden_BQ = batch.truth_BQ > 0
        shape = (len(batch.cells), -1)
        chosen = (matrix[hidden_BQ].reshape(shape) for matrix in (batch.genes_BQ, batch.truth_BQ, value_BQ))
        pairs = (detection_BQ[mask].reshape(shape) for mask in (hidden_BQ, ~hidden_BQ))
        collected.append(_Answers(*chosen, auroc(*pairs)))
    return collected


class _NotFiniteError(Exception):
    """An answer is NaN or infinite."""


def measure(answer: Answer, asked: Questions, batch_size: int) -> tuple[dict[str, float | None], dict[str, str]]:
    """Ask, and judge what is answered.

    Parameters
    ----------
    answer
        Gives the answers to a batch: `answers_of` a model, or a baseline.
    asked
        The questions.
    batch_size
        Cells asked at a time.

    Returns
    -------
    dict, dict
        The value of each of `METRICS`, None where it has none, and the reason why.
    """
    nothing = dict.fromkeys(METRICS)
    try:
        slope, shift = calibrate(_collect(answer, asked.calibration, batch_size))
        found = _collect(answer, asked.held_out, batch_size)
    except NotImplementedError:
        return nothing, dict.fromkeys(METRICS, "the architecture does not define impute")
    except _NotFiniteError:
        return nothing, dict.fromkeys(METRICS, "an answer is not a finite number; the model has diverged")
    values = {
        "pearson": _mean_pearson(found),
        "mse": _mean([((slope * part.value_BH + shift - part.truth_BH) ** 2).mean(axis=1) for part in found]),
        "mse_uncalibrated": _mean([((part.value_BH - part.truth_BH) ** 2).mean(axis=1) for part in found]),
        "pearson_residual": residual_pearson(
            *(np.concatenate([matrix.ravel() for matrix in column]) for column in list(zip(*found, strict=True))[:3]),
            asked.survey.mean_V,
        ),
        "auroc": _mean([part.above_B for part in found]),
    }
    said = {
        "pearson": "the answer is the same for all hidden genes of every cell",
        "pearson_residual": "the answer follows from the gene's mean alone",
    }
    return values, {metric: said[metric] for metric, value in values.items() if value is None}


def calibrate(answers: list[_Answers]) -> tuple[float, float]:
    """Scale and shift by which answers are nearest to the truth, in least squares over hidden genes."""
    value_P, truth_P = (np.concatenate([part[i].ravel() for part in answers]).astype(np.float64) for i in (2, 1))
    slope = 0.0 if _is_constant(value_P) else np.cov(value_P, truth_P, bias=True)[0, 1] / value_P.var()
    return float(slope), float(truth_P.mean() - slope * value_P.mean())


def pearson(a_BH: np.ndarray, b_BH: np.ndarray) -> np.ndarray:
    """float64 [B], Pearson's correlation of each row; NaN where a row is constant."""
    a_BH, b_BH = (x - x.mean(axis=-1, keepdims=True) for x in (a_BH.astype(np.float64), b_BH.astype(np.float64)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a_BH * b_BH).sum(axis=-1) / np.sqrt((a_BH**2).sum(axis=-1) * (b_BH**2).sum(axis=-1))


def _mean_pearson(answers: list[_Answers]) -> float | None:
    """Mean over the cells whose hidden values differ; a cell that is answered with one value counts 0."""
    found = []
    for part in answers:
        rankable_B = ~_is_constant(part.truth_BH)
        found.append(np.where(_is_constant(part.value_BH), np.nan, pearson(part.value_BH, part.truth_BH))[rankable_B])
    found_B = np.concatenate(found)
    return None if np.isnan(found_B).all() else float(np.nan_to_num(found_B).mean())


def residual_pearson(genes_P: np.ndarray, truth_P: np.ndarray, value_P: np.ndarray, mean_V: np.ndarray) -> float | None:
    """Pearson's correlation of answer and truth over all cells, beyond what the gene's training mean explains.

    It is the partial correlation given that mean: from both, the least-squares line through it is subtracted. (To
    subtract the mean itself would reward every answer that is shrunken towards a constant.) None if nothing of the
    answer is left.
    """
    known_P2 = np.stack([np.ones(len(genes_P)), mean_V[genes_P]], axis=1)
    both_P2 = np.stack([value_P, truth_P], axis=1).astype(np.float64)
    rest_P2 = both_P2 - known_P2 @ np.linalg.lstsq(known_P2, both_P2, rcond=None)[0]
    if (rest_P2.std(axis=0) <= 1e-5 * np.abs(both_P2).max(axis=0)).any():
        return None
    return float(pearson(*rest_P2.T))


def auroc(hidden_BH: np.ndarray, zero_BH: np.ndarray) -> np.ndarray:
    """float64 [B], the probability that a hidden gene is thought likelier detected than a zero; ties count half."""
    parts = []
    for start in range(0, len(hidden_BH), _COMPARED):
        ones_BH1, zeros_B1H = hidden_BH[start : start + _COMPARED, :, None], zero_BH[start : start + _COMPARED, None]
        parts.append(((ones_BH1 > zeros_B1H).mean(axis=(1, 2)) + (ones_BH1 >= zeros_B1H).mean(axis=(1, 2))) / 2)
    return np.concatenate(parts)


def _mean(parts: list[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean())


def _is_constant(x: np.ndarray) -> np.ndarray:
    """Whether the values of each row differ by no more than rounding."""
    return np.ptp(x, axis=-1) <= 1e-6 * np.abs(x).max(axis=-1)


def yardstick_rows(
    method: str,
    kind: str,
    seed: int,
    values: dict[str, float | None],
    reasons: dict[str, str],
    n_cells: int,
    seconds: float,
    checkpoint: str | None,
    provenance: dict,
    seen: str = "no",
) -> list[dict]:
    """Rows of the score table for one method and seed: one for each of `METRICS`."""
    return [
        row(
            task="yardstick",
            dataset="corpus",
            split="validation",
            model=method,
            kind=kind,
            regime="none",
            seed=seed,
            metric=metric,
            value=value,
            higher_is_better=METRICS[metric],
            n=n_cells,
            seconds=seconds,
            reason=reasons.get(metric),
            seen=seen,
            checkpoint=checkpoint,
            **provenance,
        )
        for metric, value in values.items()
    ]


def score_yardstick(
    name: str,
    checkpoints: list[Path],
    shards: Shards,
    statistics: GeneStatistics,
    batch_size: int,
    provenance: dict,
    vocabulary: Vocabulary | None = None,
) -> list[dict]:
    """Rows for one model: for each seed the trained model and ``NAME.untrained``; of a released model, itself alone.

    Parameters are those of `cellmill.pretraining_scores.score_pretraining`, and `vocabulary`, that of the shards, for a
    released model, whose genes are matched to it. What cells it was trained on is unknown.
    """
    asked = questions(shards)
    rows = []
    with Progress(f"yardstick of {name}", total=2 * asked.n_cells * len(checkpoints)) as progress:
        for number, folder in enumerate(checkpoints, start=1):
            model, meta = load_checkpoint(folder)
            networks, gene_map, said = [(name, "model", model)], None, []
            if vocabulary:
                gene_map = GeneMap(vocabulary.feature_ids, vocabulary.feature_names, meta["feature_ids"])
            else:
                shards.check_vocabulary(meta["vocabulary_hash"])
                recipe = ModelRecipe.from_dict(meta["recipe"])
                untrained = build_model(recipe, shards.n_genes, statistics, meta["seed"])
                networks.append((f"{name}.untrained", "untrained", untrained))
            for method, kind, network in networks:
                started = time.monotonic()
                values, reasons = measure(answers_of(network, gene_map), asked, batch_size)
                seconds = time.monotonic() - started
                checkpoint = meta["weights_sha256"] if kind == "model" else None
                measured = (values, reasons, asked.n_cells, seconds, checkpoint, provenance)
                rows += yardstick_rows(method, kind, meta["seed"], *measured, "unknown" if vocabulary else "no")
                said.append(f"{kind} {'no answer' if values['pearson'] is None else format(values['pearson'], '.3f')}")
            progress.update(
                2 * asked.n_cells * number, f"seed {meta['seed']}: Pearson of hidden genes, {', '.join(said)}"
            )
    return rows
