"""A table of orthologs in terms of the run's vocabularies."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellmill.census.wheels import write_gene_table
from cellmill.errors import CellmillError
from cellmill.orthologs import SCHEMA, build_orthologs
from cellmill.vocabulary import SCHEMA as VOCABULARY_SCHEMA
from cellmill.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def vocabularies(demo_census, tmp_path_factory) -> dict[str, Path]:
    """All protein-coding genes of three organisms."""
    folder = tmp_path_factory.mktemp("vocabularies")
    paths = {}
    for organism in ("mus_musculus", "homo_sapiens", "macaca_mulatta"):
        write_gene_table(demo_census.wheels, folder / "genes.csv.gz", organism)
        genes = pd.read_csv(folder / "genes.csv.gz", header=None, keep_default_na=False)
        genes = genes[genes[4] == "protein_coding"].sort_values(0)
        columns = {
            "feature_id": genes[0],
            "feature_name": genes[1],
            "feature_type": genes[4],
            "feature_length": genes[3],
        }
        columns |= dict.fromkeys(("is_mitochondrial", "is_ribosomal"), np.zeros(len(genes), dtype=bool))
        columns["fingerprint_group"] = pa.nulls(len(genes), pa.int8())
        paths[organism] = folder / f"{organism}.parquet"
        pq.write_table(pa.table(columns, schema=VOCABULARY_SCHEMA), paths[organism])
    return paths


@pytest.fixture
def human_and_mouse(vocabularies) -> dict[str, Path]:
    return {name: vocabularies[name] for name in ("mus_musculus", "homo_sapiens")}


def symbol_of(vocabularies, name: str) -> dict[str, str]:
    vocabulary = Vocabulary.read(vocabularies[name])
    return dict(zip(vocabulary.feature_ids, vocabulary.feature_names, strict=True))


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_real_table_of_symbols_without_a_header(data, human_and_mouse, tmp_path):
    table = data / "species" / "human_mouse_orthologs.csv.gz"
    counts = build_orthologs(table, human_and_mouse, tmp_path / "orthologs.parquet")
    found = pq.read_table(tmp_path / "orthologs.parquet")
    assert found.schema.equals(SCHEMA)
    found = found.to_pandas()
    assert (counts["organism_a"], counts["organism_b"]) == ("homo_sapiens", "mus_musculus")
    # 24,857 pairs of which 16,757 are one to one, as the catalogue of the data says
    with gzip.open(table, "rt") as file:
        pairs = {line.strip() for line in file if not line.startswith(",") and not line.strip().endswith(",")}
    assert counts["pairs"] == len(pairs) == 24_857
    assert counts["mapped"] == len(found) > 0.8 * counts["pairs"]
    assert 15_000 < counts["one_to_one"] == found["one_to_one"].sum() <= 16_757
    human, mouse = (symbol_of(human_and_mouse, name) for name in ("homo_sapiens", "mus_musculus"))
    named = [f"{human[a]},{mouse[b]}" for a, b in zip(found["feature_id_a"], found["feature_id_b"], strict=True)]
    assert set(named) <= pairs
    assert "TP53,Trp53" in named
    for side, name in (("a", "homo_sapiens"), ("b", "mus_musculus")):
        assert set(found[f"organism_{side}"]) == {name}
        ids = Vocabulary.read(human_and_mouse[name]).feature_ids
        assert [ids[row] for row in found[f"gene_{side}"]] == list(found[f"feature_id_{side}"])
        ones = found[found["one_to_one"]]
        assert not ones[f"gene_{side}"].duplicated().any()
    assert found["gene_a"].is_monotonic_increasing


def test_columns_are_found_by_their_genes_or_by_the_header(vocabularies, human_and_mouse, tmp_path):
    out = tmp_path / "orthologs.parquet"
    # ids with versions, tabs, the mouse first, a third organism in the run
    ids = write(
        tmp_path / "ids.tsv", "ENSMUSG00000059552.14\tENSG00000141510", "ENSMUSG00000000740\tENSG00000167526.14"
    )
    assert build_orthologs(ids, vocabularies, out) == {
        **{"organism_a": "mus_musculus", "organism_b": "homo_sapiens"},
        **{"pairs": 2, "mapped": 2, "one_to_one": 2},
    }
    # symbols of human and rhesus are alike: the header says which is which
    rows = ("TP53,TP53", "EGFR,EGFR", "GCG,no such gene")
    named = write(tmp_path / "named.csv", '"Rhesus macaque gene name","Human gene name"', *rows)
    counts = build_orthologs(named, vocabularies, out)
    assert (counts["organism_a"], counts["organism_b"]) == ("macaca_mulatta", "homo_sapiens")
    assert (counts["pairs"], counts["mapped"]) == (3, 2)
    with pytest.raises(CellmillError, match="write a first line that names both organisms, or use Ensembl ids"):
        build_orthologs(write(tmp_path / "unnamed.csv", *rows), vocabularies, out)
    # a header that names none is not a pair
    plain = write(tmp_path / "plain.csv", "hgnc_symbol,mgi_symbol", "TP53,Trp53")
    assert build_orthologs(plain, human_and_mouse, out)["pairs"] == 1


def test_one_to_one_is_that_of_the_whole_table(human_and_mouse, tmp_path):
    # CD8B has two rows, one of which is of a gene outside the vocabulary; ids and symbols of one gene are one gene
    rows = (
        "TP53,Trp53",
        "ENSG00000141510,ENSMUSG00000059552",
        "CD8B,Cd8b1",
        "CD8B,outside",
        "GCG,Gcg",
        "INS,Ins1",
        "INS,Ins2",
    )
    build_orthologs(write(tmp_path / "t.csv", *rows), human_and_mouse, tmp_path / "o.parquet")
    found = pd.read_parquet(tmp_path / "o.parquet")
    human = symbol_of(human_and_mouse, "homo_sapiens")
    one = dict(zip(found["feature_id_a"].map(human), found["one_to_one"], strict=True))
    assert one == {"TP53": True, "CD8B": False, "GCG": True, "INS": False}
    assert len(found) == 5


def test_bad_tables_end_in_one_sentence(vocabularies, human_and_mouse, tmp_path):
    out = tmp_path / "orthologs.parquet"
    with pytest.raises(CellmillError, match="does not exist"):
        build_orthologs(tmp_path / "absent.csv", human_and_mouse, out)
    with pytest.raises(CellmillError, match="has 3 columns; it needs two"):
        build_orthologs(write(tmp_path / "three.csv", "TP53,Trp53,1"), human_and_mouse, out)
    with pytest.raises(CellmillError, match="cannot be read"):
        build_orthologs(write(tmp_path / "ragged.csv", "TP53,Trp53", "a,b,c"), human_and_mouse, out)
    (tmp_path / "bad.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(CellmillError, match="cannot be read"):
        build_orthologs(tmp_path / "bad.csv.gz", human_and_mouse, out)
    with pytest.raises(CellmillError, match=r"no pair .*\(ins, insc, ...\) is of genes of two of the run's organisms"):
        build_orthologs(write(tmp_path / "fish.csv", "ins,insc"), human_and_mouse, out)
    with pytest.raises(CellmillError, match=r"of homo_sapiens and macaca_mulatta, but the run has no macaca_mulatta"):
        build_orthologs(write(tmp_path / "r.csv", "human,rhesus macaque", "TP53,TP53"), human_and_mouse, out)
    only = {"homo_sapiens": vocabularies["homo_sapiens"]}
    with pytest.raises(CellmillError, match="need two organisms, but the run has homo_sapiens"):
        build_orthologs(write(tmp_path / "ok.csv", "TP53,Trp53"), only, out)
    assert not out.exists()
