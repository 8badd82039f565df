"""The corpus phase on the demo Census, as the workflow's scripts run it."""

from pathlib import Path

from cellmill.census.plan import plan_cells
from cellmill.config import Census, Corpus, Dataset, Splits
from cellmill.shards.assemble import assemble
from cellmill.shards.curate import curate_block
from cellmill.vocabulary import build_vocabulary

ORGANISM = "homo_sapiens"
PANCREAS = Dataset(include={"dataset_id": ["baron_pancreas"]}, batch="library")


def corpus(**changes) -> Corpus:
    """The demo's corpus, but for `changes`."""
    return Corpus(**{"splits": Splits(validation=["H1437", "K562"]), **changes})


def census_of(soma: Path) -> Census:
    return Census(source="local", path=str(soma))


def plan(soma: Path, folder: Path, selection: Corpus | Dataset, name: str = "corpus", benchmarks=None) -> dict:
    """Plan a selection into `folder`; a corpus holds out the pancreas, if nothing else is said."""
    if benchmarks is None:
        benchmarks = {"pancreas": PANCREAS} if name == "corpus" else {}
    return plan_cells(
        census_of(soma),
        soma,
        selection,
        name=name,
        organism=ORGANISM,
        benchmarks=benchmarks,
        plan=folder / "plan.parquet",
        summary=folder / "plan.json",
    )


def vocabulary(soma: Path, folder: Path, selection: Corpus):
    """The vocabulary of the corpus that was planned in `folder`."""
    return build_vocabulary(
        census_of(soma),
        soma,
        organism=ORGANISM,
        genes=selection.genes,
        plan=folder / "plan.parquet",
        out=folder / "vocabulary.parquet",
    )


def curate(soma: Path, folder: Path, block: int, selection: Corpus | Dataset, genes: Path) -> None:
    curate_block(
        census_of(soma),
        soma,
        plan=folder / "plan.parquet",
        block=block,
        vocabulary=genes,
        organism=ORGANISM,
        quality=selection.quality,
        extra_obs=["library"],
        out=folder / f"{block}.parquet",
        qc=folder / f"{block}.qc.parquet",
    )


def join(folder: Path, blocks: int, genes: Path, cells_per_shard: int = 200, seed: int = 0) -> dict:
    return assemble(
        plan=folder / "plan.parquet",
        summary=folder / "plan.json",
        blocks=[folder / f"{block}.parquet" for block in range(blocks)],
        block_qcs=[folder / f"{block}.qc.parquet" for block in range(blocks)],
        vocabulary=genes,
        cells_per_shard=cells_per_shard,
        seed=seed,
        out=folder / "shards",
        qc=folder / "qc.parquet",
        qc_cells=folder / "qc_cells.parquet",
    )


def mill_corpus(soma: Path, folder: Path, selection: Corpus) -> dict:
    """The whole corpus phase; returns the manifest of ``folder/shards``."""
    plan(soma, folder, selection)
    vocabulary(soma, folder, selection)
    for block in range(selection.blocks):
        curate(soma, folder, block, selection, folder / "vocabulary.parquet")
    return join(folder, selection.blocks, folder / "vocabulary.parquet")


def mill_benchmark(soma: Path, folder: Path, name: str, selection: Dataset, genes: Path) -> dict:
    """The shards of a benchmark data set, with the corpus's vocabulary."""
    plan(soma, folder, selection, name)
    curate(soma, folder, 0, selection, genes)
    return join(folder, 1, genes)
