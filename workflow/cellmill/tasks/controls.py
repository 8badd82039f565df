"""Controls: what a perfect and a worthless embedding score, so that a model's place between them can be read.

Legend: N cells, L labels, E width.
"""

import numpy as np

from cellmill.errors import CellmillError
from cellmill.methods import CONTROLS
from cellmill.randomness import uniform
from cellmill.shards.dataset import Shards
from cellmill.tasks.data import column

_JITTER = 1e-3
_ANGLES = 4


def labels_embedding(labels_N: np.ndarray, seed: int) -> np.ndarray:
    """One-hot labels, spread a little: the best possible embedding for every metric of labels, and well mixed batches.

    Cells of a label must not coincide, or their nearest neighbours would be ties. Each gets a random place on a torus
    of radius 0.001 (four angles, as cosines and sines): it has no border, so that each cell is some other's neighbour
    and a label's cells form one connected, evenly dense cloud.

    Returns
    -------
    numpy.ndarray
        float32 [N, L + 8].
    """
    names, codes_N = np.unique(labels_N, return_inverse=True)
    angles = 2 * np.pi * uniform(seed, "labels control", np.arange(len(codes_N))[:, None], np.arange(_ANGLES)[None])
    place = _JITTER * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([np.eye(len(names))[codes_N], place], axis=1).astype(np.float32)


def shuffled_embedding(labels_N: np.ndarray, seed: int) -> np.ndarray:
    """The rows of `labels_embedding` in random order: the same shape of embedding, and nothing known of a cell."""
    order_N = np.argsort(uniform(seed, "shuffled control", np.arange(len(labels_N))), kind="stable")
    return labels_embedding(labels_N, seed)[order_N]


def embed_control(name: str, target: Shards, *, label: str, batch: str, seed: int) -> np.ndarray:
    """Embed all cells of a benchmark (split "all") with a control.

    ``labels`` is the best that there is for metrics of labels. ``shuffled`` knows nothing of a cell, so its batches are
    mixed. ``batches`` knows the batch alone: the worst for metrics of mixing.

    Returns
    -------
    numpy.ndarray
        float32 [N, E] in the order of the shards.

    Raises
    ------
    CellmillError
        If the control is unknown, or there is no column `label` or `batch`.
    """
    if name not in CONTROLS:
        raise CellmillError(f"control '{name}' is unknown; known are {', '.join(CONTROLS)}")
    obs = target.obs("all").to_pandas()
    if name == "batches":
        return labels_embedding(column(obs, batch, "batches"), seed)
    labels_N = column(obs, label, "cell types")
    return labels_embedding(labels_N, seed) if name == "labels" else shuffled_embedding(labels_N, seed)
