"""What the Snakefile needs of a run: targets, and the inputs and parameters of jobs as functions of their wildcards.

Each parameter holds just what its job depends on, so that a change in the config reruns the jobs that it can change and
no others.
"""

import importlib.util
import os
import re
from dataclasses import asdict
from pathlib import Path

from cellmill.config import Run
from cellmill.errors import CellmillError
from cellmill.methods import CONTROLS, GROUPS
from cellmill.provenance import PROJECT, code_version, content_hash


class Flow:
    """Names, inputs and parameters of the jobs of one run.

    Parameters
    ----------
    run
        The resolved config.
    """

    def __init__(self, run: Run):
        self.run = run
        self.config = run.config
        self.name = run.config.run
        self.results = f"results/{self.name}"
        self.models = list(run.models)
        self.trained = [name for name, recipe in run.models.items() if recipe.released is None]
        self.seeds = run.config.seeds
        first, *others = run.config.corpus.organisms
        self.organism_of = {"corpus": first} | {f"corpus-{organism}": organism for organism in others}
        self.corpora = list(self.organism_of)
        self.organism_of |= {name: dataset.organism or first for name, dataset in run.config.datasets.items()}
        # models know the genes of the first organism; data sets of others are held out, audited and sharded
        self.datasets = [name for name in run.config.datasets if self.organism_of[name] == first]
        self.selections = list(self.organism_of)
        self.organisms = run.config.corpus.organisms
        self.vocabulary = f"{self.results}/vocabulary/{first}.parquet"
        self.tasks = list(run.tasks)
        self.baselines = [*run.config.baselines, *CONTROLS]
        self.methods = [*self.models, *GROUPS]

    # --- inputs -------------------------------------------------------------------------------------------------------

    def census(self, wildcards) -> list[str]:
        """The Census on disk that the cells come from; nothing for the public one."""
        source = self.config.census.source
        if source == "public":
            return []
        return [self.config.census.path] if source == "local" else [f"{self.results}/census/soma"]

    def h5ads(self, wildcards) -> list[str]:
        """The .h5ad files that the private Census is built from, or the demo's folder of them."""
        if self.config.census.source != "h5ad":
            return [f"{self.results}/census/h5ad"]
        return sorted(str(path) for path in Path(self.config.census.path).glob("*.h5ad"))

    def gene_tables(self, wildcards) -> list[str]:
        """The gene tables that symbols are mapped with, one an organism."""
        given = self.config.census.gene_tables
        return [given.get(o) or f"{self.results}/census/genes/{o}.csv.gz" for o in self.organisms]

    def corpus_plan(self, wildcards) -> str:
        """The plan of an organism's corpus."""
        name = next(name for name in self.corpora if self.organism_of[name] == wildcards.organism)
        return f"{self.results}/selections/{name}/plan.parquet"

    def vocabulary_of(self, wildcards) -> str:
        """The vocabulary of a selection's organism."""
        return f"{self.results}/vocabulary/{self.organism(wildcards)}.parquet"

    def doublets(self, wildcards) -> list[str]:
        """The doublet scores of a selection; none where no rule asks for them."""
        if self._quality(wildcards.cells).max_doublet_score is None:
            return []
        return self._per_block(wildcards.cells, "doublets/{}.parquet")

    def blocks(self, wildcards) -> list[str]:
        """The curated blocks of a selection."""
        return self._per_block(wildcards.cells, "blocks/{}.arrow")

    def block_qcs(self, wildcards) -> list[str]:
        """The per-cell quality control of the blocks of a selection."""
        return self._per_block(wildcards.cells, "blocks/{}.qc.parquet")

    def parts(self, wildcards) -> list[str]:
        """The shuffled parts of a selection."""
        return self._per_block(wildcards.cells, "parts/{}")

    def corpus_prints(self, wildcards) -> list[str]:
        """The fingerprints of a corpus's cells."""
        return self._per_block(wildcards.corpus, "blocks/{}.prints.parquet")

    def benchmark_prints(self, wildcards) -> list[str]:
        """The fingerprints of the cells of all benchmarks of a corpus's organism."""
        return [path for name in self.audited(wildcards) for path in self._per_block(name, "blocks/{}.prints.parquet")]

    def duplicates(self, wildcards) -> list[str]:
        """The duplicates of a corpus; a benchmark keeps its cells."""
        return self._of_corpus(wildcards, "duplicates")

    def leaks(self, wildcards) -> list[str]:
        """The audit of a corpus."""
        return self._of_corpus(wildcards, "leaks")

    def removed(self, wildcards) -> list[str]:
        """Tables of the cells that the shuffle leaves out."""
        duplicates = self.duplicates(wildcards) if self.config.corpus.duplicates == "drop" else []
        return [*self.leaks(wildcards), *duplicates]

    def orthologs(self, wildcards=None) -> list[str]:
        """The table of orthologs, where the config names one."""
        return [f"{self.results}/orthologs.parquet"] if self.config.corpus.orthologs else []

    def _of_corpus(self, wildcards, table: str) -> list[str]:
        if wildcards.cells not in self.corpora:
            return []
        return [f"{self.results}/selections/{wildcards.cells}/{table}.parquet"]

    def _per_block(self, cells: str, pattern: str) -> list[str]:
        folder = f"{self.results}/selections/{cells}"
        return [f"{folder}/{pattern.format(block)}" for block in range(self._n_blocks(cells))]

    def templates(self, wildcards=None) -> list[str]:
        """What pages are made of, beside code."""
        parts = (PROJECT / "workflow" / "report").iterdir()
        return sorted(str(path) for path in parts if path.suffix in (".html", ".css", ".js"))

    def genes_mapping(self, wildcards) -> list[str]:
        """What the genes of a private Census were mapped to; nothing for a Census that was not built here."""
        built_here = self.config.census.source in ("demo", "h5ad")
        return [f"{self.results}/census/genes_mapping.parquet"] if built_here else []

    def embeddings(self, wildcards) -> list[str]:
        """The embeddings that one scoring job weighs: a model and its twin, all baselines, or all controls."""
        members = {"baselines": self.config.baselines, "controls": CONTROLS}
        method = wildcards.method
        folder = f"{self.results}/embed/{wildcards.dataset}"
        if method in self.models and method not in self.trained:  # released weights know no seed, and have no twin
            return [f"{folder}/{method}/seed{self.seeds[0]}.npy"]
        names = members.get(method, [method, f"{method}.untrained"])
        return [f"{folder}/{name}/seed{seed}.npy" for name in names for seed in self.seeds]

    def checkpoint(self, wildcards) -> str:
        """The weights that a model embeds with: trained here, or released."""
        return f"{self._checkpoint_folder(wildcards)}/checkpoint.safetensors"

    def checkpoint_meta(self, wildcards) -> str:
        """The description of those weights."""
        return f"{self._checkpoint_folder(wildcards)}/checkpoint.json"

    def _checkpoint_folder(self, wildcards) -> str:
        if wildcards.model in self.trained:
            return f"{self.results}/pretrain/{wildcards.model}/seed{wildcards.seed}"
        return f"{self.results}/released/{wildcards.model}"

    def foreign_vocabulary(self, wildcards) -> list[str]:
        """The vocabulary of the cells, from which genes are mapped to those of a released model."""
        return [] if wildcards.model in self.trained else [self.vocabulary]

    def released_files(self, wildcards) -> list[str]:
        """The published files of a released model."""
        released = self.run.models[wildcards.model].released
        path = Path(released.path.partition("#")[0])
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
        return [str(file) for file in files] + ([released.genes] if released.genes else [])

    def checkpoints(self, wildcards) -> list[str]:
        """The checkpoints of a model, one per seed; of a released one, the one."""
        if wildcards.model not in self.trained:
            return [f"{self.results}/released/{wildcards.model}/checkpoint.safetensors"]
        folder = f"{self.results}/pretrain/{wildcards.model}"
        return [f"{folder}/seed{seed}/checkpoint.safetensors" for seed in self.seeds]

    def score_tables(self, wildcards=None) -> list[str]:
        """Every part of the score table."""
        folder = f"{self.results}/scores"
        pretraining = [f"{folder}/pretraining/corpus/{model}.parquet" for model in self.trained]
        asked = [*self.models, "baselines"] if self.models else []
        yardstick = [f"{folder}/yardstick/corpus/{method}.parquet" for method in asked]
        benchmarks = [
            f"{folder}/{task}/{dataset}/{method}.parquet"
            for task in self.tasks
            for dataset in self.datasets
            for method in self.methods
        ]
        return pretraining + yardstick + benchmarks

    def logs(self, wildcards=None) -> list[str]:
        """The training logs of all models and seeds."""
        return [f"{self.results}/pretrain/{m}/seed{s}/log.parquet" for m in self.trained for s in self.seeds]

    def first_embeddings(self, wildcards=None) -> list[str]:
        """One embedding of every embedder and data set, for the maps of the report."""
        names = [*self.models, *(f"{m}.untrained" for m in self.trained), *self.config.baselines]
        return [f"{self.results}/embed/{d}/{name}/seed{self.seeds[0]}.npy" for d in self.datasets for name in names]

    # --- parameters ---------------------------------------------------------------------------------------------------

    def n_blocks(self, wildcards) -> int:
        """Jobs that the reading, and then the shuffle, of a selection is cut into; a benchmark is read in one."""
        return self._n_blocks(wildcards.cells)

    def _n_blocks(self, cells: str) -> int:
        return self.config.corpus.blocks if cells in self.corpora else 1

    def organism(self, wildcards) -> str:
        """The organism of a selection."""
        return self.organism_of[wildcards.cells]

    def audited(self, wildcards) -> list[str]:
        """The benchmarks whose cells must not be in a corpus: those of its organism."""
        return [name for name in self.config.datasets if self.organism_of[name] == self.organism_of[wildcards.corpus]]

    def opened_census(self, wildcards) -> dict:
        """What identifies the Census that a job opens; how large its buffers are is a resource and reruns nothing."""
        return self.config.census.model_dump(include={"source", "path", "version"})

    def shuffle_seed(self, wildcards) -> int:
        """Seed of the order of a selection's cells; a benchmark keeps the order of the Census."""
        return self.config.corpus.shuffle_seed if wildcards.cells in self.corpora else 0

    def selection(self, wildcards) -> dict:
        """The config section of a selection: which cells of a corpus, or of a benchmark data set."""
        if wildcards.cells in self.corpora:
            return self.config.corpus.model_dump(
                include={"organisms", "include", "exclude", "quality", "splits", "held_out"}
            )
        return self.config.datasets[wildcards.cells].model_dump(include={"include", "quality", "label", "batch"})

    def held_out(self, wildcards) -> dict[str, dict]:
        """The benchmark data sets whose cells must not enter a corpus."""
        if wildcards.cells not in self.corpora:
            return {}
        organism = self.organism(wildcards)
        return {
            name: dataset.model_dump(include={"include", "hold_out"})
            for name, dataset in self.config.datasets.items()
            if self.organism_of[name] == organism
        }

    def quality(self, wildcards) -> dict:
        """The QC thresholds of a selection."""
        return self._quality(wildcards.cells).model_dump()

    def _quality(self, cells: str):
        section = self.config.corpus if cells in self.corpora else self.config.datasets[cells]
        return section.quality

    def recipe(self, wildcards) -> dict:
        """All that a model is trained by (not how its embeddings are read)."""
        recipe = asdict(self.run.models[wildcards.model])
        return {key: recipe[key] for key in ("architecture", "preset", "sizes", "training")}

    def architecture(self, wildcards) -> str:
        """The architecture of a model."""
        return self.run.models[wildcards.model].architecture

    def released_weights(self, wildcards) -> dict:
        """Where the weights of a released model are."""
        return asdict(self.run.models[wildcards.model].released)

    def sizes(self, wildcards) -> dict:
        """What an untrained model depends on."""
        recipe = asdict(self.run.models[wildcards.model])
        return {key: recipe[key] for key in ("architecture", "preset", "sizes")}

    def embedding(self, wildcards) -> dict:
        """How a model's embeddings are read."""
        return asdict(self.run.models[wildcards.model].embedding)

    def threads(self, wildcards) -> int:
        """CPU threads of one process of a model's training, and of its embedding."""
        return self.run.models[wildcards.model].training.threads

    def training_threads(self, wildcards) -> int:
        """CPU threads of all processes that train a model on one machine."""
        training = self.run.models[wildcards.model].training
        return training.ranks * training.threads

    def training_memory(self, wildcards) -> int:
        """Megabytes, on each machine that trains a model."""
        return 4000 * self.run.models[wildcards.model].training.ranks

    def nodes(self, wildcards) -> int | None:
        """Machines that train a model, where there are several; for SLURM also its tasks, one a machine."""
        nodes = self.run.models[wildcards.model].training.nodes
        return nodes if nodes > 1 else None

    def step_starter(self, wildcards) -> str | None:
        """What starts a task on each of several machines: SLURM's plugin then leaves it to the job."""
        return "srun" if self.nodes(wildcards) else None

    def pretrain_code(self, wildcards) -> str:
        """Code version of training a model."""
        return code_version("pretrain", self._architecture_file(wildcards))

    def import_released_code(self, wildcards) -> str:
        """Code version of reading released weights."""
        return code_version("import_released", f"released/{self.architecture(wildcards)}.py")

    def embed_code(self, wildcards) -> str:
        """Code version of embedding with a model."""
        return code_version("embed_model", self._architecture_file(wildcards))

    def embed_untrained_code(self, wildcards) -> str:
        """Code version of embedding with a model's untrained twin."""
        return code_version("embed_untrained", self._architecture_file(wildcards))

    def score_pretraining_code(self, wildcards) -> str:
        """Code version of a model's held-out losses."""
        return code_version("score_pretraining", self._architecture_file(wildcards))

    def score_yardstick_code(self, wildcards) -> str:
        """Code version of asking a model for hidden genes."""
        return code_version("score_yardstick", self._architecture_file(wildcards))

    def score_code(self, wildcards) -> str:
        """Code version of a task."""
        return code_version("score", module_file("tasks", self.run.tasks[wildcards.task].task))

    def _architecture_file(self, wildcards) -> str:
        return module_file("models", self.run.models[wildcards.model].architecture)

    def dataset(self, wildcards) -> dict:
        """The config section of a benchmark data set."""
        return self.config.datasets[wildcards.dataset].model_dump()

    def batch(self, wildcards) -> dict:
        """The columns of a data set that baselines may use."""
        dataset = self.config.datasets[wildcards.cells]
        return {"label": dataset.label, "batch": dataset.batch, "min_cells_per_label": dataset.min_cells_per_label}

    def task(self, wildcards) -> dict:
        """A task and its settings."""
        return asdict(self.run.tasks[wildcards.task])

    def config_hash(self, wildcards) -> str:
        """Hash of the part of the config that a scoring job's rows depend on."""
        model = getattr(wildcards, "model", getattr(wildcards, "method", None))
        parts = {
            "census": self.config.census.model_dump(exclude={"buffer_mb"}),
            "corpus": self.config.corpus.model_dump(),
            "seeds": self.seeds,
            "model": asdict(self.run.models[model]) if model in self.run.models else model,
            "dataset": self.config.datasets[wildcards.dataset].model_dump() if hasattr(wildcards, "dataset") else None,
            "task": asdict(self.run.tasks[wildcards.task]) if hasattr(wildcards, "task") else "pretraining",
        }
        return content_hash(parts)

    def resolved(self, wildcards=None) -> dict:
        """The whole config with the models and tasks that it names, for the report."""
        return self.config.model_dump(mode="json") | {
            "models": {name: asdict(recipe) for name, recipe in self.run.models.items()},
            "tasks": {name: asdict(recipe) for name, recipe in self.run.tasks.items()},
        }

    def corpus_config(self, wildcards=None) -> dict:
        """The parts of the config that the corpus page depends on."""
        parts = {"run", "census", "corpus", "datasets"}
        return self.config.model_dump(mode="json", include=parts, exclude={"census": {"buffer_mb"}})

    def command(self, configfiles: list[str]) -> str:
        """The command that makes this run again."""
        return f"snakemake --cores all --configfile {' '.join(str(path) for path in configfiles)}"


def module_file(room: str, name: str) -> str:
    """The source of an architecture or task: relative to the package, or that of a user's own module (a dotted path).

    Raises
    ------
    CellmillError
        If the user's module is not found.
    """
    if "." not in name:
        return f"{room}/{name}.py"
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise CellmillError(f"the module '{name}' is not found; check its path and PYTHONPATH")
    return spec.origin


def one_of(names: list[str]) -> str:
    """A regular expression of exactly these names, for a wildcard constraint."""
    return "|".join(re.escape(name) for name in names) or "(?!)"


def point_environments_here() -> None:
    """Set CELLMILL_HOME, with which the conda files of ``envs/`` name the lock of versions and this package."""
    os.environ["CELLMILL_HOME"] = str(PROJECT)
