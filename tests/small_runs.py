"""Short pretraining runs on real cells, of a second or so each."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from cellmill.checkpoints import vocabulary_hash
from cellmill.pretrain import pretrain
from cellmill.recipes import ModelRecipe, Training
from cellmill.shards.batch import CellBatch
from cellmill.shards.dataset import Shards
from cellmill.shards.statistics import compute_statistics

N_GENES = 3000
META = {"feature_ids": [f"ENSG{gene:011d}" for gene in range(N_GENES)], "code_version": "tests"}
TRAINING = Training(steps=12, batch_size=8, warmup_steps=3, validate_every=5, validation_cells=16, checkpoint_every=3)
SIZES = {"n_layers": 1, "width": 16, "n_heads": 2, "hidden": 16, "max_length": 64, "dropout": 0.1}
RECIPES = {
    "geneformer": ModelRecipe(architecture="geneformer", sizes=SIZES, training=TRAINING),
    "scfoundation": ModelRecipe(
        architecture="scfoundation",
        sizes=SIZES
        | {"hidden": 32, "n_bins": 8, "decoder_layers": 1, "decoder_width": 8, "decoder_heads": 1}
        | {"decoder_hidden": 16, "redraw_every": 4},
        training=TRAINING,
    ),
    "scgpt": ModelRecipe(architecture="scgpt", sizes=SIZES | {"cell_prompt_after": 4}, training=TRAINING),
}


def few_genes(cells: CellBatch) -> CellBatch:
    """The cells with the first `N_GENES` genes as their vocabulary; totals stay over all genes."""
    kept_N = cells.genes < N_GENES
    lengths_B = np.bincount(cells.cell_of[kept_N], minlength=len(cells))
    offsets = np.concatenate([[0], np.cumsum(lengths_B)])
    return CellBatch(cells.joinids, offsets, cells.genes[kept_N], cells.counts[kept_N], cells.totals)


def make_shards(folder: Path, data: Path, cuts: dict[str, np.ndarray], **layout) -> Shards:
    """Shards of Baron's pancreas cells: the rows of each split, in `META`'s vocabulary."""
    from shard_cells import real_cells, write_shards  # anndata takes seconds to import, and training needs none of it

    cells, obs = real_cells(data, "baron_h1")
    cells = few_genes(cells)
    splits = {split: (cells.take(rows), obs.take(rows)) for split, rows in cuts.items()}
    write_shards(folder, splits, n_genes=N_GENES, **layout)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["vocabulary"]["hash"] = vocabulary_hash(META["feature_ids"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Shards(folder)


def make_corpus(folder: Path, data: Path) -> Shards:
    """300 training and 60 validation cells, in several files and row groups."""
    cuts = {"train": np.arange(300), "validation": np.arange(1000, 1060)}
    return make_shards(folder, data, cuts, cells_per_shard=130, row_group=50)


def train(shards: Shards, architecture: str, out: Path, state: Path, seed: int = 0, **training) -> None:
    """Run the architecture's recipe of `RECIPES`, with `training` changed."""
    recipe = RECIPES[architecture]
    recipe = replace(recipe, training=replace(recipe.training, **training))
    statistics = compute_statistics(shards)
    pretrain(shards, statistics, recipe, name=architecture, seed=seed, out=out, state=state, meta=META)
