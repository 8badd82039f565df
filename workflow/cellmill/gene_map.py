"""From the genes of some shards to those of a model that has a vocabulary of its own, as a released one does.

Legend: B cells, N nonzeros, V genes of the shards.
"""

from typing import Literal

import numpy as np

from cellmill.errors import CellmillError
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import argsort_within, select, sum_within

MIN_SHARE = 0.05
"""Fewer common genes than this share of the model's are a mistake."""


class GeneMap:
    """Which of a model's genes each gene of a vocabulary is.

    A model's gene is an Ensembl id (a version at its end is ignored) or a symbol; both are matched as they are. Where
    two genes of the vocabulary have the same symbol, the first is taken.

    Parameters
    ----------
    feature_ids, feature_names
        Of the V genes of the shards: Ensembl ids and symbols.
    genes
        Of the model, in the order of its ids.

    Attributes
    ----------
    gene_V
        int32 [V], the model's gene, or -1.

    Raises
    ------
    CellmillError
        If hardly any gene is common to both: the model is of another species or identifier.
    """

    def __init__(self, feature_ids: list[str], feature_names: list[str], genes: list[str]):
        place = {}
        for number, gene in enumerate(genes):
            place.setdefault(_key(gene), number)
        self.gene_V = np.full(len(feature_ids), -1, np.int32)
        for row, names in enumerate(zip(feature_ids, feature_names, strict=True)):
            found = next((place.pop(key) for key in map(_key, names) if key in place), -1)
            self.gene_V[row] = found
        self.n_common = int((self.gene_V >= 0).sum())
        if self.n_common < MIN_SHARE * len(genes):
            raise CellmillError(
                f"only {self.n_common} of the model's {len(genes)} genes ({', '.join(genes[:3])}, ...) are among the "
                f"{len(feature_ids)} of the cells ({feature_ids[0]}, {feature_names[0]}, ...); take cells of the "
                "model's species, or the model's own list of genes"
            )
        self._sorted = bool((np.diff(self.gene_V[self.gene_V >= 0]) > 0).all())

    def apply(self, cells: CellBatch, totals: Literal["all", "known"] = "all") -> CellBatch:
        """`cells` with the model's gene ids, ascending; genes that it does not have are left out.

        Parameters
        ----------
        cells
            Of the vocabulary.
        totals
            ``all``: those of the cells, over all measured genes. ``known``: over the genes that the model has.
        """
        known = select(cells, self.gene_V[cells.genes] >= 0)
        genes_N, counts_N = self.gene_V[known.genes], known.counts
        if not self._sorted:
            order_N = argsort_within(known.offsets, genes_N.astype(np.uint32))
            genes_N, counts_N = genes_N[order_N], counts_N[order_N]
        totals_B = known.totals if totals == "all" else sum_within(known.offsets, counts_N)
        return CellBatch(known.joinids, known.offsets, genes_N, counts_N, totals_B, known.codes)


def _key(gene: str) -> str:
    """An Ensembl id without its version; a symbol as it is (some hold a point)."""
    return gene.partition(".")[0] if gene.startswith("ENS") and "." in gene else gene
