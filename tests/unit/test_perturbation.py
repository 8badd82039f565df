"""In-silico perturbation: against cells that are perturbed by hand, one at a time."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from cellmill.abilities.perturbation import centroid, perturb, summarise, write
from cellmill.errors import CellmillError
from cellmill.models.geneformer import CLS, EOS, Geneformer
from cellmill.models.packing import PACKED, Packing
from cellmill.models.scgpt import Scgpt
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import select
from model_cells import make_batch, real_statistics, statistics_of_medians
from scipy import stats
from shard_cells import real_cells

N_GENES = 1500
SIZES = {"n_layers": 2, "width": 16, "n_heads": 2, "hidden": 32}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def blood(data):
    cells = real_cells(data, "celltypist_sample")[0]
    return select(cells, cells.genes < N_GENES)


def built(version: str, max_length: int, n_genes: int, statistics) -> Geneformer:
    torch.manual_seed(0)
    model = Geneformer(Geneformer.Sizes(version=version, max_length=max_length, **SIZES), n_genes, statistics)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm.weight" in name else 0.0, std=0.3)
    return model.eval()


@pytest.fixture(scope="module", params=["V1", "V2"])
def model(request, blood):
    return built(request.param, 64, N_GENES, real_statistics(blood, N_GENES))


def ranked(model, cell: CellBatch) -> list[int]:
    """The genes of one cell by rank."""
    tokens = model.embed_inputs(cell)["tokens"]
    return (tokens[tokens >= model.n_specials] - model.n_specials).tolist()


def changed(genes: list[int], gene: int, kind: str, room: int) -> list[int]:
    """The perturbed list, as the paper words it."""
    rest, n = [g for g in genes if g != gene], len(genes)
    if kind == "delete":
        return rest
    if kind == "overexpress":
        return [gene, *rest[: room - 1]]
    quartile = 4 * genes.index(gene) // n + {"inhibit": 1, "activate": -1}[kind]
    place = 0 if quartile < 0 else n - 1 if quartile > 3 else int((quartile + 0.5) * n / 4)
    return [*rest[:place], gene, *rest[place:]]


def by_hand(model, genes: list[int], gene: int, kind: str, pooling: str, goal) -> tuple[float, float, float]:
    """The three shifts, from one forward pass a side."""
    v2 = model.sizes.version == "V2"
    states = []
    after = changed(genes, gene, kind, 62 if v2 else 64)
    common = [g for g in after if g != gene and g in genes]
    for some in (genes, after):
        tokens = [g + model.n_specials for g in some]
        tokens = [CLS, *tokens, EOS] if v2 else tokens
        with torch.no_grad():
            x_LD = model.encode(torch.tensor(tokens), PACKED.layout([len(tokens)]), model.depth(pooling)).double()
        x_GD = x_LD[[some.index(g) + v2 for g in common]]
        states.append((x_LD[0] if pooling.startswith("cls") else x_GD.mean(0), x_GD))
    (a_D, a_GD), (b_D, b_GD) = states
    cosine = F.cosine_similarity
    goal = torch.as_tensor(goal).double()
    towards = cosine(b_D, goal, dim=0) - cosine(a_D, goal, dim=0)
    return (1 - cosine(a_D, b_D, dim=0)).item(), (1 - cosine(a_GD, b_GD)).mean().item(), towards.item()


@pytest.mark.parametrize("kind", ["delete", "overexpress", "activate", "inhibit"])
def test_every_perturbation_is_the_one_made_by_hand(model, blood, kind):
    cells = blood.take([3, int(np.argmin(blood.lengths)), 11, int(np.argmax(blood.lengths))])
    assert cells.lengths.min() < 62 < 64 < cells.lengths.max()
    owns = [ranked(model, cells.take([row])) for row in (0, 3)]
    genes = np.array([own[rank] for own in owns for rank in (0, 9, len(own) * 2 // 3, len(own) - 1)])
    goal = centroid(model, blood.slice(100, 110))
    whole = {}
    for pooling in model.poolings:
        table = perturb(
            model, cells, kind, genes, pooling=pooling, goal=goal, tokens_per_batch=150, **QUIET
        ).to_pylist()
        assert {row["kind"] for row in table} == {kind}
        seen = [(row["joinid"], row["gene"]) for row in table]
        assert len(set(seen)) == len(seen)
        for row in table:
            cell = cells.take(np.flatnonzero(cells.joinids == row["joinid"]))
            own = ranked(model, cell)
            assert row["rank"] == (own.index(row["gene"]) if row["gene"] in own else None)
            assert row["n_genes"] == len(own)
            expected = by_hand(model, own, row["gene"], kind, pooling, goal)
            found = [row[name] for name in ("cell_shift", "gene_shift", "goal_shift")]
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-4)
            assert expected[0] > 1e-5 or row["rank"] in (0, len(own) - 1)
        whole[pooling] = len(table)
    pairs = sum(gene in ranked(model, cells.take([row])) for row in range(4) for gene in set(genes))
    assert set(whole.values()) == {4 * len(set(genes)) if kind == "overexpress" else pairs}
    assert pairs >= 8


def test_deletion_is_a_cell_without_the_gene(blood):
    """Where nothing is cut off, the embedding after is that of the cell whose count is zero."""
    model = built("V2", 400, N_GENES, real_statistics(blood, N_GENES))
    cell = blood.take([6])
    gene = ranked(model, cell)[10]
    without = select(cell, cell.genes != gene)
    row = perturb(model, cell, "delete", np.array([gene]), **QUIET).to_pylist()[0]
    with torch.no_grad():
        before, after = (model.embed_cells(model.embed_inputs(c), "cls_last")[0] for c in (cell, without))
    assert row["rank"] == 10
    assert row["cell_shift"] == pytest.approx(
        1 - F.cosine_similarity(before.double(), after.double(), dim=0).item(), rel=1e-3
    )


def test_all_genes_of_a_cell_by_default(model, blood):
    cells = blood.slice(0, 3)
    table = perturb(model, cells, "delete", **QUIET)
    for row in range(3):
        mine = table.filter(np.array(table["joinid"]) == cells.joinids[row]).sort_by("rank")
        assert mine["gene"].to_pylist() == ranked(model, cells.take([row]))
        assert mine["rank"].to_pylist() == list(range(len(mine)))
    assert not any(table["random"].to_pylist())
    assert set(table["goal_shift"].to_pylist()) == {None}


def test_neither_batches_nor_neighbours_matter(model, blood, monkeypatch):
    cells = blood.slice(20, 26)
    whole = perturb(model, cells, "inhibit", n_random=5, **QUIET)
    small = perturb(model, cells, "inhibit", n_random=5, tokens_per_batch=1, **QUIET)
    alone = perturb(model, cells.take([2]), "inhibit", n_random=5, **QUIET)
    mine = whole.filter(np.array(whole["joinid"]) == cells.joinids[2])
    pairs = [(whole, small), (mine, alone)]
    for packing in (Packing("padded"), Packing(grain=256)):
        monkeypatch.setattr(model, "packing", packing)
        pairs.append((whole, perturb(model, cells, "inhibit", n_random=5, **QUIET)))
    for a, b in pairs:
        for name in ("joinid", "gene", "rank", "random"):
            assert a[name].to_pylist() == b[name].to_pylist()
        for name in ("cell_shift", "gene_shift"):
            np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), atol=1e-6)
    assert not model.training


def test_cells_of_few_genes():
    v1, v2 = (built(version, 8, 5, statistics_of_medians([1.0] * 5)) for version in ("V1", "V2"))
    cells = make_batch([{}, {2: 1}, {1: 2, 3: 1}])
    for model in (v1, v2):
        table = perturb(model, cells, "delete", **QUIET).to_pylist()
        assert [(row["joinid"], row["gene"]) for row in table] == [(101, 2), (102, 1), (102, 3)]
        assert table[0]["gene_shift"] is None
        assert (table[0]["cell_shift"] is None) == (model is v1)
        assert all(row["gene_shift"] > 0 for row in table[1:])
        table = perturb(model, cells, "overexpress", np.array([2]), **QUIET).to_pylist()
        assert [row["rank"] for row in table] == [None, 0, None]
        assert table[2]["cell_shift"] > 0
        same = perturb(model, cells, "activate", np.array([2]), **QUIET).to_pylist()
        assert [row["cell_shift"] for row in same] == [None if model is v1 else pytest.approx(0, abs=1e-9)]


def test_random_genes_depend_on_cell_and_seed_alone(model, blood):
    cells = blood.slice(0, 10)
    one = perturb(model, cells, "delete", np.array([7]), n_random=4, seed=1, **QUIET)
    random = one.filter(one["random"])
    assert len(random) == 40
    assert set(np.unique(random["joinid"].to_numpy(), return_counts=True)[1]) == {4}
    other = perturb(model, cells, "overexpress", np.array([3]), n_random=4, seed=1, **QUIET)
    assert other.filter(other["random"]).select(["joinid", "gene"]).equals(random.select(["joinid", "gene"]))
    third = perturb(model, cells, "delete", np.array([7]), n_random=4, seed=2, **QUIET)
    assert not third.filter(third["random"]).select(["gene"]).equals(random.select(["gene"]))


def test_statistics_are_the_formulas(model, blood):
    cells = blood.slice(0, 40)
    genes, counts = np.unique(cells.genes, return_counts=True)
    asked = genes[np.argsort(-counts)[:6]]
    names = [f"G{gene}" for gene in range(N_GENES)]
    table = perturb(model, cells, "delete", asked, n_random=6, feature_ids=names, goal=np.ones(16), **QUIET)
    rows = table.to_pandas()
    for test in ("signed_rank", "rank_sum"):
        found = summarise(table, test=test).to_pandas()
        assert found["gene"].is_unique
        assert set(found["gene"]) == set(rows[rows["asked"]]["gene"]) <= set(asked)
        for row in found.itertuples():
            mine = rows[(rows["gene"] == row.gene) & rows["asked"]]
            assert row.feature_id == f"G{row.gene}"
            assert row.n_cells == len(mine)
            for shift in ("cell_shift", "gene_shift", "goal_shift"):
                assert getattr(row, shift) == pytest.approx(mine[shift].mean(), rel=1e-4, abs=1e-9)
            if test == "rank_sum":
                background = rows[rows["random"] & (rows["gene"] != row.gene)]["cell_shift"]
                p, difference = stats.ranksums(mine["cell_shift"], background).pvalue, mine["cell_shift"].mean()
                difference -= background.mean()
            else:
                differences = []
                for one in mine.itertuples():
                    near = (rows["joinid"] == one.joinid) & rows["random"] & (rows["gene"] != row.gene)
                    differences.append(one.cell_shift - rows[near]["cell_shift"].astype(float).mean())
                p, difference = stats.wilcoxon(differences).pvalue, np.mean(differences)
            assert row.p_value == pytest.approx(p, rel=1e-6)
            assert row.difference == pytest.approx(difference, rel=1e-3, abs=1e-8)
        np.testing.assert_allclose(found["q_value"], stats.false_discovery_control(found["p_value"]))
        assert np.all(np.diff(found["difference"].abs()) <= 0)


def test_a_gene_that_matters_is_found(blood):
    """A gene whose token is made loud shifts its cells more than random genes do."""
    model = built("V1", 64, N_GENES, real_statistics(blood, N_GENES))
    seen, counts = np.unique(
        np.concatenate([ranked(model, blood.take([row])) for row in range(40)]), return_counts=True
    )
    genes = seen[np.argsort(-counts)[:8]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
        model.embedding_norm.weight.fill_(1)
        model.layers[0].attention_norm.weight.fill_(1)
        qkv = model.layers[0].attention.qkv
        loud = model.embedding_norm(model.word_embeddings.weight[genes[0] + 2])
        qkv.weight[16:32] = 0
        qkv.weight[16] = 3 * loud  # its key is heard by all
        qkv.bias[:16] = 3.0
    table = perturb(model, blood.slice(0, 40), "delete", genes, n_random=10, **QUIET)
    found = summarise(table).to_pylist()
    assert found[0]["gene"] == genes[0]
    assert found[0]["difference"] > 0
    assert found[0]["q_value"] < 0.01


def test_tables_are_written(model, blood, tmp_path):
    table = perturb(model, blood.slice(0, 4), "delete", n_random=3, **QUIET)
    write(tmp_path / "p.parquet", table)
    write(tmp_path / "s.parquet", summarise(table))
    assert pq.read_table(tmp_path / "p.parquet").equals(table)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.parquet", "s.parquet"]


def test_what_cannot_be_done_is_said(model, blood):
    cells = blood.slice(0, 2)
    for message, call in (
        ("no perturbation 'remove'; take one of delete", lambda: perturb(model, cells, "remove")),
        ("ids from 0 to 1499", lambda: perturb(model, cells, "delete", np.array([1500]))),
        ("no pooling 'max'", lambda: perturb(model, cells, "delete", pooling="max")),
        (r"the goal has shape \(3,\), not \(16,\)", lambda: perturb(model, cells, "delete", goal=np.ones(3))),
        ("no cell has a gene", lambda: perturb(model, make_batch([{}]), "delete")),
        ("no cells in the goal state", lambda: centroid(model, blood.slice(0, 0))),
        ("no random genes to compare", lambda: summarise(perturb(model, cells, "delete", **QUIET))),
        ("test is one of signed_rank", lambda: summarise(None, test="t")),
    ):
        with pytest.raises(CellmillError, match=message):
            call()
    other = Scgpt(Scgpt.presets["demo"], 5)
    with pytest.raises(CellmillError, match="a Scgpt has no ranks.*; give a Geneformer"):
        perturb(other, cells, "delete")
