"""The corpus phase on the demo Census, as the workflow's scripts run it."""

from pathlib import Path

from cellmill.census.plan import plan_cells
from cellmill.census.vocabulary import build_vocabulary
from cellmill.config import Census, Corpus, Dataset, Splits
from cellmill.duplicates import find_duplicates
from cellmill.shards.assemble import assemble
from cellmill.shards.curate import curate_block
from cellmill.shards.shuffle import shuffle_part
from cellmill.vocabulary import Vocabulary

ORGANISM = "homo_sapiens"
PANCREAS = Dataset(include={"dataset_id": ["baron_pancreas"]}, batch="library")


def corpus(**changes) -> Corpus:
    """The demo's corpus, but for `changes`."""
    return Corpus(**{"splits": Splits(validation=["H1437", "K562"]), **changes})


def census_of(soma: Path) -> Census:
    return Census(source="local", path=str(soma))


def plan(
    soma: Path,
    folder: Path,
    selection: Corpus | Dataset,
    name: str = "corpus",
    benchmarks=None,
    cells_per_shard: int = 200,
    seed: int = 0,
) -> dict:
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
        blocks=getattr(selection, "blocks", 1),
        cells_per_shard=cells_per_shard,
        shuffle_seed=seed,
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


def curate(
    soma: Path,
    folder: Path,
    block: int,
    selection: Corpus | Dataset,
    genes: Path,
    doublets: tuple[Path, ...] = (),
    extra_obs: tuple[str, ...] = ("library",),
) -> None:
    """One block of what was planned in `folder`; `genes` is the vocabulary."""
    curate_block(
        census_of(soma),
        soma,
        plan=folder / "plan.parquet",
        summary=folder / "plan.json",
        block=block,
        vocabulary=genes,
        organism=ORGANISM,
        quality=selection.quality,
        extra_obs=list(extra_obs),
        doublets=list(doublets),
        out=folder / f"{block}.parquet",
        qc=folder / f"{block}.qc.parquet",
        prints=folder / f"{block}.prints.parquet",
    )


def duplicates(folder: Path, blocks: int) -> int:
    """Find the copies among the cells of all blocks; `shuffle` and `join` leave them out once they are found."""
    prints = [folder / f"{block}.prints.parquet" for block in range(blocks)]
    return find_duplicates(prints, out=folder / "duplicates.parquet")


def shuffle(folder: Path, part: int, parts: int, genes: Path) -> dict:
    """One of as many parts as there are blocks."""
    found = _duplicates(folder)
    return shuffle_part(
        summary=folder / "plan.json",
        blocks=[folder / f"{block}.parquet" for block in range(parts)],
        removed=[found] if found else [],
        part=part,
        parts=parts,
        n_genes=len(Vocabulary.read(genes)),
        out=folder / "parts" / str(part),
    )


def join(folder: Path, parts: int, genes: Path) -> dict:
    """Make ``folder/shards`` from the parts; returns its manifest."""
    return assemble(
        summary=folder / "plan.json",
        parts=[folder / "parts" / str(part) for part in range(parts)],
        block_qcs=[folder / f"{block}.qc.parquet" for block in range(parts)],
        vocabulary=genes,
        duplicates=_duplicates(folder),
        leaks=None,
        out=folder / "shards",
        qc=folder / "qc.parquet",
        qc_cells=folder / "qc_cells.parquet",
    )


def shuffle_and_join(folder: Path, parts: int, genes: Path) -> dict:
    """All parts and the shards of curated blocks; returns the manifest."""
    for part in range(parts):
        shuffle(folder, part, parts, genes)
    return join(folder, parts, genes)


def mill_corpus(soma: Path, folder: Path, selection: Corpus, seed: int = 0) -> dict:
    """The whole corpus phase; returns the manifest of ``folder/shards``."""
    plan(soma, folder, selection, seed=seed)
    vocabulary(soma, folder, selection)
    genes = folder / "vocabulary.parquet"
    for block in range(selection.blocks):
        curate(soma, folder, block, selection, genes)
    if selection.duplicates == "drop":
        duplicates(folder, selection.blocks)
    return shuffle_and_join(folder, selection.blocks, genes)


def mill_benchmark(soma: Path, folder: Path, name: str, selection: Dataset, genes: Path) -> dict:
    """The shards of a benchmark data set, with the corpus's vocabulary."""
    plan(soma, folder, selection, name)
    curate(soma, folder, 0, selection, genes)
    return shuffle_and_join(folder, 1, genes)


def _duplicates(folder: Path) -> Path | None:
    found = folder / "duplicates.parquet"
    return found if found.is_file() else None
