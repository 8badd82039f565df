"""Generation with scGPT: from a gene prompt, a cell prompt, or both (Cui et al., Nature Methods 21, 1470 (2024)).

A gene prompt is a cell of which some genes are known; a cell prompt is the state of another cell in the place of <cls>.
Genes that are asked for are generated at once, or in steps: the paper generates the genes that are predicted with most
confidence first and takes them for known in the next step. Neither the paper nor the released code says what confidence
is, and the network has no output for it. Here a prediction is the more confident, the less the two outputs that were
trained to name the same bin differ: the one from the gene's own state (gep) and the one from the cell's state (mvc).

In training a cell prompt always stood beside known genes. Alone, it asks the network for what it did not practise, and
little-trained models answer with much the same genes for every cell; what they know of a cell by its state is in the
output that was trained on states alone (``output="mvc"``).

Bins mean counts only beside a cell: `values_by_reference` takes the counts of a cell, `values_by_total` a depth.

Legend: B cells, Q genes asked of a cell, D width, P slots of perceived tokens of all cells together, R genes of a cell
still to be generated, S of them generated in a step, E bins.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellmill.errors import CellmillError
from cellmill.models.base import Inputs, to_device
from cellmill.models.packing import uniform
from cellmill.models.scgpt import PAD_VALUE, Scgpt, value_of_bins
from cellmill.progress import Progress
from cellmill.shards.batch import CellBatch
from cellmill.views.ragged import offsets_of
from cellmill.views.scgpt import count_edges

_HALVINGS = 60
"""Of the interval in which the steepness of counts over bins is sought."""


class Generated(NamedTuple):
    """What was generated."""

    bins_BQ: np.ndarray
    """float32 [B, Q], from 1 to the number of bins."""
    step_BQ: np.ndarray
    """int64 [B, Q], the step, from 1, at which each gene was generated."""


def cell_states(model: Scgpt, cells: CellBatch, batch_size: int = 64) -> np.ndarray:
    """Cell prompts: the last state of <cls> of each cell, float32 [B, D], of its own length as in training."""
    parts, was_training = [], model.training
    model.eval()
    with torch.inference_mode(), Progress("cell states", len(cells)) as progress:
        for start in range(0, len(cells), batch_size):
            batch = cells.slice(start, min(start + batch_size, len(cells)))
            inputs = to_device(model.embed_inputs(batch), _device(model))
            parts.append(model.states(inputs, only_cls=True).float().cpu().numpy())
            progress.update(start + len(batch))
    model.train(was_training)
    return np.concatenate(parts)


def generate(
    model: Scgpt,
    genes_BQ: np.ndarray,
    *,
    known: CellBatch | None = None,
    states_BD: np.ndarray | None = None,
    steps: int = 1,
    output: Literal["gep", "mvc"] = "gep",
    batch_size: int = 64,
) -> Generated:
    """Generate genes of cells; deterministic, and of each cell the same whatever the others are.

    Parameters
    ----------
    model
        Asked in evaluation mode, on the device where it is.
    genes_BQ
        int64 [B, Q], vocabulary ids that are asked for; different ones in each row, none of them known.
    known
        Gene prompt: B cells with the counts of their known genes, which are binned among each other. At most
        ``max_length - 1`` of them are perceived.
    states_BD
        Cell prompt, from `cell_states`.
    steps
        In how many steps the genes are generated, about equally many in each. In one step no gene that is asked for
        influences another.
    output
        Which bins are taken: those of the genes' own states, or those that the cell's state alone says.
    batch_size
        Cells at a time.

    Raises
    ------
    CellmillError
        If there is no prompt, the prompts are not of B cells, or a gene is unknown, asked for twice or known already.
    """
    genes_BQ = np.ascontiguousarray(genes_BQ, dtype=np.int64)
    _check(model, genes_BQ, known, states_BD, steps, output)
    if known is None:
        nothing = np.zeros(0, np.int64)
        known = CellBatch(
            np.arange(len(genes_BQ)), np.zeros(len(genes_BQ) + 1, np.int64), nothing, nothing, np.ones(len(genes_BQ))
        )
    device, parts, was_training = _device(model), [], model.training
    model.eval()
    with torch.inference_mode(), Progress("generation", len(genes_BQ)) as progress:
        for start in range(0, len(genes_BQ), batch_size):
            stop = min(start + batch_size, len(genes_BQ))
            perceived = to_device(model.embed_inputs(known.slice(start, stop)), device)
            asked_BQ = torch.from_numpy(genes_BQ[start:stop]).to(device)
            prompt_BD = None if states_BD is None else torch.as_tensor(states_BD[start:stop]).float().to(device)
            parts.append(_generate(model, perceived, asked_BQ, prompt_BD, steps, output))
            progress.update(stop)
    model.train(was_training)
    return Generated(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def _generate(
    model: Scgpt, perceived: Inputs, asked_BQ: Tensor, prompt_BD: Tensor | None, steps: int, output: str
) -> tuple[Tensor, Tensor]:
    """Bins [B, Q] and steps [B, Q] of one batch."""
    n_asked = asked_BQ.shape[1]
    bins_BQ, step_BQ = torch.zeros_like(asked_BQ, dtype=torch.float32), torch.zeros_like(asked_BQ)
    left_BR = torch.arange(n_asked, device=asked_BQ.device).expand_as(asked_BQ)  # places among the genes asked for
    for step in range(1, steps + 1):
        n_now = n_asked * step // steps - n_asked * (step - 1) // steps
        if not n_now:
            continue
        asked_BR = asked_BQ.gather(1, left_BR)
        layout_asked = uniform(*asked_BR.shape).to(asked_BR.device)
        inputs = perceived | {"asked": asked_BR.flatten().int(), "layout_asked": layout_asked}
        predicted = model.predict(inputs, prompt_BD)
        gep_BR, mvc_BR = (layout_asked.to_matrix(bins_G) for bins_G in (predicted.gep_G, predicted.mvc_G))
        order_BR = (gep_BR - mvc_BR).abs().argsort(dim=1, stable=True)
        now_BS, later_BR = order_BR[:, :n_now], order_BR[:, n_now:]
        bins_BS = (gep_BR if output == "gep" else mvc_BR).clamp(1, model.sizes.n_bins - 1).gather(1, now_BS)
        bins_BQ.scatter_(1, left_BR.gather(1, now_BS), bins_BS)
        step_BQ.scatter_(1, left_BR.gather(1, now_BS), step)
        if later_BR.shape[1]:
            # perceived bins are whole numbers in training
            perceived = _with_genes(model, perceived, asked_BR.gather(1, now_BS), bins_BS.round())
        left_BR = left_BR.gather(1, later_BR)
    return bins_BQ, step_BQ


def _with_genes(model: Scgpt, perceived: Inputs, genes_BS: Tensor, bins_BS: Tensor) -> Inputs:
    """What is perceived, and some more genes of each cell, as many of all."""
    before, n_more = perceived["layout"], genes_BS.shape[1]
    after = model.packing.layout(before.lengths + n_more)
    offsets = offsets_of(before.lengths)
    source_P, target_P = before.index(offsets), after.index(offsets)
    more_BS = (after.ends - n_more)[:, None] + np.arange(n_more)
    inputs = {"layout": after.to(genes_BS.device)}
    for name, fill, values_BS in (("tokens", model.pad, genes_BS), ("values", PAD_VALUE, bins_BS)):
        inputs[name] = perceived[name].new_full((after.n_slots,), fill)
        inputs[name][target_P] = perceived[name][source_P]
        inputs[name][more_BS] = values_BS.to(inputs[name].dtype)
    return inputs


def values_by_reference(model: Scgpt, bins_BQ: np.ndarray, reference: CellBatch) -> np.ndarray:
    """log1p(CP10k) of bins, float32 [B, Q], where the counts are distributed as those of `reference`.

    Parameters
    ----------
    bins_BQ
        Of B cells.
    reference
        Whole cells: B of them, or one for all.
    """
    if len(reference) not in (1, len(bins_BQ)):
        raise CellmillError(
            f"there are {len(reference)} reference cells for {len(bins_BQ)} generated ones; give one for each, or one"
        )
    edges_BE = count_edges(reference, model.sizes.n_bins - 1) * (1e4 / np.maximum(reference.totals, 1))[:, None]
    return _between(bins_BQ, np.log1p(edges_BE))


def values_by_total(model: Scgpt, bins_BQ: np.ndarray, totals_B: np.ndarray) -> np.ndarray:
    """log1p(CP10k) of bins, float32 [B, Q], of cells with given raw counts in all, of the generated genes alone.

    Without a cell to go by, counts grow exponentially with the bin, from one molecule in the first bin, as steeply as
    the total asks.

    Parameters
    ----------
    bins_BQ
        Of B cells.
    totals_B
        Raw counts over the Q genes, at least Q; one number for all, or [B].
    """
    totals_B = np.broadcast_to(np.asarray(totals_B, dtype=np.float64), len(bins_BQ))
    if (totals_B < bins_BQ.shape[1]).any():
        raise CellmillError(
            f"a total of {totals_B.min():g} counts is too few for {bins_BQ.shape[1]} genes of at least one count each; "
            "give larger totals or fewer genes"
        )
    above_BQ = np.asarray(bins_BQ, dtype=np.float64) - 1
    low_B, high_B = np.zeros(len(totals_B)), np.log(totals_B) / np.maximum(above_BQ.max(axis=1), 1e-9)
    for _ in range(_HALVINGS):
        steepness_B = (low_B + high_B) / 2
        too_many_B = np.exp(steepness_B[:, None] * above_BQ).sum(axis=1) > totals_B
        low_B, high_B = np.where(too_many_B, low_B, steepness_B), np.where(too_many_B, steepness_B, high_B)
    counts_BQ = np.exp(low_B[:, None] * above_BQ)
    return np.log1p(counts_BQ * (1e4 / totals_B)[:, None]).astype(np.float32)


def _between(bins_BQ: np.ndarray, edges_BE: np.ndarray) -> np.ndarray:
    edges = torch.from_numpy(edges_BE.astype(np.float32)).expand(len(bins_BQ), -1)
    return value_of_bins(torch.as_tensor(bins_BQ), edges).numpy()


def _device(model: Scgpt) -> torch.device:
    return next(model.parameters()).device


def _check(
    model: Scgpt,
    genes_BQ: np.ndarray,
    known: CellBatch | None,
    states_BD: np.ndarray | None,
    steps: int,
    output: str,
) -> None:
    """Refuse what cannot be asked."""
    if not isinstance(model, Scgpt):
        raise CellmillError(
            f"a {type(model).__name__} cannot generate from prompts; give a model of architecture scgpt"
        )
    if known is None and states_BD is None:
        raise CellmillError("there is no prompt; give known genes, the states of cells, or both")
    if steps < 1:
        raise CellmillError(f"steps is {steps}; generate in at least 1 step")
    if output not in ("gep", "mvc"):
        raise CellmillError(f"output is '{output}'; take gep or mvc")
    for what, number in (("gene prompts", known), ("cell prompts", states_BD)):
        if number is not None and len(number) != len(genes_BQ):
            raise CellmillError(
                f"there are {len(number)} {what} and genes are asked of {len(genes_BQ)} cells; give one for each"
            )
    if states_BD is not None and np.shape(states_BD) != (len(genes_BQ), model.sizes.width):
        raise CellmillError(
            f"cell prompts are {np.shape(states_BD)}, expected ({len(genes_BQ)}, {model.sizes.width}); "
            "take them from cell_states of the same model"
        )
    if genes_BQ.size and not 0 <= genes_BQ.min() <= genes_BQ.max() < model.n_genes:
        raise CellmillError(f"a gene asked for is none of the model's {model.n_genes}; give ids of its vocabulary")
    key_BQ = genes_BQ + np.arange(len(genes_BQ))[:, None] * model.n_genes
    keys = key_BQ.ravel() if known is None else np.append(key_BQ, known.genes + known.cell_of * model.n_genes)
    if len(np.unique(keys)) != len(keys):
        raise CellmillError(
            "a gene is asked for twice, or is known already; ask for different genes that are not known"
        )
