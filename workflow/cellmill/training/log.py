"""The tidy log of a training run: one row a metric and step."""

import pyarrow as pa

LOG = "log.parquet"
LOG_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # optimiser steps done
        ("split", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("seconds", pa.float64()),  # of training so far, over all processes
    ]
)
MACHINE = "machine"
"""The split of what `cellmill.training.meter` measures. It depends on the machine, as `seconds` does; all other rows of
a run on the CPU are the same whenever and however often it was interrupted."""


class Log:
    """Rows of `LOG_SCHEMA`, on top of those of earlier processes.

    The splits are ``train`` (loss, its terms, learning_rate, gradient_norm; cells, genes: read so far),
    ``validation`` (loss, its terms) and `MACHINE`.
    """

    def __init__(self, before: pa.Table | None = None):
        self.before = before or LOG_SCHEMA.empty_table()
        self.rows = []

    def add(self, step: int, split: str, values: dict[str, float], seconds: float) -> None:
        """One row for every metric in `values`."""
        for metric, value in values.items():
            row = {"step": step, "split": split, "metric": metric, "value": value, "seconds": seconds}
            self.rows.append(row)

    def table(self) -> pa.Table:
        """All rows so far."""
        self.before = pa.concat_tables([self.before, pa.Table.from_pylist(self.rows, LOG_SCHEMA)]).combine_chunks()
        self.rows = []
        return self.before
