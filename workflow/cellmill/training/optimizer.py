"""AdamW with decay of matrices only, Muon for the matrices of layers if asked for, and the learning rate's schedule.

Decoupled decay: Loshchilov and Hutter, ICLR 2019. Muon: Jordan et al., kellerjordan.github.io/posts/muon (2024); its
step is scaled to the length of AdamW's, so that one learning rate and decay serve both: Liu et al., "Muon is scalable
for LLM training", arXiv 2502.16982.
"""

import math

import torch
from torch import nn

from cellmill.models.base import CellModel
from cellmill.recipes import Training


class Together:
    """Several optimisers that step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Update all parameters."""
        for optimizer in self.optimizers:
            optimizer.step()


Optimizer = torch.optim.Optimizer | Together


def parameter_groups(model: nn.Module, weight_decay: float, but: frozenset[int] = frozenset()) -> list[dict]:
    """Parameters in two groups: matrices, which decay, and biases, norms and embeddings, which do not.

    Within a group they keep the order of ``named_parameters``, and ``names`` holds their names. A matrix that is tied
    to an embedding counts as an embedding. Parameters whose ids are in `but` are left out.
    """
    embeddings = _embeddings(model)
    groups = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if id(parameter) not in but:
            group = groups[parameter.ndim < 2 or id(parameter) in embeddings]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups if group["params"]]


def _embeddings(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}


def make_optimizer(model: CellModel, training: Training) -> Optimizer:
    """The recipe's optimiser; its learning rate is set before every step by `learning_rate`.

    AdamW over `parameter_groups`, in one fused kernel. With ``muon`` the matrices of `CellModel.blocks` that are no
    embeddings go to Muon (momentum 0.95, Nesterov's), whose update is orthogonal, and AdamW keeps all else.
    """
    in_blocks = set()
    if training.optimizer == "muon":
        within = {id(p) for block in model.blocks() for p in block.parameters() if p.ndim == 2}
        in_blocks = within - _embeddings(model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in in_blocks]
    betas = (training.beta1, training.beta2)
    rest = parameter_groups(model, training.weight_decay, frozenset(in_blocks))
    adamw = torch.optim.AdamW(rest, lr=0.0, betas=betas, fused=True)
    if not named:
        return adamw
    names, parameters = zip(*named, strict=True)
    group = {"params": list(parameters), "names": list(names), "weight_decay": training.weight_decay}
    return Together(torch.optim.Muon([group], lr=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"), adamw)


def learning_rate(step: int, training: Training) -> float:
    """Learning rate of step 0, 1, ..., steps - 1: a line up to the peak, then a cosine ending after the last."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    floor = training.final_learning_rate_fraction
    return training.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Moments and step counts, as ``{moment}.{parameter}``."""
    return {
        f"{moment}.{name}": tensor
        for part in _parts(optimizer)
        for group in part.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for moment, tensor in part.state[parameter].items()
    }


def fill_optimizer(optimizer: Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; a parameter that had no gradient yet has none."""
    of = {}
    for key, tensor in tensors.items():
        moment, _, name = key.partition(".")
        of.setdefault(name, {})[moment] = tensor
    for part in _parts(optimizer):
        content = part.state_dict()
        content["state"] = {
            index: of[name]
            for group in content["param_groups"]
            for index, name in zip(group["params"], group["names"], strict=True)
            if name in of
        }
        part.load_state_dict(content)


def _parts(optimizer: Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    return optimizer.optimizers if isinstance(optimizer, Together) else (optimizer,)
