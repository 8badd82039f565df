"""The common yardstick: what is hidden, what is measured, and that the baselines are careful ones."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cellmill import yardstick
from cellmill.checkpoints import build_model
from cellmill.errors import CellmillError
from cellmill.gene_map import GeneMap
from cellmill.models.base import CellModel, Imputed
from cellmill.recipes import ModelRecipe
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import compute_statistics
from cellmill.views.ragged import log1p_cp10k
from cellmill.yardstick import METRICS, Questions, answers_of, ask, measure, questions, score_yardstick
from cellmill.yardstick_baselines import Components, fit, on_own_line, score_baselines, training_matrix
from shard_cells import real_cells, write_shards
from small_runs import META, N_GENES, few_genes, make_corpus, make_shards, train

PROVENANCE = {"run": "test", "code_version": "c0de", "commit": "abc", "config_hash": "c0ff"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory, data) -> Shards:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "shards", data)


@pytest.fixture(scope="module")
def asked(shards) -> Questions:
    return questions(shards)


@pytest.fixture(scope="module")
def baselines(shards, asked) -> dict:
    return fit(shards, asked)


def blood(data) -> tuple[CellBatch, np.ndarray]:
    """Real cells of three data sets, which measure each second, third or eleventh gene, and those genes."""
    cells, _ = real_cells(data, "celltypist_sample")
    cells = cells.slice(0, 60)
    n_genes = int(cells.genes.max()) + 1
    dataset_B = np.arange(60) % 3
    measured_DV = np.arange(n_genes) % np.array([[2], [3], [11]]) == 0
    kept_N = measured_DV[dataset_B[cells.cell_of], cells.genes]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cells.cell_of[kept_N], minlength=60))])
    codes = {"dataset_id": dataset_B.astype(np.int32)}
    few = CellBatch(cells.joinids, offsets, cells.genes[kept_N], cells.counts[kept_N], cells.totals, codes)
    return few, measured_DV


def dense(cells: CellBatch, n_genes: int) -> np.ndarray:
    x_BV = np.zeros((len(cells), n_genes))
    x_BV[cells.cell_of, cells.genes] = cells.counts
    return x_BV


def by_joinid(groups) -> dict[int, tuple]:
    """What each cell is asked: visible genes and counts, asked genes, truth."""
    return {
        int(group.cells.joinids[b]): (*_visible(group.cells, b), group.genes_BQ[b].tolist(), group.truth_BQ[b].tolist())
        for group in groups
        for b in range(len(group.cells))
    }


def _visible(cells: CellBatch, b: int) -> tuple[list, list]:
    mine = slice(cells.offsets[b], cells.offsets[b + 1])
    return cells.genes[mine].tolist(), cells.counts[mine].tolist()


def test_hidden_genes_are_true_and_zeros_are_measured(data):
    cells, measured_DV = blood(data)
    x_BV = dense(cells, measured_DV.shape[1])
    groups = ask(cells, measured_DV)
    n_asked = 0
    for group in groups:
        n_hidden = group.genes_BQ.shape[1] // 2
        rows = np.searchsorted(cells.joinids, group.cells.joinids)
        x_BQ = np.take_along_axis(x_BV[rows], group.genes_BQ, axis=1)
        truth_BQ = np.log1p(x_BQ / cells.totals[rows, None] * 1e4)
        np.testing.assert_allclose(group.truth_BQ, truth_BQ, rtol=1e-5)
        assert ((group.truth_BQ > 0).sum(axis=1) == n_hidden).all()
        zero_BQ = group.truth_BQ == 0
        assert (measured_DV[rows % 3][np.arange(len(rows))[:, None], group.genes_BQ] | ~zero_BQ).all()
        assert (np.diff(group.genes_BQ, axis=1) > 0).all(), "the order of the genes says nothing"
        visible_BV = dense(group.cells, x_BV.shape[1])
        assert not np.take_along_axis(visible_BV, group.genes_BQ, axis=1).any()
        np.put_along_axis(visible_BV, group.genes_BQ, x_BQ, axis=1)
        np.testing.assert_array_equal(visible_BV, x_BV[rows], err_msg="what is not hidden is visible")
        np.testing.assert_array_equal(group.cells.totals, cells.totals[rows])
        assert group.cells.codes == {}, "no metadata is given away"
        np.testing.assert_array_equal(np.minimum(0.15 * cells.lengths[rows], 256) // 16 * 16, n_hidden)
        n_asked += len(rows)
    assert n_asked == (0.15 * cells.lengths >= 16).sum()
    assert 10 < n_asked < 60, "some cells are too shallow"
    assert len(groups) > 2


def test_what_is_asked_does_not_depend_on_the_batch(data):
    cells, measured_DV = blood(data)
    together = by_joinid(ask(cells, measured_DV))
    reverse = by_joinid(ask(cells.take(np.arange(60)[::-1]), measured_DV))
    alone = by_joinid([group for b in range(60) for group in ask(cells.take([b]), measured_DV)])
    assert together == reverse == alone
    other = by_joinid(ask(cells, measured_DV, seed=1))
    assert other.keys() == together.keys()
    assert all(other[joinid][2] != together[joinid][2] for joinid in other)


def test_no_more_is_hidden_than_there_are_zeros(data):
    cells, measured_DV = blood(data)
    deep = int(cells.lengths.argmax())
    cell, measured_V = cells.take([deep]), np.zeros(measured_DV.shape[1], bool)
    measured_V[cell.genes] = True
    assert ask(cell, np.stack([measured_V] * 3)) == []
    zeros = np.flatnonzero(~measured_V)[:20]
    measured_V[zeros] = True
    (group,) = ask(cell, np.stack([measured_V] * 3))
    assert group.genes_BQ.shape == (1, 32)
    assert set(group.genes_BQ[group.truth_BQ == 0]) <= set(zeros)


def test_every_gene_is_hidden_as_often(data):
    """The chosen genes are a fair sample: over many seeds, each gene of a cell is hidden at the same rate."""
    cells, measured_DV = blood(data)
    cell = cells.take([int(cells.lengths.argmax())])
    times_V = np.zeros(measured_DV.shape[1])
    for seed in range(400):
        (group,) = ask(cell, measured_DV, seed)
        times_V[group.genes_BQ] += 1
    hidden = times_V[cell.genes]
    rate = group.genes_BQ.shape[1] / 2 / len(cell.genes)
    assert abs(hidden.mean() / 400 - rate) < 1e-9
    assert hidden.var() / (400 * rate * (1 - rate)) == pytest.approx(1, abs=0.3)


def test_survey_is_of_training_cells(shards, asked, data):
    cells, _ = real_cells(data, "baron_h1")
    cells = few_genes(cells)
    trained, held_out = (dense(cells.take(rows), N_GENES) for rows in (np.arange(300), np.arange(1000, 1060)))
    logged = np.log1p(trained / cells.totals[:300, None] * 1e4)
    nonzero_V = (trained > 0).sum(axis=0)
    expressed = nonzero_V > 0
    survey = asked.survey
    np.testing.assert_allclose(survey.mean_V[expressed], logged.sum(0)[expressed] / nonzero_V[expressed], rtol=1e-4)
    np.testing.assert_allclose(survey.mean_V[~expressed], logged[logged > 0].mean(), rtol=1e-4)
    np.testing.assert_allclose(survey.detection_V, nonzero_V / 300, rtol=1e-5)
    np.testing.assert_array_equal(survey.measured_DV, (nonzero_V + (held_out > 0).sum(axis=0) > 0)[None])
    assert survey.datasets == ["baron_h1"]
    assert asked.n_cells > 50
    calibration = np.concatenate([group.cells.joinids for group in asked.calibration])
    assert set(calibration) < set(range(300))
    assert 14 <= len(calibration) <= 19


def test_oracle_is_perfect_in_any_unit(asked):
    values, reasons = measure(lambda some: Imputed(some.truth_BQ, some.truth_BQ), asked, 16)
    assert values == pytest.approx(
        {"pearson": 1, "mse": 0, "mse_uncalibrated": 0, "pearson_residual": 1, "auroc": 1}, abs=1e-6
    )
    assert reasons == {}
    unit = lambda some: Imputed(3 * some.truth_BQ + 7, np.exp(some.truth_BQ))  # noqa: E731
    values, _ = measure(unit, asked, 16)
    assert values["mse_uncalibrated"] > 50
    assert (values["pearson"], values["auroc"]) == pytest.approx((1, 1))
    assert values["mse"] == pytest.approx(0, abs=1e-9)


def test_shuffled_oracle_is_chance(asked):
    rng = np.random.default_rng(0)

    def shuffled(some):
        return Imputed(*(rng.permuted(some.truth_BQ, axis=1) for _ in range(2)))

    values, _ = measure(shuffled, asked, 16)
    assert abs(values["pearson"]) < 0.08
    assert values["auroc"] == pytest.approx(0.5, abs=0.03)
    # cells differ in depth, and with it their truth and its permutation: that is all a permutation knows
    truths = [group.truth_BQ[group.truth_BQ > 0] for group in asked.held_out]
    assert values["mse"] > 0.8 * np.concatenate(truths).var()


def test_constant_has_no_correlation(asked):
    truth_P = np.concatenate([group.truth_BQ[group.truth_BQ > 0] for group in asked.calibration])
    values, reasons = measure(lambda some: Imputed(*[np.full(some.genes_BQ.shape, 4.2)] * 2), asked, 16)
    assert values["pearson"] is values["pearson_residual"] is None
    assert reasons.keys() == {"pearson", "pearson_residual"}
    assert values["auroc"] == 0.5
    means = [((group.truth_BQ - truth_P.mean()) ** 2 * (group.truth_BQ > 0)).sum(1) for group in asked.held_out]
    sizes = [(group.truth_BQ > 0).sum(1) for group in asked.held_out]
    assert values["mse"] == pytest.approx((np.concatenate(means) / np.concatenate(sizes)).mean(), rel=1e-5)


def test_residual_is_what_the_gene_mean_does_not_know(asked):
    mean_V = asked.survey.mean_V
    detection = asked.survey.detection_V

    def answer(weight):
        return lambda some: Imputed(
            2 * mean_V[some.genes_BQ] + weight * (some.truth_BQ - mean_V[some.genes_BQ]), detection[some.genes_BQ]
        )

    residual = {weight: measure(answer(weight), asked, 16)[0]["pearson_residual"] for weight in (0, 1e-3, 1)}
    assert residual[0] is None
    assert residual[1e-3] == pytest.approx(1, abs=1e-3)
    assert residual[1] == pytest.approx(1, abs=1e-6)


def test_metrics_are_those_of_scipy_and_sklearn():
    from scipy.stats import pearsonr
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 70, 40))
    np.testing.assert_allclose(yardstick.pearson(a, b), [pearsonr(*rows)[0] for rows in zip(a, b, strict=True)])
    a, b = rng.integers(0, 9, (2, 70, 40))
    truth = np.repeat([1, 0], 40)
    expected = [roc_auc_score(truth, np.concatenate(rows)) for rows in zip(a, b, strict=True)]
    np.testing.assert_allclose(yardstick.auroc(a, b), expected)


def test_residual_is_the_partial_correlation():
    rng = np.random.default_rng(0)
    genes, mean_V = rng.integers(0, 30, 500), rng.normal(size=30).astype(np.float32)
    truth, value = rng.normal(size=(2, 500)) + mean_V[genes]
    value += 0.3 * truth
    r = np.corrcoef([truth, value, mean_V[genes]])
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert yardstick.residual_pearson(genes, truth, value, mean_V) == pytest.approx(expected, abs=1e-6)


@dataclass(frozen=True)
class Sizes:
    """No sizes."""


class Neighbourly(CellModel):
    """A stand-in that answers with the number of visible genes near the one that is asked."""

    def __init__(self, n_genes: int, answer=lambda near_BQ: near_BQ):
        super().__init__(Sizes(), n_genes)
        self.answer = answer

    def impute_inputs(self, cells, genes_BQ):
        assert not self.training
        x_BV = torch.zeros(len(cells), self.n_genes)
        x_BV[torch.from_numpy(cells.cell_of), torch.from_numpy(cells.genes.astype(np.int64))] = 1
        return {"near": x_BV.cumsum(1), "genes": torch.from_numpy(genes_BQ)}

    def impute(self, inputs):
        high, low = (inputs["genes"] + 50).clamp(max=self.n_genes - 1), (inputs["genes"] - 50).clamp(min=0)
        near_BQ = inputs["near"].gather(1, high) - inputs["near"].gather(1, low)
        return Imputed(self.answer(near_BQ), near_BQ)


def test_a_model_is_asked_whatever_the_batches(asked):
    model = Neighbourly(N_GENES).train()
    one, other = (measure(answers_of(model), asked, size)[0] for size in (3, 64))
    assert one == pytest.approx(other, rel=1e-9)
    assert one["auroc"] > 0.5, "expressed genes stand together on the list"


def test_a_model_of_another_vocabulary_is_asked_through_its_genes(shards, asked):
    """The same network with its genes in another order, and without some of them."""
    ids, names = META["feature_ids"], [f"SYMBOL{gene}" for gene in range(N_GENES)]
    model = build_model(ModelRecipe(architecture="exceiver"), N_GENES, compute_statistics(shards), seed=0)
    group = asked.held_out[0]
    plain = answers_of(model)(group)
    same = answers_of(model, GeneMap(ids, names, ids))(group)
    torch.testing.assert_close(same.values_BQ, plain.values_BQ, rtol=0, atol=0)

    order = torch.from_numpy(np.random.default_rng(0).permutation(N_GENES))
    for rows in (model.gene_embedding.weight.data, model.mean, model.std):
        rows[:N_GENES] = rows[:N_GENES][order].clone()
    model._of_views = None
    shuffled = answers_of(model, GeneMap(ids, names, [names[gene] for gene in order]))(group)
    torch.testing.assert_close(shuffled.values_BQ, plain.values_BQ, rtol=1e-4, atol=1e-4)

    few = answers_of(model, GeneMap(ids, names, [ids[gene] if gene % 2 else "other" for gene in order.tolist()]))(group)
    known_BQ = torch.from_numpy(group.genes_BQ % 2 == 1)
    for answer_BQ, known_B, row in zip(few.values_BQ, known_BQ, range(len(known_BQ)), strict=True):
        assert answer_BQ[known_B].std() > 0, row
        torch.testing.assert_close(
            answer_BQ[~known_B], answer_BQ[known_B].mean().expand(int((~known_B).sum())), rtol=1e-4, atol=1e-5
        )


def test_no_more_cells_at_once_than_a_model_can(asked):
    taken = []

    class Large(Neighbourly):
        impute_cells = 5

        def impute_inputs(self, cells, genes_BQ):
            taken.append(len(cells))
            return super().impute_inputs(cells, genes_BQ)

    few, many = (measure(answers_of(kind(N_GENES)), asked, 16) for kind in (Large, Neighbourly))
    assert few[0] == pytest.approx(many[0], rel=1e-12)
    assert max(taken) == 5
    assert sum(taken) == asked.n_cells + sum(len(part.cells) for part in asked.calibration)


def test_answers_that_are_none(asked):
    values, reasons = measure(answers_of(CellModel(Sizes(), N_GENES)), asked, 16)
    assert set(values.values()) == {None}
    assert set(reasons.values()) == {"the architecture does not define impute"}
    diverged = Neighbourly(N_GENES, lambda near_BQ: near_BQ / near_BQ.clamp(max=0))
    values, reasons = measure(answers_of(diverged), asked, 16)
    assert set(values.values()) == {None}
    assert "not a finite number" in reasons["mse"]
    with pytest.raises(CellmillError, match="impute must return one for each cell and gene"):
        measure(answers_of(Neighbourly(N_GENES, lambda near_BQ: near_BQ[:, :-1])), asked, 16)


def test_rows_of_a_model(shards, tmp_path):
    for seed in (0, 1):
        train(shards, "geneformer", tmp_path / f"seed{seed}", tmp_path / f"state{seed}", seed=seed)
    folders = [tmp_path / f"seed{seed}" for seed in (0, 1)]
    rows = score_yardstick("g", folders, shards, compute_statistics(shards), 32, PROVENANCE)
    assert len(rows) == 2 * 2 * len(METRICS)
    assert {(row["model"], row["kind"]) for row in rows} == {("g", "model"), ("g.untrained", "untrained")}
    assert {(row["task"], row["dataset"], row["split"], row["regime"], row["seen"]) for row in rows} == {
        ("yardstick", "corpus", "validation", "none", "no")
    }
    assert all(np.isfinite(row["value"]) for row in rows)
    assert all((row["checkpoint"] is None) == (row["kind"] == "untrained") for row in rows)
    again = score_yardstick("g", folders, shards, compute_statistics(shards), 7, PROVENANCE)
    np.testing.assert_allclose([row["value"] for row in rows], [row["value"] for row in again], atol=1e-4)
    detected = {(row["kind"], row["seed"]): row["value"] for row in rows if row["metric"] == "auroc"}
    assert len(set(detected.values())) == 4, "seeds and twins are networks of their own"


def test_bad_corpora_are_one_sentence(tmp_path, data):
    cells, obs = real_cells(data, "baron_h1")
    cells = few_genes(cells)
    rows = np.arange(40)
    none = Shards(
        write_shards(tmp_path / "a", {"train": (cells.take(rows), obs.take(rows))}, n_genes=N_GENES, cells_per_shard=50)
    )
    with pytest.raises(CellmillError, match="hold no cells of the split 'validation'; set corpus.splits"):
        questions(none)
    shallow = np.flatnonzero(cells.lengths < 100)[:20]
    splits = {split: (cells.take(some), obs.take(some)) for split, some in (("train", rows), ("validation", shallow))}
    few = Shards(write_shards(tmp_path / "b", splits, n_genes=N_GENES, cells_per_shard=50))
    with pytest.raises(CellmillError, match=r"no cell of the split 'validation' of .*fewer than 107 expressed"):
        questions(few)


def test_baselines_are_in_the_order_of_what_they_know(tmp_path, data):
    rows = np.random.default_rng(0).permutation(1900)
    mixed = make_shards(
        tmp_path / "shards", data, {"train": rows[:1200], "validation": rows[1200:]}, cells_per_shard=500
    )
    asked = questions(mixed)
    found = {name: measure(answer, asked, 64)[0] for name, answer in fit(mixed, asked).items()}
    means, by_cell = found["gene_means"], found["gene_means_by_cell"]
    assert means["pearson_residual"] is None
    assert by_cell["pearson"] == pytest.approx(means["pearson"], rel=1e-6), "a line changes no order within a cell"
    assert by_cell["mse"] < means["mse"]
    assert by_cell["auroc"] == means["auroc"]
    for name in ("pca_imputation", "knn_imputation"):
        assert found[name]["pearson"] > means["pearson"]
        assert found[name]["mse"] < by_cell["mse"]
        assert found[name]["pearson_residual"] > by_cell["pearson_residual"]
        assert found[name]["auroc"] > means["auroc"]


def test_rows_of_the_baselines(shards):
    rows = score_baselines(shards, [3, 5], PROVENANCE)
    assert len(rows) == 4 * 2 * len(METRICS)
    assert {(row["kind"], row["checkpoint"], row["seed"]) for row in rows} == {
        ("baseline", None, 3),
        ("baseline", None, 5),
    }
    again = score_baselines(shards, [3, 5], PROVENANCE)
    assert [row["value"] for row in rows] == [row["value"] for row in again]


def test_baselines_never_learn_from_the_cells_they_are_tuned_on(shards, asked):
    calibration = sum(len(group.cells) for group in asked.calibration)
    x_MV = training_matrix(shards, asked)
    assert x_MV.shape == (300 - calibration, N_GENES)


def test_a_hidden_count_changes_no_answer(asked, baselines):
    """What a baseline answers depends on what is visible alone."""
    group = asked.held_out[-1]
    told = dataclasses.replace(group.cells, joinids=group.cells.joinids + 10**6)
    for answer in baselines.values():
        for one, other in zip(answer(group), answer(group._replace(cells=told, truth_BQ=None)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_scores_are_what_filling_in_converges_to(shards, asked):
    x_MV = training_matrix(shards, asked)
    components = Components(x_MV)
    group = asked.held_out[-1]
    x_BV = np.zeros((len(group.cells), N_GENES), np.float32)
    x_BV[group.cells.cell_of, group.cells.genes] = log1p_cp10k(group.cells)
    from scipy.sparse import csr_matrix

    closed_BV = components.reconstruct(csr_matrix(x_BV), group.genes_BQ, 10, 1e-6)
    filled_BV = x_BV.copy()
    none_missing = np.zeros((len(filled_BV), 0), np.int64)
    for _ in range(100):
        again_BV = components.reconstruct(csr_matrix(filled_BV), none_missing, 10, 1e-6)
        missing_BQ = np.take_along_axis(again_BV, group.genes_BQ, axis=1)
        np.put_along_axis(filled_BV, group.genes_BQ, missing_BQ, axis=1)
    np.testing.assert_allclose(
        *(np.take_along_axis(x, group.genes_BQ, axis=1) for x in (closed_BV, filled_BV)), atol=0.01
    )


def test_on_own_line_finds_each_cells_line(asked):
    group = asked.held_out[-1]
    slope_B1, shift_B1 = np.random.default_rng(0).uniform(0.5, 2, (2, len(group.cells), 1))
    truth_BV = np.random.default_rng(1).uniform(0, 5, (len(group.cells), N_GENES))
    truth_BV[group.cells.cell_of, group.cells.genes] = log1p_cp10k(group.cells)
    answer = on_own_line(lambda some: ((truth_BV - shift_B1) / slope_B1, truth_BV))
    expected_BQ = np.take_along_axis(truth_BV, group.genes_BQ, axis=1)
    np.testing.assert_allclose(answer(group).values_BQ, expected_BQ, atol=1e-5)
