"""A local Census of many cells: real cells thinned binomially, written by cellmill, one hundred data sets.

Cell i is real cell i mod n with each of its counts kept with a probability of its own, drawn between 0.3 and 0.9: so
depth, sparsity and genes are those of real cells, and no two cells are the same. It is kept under ``results/bench`` and
used again.

Legend: n real cells, D cells of a chunk, V genes of the Census.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from corpora import ORGANISM, cached, fetched, real_census
from harness import Options, Row, child, disk

DATASETS = 100
DONORS = 4
"""Per data set."""
ASSAYS = ("10x 3' v2", "10x 3' v3", "CEL-seq2")
CHUNK = 2048
LEAST, MOST = 0.3, 0.9
"""Share of its counts that a cell keeps."""


def census_of(options: Options) -> Path:
    """The Census, built where it is not there yet."""
    folder = cached(options, f"census-{options.cells}")
    if not (folder / "built.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        real, (_, genes) = real_census(options), fetched(options)
        figures = child("million.py", str(options.cells), str(real), str(genes), str(folder))
        (folder / "built.json").write_text(json.dumps(figures))
    return folder / "soma"


class Thinned:
    """Real cells, and any number of thinned copies of them."""

    def __init__(self, soma: Path):
        import scipy.sparse as sp
        import tiledbsoma

        with tiledbsoma.Experiment.open(f"{soma}/census_data/{ORGANISM}") as experiment:
            rna = experiment.ms["RNA"]
            self.obs = experiment.obs.read(column_names=["dataset_id", "cell_type"]).concat().to_pandas().astype(str)
            self.genes = rna.var.read(column_names=["feature_id"]).concat()["feature_id"].to_pylist()
            table = rna.X["raw"].read().tables().concat()
        cell, gene, count = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        self.counts_nV = sp.csr_matrix((count, (cell, gene)), shape=(len(self.obs), len(self.genes)))

    def chunks(self, first: int, cells: int) -> Iterator:
        """Row and counts (float32 CSR [D, V]) of cells `first` to ``first + cells``; seeded by the first cell."""
        import scipy.sparse as sp
        from cellmill.randomness import uniform

        for start in range(0, cells, CHUNK):
            number_D = np.arange(first + start, first + min(start + CHUNK, cells))
            real_DV = self.counts_nV[number_D % len(self.obs)]
            kept_D = LEAST + (MOST - LEAST) * uniform(0, "thinning", number_D)
            kept_N = np.repeat(kept_D, np.diff(real_DV.indptr))
            drawn_N = np.random.default_rng([0, first + start]).binomial(real_DV.data.astype(np.int64), kept_N)
            yield start, sp.csr_matrix((drawn_N.astype(np.float32), real_DV.indices, real_DV.indptr), real_DV.shape)

    def metadata(self, dataset: int, first: int, cells: int):
        """obs of one data set: cell types of the real cells, donors in turn, an assay by the cell's real data set."""
        import pandas as pd

        real = self.obs.iloc[np.arange(first, first + cells) % len(self.obs)].reset_index(drop=True)
        assay_of = {name: ASSAYS[at % len(ASSAYS)] for at, name in enumerate(sorted(real["dataset_id"].unique()))}
        return pd.DataFrame(
            {
                "cell_type": real["cell_type"],
                "assay": real["dataset_id"].map(assay_of),
                "donor_id": [f"donor{dataset}.{cell % DONORS}" for cell in range(cells)],
                "suspension_type": "cell",
                "tissue_type": "tissue",
            }
        ).set_index(np.array([f"cell{first + cell}" for cell in range(cells)]))


def build(cells: int, real: Path, genes: Path, folder: Path) -> None:
    """Write the Census; its data sets hold equal numbers of cells."""
    import pandas as pd
    from cellmill.census.build import make_source, write_census
    from cellmill.census.genes import read_gene_table

    thinned, table = Thinned(real), read_gene_table(genes)
    var = pd.DataFrame(index=thinned.genes)
    size, sources = cells // DATASETS, []
    for dataset in range(DATASETS):
        first = dataset * size
        sources.append(
            make_source(
                f"thinned{dataset:03d}",
                thinned.metadata(dataset, first, size),
                var,
                lambda first=first: thinned.chunks(first, size),
                table,
                ORGANISM,
            )
        )
    write_census(sources, {ORGANISM: table}, folder / "soma", mapping=folder / "genes_mapping.parquet", quiet=True)


def measure(options: Options) -> list[Row]:
    """What building the Census took."""
    soma = census_of(options)
    built = json.loads((soma.parent / "built.json").read_text())
    import tiledbsoma

    with tiledbsoma.Experiment.open(f"{soma}/census_data/{ORGANISM}") as experiment:
        cells, nonzeros = experiment.obs.count, experiment.ms["RNA"].X["raw"].nnz
    size = disk(soma)
    note = f"one process, built {built['date']}, load {built['load']:.1f} on {os.cpu_count()} cores"
    return [
        Row("cells", cells, "cells", note=f"{DATASETS} data sets, thinned from real cells"),
        Row("nonzeros", nonzeros, "nonzeros", note=f"{nonzeros / cells:,.0f} a cell"),
        Row("time to build", built["seconds"], "s", note=note),
        Row("CPU time to build", built["cpu"], "s", note=note),
        Row("cells per second", cells / built["seconds"], "cells/s", note=note),
        Row("peak memory of the build", built["peak_mb"], "MB", note="holds all real cells to thin them"),
        Row("disk", size / 2**30, "GiB"),
        Row("disk per nonzero", size / nonzeros, "bytes"),
    ]


if __name__ == "__main__":
    import sys

    from harness import measured, now

    n, *paths = sys.argv[1:]
    with measured() as figures:
        build(int(n), *map(Path, paths))
    print(json.dumps(figures | {"date": now(), "load": os.getloadavg()[0]}))
