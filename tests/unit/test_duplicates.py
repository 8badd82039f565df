"""Copies within a corpus and between a corpus and the benchmarks, of real cells."""

import json
import re
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill import duplicates
from cellmill.duplicates import COMPARED, DUPLICATES_SCHEMA, LEAKS_SCHEMA, audit_leaks, find_duplicates
from cellmill.errors import CellmillError
from cellmill.fingerprints import GROUPS, PRINTS_SCHEMA, choose_groups
from print_cells import RealCells, genes_that_differ, prints_of, real_cells, same_barcode


@pytest.fixture(scope="module")
def cells(data) -> RealCells:
    return real_cells(data)


@pytest.fixture(scope="module")
def table(cells) -> pa.Table:
    """The fingerprints of all cells; a cell's joinid is its row."""
    prints = prints_of(cells.counts, cells.group_V, cells.dataset, cells.measured)
    return prints_table(np.arange(len(prints)), cells.dataset, cells.name, prints)


def prints_table(joinids, dataset, name, prints) -> pa.Table:
    names = [pa.array(dataset).dictionary_encode(), pa.array(name, pa.string())]
    return pa.table([joinids, *names, *prints.T], schema=PRINTS_SCHEMA)


def write(folder: Path, *parts: pa.Table) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number}.prints.parquet" for number in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        pq.write_table(part, path)
    return paths


def prints(table: pa.Table) -> np.ndarray:
    return np.stack([table[f"p{group}"].to_numpy() for group in range(GROUPS)], axis=1)


def changed(table: pa.Table, **columns) -> pa.Table:
    """`table` with other joinids, data sets or fingerprints."""
    given = {
        "joinids": table["soma_joinid"].to_numpy(),
        "dataset": table["dataset_id"].to_pylist(),
        "name": table["observation_joinid"].to_pylist(),
        "prints": prints(table),
    }
    return prints_table(**given | columns)


def pairs(path: Path) -> set[tuple[int, int]]:
    """(copy, kept) of a table of duplicates."""
    table = pq.read_table(path)
    return set(zip(table["soma_joinid"].to_pylist(), table["kept_joinid"].to_pylist(), strict=True))


def test_the_copies_of_two_real_studies_and_no_other_cell(cells, table, tmp_path):
    """Of all 21,918 cells of 16 files exactly those that agree in all but three or fewer of the genes of both."""
    copies = {(b, a) for a, b in same_barcode(cells) if genes_that_differ(cells, a, b) <= 3}
    out = tmp_path / "duplicates.parquet"
    assert find_duplicates(write(tmp_path / "p", table), out=out) == len(copies) == 177
    found = pq.read_table(out)
    assert pairs(out) == copies
    assert set(found["dataset_id"].to_pylist()) == {"scminer_pbmc14k_recovered"}
    assert set(found["kept_dataset_id"].to_pylist()) == {"fasttopics_pbmc_facs"}  # the smaller name
    assert found.schema.equals(DUPLICATES_SCHEMA)
    assert set(np.unique(found["groups_compared"])) <= set(range(2, GROUPS + 1))
    compared = json.loads(found.schema.metadata[COMPARED])
    shallow = int(((prints(table) > 0).sum(axis=1) < 2).sum())
    assert compared == {"cells": 21_918, "not_comparable": shallow, "share": shallow / 21_918}
    assert 0 < shallow < 100


def test_blocks_their_order_and_memory_change_no_byte(table, tmp_path, monkeypatch):
    one, many = tmp_path / "one.parquet", tmp_path / "many.parquet"
    find_duplicates(write(tmp_path / "one", table), out=one)
    shuffled = table.take(np.random.default_rng(0).permutation(len(table)))
    blocks = [shuffled.slice(start, 3000) for start in range(0, len(shuffled), 3000)]
    monkeypatch.setattr(duplicates, "AT_A_TIME", {"values": 4000, "cells": 100})
    monkeypatch.setattr(duplicates, "BATCH", 700)
    find_duplicates(write(tmp_path / "many", *blocks, table.slice(0, 0)), out=many)
    assert pq.read_table(one).equals(pq.read_table(many))
    assert len(pq.read_table(one)) == 177


def test_copies_within_a_data_set_and_clusters_keep_the_smallest(table, tmp_path):
    rows = table.slice(1482, 40)  # of the pancreas
    again = [changed(rows, joinids=np.arange(40) + first) for first in (50_000, 60_000, 70_000)]
    elsewhere = changed(rows, joinids=np.arange(40) + 90_000, dataset=["another"] * 40)
    out = tmp_path / "duplicates.parquet"
    assert find_duplicates(write(tmp_path / "p", *again, elsewhere, table.slice(0, 3000)), out=out) == 160
    found = pq.read_table(out)
    assert pairs(out) == {
        (first + row, 90_000 + row) for first in (1482, 50_000, 60_000, 70_000) for row in range(40)
    }  # "another" < "baron_h1"
    order = list(zip(found["dataset_id"].to_pylist(), found["soma_joinid"].to_pylist(), strict=True))
    assert order == sorted(order)
    assert found["groups_equal"].equals(found["groups_compared"])


def test_copies_of_a_copy_are_joined(table, tmp_path):
    """A cell of all groups joins two that have no group in common."""
    rows = table.slice(1482, 20)
    left, right = prints(rows), prints(rows)
    left[:, GROUPS // 2 :] = 0
    right[:, : GROUPS // 2] = 0
    parts = [
        rows,
        changed(rows, joinids=np.arange(20), prints=left),
        changed(rows, joinids=np.arange(20) + 100, prints=right),
    ]
    out = tmp_path / "duplicates.parquet"
    assert find_duplicates(write(tmp_path / "p", *parts), out=out) == 40
    assert pairs(out) == {(copy + row, row) for row in range(20) for copy in (100, 1482)}
    compared = dict(
        zip(*(pq.read_table(out)[name].to_pylist() for name in ("soma_joinid", "groups_compared")), strict=True)
    )
    assert compared[100] == 0
    assert compared[1482] == 4
    assert find_duplicates(write(tmp_path / "q", *parts[1:]), out=out) == 0


def test_agreement_in_part(table, tmp_path):
    """Three quarters of the groups that both have, and at least two."""
    rows = table.slice(19_700, 1)  # a deep cell, with a print in every group
    out = tmp_path / "duplicates.parquet"

    def found(differ: int, missing: int) -> int:
        theirs = prints(rows)
        theirs[:, :differ] += np.uint64(1)
        theirs[:, GROUPS - missing :] = 0
        return find_duplicates(write(tmp_path / "p", rows, changed(rows, joinids=[1], prints=theirs)), out=out)

    assert [found(differ, 0) for differ in range(5)] == [1, 1, 1, 0, 0]
    assert [found(0, missing) for missing in (5, 6, 7)] == [1, 1, 0]
    assert [found(1, 4), found(2, 4), found(1, 5)] == [1, 0, 0]


def test_a_fingerprint_that_very_many_cells_share(table, tmp_path):
    """Cells of one profile in one group only are no copies; copies among them are found nonetheless."""
    rows = table.slice(1482, 1500)
    shared = prints(rows)
    shared[:, 0] = 12_345
    rows = changed(rows, prints=shared)
    theirs = prints(rows).copy()
    theirs[:, 3] += np.uint64(1)  # differ in a group, so that they do not stand side by side in every order
    copies = changed(rows, joinids=np.arange(1500) + 50_000, prints=theirs).slice(0, 200)
    out = tmp_path / "duplicates.parquet"
    assert find_duplicates(write(tmp_path / "p", rows, copies), out=out) == 200
    assert pairs(out) == {(50_000 + row, 1482 + row) for row in range(200)}


def test_no_cell_and_no_copy(table, tmp_path):
    out = tmp_path / "duplicates.parquet"
    assert find_duplicates(write(tmp_path / "p", table.slice(0, 0)), out=out) == 0
    assert pq.read_schema(out).equals(DUPLICATES_SCHEMA)
    assert find_duplicates(write(tmp_path / "p", table.slice(0, 100)), out=out) == 0


def test_damaged_fingerprints_are_said(table, tmp_path):
    paths = write(tmp_path / "p", table.slice(0, 1000), table.slice(1000, 10).drop_columns(["p7"]))
    with pytest.raises(CellmillError, match=r"1\.prints\.parquet have other columns .* delete the file and run again"):
        find_duplicates(paths, out=tmp_path / "d.parquet")
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[:-50])
    with pytest.raises(CellmillError, match=r"0\.prints\.parquet cannot be read as parquet"):
        find_duplicates(paths[:1], out=tmp_path / "d.parquet")
    with pytest.raises(CellmillError, match=r"none\.parquet cannot be read"):
        audit_leaks({"corpus": [tmp_path / "none.parquet"]}, {}, action="drop", out=tmp_path / "l.parquet")
    assert not (tmp_path / "d.parquet").exists()


def test_a_full_disk_and_a_killed_job_leave_nothing(table, tmp_path):
    out, paths = tmp_path / "d.parquet", write(tmp_path / "p", table)
    left = tmp_path / "d.parquet.tmp.d"
    left.mkdir()
    (left / "dealt-0").write_bytes(b"of a killed job")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk: writing fails in the middle
    try:
        with pytest.raises(CellmillError, match=r"d\.parquet.* could not be written .*run the same command again"):
            find_duplicates(paths, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]
    assert find_duplicates(paths, out=out) == 177
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.parquet", "p"]


def planted(cells: RealCells, *, half: bool) -> tuple[pa.Table, pa.Table]:
    """Fingerprints of a corpus with 20 cells of the pancreas, under other ids and in a data set of blood cells, and of
    the pancreas. With `half`, half of the genes are cut from that data set, as a filtered file has them cut.
    """
    rows = np.flatnonzero(cells.dataset == "baron_h1")[100:120]
    blood = np.flatnonzero(cells.dataset == "tenx_pbmc1k_v2")
    mixed = cells.counts[np.concatenate([blood, rows])]
    measured = dict(cells.measured) | {"mine": cells.measured["baron_h1"] | cells.measured["tenx_pbmc1k_v2"]}
    if half:
        kept = np.random.default_rng(3).random(mixed.shape[1]) < 0.5
        measured["mine"] = measured["mine"] & kept
        mixed = mixed.multiply(kept).tocsr()
        mixed.eliminate_zeros()
    # the groups are chosen over the Census, in which the planted file stands, too
    expressed = (cells.counts > 0).sum(axis=0) + (mixed > 0).sum(axis=0)
    group_V = choose_groups(expressed, np.sum(list(measured.values()), axis=0))
    everything = prints_of(cells.counts, group_V, cells.dataset, measured)
    names = np.array(["mine"] * mixed.shape[0])
    mine = prints_table(
        np.arange(len(names)) + 100_000,
        names,
        [f"mine-{number}" for number in range(len(names))],
        prints_of(mixed, group_V, names, measured),
    )
    all_cells = prints_table(np.arange(len(cells.dataset)), cells.dataset, cells.name, everything)
    pancreas = cells.dataset == "baron_h1"
    corpus = all_cells.filter(pa.array(~pancreas & (cells.dataset != "tenx_pbmc1k_v2")))
    return pa.concat_tables([corpus, mine]).unify_dictionaries(), all_cells.filter(pa.array(pancreas))


@pytest.mark.parametrize("half", [False, True])
def test_a_planted_leak_is_found_and_named(cells, tmp_path, half):
    corpus, pancreas = planted(cells, half=half)
    corpus_paths = write(tmp_path / "corpus", corpus.slice(0, 9000), corpus.slice(9000))
    benchmark_paths = write(tmp_path / "pancreas", pancreas)
    out = tmp_path / "leaks.parquet"
    with pytest.raises(CellmillError) as error:
        audit_leaks({"corpus": corpus_paths}, {"pancreas": benchmark_paths}, action="fail", out=out)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert re.search(r"\b20 cells of corpus\b", sentence)
    blood = int((cells.dataset == "tenx_pbmc1k_v2").sum())
    first = cells.name[np.flatnonzero(cells.dataset == "baron_h1")[100]]
    assert f"mine-{blood} is {first}" in sentence
    assert "20 of data set mine in benchmark pancreas (data set baron_h1)" in sentence
    assert "corpus.held_out.datasets" in sentence
    assert "corpus.leaks: drop" in sentence
    found = tmp_path / "leaks_found.parquet"
    assert str(found) in sentence
    assert found.is_file()
    assert not out.exists()  # the workflow deletes what a failed job was to write

    assert audit_leaks({"corpus": corpus_paths}, {"pancreas": benchmark_paths}, action="drop", out=out) == 20
    assert not found.exists()
    leaks = pq.read_table(out)
    assert leaks.schema.equals(LEAKS_SCHEMA)
    assert leaks["soma_joinid"].to_pylist() == [100_000 + blood + row for row in range(20)]
    first_row = int(np.flatnonzero(cells.dataset == "baron_h1")[100])
    assert leaks["benchmark_joinid"].to_pylist() == [first_row + row for row in range(20)]
    assert set(leaks["dataset_id"].to_pylist()) == {"mine"}
    assert set(leaks["benchmark_dataset_id"].to_pylist()) == {"baron_h1"}
    assert set(leaks["selection"].to_pylist()) == {"corpus"}
    assert set(leaks["benchmark"].to_pylist()) == {"pancreas"}
    compared = json.loads(leaks.schema.metadata[COMPARED])
    assert compared["corpus"]["cells"] == len(corpus)
    assert compared["pancreas"] == {"cells": 1937, "not_comparable": 0, "share": 0.0}


def test_the_very_same_cell_is_a_leak_however_shallow(table, tmp_path):
    benchmark = table.slice(1482, 5)
    nothing = np.zeros((5, GROUPS), np.uint64)
    same = changed(benchmark, prints=nothing)
    other = changed(benchmark, prints=nothing, dataset=["another"] * 5)  # one joinid of another organism
    corpus, target = write(tmp_path / "c", same, other), write(tmp_path / "b", benchmark)
    assert audit_leaks({"corpus": corpus[:1]}, {"b": target}, action="drop", out=tmp_path / "l.parquet") == 5
    assert audit_leaks({"corpus": corpus[1:]}, {"b": target}, action="drop", out=tmp_path / "l.parquet") == 0


def test_a_copy_of_a_leaked_cell_has_leaked(table, tmp_path):
    """Of one cell the corpus holds three copies, two of them too shallow to be compared with the benchmark."""
    rows = table.slice(1482, 3)
    target = write(tmp_path / "b", rows)
    corpus = write(tmp_path / "c", changed(rows, joinids=np.array([1, 2, 3]), dataset=["mine"] * 3))
    found = {
        "soma_joinid": [11, 12, 21],
        "kept_joinid": [1, 1, 20],
        "groups_equal": [1] * 3,
        "groups_compared": [1] * 3,
    }
    names = {"dataset_id": ["other", "third", "other"], "kept_dataset_id": ["mine", "mine", "other"]}
    columns = [pa.array((found | names)[field.name]).cast(field.type) for field in DUPLICATES_SCHEMA]
    pq.write_table(pa.table(columns, schema=DUPLICATES_SCHEMA), tmp_path / "d.parquet")
    out = tmp_path / "leaks.parquet"
    copies = {"corpus": tmp_path / "d.parquet"}
    assert audit_leaks({"corpus": corpus}, {"b": target}, action="drop", out=out, copies=copies) == 5
    leaks = pq.read_table(out).to_pandas().set_index("soma_joinid")
    assert sorted(leaks.index) == [1, 2, 3, 11, 12]
    assert leaks.loc[11, "dataset_id"] == "other"
    assert leaks.loc[12, "benchmark_joinid"] == leaks.loc[1, "benchmark_joinid"]


def test_one_row_for_each_benchmark_that_has_a_cell(table, tmp_path):
    rows = table.slice(1482, 6)
    twice = changed(rows, joinids=np.arange(6) + 300, dataset=["a study"] * 6)
    benchmarks = {
        "one": write(tmp_path / "one", rows, twice),
        "two": write(tmp_path / "two", rows),
        "three": write(tmp_path / "three", table.slice(0, 100)),
    }
    corpora = {
        "corpus": write(tmp_path / "c", changed(rows, joinids=np.arange(6), dataset=["mine"] * 6)),
        "corpus-mus_musculus": write(tmp_path / "m", table.slice(20_000, 500)),
    }
    out = tmp_path / "leaks.parquet"
    assert audit_leaks(corpora, benchmarks, action="drop", out=out) == 12
    leaks = pq.read_table(out)
    assert leaks["benchmark"].to_pylist() == ["one", "two"] * 6
    # of the two copies in the first benchmark the one of the smaller data set
    assert leaks["benchmark_dataset_id"].to_pylist() == ["a study", "baron_h1"] * 6
    with pytest.raises(CellmillError, match=r"^6 cells of corpus are cells of a benchmark"):
        audit_leaks(corpora, benchmarks, action="fail", out=out)


@pytest.mark.parametrize("is_same", [False, True])
def test_thousands_of_cells_of_one_profile_are_compared_in_bounded_memory(table, tmp_path, monkeypatch, is_same):
    """Copies of one cell in the corpus and in the benchmark, which differ in one group or in none."""
    n, seen = 1500, []
    find = duplicates._Sorted.find

    def counted(self, wanted_B):
        for part in find(self, wanted_B):
            seen.append(len(part[0]))
            yield part

    monkeypatch.setattr(duplicates, "PAIRS", 10_000)
    monkeypatch.setattr(duplicates._Sorted, "find", counted)
    copies = table.take(np.full(n, 19_700))  # a deep cell, with a print in every group
    values = prints(copies)
    if not is_same:
        values[:, -1] += np.arange(n, dtype=np.uint64)
    corpus = changed(copies, joinids=np.arange(n), dataset=["mine"] * n, prints=values)
    benchmark = changed(copies, joinids=np.arange(n) + n, prints=values)
    out = tmp_path / "leaks.parquet"
    given = {"corpus": write(tmp_path / "c", corpus)}, {"b": write(tmp_path / "b", benchmark)}
    assert audit_leaks(*given, action="drop", out=out) == n
    assert pq.read_table(out)["benchmark_joinid"].to_pylist() == [n] * n
    assert max(seen) <= 10_000
    assert sum(seen) == (GROUPS * n if is_same else (GROUPS - 1) * n * n + n)


def test_no_leak_is_an_empty_table(table, tmp_path):
    out = tmp_path / "leaks.parquet"
    corpus, target = write(tmp_path / "c", table.slice(3419)), write(tmp_path / "b", table.slice(1482, 1937))
    assert audit_leaks({"corpus": corpus}, {"pancreas": target}, action="fail", out=out) == 0
    assert pq.read_schema(out).equals(LEAKS_SCHEMA)
    assert audit_leaks({"corpus": corpus}, {}, action="fail", out=out) == 0
