"""The learning rate's schedule, what decays, what Muon updates and how, and optimisers' states."""

from dataclasses import replace

import pytest
import torch
from cellmill.checkpoints import build_model
from cellmill.recipes import Training
from cellmill.training.optimizer import (
    Together,
    fill_optimizer,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
)
from small_runs import N_GENES, RECIPES

MUON = Training(optimizer="muon", weight_decay=0.1)


def models() -> dict:
    return {name: build_model(recipe, N_GENES, None, 0) for name, recipe in RECIPES.items()}


def give_gradients(model, step: int) -> None:
    """Gradients that differ from parameter to parameter and step to step."""
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(1000 * step + number)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    training = Training(steps=10, warmup_steps=4, learning_rate=0.8, final_learning_rate_fraction=0.25)
    rates = [learning_rate(step, training) for step in range(11)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[7] == pytest.approx((0.8 + 0.2) / 2)  # the middle of the cosine
    assert rates[9] > rates[10]  # the last step still learns
    assert rates[10] == pytest.approx(0.2)
    assert learning_rate(0, Training(steps=1, warmup_steps=0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_matrices_decay_and_nothing_else(name):
    model = models()[name]
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"] + kept["params"]} == {id(p) for p in model.parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in decayed["params"])
    plain = (torch.nn.Embedding, torch.nn.LayerNorm)
    spared = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, plain)}
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert set(decayed["names"]) == matrices - spared
    assert not any(name.endswith("bias") for name in decayed["names"])


OF_A_LAYER = {"attention.qkv.weight", "attention.out.weight"}
MATRICES = {
    "geneformer": {"layers.0": OF_A_LAYER | {"intermediate.weight", "output.weight"}},
    "scfoundation": {f"{part}.0": OF_A_LAYER | {"linear1.weight", "linear2.weight"} for part in ("encoder", "decoder")},
    "scgpt": {"layers.0": OF_A_LAYER | {"linear1.weight", "linear2.weight"}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_muon_has_the_matrices_of_layers_and_adamw_all_else(name):
    model = models()[name]
    muon, adamw = make_optimizer(model, MUON).optimizers
    (group,) = muon.param_groups
    assert set(group["names"]) == {f"{layer}.{matrix}" for layer, rest in MATRICES[name].items() for matrix in rest}
    assert group["weight_decay"] == 0.1
    rest = [n for g in adamw.param_groups for n in g["names"]]
    assert sorted([*group["names"], *rest]) == sorted(n for n, _ in model.named_parameters())


def test_muon_turns_a_matrix_by_an_orthogonal_step_as_long_as_adamws():
    """Its update is U V' of the gradient's singular vectors, times 0.2 sqrt(the longer side) and the learning rate."""
    model = models()["geneformer"]
    optimizer = make_optimizer(model, replace(MUON, weight_decay=0.0))
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("intermediate.weight"))
    assert name in optimizer.optimizers[0].param_groups[0]["names"]
    before = parameter.detach().clone()
    give_gradients(model, 0)
    u, _, vh = torch.linalg.svd(parameter.grad, full_matrices=False)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    optimizer.step()
    step = (before - parameter.detach()) / 0.01
    # five Newton-Schulz steps bring singular values near 1, not to it; small ones of the gradient stay smaller
    assert torch.linalg.svdvals(step)[0] == pytest.approx(0.2 * max(step.shape) ** 0.5, rel=0.25)
    along = ((u.T @ step @ vh.T) / (0.2 * max(step.shape) ** 0.5)).diag()
    assert along[0] == pytest.approx(1, abs=0.35)
    assert (along > 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_is_gone_on_from_to_the_bit(kind):
    training = Training(optimizer=kind)
    whole, cut = models()["scgpt"], models()["scgpt"]
    optimizers = [make_optimizer(model, training) for model in (whole, cut)]
    assert isinstance(optimizers[0], Together) == (kind == "muon")
    for step in range(4):
        if step == 2:  # another process
            saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizers[1]).items()}
            optimizers[1] = make_optimizer(cut, training)
            fill_optimizer(optimizers[1], saved)
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            give_gradients(model, step)
            optimizer.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    moments = {name.partition(".")[0] for name in optimizer_tensors(optimizers[0])}
    assert moments == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if kind == "muon" else set())
