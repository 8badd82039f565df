"""One job of the corpus phase in a process of its own: ``python tests/bench/corpus_job.py JOB RUN.json [NUMBER]``.

The calls are those of ``workflow/scripts``. Prints one line of JSON: seconds, CPU seconds and peak memory of the job
(its imports are in the memory and not in the seconds), and what it returned.

``RUN.json`` says ``soma``, ``folder``, ``organism``, ``blocks`` and ``selection``, the keys of the config's ``corpus``.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cellmill.census.plan import plan_cells
from cellmill.census.read import open_census
from cellmill.census.vocabulary import build_vocabulary
from cellmill.config import Census, Corpus
from cellmill.duplicates import find_duplicates
from cellmill.shards.assemble import assemble
from cellmill.shards.curate import curate_block
from cellmill.shards.shuffle import shuffle_part
from cellmill.vocabulary import Vocabulary
from harness import measured


class Run:
    """The jobs of one selection, each a method."""

    def __init__(self, path: Path):
        about = json.loads(path.read_text())
        self.folder, self.soma, self.organism = Path(about["folder"]), Path(about["soma"]), about["organism"]
        self.census = Census(source="local", path=about["soma"])
        self.selection = Corpus(**about["selection"])
        self.plan_table, self.summary = self.folder / "plan.parquet", self.folder / "plan.json"
        self.genes, self.copies = self.folder / "vocabulary.parquet", self.folder / "duplicates.parquet"

    def block_files(self, suffix: str) -> list[Path]:
        blocks = len(json.loads(self.summary.read_text())["blocks"])
        return [self.folder / "blocks" / f"{block}{suffix}" for block in range(blocks)]

    def plan(self, _: int):
        """Plan the selection."""
        plan_cells(
            self.census,
            self.soma,
            self.selection,
            name="corpus",
            organism=self.organism,
            benchmarks={},
            blocks=self.selection.blocks,
            cells_per_shard=self.selection.cells_per_shard,
            shuffle_seed=self.selection.shuffle_seed,
            plan=self.plan_table,
            summary=self.summary,
        )
        plan = json.loads(self.summary.read_text())
        return {key: plan[key] for key in ("cells", "nonzeros", "predicted")} | {"blocks": len(plan["blocks"])}

    def vocabulary(self, _: int):
        """The genes."""
        build_vocabulary(
            self.census,
            self.soma,
            organism=self.organism,
            genes=self.selection.genes,
            plan=self.plan_table,
            out=self.genes,
        )

    def scan(self, block: int):
        """The limit: read the counts of a block's range of joinids, and do nothing with them."""
        first, last = json.loads(self.summary.read_text())["blocks"][block]["joinids"]
        nonzeros = 0
        with open_census(self.census, self.soma) as census:
            counts = census["census_data"][self.organism].ms["RNA"].X["raw"]
            for table in counts.read((slice(first, last),)).tables():
                nonzeros += len(table)
        return {"nonzeros": nonzeros}

    def curate(self, block: int):
        """Curate one block."""
        (self.folder / "blocks").mkdir(exist_ok=True)
        curate_block(
            self.census,
            self.soma,
            plan=self.plan_table,
            summary=self.summary,
            block=block,
            vocabulary=self.genes,
            organism=self.organism,
            quality=self.selection.quality,
            extra_obs=[],
            doublets=[],
            out=self.block_files(".arrow")[block],
            qc=self.block_files(".qc.parquet")[block],
            prints=self.block_files(".prints.parquet")[block],
        )

    def duplicates(self, _: int):
        """Cells with the profile of another one."""
        return find_duplicates(self.block_files(".prints.parquet"), out=self.copies)

    def shuffle(self, part: int):
        """The shards of one part of the selection."""
        (self.folder / "parts").mkdir(exist_ok=True)
        shuffle_part(
            summary=self.summary,
            blocks=self.block_files(".arrow"),
            removed=[self.copies] if self.selection.duplicates == "drop" else [],
            part=part,
            parts=len(self.block_files("")),
            n_genes=len(Vocabulary.read(self.genes)),
            out=self.folder / "parts" / str(part),
        )

    def assemble(self, _: int):
        """The folder of shards."""
        manifest = assemble(
            summary=self.summary,
            parts=[self.folder / "parts" / str(part) for part in range(len(self.block_files("")))],
            block_qcs=self.block_files(".qc.parquet"),
            vocabulary=self.genes,
            duplicates=self.copies if self.selection.duplicates == "drop" else None,
            leaks=None,
            out=self.folder / "shards",
            qc=self.folder / "qc.parquet",
            qc_cells=self.folder / "qc_cells.parquet",
        )
        return manifest["totals"]


if __name__ == "__main__":
    job, path, *number = sys.argv[1:]
    work = getattr(Run(Path(path)), job)
    with measured() as figures:
        returned = work(int(number[0]) if number else 0)
    print(json.dumps(figures | {"returned": returned}))
