"""Read-depth enhancement: what a cell's genes would be if it were sequenced to another depth (scFoundation's T and S).

Hao et al., Nature Methods 21, 1481 (2024). The model is shown a cell with its own depth S and asked for the depth T; it
was trained to predict cells from thinned copies of them, told both depths. As in the released code nothing is masked.

Legend: B cells, V genes, G of them asked for.
"""

import numpy as np
import torch

from cellmill.errors import CellmillError
from cellmill.models.base import to_device
from cellmill.models.scfoundation import Scfoundation
from cellmill.progress import Progress
from cellmill.shards.batch import CellBatch

HIGHEST = 12.0
"""log10 of the deepest target: far beyond any cell, where a slip of the pen begins."""


def target_counts(depth: str | np.ndarray, totals_B: np.ndarray) -> np.ndarray:
    """Total counts that are asked for, float64 [B].

    Parameters
    ----------
    depth
        As in the released code: ``t4.5``, 10^4.5 counts; ``a1``, ten to the power 1 times the cell's own; ``f2``, twice
        the cell's own. Or the counts themselves, [B].
    totals_B
        The cells' own total counts.

    Raises
    ------
    CellmillError
        If `depth` is none of these, or a target is not positive and finite, or above 10^12.
    """
    own_B = np.maximum(totals_B, 1).astype(np.float64)
    if isinstance(depth, str):
        try:
            number = float(depth[1:])
            target_B = {"t": 0 * own_B + 10.0**number, "a": own_B * 10.0**number, "f": own_B * number}[depth[:1]]
        except (ValueError, KeyError, OverflowError) as error:
            raise CellmillError(
                f"the depth '{depth}' is not understood; give t4.5 (log10 of total counts), a1 (added to the cell's "
                "own log10) or f2 (times the cell's own counts)"
            ) from error
    else:
        target_B = np.asarray(depth, np.float64)
        if target_B.shape != own_B.shape:
            raise CellmillError(
                f"{len(own_B)} cells were given target counts of shape {target_B.shape}; give one for each cell"
            )
    if not ((target_B >= 1) & (target_B <= 10.0**HIGHEST)).all():
        raise CellmillError(
            f"the depth {depth} asks for less than 1 or more than 10^{HIGHEST:.0f} counts of a cell; choose another"
        )
    return target_B


def enhance(
    model: Scfoundation,
    cells: CellBatch,
    depth: str | np.ndarray,
    genes: np.ndarray | None = None,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> np.ndarray:
    """Values of genes as the model expects them at another read depth.

    Parameters
    ----------
    model
        An scFoundation, on any device; its mode is left as it was.
    cells
        B cells, in the model's vocabulary.
    depth
        See `target_counts`.
    genes
        Ids of the G genes; by default all V.
    batch_size
        Cells per forward pass, each of which takes a third of a GB (of the preset `small`, at 20,000 genes); the result
        depends on it by rounding alone.
    progress
        False keeps silent.

    Returns
    -------
    np.ndarray
        float32 [B, G], log1p(CP10k); unlike counts, it may be slightly negative.

    Raises
    ------
    CellmillError
        If the model has no depth tokens, a gene or a depth is impossible.
    """
    if not isinstance(model, Scfoundation):
        raise CellmillError(
            f"a {type(model).__name__} has no target depth; give a model of the architecture scfoundation"
        )
    genes_G = np.arange(model.n_genes) if genes is None else np.asarray(genes, np.int64)
    if genes_G.ndim != 1 or not ((genes_G >= 0) & (genes_G < model.n_genes)).all():
        raise CellmillError(f"genes must be a list of ids from 0 to {model.n_genes - 1}, the model's vocabulary")
    target_B = target_counts(depth, cells.totals)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    values_BG = np.empty((len(cells), len(genes_G)), np.float32)
    with torch.inference_mode(), Progress("read depth", len(cells), show=progress) as bar:
        for start in range(0, len(cells), batch_size):
            stop = min(start + batch_size, len(cells))
            inputs = model.embed_inputs(cells.slice(start, stop), target_B[start:stop])
            inputs |= model.asked_inputs(np.tile(genes_G, (stop - start, 1)))
            inputs = to_device(inputs, device)
            values = model.predict(inputs, torch.zeros_like(inputs["asked"], dtype=torch.bool))
            values_BG[start:stop] = values.view(stop - start, -1).cpu().numpy()
            bar.update(stop)
    model.train(was_training)
    return values_BG
