"""A reader of shards written from docs/shards.md alone: it imports nothing of cellmill and unpacks cell by cell."""

import hashlib
import json
import struct
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq


def read_folder(folder: Path, split: str):
    """Yield (metadata as a dict, gene ids, counts) of every cell of a split, checking all that the page promises."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["format"], manifest["version"]) == ("cellmill-shards", 1)
    assert "/" not in manifest["created_by"]
    everything = [shard for shards in manifest["splits"].values() for shard in shards]
    for key in ("cells", "nonzeros", "bytes"):
        assert manifest["totals"][key] == sum(shard[key] for shard in everything)
    for shard in manifest["splits"][split]:
        yield from read_shard(folder, shard, manifest["vocabulary"]["n_genes"])


def read_shard(folder: Path, shard: dict, n_vocabulary: int):
    """Yield the cells of one shard of the manifest."""
    content = (folder / shard["file"]).read_bytes()
    assert len(content) == shard["bytes"]
    assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    file = pq.ParquetFile(folder / shard["file"])
    assert file.metadata.metadata[b"cellmill.format"] == b"cellmill-shard"
    assert file.metadata.metadata[b"cellmill.version"] == b"1"
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == shard["row_groups"]
    assert file.schema_arrow.names[-4:] == ["genes", "genes_overflow", "counts", "counts_overflow"]
    nonzeros = cells = 0
    for row in file.read().to_pylist():
        packed = {name: row.pop(name) for name in ("genes", "genes_overflow", "counts", "counts_overflow")}
        genes, counts = unpack(**packed, n=row["n_genes"])
        assert genes == sorted(set(genes))
        assert not genes or genes[-1] < n_vocabulary
        assert row["total_counts"] >= sum(counts)
        assert row["n_measured_genes"] >= row["n_genes"]
        nonzeros += len(genes)
        cells += 1
        yield row, genes, counts
    assert (cells, nonzeros) == (shard["cells"], shard["nonzeros"])


def unpack(
    genes: bytes, genes_overflow: bytes, counts: bytes, counts_overflow: bytes, n: int
) -> tuple[list[int], list[int]]:
    """The gene ids and counts of one cell."""
    assert len(genes) == len(counts) == n
    assert 0 not in counts
    assert 0 not in genes[1:]
    return list(accumulate(widen(genes, genes_overflow, "H"))), widen(counts, counts_overflow, "I")


def widen(values: bytes, overflow: bytes, wide: str) -> list[int]:
    """The numbers of one packed column of a cell; in place of every byte 255 one of the overflow."""
    large = iter(struct.unpack(f"<{values.count(255)}{wide}", overflow))
    return [next(large) if value == 255 else value for value in values]
