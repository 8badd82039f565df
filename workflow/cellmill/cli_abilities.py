"""The command line of `cellmill.abilities`: what a trained or released model can do with cells, without a workflow.

Every command takes the folder of a checkpoint and a folder of shards, and writes one parquet file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.shards.batch import CellBatch

CHUNK = 1024
"""Cells that are read, and whose answers are written, at once."""

Checkpoint = Annotated[Path, typer.Argument(help="Folder of checkpoint.safetensors and checkpoint.json.")]
CellShards = Annotated[Path, typer.Argument(help="Folder of shards, such as results/demo/shards/baron_pancreas.")]
Out = Annotated[Path, typer.Argument(help="Parquet file to write.")]
Split = Annotated[str, typer.Option(help="Split of the shards.")]
VocabularyFile = Annotated[
    Path | None,
    typer.Option(help="vocabulary/ORGANISM.parquet of the run: for gene symbols, and for released models."),
]
AskedGenes = Annotated[list[str], typer.Option("--gene", help="Ensembl id (or symbol, with --vocabulary); repeat.")]


class Opened:
    """A checkpoint, and the cells of a split in its vocabulary."""

    def __init__(self, checkpoint: Path, shards: Path | None, split: str, vocabulary: Path | None):
        from cellmill.checkpoints import load_checkpoint
        from cellmill.device import best_device
        from cellmill.gene_map import GeneMap
        from cellmill.shards.dataset import Shards
        from cellmill.vocabulary import Vocabulary

        self.model, meta = load_checkpoint(checkpoint)
        self.model.to(best_device())
        self.genes: list[str] = meta["feature_ids"]
        self._place = {gene: number for number, gene in enumerate(self.genes)}
        self._map, self._split = None, split
        known = Vocabulary.read(vocabulary) if vocabulary else None
        if known:
            self._map = GeneMap(known.feature_ids, known.feature_names, self.genes)
            for name, gene in zip(known.feature_names, self._map.gene_V.tolist(), strict=True):
                if gene >= 0:
                    self._place.setdefault(name, gene)  # of two genes with one symbol the first, as the map
        self._shards = Shards(shards) if shards else None
        if self._shards and self._shards.vocabulary_hash == meta["vocabulary_hash"]:
            self._map = None
        elif self._shards and known is None:
            raise CellmillError(
                f"{checkpoint} has a vocabulary of its own, not that of {shards}; give the run's "
                "vocabulary/ORGANISM.parquet with --vocabulary, and genes are matched"
            )
        elif self._shards:
            self._shards.check_vocabulary(known.hash)

    def cells(self) -> Iterator[CellBatch]:
        """The cells, `CHUNK` at a time."""
        for cells in self._shards.batches(self._split, CHUNK):
            yield self._map.apply(cells, self.model.released_totals) if self._map else cells

    def gene_ids(self, names: list[str]) -> np.ndarray:
        """int64, the model's ids of genes; all of them if none is named."""
        unknown = [name for name in names if name not in self._place]
        if unknown:
            raise CellmillError(
                f"the model knows no gene {', '.join(unknown[:5])}; its genes are called as {self.genes[0]}, and by "
                "symbols if --vocabulary is given"
            )
        return np.array([self._place[name] for name in names] or range(len(self.genes)), np.int64)


def write_tables(tables: Iterator[pa.Table], out: Path) -> int:
    """Write tables of one schema as one parquet file, whole or not at all; returns the number of rows."""
    rows, writer = 0, None
    with atomic(out) as temporary:
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
                writer.write_table(table)
                rows += len(table)
        finally:
            if writer:
                writer.close()
        if writer is None:
            raise CellmillError("there are no cells; choose a split of the shards that has some")
    return rows


def annotate(
    checkpoint: Checkpoint,
    shards: CellShards,
    out: Out,
    split: Split = "all",
    vocabulary: VocabularyFile = None,
):
    """Let scMulan name the cell type of every cell (soma_joinid, cell_type, probability)."""
    from cellmill.abilities.sentences import annotate as said_of

    opened = Opened(checkpoint, shards, split, vocabulary)

    def tables():
        for cells in opened.cells():
            said = said_of(opened.model, cells)
            columns = {"soma_joinid": cells.joinids, "cell_type": said.names, "probability": said.probabilities}
            yield pa.table(columns)

    print(f"{out}: {write_tables(tables(), out)} cells")


def generate(
    checkpoint: Checkpoint,
    out: Out,
    word: Annotated[list[str], typer.Option(help="COLUMN=VALUE that the cells are to have; may be repeated.")],
    n: Annotated[int, typer.Option(help="Number of cells.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides every draw.")] = 0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest genes.")] = None,
):
    """Let scMulan write cells of given metadata (cell, gene, bin: tenths of a cell's largest value)."""
    from cellmill.abilities.sentences import generate as write_cells

    words = {}
    for option in word:
        column, equals, value = option.partition("=")
        if not equals:
            raise CellmillError(f"--word is '{option}'; it must be of the form COLUMN=VALUE")
        words[column] = value
    opened = Opened(checkpoint, None, "", None)
    made = write_cells(opened.model, words, n, seed=seed, top_k=top_k)
    genes = pa.array(opened.genes).take(pa.array(made.genes))
    cell_N = np.repeat(np.arange(n), np.diff(made.offsets))
    rows = write_tables(iter([pa.table({"cell": cell_N, "gene": genes, "bin": made.bins})]), out)
    print(f"{out}: {n} cells, {rows} genes")


def enhance(
    checkpoint: Checkpoint,
    shards: CellShards,
    out: Out,
    depth: Annotated[str, typer.Option(help="t4.5: 10^4.5 counts; a1: ten times the cell's own; f2: twice.")] = "f2",
    gene: AskedGenes = (),
    split: Split = "all",
    vocabulary: VocabularyFile = None,
):
    """Let scFoundation say log1p(CP10k) at another read depth (soma_joinid, a column a gene; by default all genes)."""
    from cellmill.abilities.depth import enhance as values_at

    opened = Opened(checkpoint, shards, split, vocabulary)
    ids = opened.gene_ids(list(gene))
    tables = (_wide(cells, opened, ids, values_at(opened.model, cells, depth, ids)) for cells in opened.cells())
    print(f"{out}: {write_tables(tables, out)} cells, {len(ids)} genes")


def prompt(
    checkpoint: Checkpoint,
    shards: CellShards,
    out: Out,
    gene: AskedGenes,
    by: Annotated[
        str, typer.Option(help="What is known: genes (all others), cell (its state alone), or both.")
    ] = "genes",
    steps: Annotated[int, typer.Option(help="In how many steps, the surest genes first.")] = 1,
    split: Split = "all",
    vocabulary: VocabularyFile = None,
):
    """Let scGPT generate log1p(CP10k) of some genes from a gene or cell prompt (soma_joinid, a column a gene)."""
    from cellmill.abilities.generation import cell_states, values_by_reference
    from cellmill.abilities.generation import generate as generated
    from cellmill.views.ragged import select

    if by not in ("genes", "cell", "both"):
        raise CellmillError(f"--by is '{by}'; it must be genes, cell or both")
    opened = Opened(checkpoint, shards, split, vocabulary)
    ids = opened.gene_ids(list(gene))

    def tables():
        for cells in opened.cells():
            shown = select(cells, ~np.isin(cells.genes, ids))  # what is asked for is never shown
            asked_BQ = np.broadcast_to(ids, (len(cells), len(ids)))
            made = generated(
                opened.model,
                asked_BQ,
                known=None if by == "cell" else shown,
                states_BD=None if by == "genes" else cell_states(opened.model, shown),
                steps=steps,
            )
            yield _wide(cells, opened, ids, values_by_reference(opened.model, made.bins_BQ, shown))

    print(f"{out}: {write_tables(tables(), out)} cells, {len(ids)} genes")


def perturb(
    checkpoint: Checkpoint,
    shards: CellShards,
    out: Out,
    kind: Annotated[str, typer.Option(help="delete, overexpress, activate or inhibit.")] = "delete",
    gene: AskedGenes = (),
    random: Annotated[int, typer.Option(help="Random genes of each cell to compare with; 0 gives no statistics.")] = 50,
    cells: Annotated[int, typer.Option(help="Take so many cells at most.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides the random genes.")] = 0,
    split: Split = "all",
    vocabulary: VocabularyFile = None,
):
    """Let Geneformer say how far a perturbed gene moves the cells.

    Writes one row per gene (mean shifts, p and q against random genes), and beside it, with .cells in its name, one row
    per cell and gene. Without --gene, all genes of every cell are perturbed.
    """
    from cellmill.abilities import perturbation

    opened = Opened(checkpoint, shards, split, vocabulary)
    ids = opened.gene_ids(list(gene)) if gene else None
    parts, left = [], cells
    for chunk in opened.cells():
        taken = chunk.slice(0, min(left, len(chunk)))
        left -= len(taken)
        options = {"n_random": random, "seed": seed, "feature_ids": opened.genes}
        parts.append(perturbation.perturb(opened.model, taken, kind, ids, **options))
        if not left:
            break
    table = pa.concat_tables(parts)
    every = out.with_suffix(f".cells{out.suffix}")
    perturbation.write(every, table)
    if random:
        perturbation.write(out, perturbation.summarise(table))
    print(f"{out if random else every}: {kind} of genes in {cells - left} cells, {len(table)} perturbations")


def _wide(cells: CellBatch, opened: Opened, ids: np.ndarray, values_BG: np.ndarray) -> pa.Table:
    """soma_joinid, and a column for each gene."""
    columns = {opened.genes[gene]: values_BG[:, place] for place, gene in enumerate(ids)}
    return pa.table({"soma_joinid": cells.joinids, **columns})


COMMANDS = (annotate, generate, enhance, prompt, perturb)
