"""All scores in one table, with each value also on the scale that the task's controls span (docs/scores.md)."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.scores import COLLECTED, SCHEMA, read, sort

SCALE = ["run", "task", "dataset", "split", "regime", "metric"]
"""Columns of the values that share one scale."""
COINCIDE = 1e-9
"""Controls that are no further apart than so much of their size span no scale."""


def collect(paths: list[Path], parquet: Path, csv: Path) -> None:
    """Join the score files `paths` into one table, sorted by its key columns, and write it as parquet and as CSV.

    Raises
    ------
    CellmillError
        If there is no file, one is not a table of scores, or a key occurs twice.
    """
    if not paths:
        raise CellmillError("there are no scores to collect; name at least one task and one data set in the config")
    parts = [read(path).select(SCHEMA.names) for path in paths]
    table = with_scaled(sort(pa.concat_tables(parts), str(parquet)))
    with atomic(parquet) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    with atomic(csv) as temporary:
        pa.csv.write_csv(table, temporary)


def with_scaled(table: pa.Table) -> pa.Table:
    """`table` with the column `scaled`: (value - worst control) / (best control - worst control).

    A control's place is the mean of its values over seeds; which control is best and which worst is told by these
    values and the metric's direction, for each metric anew. Nothing is clipped: below 0 is worse than the worst
    control, above 1 better than the best one. Null where there is no value, fewer than two controls, or they coincide.
    """
    controls = table.filter((pc.field("kind") == "control") & pc.field("value").is_valid())
    means = controls.group_by([*SCALE, "model", "higher_is_better"], use_threads=False).aggregate([("value", "mean")])
    ends = means.group_by([*SCALE, "higher_is_better"], use_threads=False).aggregate(
        [("value_mean", "max"), ("value_mean", "min")]
    )
    rows = pa.table({**{name: table[name] for name in SCALE}, "row": pa.array(range(table.num_rows), pa.int64())})
    ends = rows.join(ends, SCALE, join_type="left outer", use_threads=False).sort_by("row")
    best = pc.if_else(ends["higher_is_better"], ends["value_mean_max"], ends["value_mean_min"])
    worst = pc.if_else(ends["higher_is_better"], ends["value_mean_min"], ends["value_mean_max"])
    span = pc.subtract(best, worst)
    size = pc.max_element_wise(pc.abs(best), pc.abs(worst))
    spans = pc.greater(pc.abs(span), pc.multiply(size, COINCIDE))
    scaled = pc.if_else(spans, pc.divide(pc.subtract(table["value"], worst), span), None)
    return table.append_column("scaled", scaled).select(COLLECTED.names).cast(COLLECTED)
