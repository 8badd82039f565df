"""The batch that stopped a run: all that its step worked on, saved where it can be looked at.

``offending_batch.safetensors`` holds the raw cells (``cells.joinids``, ``cells.offsets``, ``cells.genes``,
``cells.counts``, ``cells.totals``, ``cells.codes.COLUMN``) and what the model saw of them: ``micro0.NAME`` for every
tensor of the first micro batch, and for a layout ``micro0.NAME.lengths``, ``.starts`` and ``.slots`` (its number of
slots, and those of each cell where all have as many, else 0). ``offending_batch.json`` holds all else.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cellmill.checkpoints import META, fill_model, load_checkpoint
from cellmill.errors import CellmillError
from cellmill.files import atomic
from cellmill.models import load_architecture
from cellmill.models.base import CellModel, Inputs
from cellmill.models.packing import Layout
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.reader import read_obs

NAME = "offending_batch"
ADVICE = (
    "lower training.learning_rate, raise training.warmup_steps, set training.precision to float32 or, if the cells are "
    "at fault, mend them"
)


@dataclass(frozen=True, kw_only=True)
class OffendingBatch:
    """One step's batch and what came of it.

    Attributes
    ----------
    reason
        What is wrong.
    step
        Optimiser steps done, this one included; the draws of its view are keyed by ``step - 1``.
    seed
        The run's seed.
    values
        What was measured: loss, its terms, gradient_norm, learning_rate.
    gradient_norms
        The largest norms of parameters' gradients: `cellmill.training.guard.largest_norms`.
    datasets
        The data set of each cell, as the shards name it; empty if they do not.
    cells
        The raw cells (of this rank).
    parts
        The micro batches' inputs.
    model
        Architecture, sizes, n_genes and categories: what rebuilds the model around saved weights.
    """

    reason: str
    step: int
    seed: int
    values: dict[str, float]
    gradient_norms: dict[str, float]
    datasets: list[str]
    cells: CellBatch
    parts: list[Inputs]
    model: dict


def describe_model(model: CellModel, architecture: str) -> dict:
    """The `OffendingBatch.model` of a model."""
    return {
        "architecture": architecture,
        "sizes": asdict(model.sizes),
        "n_genes": model.n_genes,
        "categories": model.categories,
    }


def datasets_of(shards: Shards, split: str, cells: CellBatch) -> list[str]:
    """The data set of each cell; empty if the shards do not name data sets."""
    joinids, named = pa.array(cells.joinids), {}
    try:
        for path in dict.fromkeys(group.path for group in shards.row_groups(split)):  # a corpus may be large
            obs = read_obs(path, ["soma_joinid", "dataset_id"])
            obs = obs.filter(pc.is_in(obs["soma_joinid"], joinids))
            named |= zip(obs["soma_joinid"].to_pylist(), obs["dataset_id"].to_pylist(), strict=True)
            if len(named) == len(joinids):
                break
    except (CellmillError, KeyError, pa.ArrowInvalid):
        return []
    return [str(named.get(joinid, "unknown")) for joinid in cells.joinids.tolist()]


def stopped(folder: Path, batch: OffendingBatch, rank: int = 0) -> CellmillError:
    """Save the batch in the state's folder; returns the error to raise, which says where it lies."""
    try:
        path = save_batch(folder, batch, rank)
        said = f"`cellmill show-batch {path}` shows the batch that did it"
    except CellmillError as error:
        said = f"the batch that did it is not: {error}"
    return CellmillError(f"training: {batch.reason}; {ADVICE} (the last saved state is kept, and {said})")


def save_batch(folder: Path, batch: OffendingBatch, rank: int = 0) -> Path:
    """Write both files; returns the path of the JSON, which is written last. Ranks but the first add their number."""
    stem = f"{NAME}.rank{rank}" if rank else NAME
    tensors = {f"cells.{name}": torch.from_numpy(array) for name, array in _arrays(batch.cells).items()}
    for place, inputs in enumerate(batch.parts):
        for name, value in inputs.items():
            if isinstance(value, Layout):
                arrays = (value.lengths, value.starts, np.array([value.n_slots, value.width or 0]))
                for part, array in zip(("lengths", "starts", "slots"), arrays, strict=True):
                    tensors[f"micro{place}.{name}.{part}"] = torch.from_numpy(np.array(array))
            else:
                tensors[f"micro{place}.{name}"] = value.detach()
    content = {
        "reason": batch.reason,
        "step": batch.step,
        "seed": batch.seed,
        "values": {name: _json_number(value) for name, value in batch.values.items()},
        "gradient_norms": {name: _json_number(value) for name, value in batch.gradient_norms.items()},
        "joinids": batch.cells.joinids.tolist(),
        "datasets": batch.datasets,
        "n_micro_batches": len(batch.parts),
        "model": batch.model,
    }
    with atomic(folder / f"{stem}.safetensors") as path:  # clones: tensors of one storage cannot be saved as they are
        path.write_bytes(save({name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()}))
    with atomic(folder / f"{stem}.json") as path:
        path.write_text(json.dumps(content, indent=1, allow_nan=False))
    return folder / f"{stem}.json"


def load_batch(path: Path) -> OffendingBatch:
    """Read what `save_batch` wrote; `path` is either file, or their folder (of several ranks, the first one's)."""
    path = Path(path)
    if path.is_dir():
        path = next(iter(sorted(path.glob(f"{NAME}*.json"))), path / f"{NAME}.json")
    path = path.with_suffix(".json")
    try:
        content = json.loads(path.read_text())
        tensors = load_file(path.with_suffix(".safetensors"))
        n_parts = content.pop("n_micro_batches")
        content.pop("joinids")
        for group in ("values", "gradient_norms"):
            content[group] = {name: float(value) for name, value in content[group].items()}
        cells = _cells({name.removeprefix("cells."): t for name, t in tensors.items() if name.startswith("cells.")})
        parts = []
        for place in range(n_parts):
            start = f"micro{place}."
            parts.append(
                _inputs({name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)})
            )
        return OffendingBatch(**content, cells=cells, parts=parts)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CellmillError(
            f"{path} cannot be read as an offending batch ({' '.join(str(error).split())}); name the "
            "offending_batch.json that a stopped training wrote, with its .safetensors beside it"
        ) from error


def _json_number(value: float) -> float | str:
    """JSON knows no nan and no inf; `float` reads their names."""
    return value if math.isfinite(value) else str(value)


def _room(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _arrays(cells: CellBatch) -> dict[str, np.ndarray]:
    names = ("joinids", "offsets", "genes", "counts", "totals")
    codes = {f"codes.{column}": codes_B for column, codes_B in cells.codes.items()}
    return {name: np.array(array) for name, array in ({n: getattr(cells, n) for n in names} | codes).items()}


def _cells(tensors: dict[str, torch.Tensor]) -> CellBatch:
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    codes = {name.removeprefix("codes."): arrays.pop(name) for name in list(arrays) if name.startswith("codes.")}
    return CellBatch(**arrays, codes=codes)


def _inputs(tensors: dict[str, torch.Tensor]) -> Inputs:
    layouts = [name.removesuffix(".slots") for name in tensors if name.endswith(".slots")]
    inputs = {}
    for name in layouts:
        lengths, starts, slots = (tensors.pop(f"{name}.{part}").numpy() for part in ("lengths", "starts", "slots"))
        inputs[name] = Layout(lengths, starts, int(slots[0]), int(slots[1]) or None)
    return inputs | tensors


# --- running it again -------------------------------------------------------------------------------------------------


def load_model(path: Path, batch: OffendingBatch) -> CellModel:
    """The model of a checkpoint's folder, or of a saved training state (its folder, or that of all states)."""
    path = Path(path)
    if (path / META).is_file():
        return load_checkpoint(path)[0]
    states = sorted(path.glob("step-*"))
    weights = (states[-1] if states else path) / "tensors.safetensors"
    if not weights.is_file():
        raise CellmillError(f"{path} is neither a checkpoint nor a training state; name the folder of one with --model")
    kind = load_architecture(batch.model["architecture"])
    sizes = kind.Sizes(**batch.model["sizes"])
    model = kind(sizes, batch.model["n_genes"], categories=batch.model["categories"])
    fill_model(model, _room(load_file(weights), "model."), str(weights))
    return model.eval()


@torch.no_grad()
def batch_terms(model: CellModel, batch: OffendingBatch) -> dict[str, float]:
    """The mean of each term over the micro batches' inputs as they were saved, without dropout."""
    sums, counts = {}, {}
    for inputs in batch.parts:
        for name, term in model(inputs, step=batch.step - 1).items():
            sums[name] = sums.get(name, 0.0) + float(term.sum)
            counts[name] = counts.get(name, 0.0) + float(term.count)
    return {name: sums[name] / max(counts[name], 1.0) for name in sums}


@torch.no_grad()
def cell_terms(model: CellModel, batch: OffendingBatch) -> list[dict[str, float]]:
    """The mean of each term for every cell alone: the same draws, since they depend on the seed, step and cell only."""
    terms = []
    for row in range(len(batch.cells)):
        inputs = model.pretrain_inputs(batch.cells.slice(row, row + 1), seed=batch.seed, step=batch.step - 1)
        found = model(inputs, step=batch.step - 1)
        terms.append({name: float(term.sum / term.count.clamp(min=1)) for name, term in found.items()})
    return terms


def badness(value: float) -> float:
    """By which values are sorted: what is not finite is worst."""
    return value if math.isfinite(value) else math.inf
