"""``manifest.json``: what a folder of shards holds and where it came from (``docs/shards.md``)."""

import json
from pathlib import Path

import cellmill
from cellmill.errors import CellmillError
from cellmill.files import atomic, sha256
from cellmill.shards.format import MANIFEST, MAX_GENES, corrupt

FORMAT, VERSION = "cellmill-shards", 1
_KEYS = ("organism", "census", "selection", "vocabulary", "splits", "totals")
_SHARD_KEYS = ("file", "cells", "nonzeros", "bytes", "sha256", "row_groups")


def write_manifest(
    folder: str | Path,
    *,
    organism: str,
    census: dict,
    selection: dict,
    vocabulary_hash: str,
    n_genes: int,
    splits: dict[str, list[dict]],
) -> dict:
    """Write ``manifest.json`` beside its shards.

    The same arguments give the same bytes: it holds no times, and no absolute paths unless `census` or `selection` do.

    Parameters
    ----------
    folder
        Where the shards lie.
    organism
        Organism of the Census, such as homo_sapiens.
    census
        What identifies the Census: its version (or its folder's name) and build description.
    selection
        The filter and the QC thresholds that the cells passed.
    vocabulary_hash, n_genes
        Hash and number of genes of the vocabulary.
    splits
        For every split its shards in order, each as `ShardWriter.close` returned it.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    CellmillError
        If the vocabulary is too large, or a shard is missing or not the one described.
    """
    folder = Path(folder)
    if not 1 <= n_genes <= MAX_GENES:
        raise CellmillError(f"a vocabulary of {n_genes:,} genes does not fit shards; choose 1 to {MAX_GENES:,} genes")
    shards = [shard for split in splits.values() for shard in split]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"cellmill {cellmill.__version__}",
        "organism": organism,
        "census": census,
        "selection": selection,
        "vocabulary": {"hash": vocabulary_hash, "n_genes": n_genes},
        "splits": {name: [{key: shard[key] for key in _SHARD_KEYS} for shard in s] for name, s in splits.items()},
        "totals": {key: sum(shard[key] for shard in shards) for key in ("cells", "nonzeros", "bytes")},
    }
    _check_files(folder, manifest)
    with atomic(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """Read ``manifest.json`` and check that every shard is there with its size.

    Raises
    ------
    CellmillError
        If the manifest is missing, not JSON, incomplete or of an unknown version, or a shard is missing or has another
        size.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CellmillError(f"{path} does not exist; name a folder of shards, or make them first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CellmillError(f"{path} is not JSON ({error}); delete the folder and make the shards again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CellmillError(f"{path} is no manifest of shards; name a folder that cellmill wrote")
    if manifest.get("version") != VERSION:
        raise CellmillError(
            f"{path} has format version {manifest.get('version')}, this cellmill reads {VERSION}; update cellmill"
        )
    missing = [key for key in _KEYS if key not in manifest]
    shards = [shard for split in manifest.get("splits", {}).values() for shard in split]
    missing += [key for key in _SHARD_KEYS if any(key not in shard for shard in shards)]
    if missing:
        raise CellmillError(f"{path} lacks {', '.join(missing)}; delete the folder and make the shards again")
    _check_files(folder, manifest)
    return manifest


def verify_checksums(folder: str | Path) -> None:
    """Read every shard's bytes and compare their SHA-256 with the manifest's.

    Raises
    ------
    CellmillError
        As `read_manifest`, or if a shard's bytes changed.
    """
    folder = Path(folder)
    for shards in read_manifest(folder)["splits"].values():
        for shard in shards:
            found = sha256(folder / shard["file"])
            if found != shard["sha256"]:
                raise corrupt(folder / shard["file"], f"its SHA-256 is {found}, the manifest's is {shard['sha256']}")


def _check_files(folder: Path, manifest: dict) -> None:
    for shards in manifest["splits"].values():
        for shard in shards:
            path = folder / shard["file"]
            if not path.is_file():
                raise CellmillError(
                    f"shard {path} does not exist but the manifest names it: it was lost, or the manifest is that of "
                    f"another corpus; delete {folder} and run again"
                )
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise corrupt(
                    path, f"it has {size} bytes, the manifest says {shard['bytes']} (unless that is another corpus's)"
                )
