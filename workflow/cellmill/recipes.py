"""What a user may set of a model: its architecture, its training, how its embeddings are read.

Plain frozen dataclasses, so that a GPU node needs no validator to read them; `cellmill.config` validates the same
classes (types and the bounds in ``metadata``) before any job starts.
"""

from dataclasses import dataclass, field
from os.path import expanduser, expandvars
from typing import Literal

from cellmill.errors import CellmillError


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained: linear warm-up then cosine decay, gradient clipping, exact resume."""

    steps: int = field(default=200, metadata={"description": "Optimiser steps.", "ge": 1})
    batch_size: int = field(
        default=32, metadata={"description": "Cells per optimiser step, of all ranks together.", "ge": 1}
    )
    batch_tokens: int | None = field(
        default=None,
        metadata={
            "description": "Tokens per optimiser step at least: batches of batch_size cells are taken until all ranks "
            "together have so many. Default: one batch a step.",
            "ge": 1,
        },
    )
    micro_batch_tokens: int | Literal["auto"] = field(
        default=16384,
        metadata={
            "description": "Tokens of one forward and backward pass at most, 1 or more; a step's gradient is the same "
            "however its cells are cut. auto: as many as the memory holds."
        },
    )
    packing: Literal["packed", "padded"] = field(
        default="packed",
        metadata={
            "description": "packed: the tokens of all cells one after the other; padded: every cell as long as the "
            "longest of its micro batch, the plain way, for comparison."
        },
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"description": "muon: Muon for the matrices of the layers, AdamW for all else."}
    )
    learning_rate: float = field(default=1e-3, metadata={"description": "Peak learning rate.", "gt": 0})
    final_learning_rate_fraction: float = field(
        default=0.0,
        metadata={"description": "Learning rate at the last step, as a share of the peak.", "ge": 0, "le": 1},
    )
    warmup_steps: int = field(default=20, metadata={"description": "Steps of linear warm-up.", "ge": 0})
    weight_decay: float = field(
        default=0.01,
        metadata={"description": "Decoupled decay of matrices; biases, norms and embeddings have none.", "ge": 0},
    )
    beta1: float = field(default=0.9, metadata={"description": "AdamW's first moment.", "ge": 0, "lt": 1})
    beta2: float = field(default=0.98, metadata={"description": "AdamW's second moment.", "ge": 0, "lt": 1})
    gradient_clip: float = field(default=1.0, metadata={"description": "Largest norm of the gradient.", "gt": 0})
    precision: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "description": "Arithmetic of the forward pass; auto: bfloat16 on a GPU that has it, float32 on the CPU."
        },
    )
    compile: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={"description": "Whether the layers are compiled (torch.compile); auto: on a GPU, where packed."},
    )
    checkpoint_activations: bool = field(
        default=False,
        metadata={
            "description": "Whether layers are computed again in the backward pass instead of kept: a third more work, "
            "far less memory."
        },
    )
    memory_gb: float | None = field(
        default=None,
        metadata={
            "description": "Memory (of the GPU, if there is one) that micro_batch_tokens: auto may fill. Default: what "
            "is free.",
            "gt": 0,
        },
    )
    ranks: int = field(default=1, metadata={"description": "Processes that train together on one machine.", "ge": 1})
    nodes: int = field(default=1, metadata={"description": "Machines that train together.", "ge": 1})
    parallel: Literal["ddp", "fsdp"] = field(
        default="ddp",
        metadata={
            "description": "What several ranks share: ddp: the cells; fsdp: also the weights and the optimiser's state."
        },
    )
    validate_every: int = field(default=50, metadata={"description": "Steps between validations.", "ge": 1})
    early_stop: int | None = field(
        default=None,
        metadata={
            "description": "Validations in a row without a better loss after which training ends. Default: it goes on.",
            "ge": 1,
        },
    )
    spike_factor: float | None = field(
        default=None,
        metadata={
            "description": "Training stops at a loss that is so many times the median of recent ones. Default: only "
            "at one that is not finite.",
            "gt": 1,
        },
    )
    validation_cells: int = field(
        default=2048, metadata={"description": "Largest number of held-out cells of one validation.", "ge": 1}
    )
    checkpoint_every: int = field(
        default=50, metadata={"description": "Steps between saved states, from which a killed run goes on.", "ge": 1}
    )
    log_every: int = field(default=1, metadata={"description": "Steps between logged training losses.", "ge": 1})
    threads: int = field(
        default=1,
        metadata={"description": "CPU threads; part of the recipe since sums depend on it to the bit.", "ge": 1},
    )

    def __post_init__(self):
        if self.micro_batch_tokens != "auto" and self.micro_batch_tokens < 1:
            raise CellmillError(
                f"training.micro_batch_tokens is {self.micro_batch_tokens}; set it to 1 or more, or to auto"
            )
        world = self.ranks * self.nodes
        if self.batch_size % world:
            raise CellmillError(
                f"training.batch_size {self.batch_size} is not a multiple of the {world} ranks that share it; "
                "change one of them"
            )
        if self.optimizer == "muon" and self.parallel == "fsdp" and world > 1:
            raise CellmillError(
                "training.optimizer muon needs whole matrices, which training.parallel fsdp cuts; take ddp or adamw"
            )
        if self.compile == "on" and self.packing == "padded":
            raise CellmillError(
                "training.compile on needs few shapes, and training.packing padded gives each step its own; "
                "take packed or compile: off"
            )
        if self.memory_gb is not None and self.micro_batch_tokens != "auto":
            raise CellmillError("training.memory_gb is a limit for micro_batch_tokens: auto; set that, or leave it out")


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How cell embeddings are read from a trained model."""

    pooling: str | None = field(
        default=None, metadata={"description": "One of the architecture's poolings. Default: its paper's own."}
    )
    batch_size: int = field(default=64, metadata={"description": "Cells per forward pass.", "ge": 1})
    precision: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={"description": "Arithmetic; bfloat16 is faster and keeps about three digits."},
    )


@dataclass(frozen=True, kw_only=True)
class Released:
    """Published weights that stand in for training."""

    path: str = field(
        metadata={
            "description": "File or folder of the weights, in the layout that their authors published "
            "(docs/released.md); variables such as $CELLMILL_DATA are expanded."
        }
    )
    genes: str | None = field(
        default=None, metadata={"description": "The ordered list of genes, where it does not lie beside the weights."}
    )

    def __post_init__(self):
        object.__setattr__(self, "path", expanduser(expandvars(self.path)))
        object.__setattr__(self, "genes", self.genes and expanduser(expandvars(self.genes)))


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """One model of a run: ``config/models/NAME.yaml``."""

    architecture: str = field(
        metadata={"description": "A module of cellmill.models, or the dotted path of your own module."}
    )
    preset: str = field(default="demo", metadata={"description": "One of the architecture's presets of sizes."})
    sizes: dict = field(
        default_factory=dict, metadata={"description": "Sizes that differ from the preset's, such as n_layers: 4."}
    )
    training: Training = field(default_factory=Training, metadata={"description": "How it is trained."})
    embedding: Embedding = field(default_factory=Embedding, metadata={"description": "How embeddings are read."})
    released: Released | None = field(
        default=None,
        metadata={"description": "Published weights: nothing is trained, and preset, sizes and training are not used."},
    )

    @classmethod
    def from_dict(cls, content: dict) -> "ModelRecipe":
        """The recipe from plain data, as it stands in a job's parameters or in a checkpoint's JSON."""
        parts = {"training": Training, "embedding": Embedding, "released": Released}
        return cls(**{key: parts[key](**value) if key in parts and value else value for key, value in content.items()})
