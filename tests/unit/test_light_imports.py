"""From shards to embeddings nothing but torch, numpy, pyarrow and safetensors is imported: a GPU node has little."""

import subprocess
import sys
from pathlib import Path

import cellmill
from shard_cells import real_cells, write_shards

FORBIDDEN = (
    *("pandas", "scanpy", "anndata", "tiledbsoma", "cellxgene_census", "snakemake", "pydantic", "yaml", "sklearn"),
    *("scipy", "altair"),
)
ROOMS = ("randomness", "shards", "views", "models", "pretrain", "embed", "checkpoints", "recipes", "gene_map")
ROOMS += ("evaluate_loss", "yardstick", "released", "abilities")
CORPUS_PHASE = {"cellmill.shards.curate", "cellmill.shards.assemble"}
"""Run before there is a shard, where the Census and the typed config are at hand."""

HOOK = f"""
import importlib.abc, sys

class Forbid(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"{{name}} is not part of the light path", name=name)

sys.meta_path.insert(0, Forbid())
"""


def modules() -> list[str]:
    root = Path(cellmill.__file__).parent
    paths = [path for room in ROOMS for path in (root / f"{room}.py", *(root / room).rglob("*.py")) if path.is_file()]
    names = [".".join(path.relative_to(root.parent).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names if name not in CORPUS_PHASE]


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", HOOK + code, *arguments], capture_output=True, text=True, timeout=300)


def test_the_hook_forbids():
    assert "not part of the light path" in run("import yaml").stderr


def test_light_path_imports_little():
    names = modules()
    assert {"cellmill.shards.loader", "cellmill.views.scgpt", "cellmill.models.base", "cellmill.recipes"} <= set(names)
    done = run("import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *names)
    assert done.returncode == 0, done.stderr


def test_shards_are_read_with_little(data, tmp_path):
    folder = write_shards(
        tmp_path / "s", {"train": real_cells(data, "tenx_pbmc1k_v2")}, n_genes=33_538, cells_per_shard=500
    )
    done = run(
        """
from cellmill.shards.dataset import Shards
from cellmill.shards.reader import read_shard
from cellmill.shards.writer import ShardWriter
from cellmill.shards.loader import Loader
from cellmill.shards.statistics import compute_statistics, save_statistics

shards = Shards(sys.argv[1])
assert shards.obs("train").num_rows == shards.n_cells("train") == 996
with Loader(shards, "train", 8, seed=0) as loader:
    assert len(next(loader)) == 8
save_statistics(sys.argv[1] + "/statistics.safetensors", compute_statistics(shards), shards.vocabulary_hash)
with ShardWriter(sys.argv[1] + "/again.parquet") as writer:
    writer.write(*read_shard(sys.argv[1] + "/train-00000.parquet"))
""",
        str(folder),
    )
    assert done.returncode == 0, done.stderr


def test_reading_leaves_alone_what_is_installed(data, tmp_path):
    """Arrow imports pandas in some of its methods, where it finds it; the loader calls none of them."""
    splits = {"train": real_cells(data, "tenx_pbmc1k_v2")}
    folder = write_shards(tmp_path / "s", splits, n_genes=33_538, cells_per_shard=500)
    code = """
import sys
from cellmill.shards.dataset import Shards
from cellmill.shards.loader import Loader
from cellmill.shards.statistics import compute_statistics

shards = Shards(sys.argv[1])
shards.obs("train")
compute_statistics(shards)
with Loader(shards, "train", 8, seed=0, categories={"cell_type": ["unknown"]}) as loader:
    assert not next(loader).codes["cell_type"].any()
assert not {"pandas", "scipy", "rich"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
