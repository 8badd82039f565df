"""The command line of training: what a run of it left behind, and what to know before one."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from cellmill.errors import CellmillError
from cellmill.files import atomic

LINES = 20
"""Of a table that is printed."""


def show_batch(
    path: Annotated[Path, typer.Argument(help="offending_batch.json that a stopped training wrote, or its folder.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a checkpoint or training state: the batch is run again, cell by cell."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Show so many cells at most.")] = 20,
):
    """Show the batch that stopped a training, and with --model which term and cell are worst."""
    from cellmill.training.offending_batch import badness, batch_terms, cell_terms, load_batch, load_model

    batch = load_batch(path)
    print(f"{batch.reason} (seed {batch.seed}, {batch.model['architecture']}, micro batches: {len(batch.parts)})")
    print("measured: " + ", ".join(f"{name} {value:.6g}" for name, value in batch.values.items()))
    if batch.gradient_norms:
        print_table(
            ["parameter", "norm of its gradient"],
            [[name, f"{norm:.6g}"] for name, norm in batch.gradient_norms.items()],
        )
    cells = batch.cells
    columns = {
        "soma_joinid": cells.joinids.tolist(),
        "data set": batch.datasets or ["unknown"] * len(cells),
        "genes": cells.lengths.tolist(),
        "raw counts": cells.totals.tolist(),
    }
    order, note = range(len(cells)), ""
    if model is not None:
        loaded = load_model(model, batch)
        again, alone = batch_terms(loaded, batch), cell_terms(loaded, batch)
        columns |= {term: [f"{terms[term]:.6g}" for terms in alone] for term in again}
        print(f"run again with {model}: " + ", ".join(f"{term} {value:.6g}" for term, value in again.items()))
        for term in again:
            row = max(range(len(alone)), key=lambda i: badness(alone[i][term]))
            print(f"worst in {term}: cell {cells.joinids[row]}, {alone[row][term]:.6g}")
        order = sorted(order, key=lambda i: -max(map(badness, alone[i].values())))
        note = ", the worst first"
    print(f"{len(cells)} cells of {_counted(columns['data set'])}{note}:")
    print_table(list(columns), [[str(values[i]) for values in columns.values()] for i in list(order)[:rows]])


def find_learning_rate(
    config: Annotated[Path, typer.Option(help="The run's YAML, such as config/demo.yaml; its shards must be there.")],
    model: Annotated[str, typer.Option(help="One of the run's models.")],
    steps: Annotated[int, typer.Option(help="Training steps to take.")] = 100,
    seed: Annotated[int, typer.Option(help="Decides weights and cells.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for MODEL.csv and MODEL.svg. Default: results/RUN/learning_rate.")
    ] = None,
):
    """Find a learning rate: train for a few steps while it grows, and see where the loss falls fastest."""
    from cellmill.config import load, read_yaml
    from cellmill.flow import Flow
    from cellmill.provenance import PROJECT
    from cellmill.shards.dataset import Shards
    from cellmill.shards.statistics import load_statistics
    from cellmill.training.find_rate import find_rate

    flow = Flow(load(read_yaml(config), PROJECT))
    if model not in flow.trained:
        raise CellmillError(
            f"{config} trains no model '{model}'; name one of {', '.join(flow.trained) or 'its models'}"
        )
    results = Path(flow.results)
    if not (results / "statistics.safetensors").is_file():
        raise CellmillError(
            f"{results} has no shards and statistics yet; make them with "
            f"`snakemake --cores all --configfile {config} {results}/statistics.safetensors`"
        )
    shards = Shards(results / "shards" / "corpus")
    statistics = load_statistics(results / "statistics.safetensors", shards.vocabulary_hash)
    test = find_rate(shards, statistics, flow.run.models[model], seed=seed, steps=steps, name=model)
    folder = out or results / "learning_rate"
    table, chart = folder / f"{model}.csv", folder / f"{model}.svg"
    header = ["learning_rate", "loss", "smoothed_loss"]
    lines = list(zip(test.rates_T.tolist(), test.losses_T.tolist(), test.smoothed_T.tolist(), strict=True))
    with atomic(table) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *lines])
    stride = math.ceil(len(lines) / LINES)
    print_table(header, [[f"{rate:.2e}", f"{loss:.4f}", f"{mean:.4f}"] for rate, loss, mean in lines[::stride]])
    if test.suggestion is None:
        print("the loss never falls: look at the data, or take more steps (--steps)")
    else:
        print(f"suggestion: learning_rate: {test.suggestion:.1e} (the loss falls fastest)")
    if test.divergence is not None:
        print(f"training diverges from {test.divergence:.1e}")
    try:
        from cellmill.report.rate_chart import write_chart

        write_chart(test, f"{model}, {len(lines)} steps", chart)
        print(f"{table} and {chart} are written")
    except ModuleNotFoundError as error:
        print(f"{table} is written; there is no chart without the package {error.name}")


def export_tensorboard(
    run_folder: Annotated[Path, typer.Argument(help="The run's results, such as results/demo.")],
    out: Annotated[Path, typer.Option(help="Folder for TensorBoard's files; show it with `tensorboard --logdir`.")],
):
    """Write the training logs of all models and seeds of a run for TensorBoard."""
    from cellmill.training.tensorboard import export

    logs = export(run_folder, out)
    print(f"{out}: {len(logs)} logs; show them with `tensorboard --logdir {out}`")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns of text, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for line in (header, *rows):
        others = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
        print("  ".join([line[0].ljust(widths[0]), *others]))


def _counted(names: list[str]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in Counter(names).most_common())


COMMANDS = (show_batch, find_learning_rate, export_tensorboard)
