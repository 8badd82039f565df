"""What a model must beat on the yardstick: gene means, gene means on each cell's own line, PCA and kNN imputation.

All are fitted on training cells, of which those of the calibration are left out: on these, asked as held-out cells are,
the numbers of components and neighbours and the ridge are chosen, for values by correlation, for detection by AUROC.

Legend: B cells, Q genes asked of a cell, V genes, M training cells, K principal components, N visible nonzeros.
"""

import time
from collections.abc import Callable
from itertools import product

import numpy as np
from scipy import sparse

from cellmill import yardstick
from cellmill.errors import CellmillError
from cellmill.evaluate_loss import spread_batches
from cellmill.models.base import Imputed
from cellmill.progress import Progress
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.views.ragged import log1p_cp10k, sum_within
from cellmill.yardstick import Asked, Questions

COMPONENTS = (3, 10, 50)
RIDGES = (0.01, 1.0)
NEIGHBOURS = (15, 30, 60, 120)
_READ = 32
_BATCH = 64

Guess = Callable[[Asked], tuple[np.ndarray, np.ndarray]]
"""Value and detection of every gene in every cell, float32 [B, V] or [V]."""


def score_baselines(shards: Shards, seeds: list[int], provenance: dict) -> list[dict]:
    """Rows of all baselines. They know no seed: each is measured once and stands beside every seed of the models.

    Parameters
    ----------
    shards
        The corpus.
    seeds
        Those of the run.
    provenance
        As for `cellmill.yardstick.score_yardstick`.

    Raises
    ------
    CellmillError
        If the corpus has no training or held-out cells, or too few.
    """
    import sklearn.decomposition  # noqa: F401, before the limit, which holds for the libraries that are loaded
    from threadpoolctl import threadpool_limits

    rows = []
    with threadpool_limits(1):  # sums depend on the number of threads, to the bit
        asked = yardstick.questions(shards)
        fitted = fit(shards, asked)
        with Progress("yardstick of the baselines", total=len(fitted) * asked.n_cells) as progress:
            for number, (name, answer) in enumerate(fitted.items(), start=1):
                started = time.monotonic()
                values, reasons = yardstick.measure(answer, asked, _BATCH)
                seconds = time.monotonic() - started
                for seed in seeds:
                    rows += yardstick.yardstick_rows(
                        name, "baseline", seed, values, reasons, asked.n_cells, seconds, None, provenance
                    )
                progress.update(number * asked.n_cells, f"{name}: Pearson of hidden genes {values['pearson'] or 0:.3f}")
    return rows


def fit(shards: Shards, asked: Questions) -> dict[str, yardstick.Answer]:
    """The baselines by name, ready to answer."""
    x_MV = training_matrix(shards, asked)
    if min(x_MV.shape) < 2:
        raise CellmillError(
            f"{shards.folder} has too few training cells for the baselines of the yardstick; choose more cells"
        )
    means = asked.survey.mean_V, asked.survey.detection_V
    values, detection = Components(x_MV), Components(_detected(x_MV))
    pca_answer, (for_values, _) = tuned(lambda *chosen: pca(values, detection, *chosen), values.choices, asked)
    neighbours = Neighbours(x_MV, values, *for_values)
    knn_answer, _ = tuned(neighbours.guess, neighbours.choices, asked)
    return {
        "gene_means": lambda some: Imputed(*(mean_V[some.genes_BQ] for mean_V in means)),
        "gene_means_by_cell": on_own_line(lambda some: means),
        "pca_imputation": pca_answer,
        "knn_imputation": knn_answer,
    }


def training_matrix(shards: Shards, asked: Questions) -> sparse.csr_matrix:
    """float32 [M, V], log1p(CP10k) of training cells, at most as many as a survey reads, less the calibration's."""
    calibration = np.concatenate([group.cells.joinids for group in asked.calibration])
    parts = []
    for cells in spread_batches(shards, "train", _READ, yardstick.n_sampled(shards, "train")):
        parts.append(_matrix(cells.take(np.flatnonzero(~np.isin(cells.joinids, calibration))), shards.n_genes))
    return sparse.vstack(parts, format="csr")


def _matrix(cells: CellBatch, n_genes: int) -> sparse.csr_matrix:
    return sparse.csr_matrix((log1p_cp10k(cells), cells.genes, cells.offsets), shape=(len(cells), n_genes))


def _detected(x: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix((np.ones_like(x.data), x.indices, x.indptr), shape=x.shape)


def tuned(guess: Callable[..., Guess], choices: list, asked: Questions) -> tuple[yardstick.Answer, tuple]:
    """The best of a family of guesses, mixed with gene means and on each cell's own line.

    Parameters
    ----------
    guess
        Makes one from the choice for values and that for detection.
    choices
        What either may be; the smallest of equally good ones is taken.
    asked
        Correlation and AUROC on the cells of its calibration decide.

    Returns
    -------
    The answer of the best; the two choices.
    """
    tuning = Questions(asked.survey, asked.calibration, asked.calibration)
    answers = [on_own_line(mixed(guess(choice, choice), asked)) for choice in choices]
    found = [yardstick.measure(answer, tuning, _BATCH)[0] for answer in answers]
    best = tuple(choices[int(np.argmax([values[metric] or 0 for values in found]))] for metric in ("pearson", "auroc"))
    return on_own_line(mixed(guess(*best), asked)), best


def mixed(guess: Guess, asked: Questions) -> Guess:
    """`guess`, to whose values the genes' nonzero means are added, in the proportion that is best in least squares.

    Means over cells with zeros tell how often a gene is detected, too; what is asked is its value where it is.
    Differences within the calibration's cells decide.
    """
    mean_V = asked.survey.mean_V
    both_P2, truth_P = [], []
    for some in yardstick.batches(asked.calibration, _BATCH):
        hidden_BQ = some.truth_BQ > 0
        value_BQ = np.take_along_axis(guess(some)[0], some.genes_BQ, axis=1)
        of_hidden = (x[hidden_BQ].reshape(len(x), -1) for x in (value_BQ, mean_V[some.genes_BQ], some.truth_BQ))
        value_P, of_gene_P, own_P = ((x - x.mean(axis=1, keepdims=True)).ravel() for x in of_hidden)
        both_P2.append(np.stack([value_P, of_gene_P], axis=1))
        truth_P.append(own_P)
    weights = np.linalg.lstsq(np.concatenate(both_P2), np.concatenate(truth_P), rcond=None)[0].astype(np.float32)

    def mixture(some: Asked) -> tuple[np.ndarray, np.ndarray]:
        value_BV, detection_BV = guess(some)
        return weights[0] * value_BV + weights[1] * mean_V, detection_BV

    return mixture


def on_own_line(guess: Guess) -> yardstick.Answer:
    """`guess`, its values scaled and shifted for each cell: by least squares over the genes that the cell shows.

    This is how a baseline knows of a cell's depth, which decides how high log1p(CP10k) of a detected gene can be.
    """

    def answer(asked: Asked) -> Imputed:
        cells = asked.cells
        value, detection = (np.broadcast_to(x, (len(cells), x.shape[-1])) for x in guess(asked))
        guess_N, truth_N = value[cells.cell_of, cells.genes].astype(np.float64), log1p_cp10k(cells)

        def mean(x_N: np.ndarray) -> np.ndarray:
            return sum_within(cells.offsets, x_N, np.float64) / np.maximum(cells.lengths, 1)

        guess_B, truth_B = mean(guess_N), mean(truth_N)
        spread_B = mean(guess_N**2) - guess_B**2
        slope_B = np.divide(
            mean(guess_N * truth_N) - guess_B * truth_B, spread_B, out=np.zeros_like(spread_B), where=spread_B > 1e-12
        )
        value_BQ, detection_BQ = (np.take_along_axis(x, asked.genes_BQ, axis=1) for x in (value, detection))
        return Imputed(truth_B[:, None] + slope_B[:, None] * (value_BQ - guess_B[:, None]), detection_BQ)

    return answer


class Components:
    """Principal components of training cells, from which genes that are not visible are reconstructed.

    Parameters
    ----------
    x_MV
        Training cells.

    Attributes
    ----------
    choices : list of (int, float)
        Numbers of components, each with every ridge, to choose from.
    """

    def __init__(self, x_MV: sparse.csr_matrix):
        from sklearn.decomposition import PCA

        most = min(min(x_MV.shape) - 1, max(COMPONENTS))
        fitted = PCA(most, svd_solver="arpack", random_state=0).fit(x_MV)
        self.choices = list(product(sorted({min(n, most) for n in COMPONENTS}), RIDGES))
        self.components_VK = np.ascontiguousarray(fitted.components_.T, dtype=np.float32)
        self.mean_V = fitted.mean_.astype(np.float32)

    def scores(self, x_BV: sparse.csr_matrix, genes_BQ: np.ndarray, n: int, ridge: float) -> np.ndarray:
        """float32 [B, K], the scores on the first `n` components that fit all genes but `genes_BQ` best.

        These are what filling in the missing genes with their reconstruction, again and again, comes to: of ridge
        regression on the other genes, with orthonormal components W whose rows of the missing genes are W_Q, the normal
        matrix is I (1 + ridge) - W_Q' W_Q. The ridge draws cells that show little towards the mean cell.
        """
        components_VK = self.components_VK[:, :n]
        missing_BQK = components_VK[genes_BQ]
        normal_BKK = (1 + ridge) * np.eye(n, dtype=np.float32) - missing_BQK.transpose(0, 2, 1) @ missing_BQK
        right_BK = x_BV @ components_VK - self.mean_V @ components_VK
        right_BK += np.einsum("bqk,bq->bk", missing_BQK, self.mean_V[genes_BQ])
        return np.linalg.solve(normal_BKK, right_BK[:, :, None])[:, :, 0]

    def reconstruct(self, x_BV: sparse.csr_matrix, genes_BQ: np.ndarray, n: int, ridge: float) -> np.ndarray:
        """float32 [B, V], from `n` components."""
        return self.mean_V + self.scores(x_BV, genes_BQ, n, ridge) @ self.components_VK[:, :n].T


def pca(
    values: Components, detection: Components, for_values: tuple[int, float], for_detection: tuple[int, float]
) -> Guess:
    """PCA imputation: values from the components of log1p(CP10k), detection from those of what is detected."""

    def guess(asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        x_BV = _matrix(asked.cells, len(values.mean_V))
        return (
            values.reconstruct(x_BV, asked.genes_BQ, *for_values),
            detection.reconstruct(_detected(x_BV), asked.genes_BQ, *for_detection),
        )

    return guess


class Neighbours:
    """kNN imputation: the nearest training cells by the principal components of the visible genes.

    Parameters
    ----------
    x_MV
        Training cells.
    components
        Their principal components.
    n, ridge
        How many of them distances are measured in, and the ridge by which a cell's scores are found.

    Attributes
    ----------
    choices : list of int
        Numbers of neighbours to choose from.
    """

    def __init__(self, x_MV: sparse.csr_matrix, components: Components, n: int, ridge: float):
        self.x_MV, self.detected_MV, self.components, self.chosen = x_MV, _detected(x_MV), components, (n, ridge)
        self.scores_MK = components.scores(x_MV, np.zeros((x_MV.shape[0], 0), np.int64), n, ridge)
        self.rate_V = np.asarray(self.detected_MV.mean(axis=0), dtype=np.float32).ravel()
        self.choices = [k for k in NEIGHBOURS if k < x_MV.shape[0]] or [x_MV.shape[0] - 1]

    def guess(self, k_values: int, k_detection: int) -> Guess:
        """Values: the mean over the neighbours, zeros included; detection: the share of them that express the gene.

        The mean of all training cells counts as one neighbour more, so that no gene is unknown.
        """

        def guess(asked: Asked) -> tuple[np.ndarray, np.ndarray]:
            x_BV = _matrix(asked.cells, len(self.rate_V))
            scores_BK = self.components.scores(x_BV, asked.genes_BQ, *self.chosen)
            distance_BM = (self.scores_MK**2).sum(axis=1) - 2 * scores_BK @ self.scores_MK.T
            return (
                self._mean(distance_BM, k_values, self.x_MV, self.components.mean_V),
                self._mean(distance_BM, k_detection, self.detected_MV, self.rate_V),
            )

        return guess

    def _mean(self, distance_BM: np.ndarray, k: int, x_MV: sparse.csr_matrix, mean_V: np.ndarray) -> np.ndarray:
        nearest_BK = np.argpartition(distance_BM, k, axis=1)[:, :k]
        chosen = (np.ones(nearest_BK.size, np.float32), nearest_BK.ravel(), np.arange(0, nearest_BK.size + 1, k))
        chosen_BM = sparse.csr_matrix(chosen, shape=distance_BM.shape)
        return ((chosen_BM @ x_MV).toarray() + mean_V) / (k + 1)
