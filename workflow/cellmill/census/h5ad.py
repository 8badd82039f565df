"""Raw counts out of any h5ad: found in X, raw/X or layers/counts, checked, and read in chunks of rows.

Shape legend: D = cells of a chunk, G = genes of the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from cellmill.census.organisms import SAID_IN
from cellmill.errors import CellmillError

LAYERS = ("X", "raw/X", "layers/counts")
CHUNK = 2048
LARGEST = 2**24
"""float32, the type of X/raw in a Census, holds every whole number up to this."""


@dataclass(frozen=True)
class H5ad:
    """One h5ad whose raw counts were found.

    `var` are the genes of `layer`, indexed by name (those of ``raw/var`` where the counts are in ``raw/X``); of `uns`
    only what may say the organism is kept.
    """

    path: Path
    layer: str
    obs: pd.DataFrame
    var: pd.DataFrame
    uns: dict


def find_h5ads(folder: Path) -> list[Path]:
    """The ``.h5ad`` files of a folder, sorted by name; a missing or empty folder is a `CellmillError`."""
    if not folder.is_dir():
        raise CellmillError(f"the folder of .h5ad files {folder} does not exist; name one that does in census.path")
    found = sorted(path for path in folder.glob("*.h5ad") if not path.name.startswith("."))
    if not found:
        raise CellmillError(f"the folder {folder} holds no .h5ad file; put at least one there")
    return found


def unreadable(path: Path, error: Exception) -> CellmillError:
    """The error for a file that HDF5 or anndata cannot read."""
    said = " ".join(str(error).split())[:200]
    return CellmillError(
        f"{path} cannot be read as .h5ad: it is truncated, corrupt or of another format ({said}); copy it again"
    )


def open_h5ad(path: Path) -> H5ad:
    """Read obs and var of an h5ad and find its raw counts.

    Parameters
    ----------
    path
        The file. Its counts are the first of ``X``, ``raw/X`` and ``layers/counts`` whose first rows are raw counts.

    Returns
    -------
    H5ad

    Raises
    ------
    CellmillError
        If the file is missing, truncated, corrupt or empty, or holds no raw counts.
    """
    if not path.is_file():
        raise CellmillError(f"{path} does not exist; name an .h5ad file that does")
    try:
        with h5py.File(path, "r") as file:
            present = [layer for layer in LAYERS if layer in file]
            obs, var = read_elem(file["obs"]), read_elem(file["var"])
            raw_var = read_elem(file["raw/var"]) if "raw/X" in file else var
            uns = {key: read_elem(file[f"uns/{key}"]) for key in SAID_IN if f"uns/{key}" in file}
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise unreadable(path, error) from error
    if not isinstance(obs, pd.DataFrame) or not isinstance(var, pd.DataFrame):
        raise CellmillError(f"{path} is of an anndata format before 0.7; open and write it with a current anndata")
    if not present:
        raise CellmillError(f"{path} holds no X; write the raw counts there")
    if len(obs) == 0:
        raise CellmillError(f"{path} holds no cells; leave it out")
    faults = []
    for layer in present:
        found = H5ad(path, layer, obs, raw_var if layer == "raw/X" else var, uns)
        if len(found.var) == 0:
            raise CellmillError(f"{path} holds no genes in {layer}; leave it out")
        try:
            next(read_chunks(found))
        except NotCounts as fault:
            faults.append(fault)
        else:
            return found
    raise faults[0]


class NotCounts(CellmillError):
    """A value that is no raw count."""


def check_counts(counts_DG: sp.csr_matrix, h5ad: H5ad, start: int) -> None:
    """Raise `NotCounts` unless every value is a whole number from 0 to 2**24; `start` is the row of the first cell."""
    values = counts_DG.data
    # NaN fails every comparison, so it is caught by the first.
    good = (values >= 0) & (values <= LARGEST) & (values == np.rint(values))
    if good.all():
        return
    at = int(np.flatnonzero(~good)[0])
    value = float(values[at])
    cell = h5ad.obs.index[start + int(np.searchsorted(counts_DG.indptr, at, side="right")) - 1]
    gene = h5ad.var.index[counts_DG.indices[at]]
    if np.isnan(value):
        what = "is not a number (NaN)"
    elif value < 0:
        what = f"is negative ({value:g})"
    elif value > LARGEST:
        what = f"is {value:g}, above the largest count that a Census can hold ({LARGEST})"
    else:
        what = f"is {value:g}, no whole number (normalised or log-transformed, or expected counts that want rounding)"
    raise NotCounts(
        f"{h5ad.path}: {h5ad.layer} holds no raw counts: gene {gene} of cell {cell} {what}; "
        "put raw counts into X, raw/X or layers/counts"
    )


class DenseReader:
    """Rows of a dense matrix on disk, as CSR float32."""

    def __init__(self, stored: h5py.Dataset):
        self._stored = stored
        self.shape = tuple(stored.shape)

    def __call__(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop`."""
        return sp.csr_matrix(self._stored[start:stop].astype(np.float32))


class SparseReader:
    """Rows of a CSR or CSC matrix on disk, as CSR float32; a CSC matrix is read whole."""

    def __init__(self, stored: h5py.Group):
        self.shape = tuple(int(n) for n in stored.attrs["shape"])
        if stored.attrs["encoding-type"] == "csc_matrix":
            matrix = read_elem(stored).tocsr()
            self._data, self._indices, self._indptr = matrix.data, matrix.indices, matrix.indptr
        else:
            self._data, self._indices, self._indptr = stored["data"], stored["indices"], stored["indptr"][:]
        ends = (self._indptr[0], self._indptr[-1])
        if len(self._indptr) != self.shape[0] + 1 or ends != (0, len(self._data)) or (np.diff(self._indptr) < 0).any():
            raise OSError("the row pointers of its sparse matrix do not fit its values")

    def __call__(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows `start` to `stop`."""
        indptr = self._indptr[start : stop + 1]
        span = slice(int(indptr[0]), int(indptr[-1]))
        data, indices = self._data[span].astype(np.float32), self._indices[span]
        if len(indices) and (indices.min() < 0 or indices.max() >= self.shape[1]):
            raise OSError("its sparse matrix points at genes that do not exist")
        return sp.csr_matrix((data, indices, indptr - indptr[0]), shape=(stop - start, self.shape[1]))


def read_chunks(h5ad: H5ad, rows: int = CHUNK) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Read the counts in chunks of whole cells, checked.

    CSR and dense matrices are read from disk chunk by chunk; a CSC matrix is column-major and is read whole.

    Parameters
    ----------
    h5ad
        From `open_h5ad`.
    rows
        Cells per chunk.

    Yields
    ------
    start, counts_DG
        Row of the first cell; the counts, float32 [D, G].

    Raises
    ------
    CellmillError
        If the file is corrupt or a value is no raw count.
    """
    try:
        with h5py.File(h5ad.path, "r") as file:
            stored = file[h5ad.layer]
            read = DenseReader(stored) if isinstance(stored, h5py.Dataset) else SparseReader(stored)
            n_cells, n_genes = read.shape
            if (n_cells, n_genes) != (len(h5ad.obs), len(h5ad.var)):
                raise OSError(
                    f"{h5ad.layer} is {n_cells} x {n_genes}, obs and var are {len(h5ad.obs)} x {len(h5ad.var)}"
                )
            for start in range(0, n_cells, rows):
                counts_DG = read(start, min(start + rows, n_cells))
                check_counts(counts_DG, h5ad, start)
                yield start, counts_DG
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise unreadable(h5ad.path, error) from error
