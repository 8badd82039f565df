"""A corpus phase that is killed and goes on: every step whose outputs are there is passed over, as by Snakemake."""

import shutil
from pathlib import Path

import corpus_runs
from cellmill.config import Corpus
from cellmill.files import sha256


def steps(soma: Path, folder: Path, selection: Corpus) -> list[tuple[list[Path], callable, tuple]]:
    """Outputs, function and arguments of every step of a corpus."""
    genes, blocks = folder / "vocabulary.parquet", range(selection.blocks)
    listed = [([folder / "plan.parquet", folder / "plan.json"], corpus_runs.plan, (soma, folder, selection))]
    listed.append(([genes], corpus_runs.vocabulary, (soma, folder, selection)))
    for block in blocks:
        outputs = [folder / f"{block}{end}" for end in (".parquet", ".qc.parquet", ".prints.parquet")]
        listed.append((outputs, corpus_runs.curate, (soma, folder, block, selection, genes)))
    listed.append(([folder / "duplicates.parquet"], corpus_runs.duplicates, (folder, selection.blocks)))
    for part in blocks:
        listed.append(([folder / "parts" / str(part)], corpus_runs.shuffle, (folder, part, selection.blocks, genes)))
    listed.append(([folder / "shards"], corpus_runs.join, (folder, selection.blocks, genes)))
    return listed


def child(soma: str, folder: str, blocks: int) -> None:
    """One process of the corpus phase: what is left of it."""
    folder = Path(folder)
    for outputs, step, arguments in steps(Path(soma), folder, corpus_runs.corpus(blocks=blocks)):
        if not all(path.exists() for path in outputs):
            for path in outputs:  # as Snakemake removes what an incomplete job left
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            step(*arguments)


def shard_bytes(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard and of the manifest."""
    return {path.name: sha256(path) for path in sorted((folder / "shards").iterdir())}
