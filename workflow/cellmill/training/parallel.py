"""Several processes that train one model together: who they are, what they add up, how the model is spread over them.

Of every batch each rank takes its own part of the cells, and the gradient is the sum over ranks: the objective is
divided by the counts of the whole step, so there is nothing to average. What is saved are whole tensors, so a run goes
on with any other number of ranks.

Two ways to spread a model, both torch's own. ``ddp``: every rank holds all of it, and gradients are added up while the
last backward pass of a step still runs (Li et al., VLDB 2020). ``fsdp``: every rank holds a slice of each weight and of
the optimiser's moments, and the weights of a block are put together just before they are used (Zhao et al., VLDB 2023).
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellmill.checkpoints import fill_model, model_tensors
from cellmill.errors import CellmillError
from cellmill.models.base import CellModel, Inputs, Losses
from cellmill.randomness import hash64
from cellmill.recipes import Training
from cellmill.shards.batch import CellBatch
from cellmill.training.guard import clip_gradients
from cellmill.training.micro_batches import views
from cellmill.training.optimizer import fill_optimizer, optimizer_tensors

TIME_LIMIT = timedelta(minutes=10)
"""How long a rank waits for the others: longer than any of them saves a state or looks at held-out cells."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen from one of them.

    Attributes
    ----------
    rank
        This process's number among all.
    world
        Processes in all.
    local
        This process's number on its machine, which is that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """What torchrun has put into the environment; one process alone without it."""
        names = {"rank": "RANK", "world": "WORLD_SIZE", "local": "LOCAL_RANK"}
        return cls(**{key: int(os.environ[name]) for key, name in names.items() if name in os.environ})

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    @property
    def kind(self) -> str:
        """How the ranks are joined, in words."""
        return "NCCL" if torch.cuda.is_available() else "gloo"

    def check(self, training: Training) -> None:
        """See that as many processes run as the recipe says.

        Raises
        ------
        CellmillError
            If they do not.
        """
        wanted = training.ranks * training.nodes
        if self.world != wanted:
            raise CellmillError(
                f"the recipe is for {wanted} processes (training.ranks {training.ranks} on training.nodes "
                f"{training.nodes}) and {self.world} run; start it with cellmill.training.launch, or change the recipe"
            )

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Join the other ranks for as long as the context lasts; alone it does nothing.

        Tensors of a GPU are exchanged by NCCL, those of the host by gloo. A rank that fails leaves without waiting for
        the others, which end when they next ask for it.

        Raises
        ------
        CellmillError
            If this machine has GPUs, but not one for every rank.
        """
        if self.world == 1:
            yield
            return
        backend = "gloo"
        if torch.cuda.is_available():
            if self.local >= torch.cuda.device_count():
                raise CellmillError(
                    f"there are more ranks on this machine than its {torch.cuda.device_count()} GPUs; set "
                    "training.ranks to at most their number, ask for more of them (docs/cluster.md), or set "
                    "CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
                )
            torch.cuda.set_device(self.local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=TIME_LIMIT)
        yield
        dist.barrier()  # nobody leaves while another still needs it
        dist.destroy_process_group()  # not after a failure: NCCL may wait there for what the others never send

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, the same on each; every rank must ask for it, at the same place of its course."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self._reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def agree(self, flag: bool) -> bool:
        """Whether any rank says so: what one finds, all do."""
        return bool(self.most(int(flag)))

    def _reduced(self, tensor: Tensor, operation) -> Tensor:
        if self.world == 1:
            return tensor
        tensor = tensor.detach().clone()
        dist.all_reduce(tensor, operation)
        return tensor

    # --- random states ------------------------------------------------------------------------------------------------

    def seed(self, seed: int, step: int = 0) -> None:
        """Set torch's generators, which only dropout uses, to this rank's own for a run that starts at `step`."""
        keys = () if self.rank == 0 and step == 0 else (self.rank, step)
        torch.manual_seed(int(hash64(seed, "dropout", *keys).view("int64")[0]))  # of the CPU and of every GPU

    def random_tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The states of all ranks' generators by name; every rank must ask for them."""
        states = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        return {
            f"{kind}.{rank}": part for kind, state in states.items() for rank, part in enumerate(self._gathered(state))
        }

    def restore_random(self, tensors: dict[str, Tensor], seed: int, step: int, device: torch.device) -> None:
        """Go on with the states that `random_tensors` gave after `step` steps.

        With another number of ranks there is no state that would be the same, since the ranks share the cells anew:
        each then begins its own, keyed by the step.
        """
        saved = sum(name.startswith("cpu.") for name in tensors)
        if saved != self.world:
            self.seed(seed, step)
            return
        torch.set_rng_state(tensors[f"cpu.{self.rank}"])
        if device.type == "cuda" and f"cuda.{self.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{self.rank}"], device)

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        if self.world == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return parts


class Wrapped:
    """A model as one rank trains it.

    After a step's backward passes, all but the last under `no_sync`, every parameter's gradient is the sum over ranks:
    of ddp whole, of fsdp this rank's slice. The optimiser is made over `model.parameters()` after wrapping.

    Attributes
    ----------
    model
        The model itself: what makes inputs, and on whose parameters the optimiser works.
    even
        Whether all ranks must call `forward` equally often, also in evaluation: of fsdp, whose ranks bring together
        the weights of a block whenever it is used.
    """

    def __init__(self, model: CellModel, module: nn.Module, even: bool = False):
        self.model, self.even = model, even
        self._module = module

    def forward(self, inputs: Inputs, step: int | None) -> Losses:
        """The objective's terms on this rank's cells."""
        return self._module(inputs, step=step)

    def no_sync(self) -> AbstractContextManager:
        """The context of a step's backward passes but for the last: gradients stay with their rank.

        Of fsdp they are added up each time, since to keep them whole would take the memory that it saves.
        """
        return getattr(self._module, "no_sync", nullcontext)()

    def clip(self, largest: float) -> Tensor:
        """Scale the gradient to a norm of at most `largest`; returns the norm before, of the whole gradient."""
        norm, norms_P = clip_gradients(self.model, largest)
        self.norms_P = _whole(norms_P)  # of each parameter, for who asks after a step that went wrong
        return _whole(norm)


def wrap(model: CellModel, training: Training, ranks: Ranks) -> Wrapped:
    """Spread a model, which lies on its device and is the same on all ranks, as ``training.parallel`` says."""
    if ranks.world == 1:
        return Wrapped(model, model)
    if training.parallel == "ddp":
        return Wrapped(model, _replicated(model))
    _sharded(model, ranks)
    return Wrapped(model, model, even=True)


def _replicated(model: CellModel) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    # buffers are the corpus's and the same everywhere; what says so has another name since torch 2.13
    names = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    module = DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        find_unused_parameters=True,  # an objective may use more of the model in later steps
        **{sync_buffers: False},
    )

    def add_up(_, bucket: dist.GradBucket):
        total = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return total.then(lambda future: future.value()[0])

    module.register_comm_hook(None, add_up)  # torch's own divides by the number of ranks
    return module


def _sharded(model: CellModel, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks.world,))
    for block in [*model.blocks(), model]:
        fully_shard(block, mesh=mesh)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


# --- held-out cells ---------------------------------------------------------------------------------------------------


def shared_losses(
    wrapped: Wrapped,
    batches: list[CellBatch],
    seed: int,
    autocast: AbstractContextManager,
    limit: int,
    ranks: Ranks,
) -> dict[str, float]:
    """`cellmill.evaluate_loss.mean_losses` of batches that the ranks share out; the same on every rank."""
    model = wrapped.model
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    n_cells, totals, terms = 0, 0.0, {}
    with torch.no_grad(), autocast:  # inference mode would make tensors that fsdp cannot use again in training
        for first in range(0, len(batches), ranks.world):
            mine = min(first + ranks.rank, len(batches) - 1)
            counts = mine == first + ranks.rank  # the last round may have less than a batch for every rank
            if not (counts or wrapped.even) and terms:
                continue  # who has computed nothing yet learns the terms' names
            parts = views(model, batches[mine], limit, device, seed=seed, step=None)
            n_cells += len(batches[mine]) * counts
            for i in range(ranks.most(len(parts)) if wrapped.even else len(parts)):
                terms = model(parts[min(i, len(parts) - 1)], step=None)
                both = torch.stack([torch.stack([term.sum.double(), term.count.double()]) for term in terms.values()])
                totals = totals + (both if counts and i < len(parts) else torch.zeros_like(both))
    model.train(was_training)
    sums = dict(zip(terms, ranks.sum(totals), strict=True))
    means = {name: float(total / count.clamp(min=1)) for name, (total, count) in sums.items()}
    return {"loss": sum(means.values()), **means, "cells": int(ranks.sum(torch.tensor(n_cells)))}


# --- whole tensors, for saving and going on ---------------------------------------------------------------------------


def whole_tensors(model: CellModel, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Weights as ``model.{name}`` and the optimiser's tensors as ``optimizer.{name}``, whole, whatever the ranks.

    Every rank must ask for them, and gets them; where they are cut, they are put together one at a time, and come to
    the host of rank 0 alone (the others get empty ones).
    """
    tensors = {f"model.{name}": tensor for name, tensor in model_tensors(model).items()}
    if optimizer is not None:
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(optimizer).items()}
    return {name: _on_host_of_first(tensor) for name, tensor in tensors.items()}


def fill(model: CellModel, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: str) -> None:
    """Put `whole_tensors` back, cut as the model is; every rank gives all of them.

    Raises
    ------
    CellmillError
        If they are not those of the model; `where` says where they are from.
    """
    rooms = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        room, _, rest = name.partition(".")
        rooms[room][rest] = tensor
    own = model_tensors(model)
    of_optimizer = {}
    for name, tensor in rooms["optimizer"].items():
        like = own.get(name.partition(".")[2])
        of_optimizer[name] = tensor if like is None or like.shape != tensor.shape else _cut_as(like, tensor)
    of_model = {name: _cut_as(own[name], tensor) if name in own else tensor for name, tensor in rooms["model"].items()}
    with torch.no_grad():
        fill_model(model, of_model, where)
    fill_optimizer(optimizer, of_optimizer)


def whole_model(wrapped: Wrapped, build: Callable[[], CellModel]) -> CellModel:
    """The model with whole weights, on rank 0; every rank must ask for it. `build` makes another one like it."""
    if not wrapped.even:
        return wrapped.model
    tensors = whole_tensors(wrapped.model)
    if dist.get_rank() != 0:
        return wrapped.model
    model = build()
    fill_model(model, {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, "the trained model")
    return model


def _is_cut(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes long to import


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if _is_cut(tensor) else tensor


def _on_host_of_first(tensor: Tensor) -> Tensor:
    if not _is_cut(tensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0, device="cpu")


def _cut_as(like: Tensor, whole: Tensor) -> Tensor:
    """The slice of this rank of a tensor that every rank holds, or the tensor itself where `like` is not cut."""
    if not _is_cut(like) or like.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
