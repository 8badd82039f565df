"""Doublet scores: how much a cell looks like two cells of its own library, by scanpy's scrublet.

A doublet forms between cells that went through one machine together, so cells are scored against simulated doublets of
their own group: one data set, donor and assay. A group is the same whatever else is planned beside it, and everything
random is keyed by its name; so a cell's score does not depend on the number of jobs.

Legend: B cells of one read of obs, C cells of this job, P cells of one piece, V genes, N nonzeros of a piece.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse as sp

from cellmill.census.read import open_census, organism_obs
from cellmill.config import Census
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.progress import Progress
from cellmill.randomness import hash64

SCHEMA = pa.schema([("soma_joinid", pa.int64()), ("doublet_score", pa.float64())])
GROUP = ("dataset_id", "donor_id", "assay")
"""Columns of obs whose values name a group."""
MIN_CELLS = 100
"""Smaller groups hold too few pairs to simulate doublets from: their scores are null."""
MAX_CELLS = 20_000
"""Cells that scrublet sees at a time; larger groups are cut by a hash of the joinid."""
MAX_NONZEROS = 10_000_000
"""Nonzeros that scrublet sees at a time, for the sake of memory: deep groups are cut into smaller pieces."""
SETTINGS = {
    "use_approx_neighbors": False,  # exact ones are reproducible
    "mean_center": False,  # centred counts are dense: several times the memory for the same ranking of cells
    "threshold": 0.0,  # of a call that is not used; its search would ask for one more library
}


@dataclass(frozen=True)
class Group:
    """The planned cells of one data set, donor and assay."""

    name: str
    joinids: np.ndarray
    nonzeros: int

    def pieces(self) -> list[np.ndarray]:
        """The joinids in random parts of about equal size, each within `MAX_CELLS` and about `MAX_NONZEROS`."""
        n = max(-(-len(self.joinids) // MAX_CELLS), -(-self.nonzeros // MAX_NONZEROS))
        order = np.argsort(hash64("doublet piece", self.joinids), kind="stable")
        return [np.sort(self.joinids[part]) for part in np.array_split(order, n)]


def score_doublets(
    census: Census,
    path: Path | None,
    *,
    plan: Path,
    block: int,
    blocks: int,
    organism: str,
    seed: int,
    out: Path,
) -> None:
    """Score the groups of a selection that fall to one of `blocks` jobs, and write joinids and scores.

    A score lies between 0 and 1: the larger, the more simulated doublets are among the cell's neighbours. It is null
    for cells of groups under `MIN_CELLS`, of groups on which scrublet fails, and with fewer than three genes of the
    group; the log says which groups. Memory is that of one piece, whatever the size of a group; a group in several
    pieces is read once for each.

    Parameters
    ----------
    census, path
        The Census, as `cellmill.census.read.open_census` takes them.
    plan
        ``plan.parquet`` of the selection.
    block, blocks
        This job's number and how many there are; the hash of its name decides which job scores a group.
    organism
        Organism of the Census.
    seed
        Key of the simulated doublets.
    out
        Parquet with the columns of `SCHEMA`, ascending joinids.

    Raises
    ------
    CellmillError
        The plan names cells that the Census does not have.
    """
    with open_census(census, path) as collection:
        groups = _groups(organism_obs(collection, organism), plan, block, blocks)
        n_cells = sum(len(group.joinids) for group in groups)
        rna = collection["census_data"][organism].ms["RNA"]
        n_genes = rna.var.count
        scored = [(np.zeros(0, np.int64), np.zeros(0))]
        done = 0
        with Progress(f"doublets, block {block}", n_cells) as progress:
            for group in groups:
                if len(group.joinids) < MIN_CELLS:
                    progress.say(f"no scores for {group.name}: {len(group.joinids)} cells, fewer than {MIN_CELLS}")
                    pieces, scores = [group.joinids], [np.full(len(group.joinids), np.nan)]
                else:
                    pieces = group.pieces()
                    scores = []
                    for number, joinids_P in enumerate(pieces):
                        counts_PV = _read_counts(rna.X["raw"], joinids_P, n_genes)
                        state = int(hash64(seed, "scrublet", group.name, number)[0] >> np.uint64(33))
                        scores.append(_scrublet(counts_PV, state, group.name, progress))
                        progress.update(done + sum(map(len, scores)))
                done += len(group.joinids)
                progress.update(done)
                scored += zip(pieces, scores, strict=True)
    joinids_C, scores_C = (np.concatenate(column) for column in zip(*scored, strict=True))
    order = np.argsort(joinids_C)
    table = pa.table([joinids_C[order], pa.array(scores_C[order], from_pandas=True)], schema=SCHEMA)  # NaN becomes null
    with atomic(out) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _groups(obs, plan: Path, block: int, blocks: int) -> list[Group]:
    """The groups of one job by name; of other jobs' cells none is held longer than one read."""
    joinids: dict[str, list[np.ndarray]] = {}
    nonzeros: dict[str, int] = {}
    batches = pq.ParquetFile(plan, pre_buffer=False).iter_batches(columns=["soma_joinid", "nnz"])
    for planned in batches:  # buffered, the whole plan would stay in memory
        joinid_B, nnz_B = planned["soma_joinid"].to_numpy(), planned["nnz"].to_numpy()
        names, name_B = np.unique(_names(obs, joinid_B), return_inverse=True)
        own = [int(hash64("doublet block", name)[0] % np.uint64(blocks)) == block for name in names]
        for code in np.flatnonzero(own):
            mask_B, name = name_B == code, str(names[code])
            joinids.setdefault(name, []).append(joinid_B[mask_B])
            nonzeros[name] = nonzeros.get(name, 0) + int(nnz_B[mask_B].sum())
    return [Group(name, np.concatenate(joinids[name]), nonzeros[name]) for name in sorted(joinids)]


def _names(obs, joinid_B: np.ndarray) -> np.ndarray:
    """Object [B], the name of each cell's group, such as ``data set D, donor H1, assay 10x 3' v3``."""
    stale = CellmillError("the plan names cells that this Census does not have; plan the selection anew")
    if joinid_B[-1] > obs.domain[0][1]:
        raise stale
    coords = _coordinates(joinid_B)
    table = obs.read((coords,), column_names=["soma_joinid", *GROUP], result_order="row-major").concat()
    found = table["soma_joinid"].to_numpy()
    rows_B = np.minimum(np.searchsorted(found, joinid_B), max(len(found) - 1, 0))
    if not len(found) or (found[rows_B] != joinid_B).any():
        raise stale
    columns = [table[name].take(pa.array(rows_B)).cast(pa.string()).fill_null("unknown") for name in GROUP]
    dataset, donor, assay = columns
    return pc.binary_join_element_wise("data set ", dataset, ", donor ", donor, ", assay ", assay, "").to_numpy()


def _coordinates(joinids_P: np.ndarray) -> slice | pa.Array:
    """Ascending joinids as one slice, which is far quicker than a list of points unless few cells of it are wanted."""
    span = int(joinids_P[-1] - joinids_P[0]) + 1
    return slice(int(joinids_P[0]), int(joinids_P[-1])) if span <= 2 * len(joinids_P) else pa.array(joinids_P)


def _read_counts(X, joinids_P: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """float32 [P, V], the raw counts of cells with ascending joinids."""
    coords = _coordinates(joinids_P)
    parts = []
    for table in X.read((coords,)).tables():
        joinid_N, gene_N, count_N = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
        row_N = np.minimum(np.searchsorted(joinids_P, joinid_N), len(joinids_P) - 1)
        wanted = joinids_P[row_N] == joinid_N
        part = (row_N[wanted].astype(np.int32), gene_N[wanted].astype(np.int32), count_N[wanted].astype(np.float32))
        parts.append(part)
    row_N, gene_N, count_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    return sp.csr_matrix((count_N, (row_N, gene_N)), shape=(len(joinids_P), n_genes))


def _scrublet(counts_PV: sp.csr_matrix, random_state: int, name: str, progress: Progress) -> np.ndarray:
    """float64 [P], scrublet's scores, NaN where there is none; a failure is said with the group's name."""
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(counts_PV)
    try:
        sc.pp.scrublet(adata, random_state=random_state, verbose=False, **SETTINGS)
    except (ValueError, IndexError, ArithmeticError) as error:  # too few variable genes, or cells that are all alike
        reason = " ".join(str(error).split())[:200]
        progress.say(f"warning: no scores for {name}: scrublet fails on its {adata.n_obs:,} cells ({reason})")
        return np.full(adata.n_obs, np.nan)
    scores_P = adata.obs["doublet_score"].to_numpy(np.float64)
    if missing := int(np.isnan(scores_P).sum()):
        progress.say(f"warning: no scores for {missing:,} of {len(scores_P):,} cells of {name}: too few genes")
    return scores_P
