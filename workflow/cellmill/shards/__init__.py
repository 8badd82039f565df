"""Shards v1: packed parquet cells, their manifest, and the loader that streams them (``docs/shards.md``)."""
