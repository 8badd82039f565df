"""AdamW with decay of matrices only, and a learning rate that warms up and then falls along a cosine.

Decoupled decay: Loshchilov and Hutter, ICLR 2019.
"""

import math

import torch
from torch import nn

from cellmill.recipes import Training


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters in two groups: matrices, which decay, and biases, norms and embeddings, which do not.

    Within a group they keep the order of ``named_parameters``, and ``names`` holds their names. A matrix that is tied
    to an embedding counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    groups = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        group = groups[parameter.ndim < 2 or id(parameter) in embeddings]
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the learning rate is set before every step by `learning_rate`."""
    betas = (training.beta1, training.beta2)
    return torch.optim.AdamW(parameter_groups(model, training.weight_decay), lr=0.0, betas=betas, fused=True)


def learning_rate(step: int, training: Training) -> float:
    """Learning rate of step 0, 1, ..., steps - 1: a line up to the peak, then a cosine ending after the last."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    floor = training.final_learning_rate_fraction
    return training.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts, as ``{moment}.{parameter}``."""
    return {
        f"{moment}.{name}": tensor
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for moment, tensor in optimizer.state[parameter].items()
    }


def fill_optimizer(optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; a parameter that had no gradient yet has none."""
    content = optimizer.state_dict()
    content["state"] = {
        index: {moment: tensors[f"{moment}.{name}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
        for group in content["param_groups"]
        for index, name in zip(group["params"], group["names"], strict=True)
        if f"step.{name}" in tensors
    }
    optimizer.load_state_dict(content)
