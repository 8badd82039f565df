"""DuckDB, polars and pandas read the metadata of shards without our code, and agree with it."""

import json
import sys
import time
from pathlib import Path

from harness import Options, Row, at_least, child, failure

READERS = ("duckdb", "polars", "pandas", "pyarrow")
COLUMN = "cell_type"


def count(reader: str, shards: str) -> dict[str, int]:
    """Cells of each type in all shards of a folder; imports nothing of cellmill."""
    files = f"{shards}/*.parquet"
    if reader == "duckdb":
        import duckdb

        return dict(duckdb.sql(f"SELECT {COLUMN}, count(*) FROM '{files}' GROUP BY {COLUMN}").fetchall())
    if reader == "polars":
        import polars

        table = polars.scan_parquet(files).group_by(COLUMN).len().collect()
        return dict(zip(table[COLUMN].cast(polars.String).to_list(), table["len"].to_list(), strict=True))
    paths = sorted(Path(shards).glob("*.parquet"))
    if reader == "pandas":
        import pandas

        table = pandas.concat([pandas.read_parquet(path, columns=[COLUMN]).astype(str) for path in paths])
        return table[COLUMN].value_counts().to_dict()
    import pyarrow.parquet

    table = pyarrow.concat_tables([pyarrow.parquet.read_table(path, columns=[COLUMN]) for path in paths])
    values = table.unify_dictionaries()[COLUMN].cast("string").value_counts()
    return {pair["values"]: pair["counts"] for pair in values.to_pylist()}


def measure(options: Options) -> list[Row]:
    """Whether each counts as many cells of each type as cellmill, and in how many seconds."""
    from collections import Counter

    from cellmill.shards.dataset import Shards
    from corpora import real_corpus

    folder = real_corpus(options)
    shards, ours, rows = Shards(folder), Counter(), []
    for split in shards.splits:
        ours.update(shards.obs(split)[COLUMN].to_pylist())
    for reader in READERS:
        what = f"cells per type by {reader}"
        try:
            theirs = child("reading.py", reader, str(folder), python=options.peers)
        except RuntimeError as error:
            rows.append(failure(what, error))
            continue
        if theirs["cells"] != dict(ours):
            rows.append(failure(what, ValueError(f"it counts {theirs['cells']}, cellmill {dict(ours)}")))
            continue
        cells, seen = sum(ours.values()), sum(theirs["cells"].values())
        note = f"{len(ours)} types, each the same; {theirs['seconds']:.3f} s, imports left out"
        rows.append(Row(what, seen, "cells", "cellmill", cells, at_least(1, "ratio"), note))
    return rows


if __name__ == "__main__":
    name, where = sys.argv[1:]
    count(name, where)
    start = time.perf_counter()
    counted = count(name, where)
    print(json.dumps({"seconds": time.perf_counter() - start, "cells": counted}))
