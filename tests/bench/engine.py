"""Training and embedding against the scgpt wheel's module, Hugging Face's BERT, and bare matrix products.

Every side takes the same real cells, the same weights, the same optimiser and two cores, in a process of its own, and
must come to the same losses. Theirs run as they are: float32, every cell padded to the longest of its batch. Ours run
packed, in float32 and in bfloat16. The limit is the time of the bare bfloat16 matrix products that a step of ours
needs, of the same shapes, and nothing else.
"""

import importlib.util
import json
import sys
import time
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

from harness import Options, Row, at_least, at_most, child, failure, peak_mb

CELLS = 16
"""Cells of a step; real ones of many lengths."""
STEPS = 3
"""The first is not timed."""
LENGTH = 1024
MICRO_BATCH = 8
"""Cells that the published modules take at once: more need more memory, and are no faster here."""
TOKENS = 8192
"""Tokens of a micro batch of ours."""
SAME_LOSS = {"float32": 1e-4, "bfloat16": 1e-2}
"""How far apart losses may lie, as a share."""


def measure(options: Options) -> list[Row]:
    """Rows of both models: training, embedding, memory, and the share of bare products."""
    from corpora import real_corpus

    corpus = real_corpus(options, "protein_coding")
    rows = []
    for architecture, peer, factor in (("scgpt", "scgpt wheel", 4), ("geneformer", "Hugging Face BERT", 6)):
        try:
            rows += compare(corpus, architecture, peer, factor, options.seconds)
        except RuntimeError as error:
            rows.append(failure(architecture, error))
    return rows


def compare(corpus: Path, architecture: str, peer: str, factor: int, seconds: float) -> list[Row]:
    """Rows of one architecture's base preset."""
    sides = {}
    kinds = ["theirs", "float32", "bfloat16"]
    for kind in [*kinds, "theirs masked"] if architecture == "scgpt" else kinds:
        sides[kind] = child("engine.py", str(corpus), architecture, kind)
    theirs = sides.pop("theirs")
    masked = sides.pop("theirs masked", theirs)
    fastest = min(theirs["step"], masked["step"])
    rows = []
    for kind, ours in sides.items():
        drift = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        about = f"{architecture}-base, {CELLS} real cells, {ours['tokens']:,} tokens a step, mean length "
        about += f"{ours['tokens'] / CELLS:.0f} of {LENGTH}"
        fast = kind == "bfloat16"
        rows += [
            Row(
                f"{architecture}: training, {kind}",
                CELLS / ours["step"],
                "cells/s",
                peer,
                CELLS / fastest,
                at_least(factor, "ratio") if fast else None,
                about,
            ),
            Row(
                f"{architecture}: embedding, {kind}",
                CELLS / ours["embedding"],
                "cells/s",
                peer,
                CELLS / theirs["embedding"],
                at_least(factor, "ratio") if fast else None,
                about,
            ),
            Row(
                f"{architecture}: memory of training, {kind}",
                ours["training_mb"],
                "MB",
                peer,
                min(theirs["training_mb"], masked["training_mb"]),
                at_most(0.5, "ratio") if fast else None,
                "peak less what the process held before the first step",
            ),
            Row(
                f"{architecture}: losses of {STEPS} steps, {kind}",
                drift,
                "largest share apart",
                aim=at_most(SAME_LOSS[kind]),
                note=f"{[round(loss, 4) for loss in ours['losses']]}; {peer} {[round(x, 4) for x in theirs['losses']]}",
            ),
        ]
        if fast:
            rows.append(
                Row(
                    f"{architecture}: forward and backward",
                    ours["products"] / ours["gradient"],
                    "of bare products",
                    "time of bfloat16 products alone",
                    1.0,
                    at_least(0.5, "ratio"),
                    f"{ours['products']:.2f} s of products, {ours['gradient']:.2f} s of a step without its optimiser",
                )
            )
    return rows


# --- one side, in a process of its own --------------------------------------------------------------------------------


def side(corpus: Path, architecture: str, kind: str, preset: str = "base") -> dict:
    """Seconds and memory of training and embedding, and the losses."""
    import torch
    from cellmill.checkpoints import build_model
    from cellmill.device import use_threads
    from cellmill.recipes import ModelRecipe
    from cellmill.shards.dataset import Shards
    from cellmill.shards.loader import Loader

    use_threads(2)
    torch.set_deterministic_debug_mode("default")  # the published modules index in ways without a deterministic form
    shards = Shards(corpus)
    statistics = statistics_of(corpus)
    sizes = {"max_length": LENGTH, "dropout": 0.0}
    if architecture == "scgpt":
        sizes |= {"flag_embedding": False, "cell_prompt_after": 10**9}
    recipe = ModelRecipe(architecture=architecture, preset=preset, sizes=sizes)
    model = build_model(recipe, shards.n_genes, statistics, seed=0)
    with Loader(shards, "train", CELLS, seed=0) as loader:
        cells = [next(loader) for _ in range(STEPS)]
    make = {"theirs": Theirs, "theirs masked": TheirsMasked}.get(kind, Ours)
    run = make(model, architecture, bfloat16=kind == "bfloat16")
    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-4, fused=True)
    before, losses, seconds = peak_mb(), [], []
    for step, batch in enumerate(cells):
        began = time.perf_counter()
        optimizer.zero_grad()
        losses.append(run.gradient(batch, step))
        gradient = time.perf_counter() - began
        optimizer.step()
        seconds.append((time.perf_counter() - began, gradient))
    found = {"losses": losses, "step": min(s for s, _ in seconds[1:]), "gradient": min(g for _, g in seconds[1:])}
    found["training_mb"] = peak_mb() - before
    times = []
    for batch in cells:
        began = time.perf_counter()
        run.embed(batch)
        times.append(time.perf_counter() - began)
    found["embedding"] = min(times[1:])
    found["tokens"] = int(model.token_lengths(cells[-1]).sum())
    if kind == "bfloat16":
        found["products"] = products(run.layouts(cells[-1]), model)
    return found


def statistics_of(corpus: Path):
    """The corpus's statistics, computed once."""
    from cellmill.shards.dataset import Shards
    from cellmill.shards.statistics import compute_statistics, load_statistics, save_statistics

    path = corpus.parent / "statistics.safetensors"
    if not path.exists():
        shards = Shards(corpus)
        save_statistics(path, compute_statistics(shards), shards.vocabulary_hash)
    return load_statistics(path)


class Ours:
    """cellmill's own model, packed."""

    def __init__(self, model, architecture: str, bfloat16: bool):
        import torch

        self.model, self.bfloat16 = model.train(), bfloat16
        self.torch = torch

    def parameters(self):
        return self.model.parameters()

    def _autocast(self):
        return self.torch.autocast("cpu", self.torch.bfloat16) if self.bfloat16 else nullcontext()

    def _parts(self, batch):
        from cellmill.training.micro_batches import cut

        return [batch.take(rows) for rows in cut(self.model.token_lengths(batch), TOKENS)]

    def gradient(self, batch, step: int) -> float:
        inputs = [self.model.pretrain_inputs(part, seed=0, step=step) for part in self._parts(batch)]
        counts = [self.model.loss_counts(part, step=step) for part in inputs]
        total = {name: sum(float(count[name]) for count in counts) for name in counts[0]}
        loss = 0.0
        for part in inputs:
            with self._autocast():
                terms = self.model(part, step=step)
            objective = sum(term.sum / total[name] for name, term in terms.items())
            objective.backward()
            loss += float(objective.detach())
        return loss

    def embed(self, batch):
        self.model.eval()
        with self.torch.inference_mode(), self._autocast():
            out = [self.model.embed_cells(self.model.embed_inputs(part)) for part in self._parts(batch)]
        self.model.train()
        return out

    def layouts(self, batch) -> list[dict]:
        return [self.model.pretrain_inputs(part, seed=0, step=0) for part in self._parts(batch)]


class Theirs:
    """The published module with our weights, under our objective."""

    def __init__(self, model, architecture: str, bfloat16: bool):
        import tempfile

        import torch
        from cellmill.models.packing import Packing
        from cellmill.released import write_released

        self.torch, self.ours = torch, model
        model.packing = Packing("padded")
        genes = [f"ENSG{gene:011d}" for gene in range(model.n_genes)]
        with tempfile.TemporaryDirectory() as folder:
            write_released(architecture, model, {"feature_ids": genes}, Path(folder))
            self.model = {"scgpt": wheels_scgpt, "geneformer": bert}[architecture](Path(folder))
        self.loss = {"scgpt": self._generative, "geneformer": self._masked_language}[architecture]
        self.states = {"scgpt": self._cell, "geneformer": self._cls}[architecture]
        self.model.train()

    def parameters(self):
        return self.model.parameters()

    def _parts(self, batch):
        return [batch.slice(i, min(i + MICRO_BATCH, len(batch))) for i in range(0, len(batch), MICRO_BATCH)]

    def gradient(self, batch, step: int) -> float:
        inputs = [self.ours.pretrain_inputs(part, seed=0, step=step) for part in self._parts(batch)]
        total = sum(float(next(iter(self.ours.loss_counts(part, step=step).values()))) for part in inputs)
        loss = 0.0
        for part in inputs:
            objective = self.loss(part) / total
            objective.backward()
            loss += float(objective.detach())
        return loss

    def embed(self, batch):
        self.model.eval()
        with self.torch.inference_mode():
            out = [self.states(self.ours.embed_inputs(part)) for part in self._parts(batch)]
        self.model.train()
        return out

    # Geneformer

    def _masked_language(self, inputs):
        tokens = inputs["layout"].to_matrix(inputs["tokens"].long())
        labels = self.torch.full((inputs["tokens"].numel(),), -100)
        labels[inputs["positions"]] = inputs["targets"].long()
        out = self.model(input_ids=tokens, attention_mask=(tokens != 0).long(), labels=labels.view_as(tokens))
        return out.loss * len(inputs["positions"])

    def _cls(self, inputs):
        tokens = inputs["layout"].to_matrix(inputs["tokens"].long())
        out = self.model.bert(input_ids=tokens, attention_mask=(tokens != 0).long(), output_hidden_states=True)
        return out.hidden_states[-2][:, 0]

    # scGPT

    def _sequence(self, inputs):
        """Perceived tokens, then hidden genes: tokens [B, L], values, targets, and how many are perceived."""
        torch, pad = self.torch, self.ours.pad
        shown, asked = inputs["layout"], inputs["layout_asked"]
        tokens = torch.cat(
            [shown.to_matrix(inputs["tokens"].long(), pad), asked.to_matrix(inputs["asked"].long(), pad)], 1
        )
        values = shown.to_matrix(inputs["values"], -2.0)
        return tokens, values, asked.to_matrix(inputs["targets"]), values.shape[1]

    def _generative(self, inputs):
        """The paper's rule as a mask: all see the perceived tokens and themselves."""
        torch, F = self.torch, self.torch.nn.functional
        tokens, values, targets, n = self._sequence(inputs)
        pad, length = self.ours.pad, tokens.shape[1]
        seen = torch.zeros(tokens.shape, dtype=torch.bool)
        seen[:, :n] = tokens[:, :n] != pad
        closed = ~(seen[:, None, :] | torch.eye(length, dtype=torch.bool))
        closed = closed.repeat_interleave(self.ours.sizes.n_heads, dim=0)
        genes = self.model.encoder(tokens)
        x = genes + F.pad(self.model.value_encoder(values), (0, 0, 0, length - n))
        h = self.model.transformer_encoder(x, mask=closed)
        return self._errors(h, genes, tokens, targets, n)

    def _errors(self, h, genes, tokens, targets, n):
        hidden = tokens[:, n:] != self.ours.pad
        gep = self.model.decoder(h)["pred"][:, n:]
        mvc = self.model.mvc_decoder(h[:, 0], genes)["pred"][:, n:]
        return sum(((predicted - targets)[hidden] ** 2).sum() for predicted in (gep, mvc))

    def _cell(self, inputs):
        tokens = inputs["layout"].to_matrix(inputs["tokens"].long(), self.ours.pad)
        values = inputs["layout"].to_matrix(inputs["values"], -2.0)
        return self.model._encode(tokens, values, tokens == self.ours.pad)[:, 0]


class TheirsMasked(Theirs):
    """The wheel's plain forward pass, as its fine-tuning trains: all tokens see all, hidden values are masked."""

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.loss = self._masked_values

    def _masked_values(self, inputs):
        torch = self.torch
        tokens, values, targets, n = self._sequence(inputs)
        masked = torch.full((len(tokens), tokens.shape[1] - n), -1.0)
        out = self.model(tokens, torch.cat([values, masked], 1), src_key_padding_mask=tokens == self.ours.pad, MVC=True)
        hidden = tokens[:, n:] != self.ours.pad
        parts = (out["mlm_output"], out["mvc_output"])
        return sum(((predicted[:, n:] - targets)[hidden] ** 2).sum() for predicted in parts)


def bert(folder: Path):
    """Hugging Face's module with the weights that we exported."""
    import transformers

    return transformers.BertForMaskedLM.from_pretrained(folder)


def wheels_scgpt(folder: Path):
    """The wheel's module with the weights that we exported; its package's other imports no longer install."""
    import torch

    package = Path(importlib.util.find_spec("scgpt").submodule_search_locations[0])
    for name, place in {"scgpt": package, "scgpt.model": package / "model"}.items():
        module = types.ModuleType(name)
        module.__path__ = [str(place)]
        sys.modules[name] = module
    wheel = importlib.import_module("scgpt.model.model")
    args, vocab = (json.loads((folder / name).read_text()) for name in ("args.json", "vocab.json"))
    theirs = wheel.TransformerModel(
        ntoken=len(vocab),
        d_model=args["embsize"],
        nhead=args["nheads"],
        d_hid=args["d_hid"],
        nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"],
        n_cls=1,
        vocab=vocab,
        dropout=args["dropout"],
        pad_token=args["pad_token"],
        pad_value=args["pad_value"],
        do_mvc=True,
        input_emb_style=args["input_emb_style"],
    )
    tensors = torch.load(folder / "best_model.pt", weights_only=True)
    theirs.load_state_dict({name.replace("Wqkv.", "in_proj_"): tensor for name, tensor in tensors.items()})
    return theirs


# --- the limit --------------------------------------------------------------------------------------------------------


def products(parts: list[dict], model) -> float:
    """Seconds of a step's bare bfloat16 products: of every layer's matrices and attention, forward and backward."""
    import torch

    def timed(m: int, k: int, n: int, batch: int = 0) -> float:
        """Of a product and the two of its gradient, the fastest of three rounds."""
        lead = (batch,) if batch else ()
        x, w, y = (torch.randn(*lead, *shape).bfloat16() for shape in ((m, k), (k, n), (m, n)))
        times = []
        for _ in range(3):
            began = time.perf_counter()
            torch.matmul(x, w), torch.matmul(y, w.mT), torch.matmul(x.mT, y)
            times.append(time.perf_counter() - began)
        return min(times)

    sizes, seconds = model.sizes, 0.0
    width, head = sizes.width, sizes.width // sizes.n_heads
    shapes = [(width, 3 * width), (width, width), (width, sizes.hidden), (sizes.hidden, width)]
    for part in parts:
        shown, asked = part["layout"], part.get("layout_asked")
        n_tokens = shown.n_slots + (asked.n_slots if asked else 0)
        seconds += sizes.n_layers * sum(timed(n_tokens, k, n) for k, n in shapes)
        for row in range(len(shown)):
            n_keys = int(shown.lengths[row])
            n_queries = n_keys + (int(asked.lengths[row]) if asked else 0)
            once = timed(n_queries, head, n_keys, sizes.n_heads) + timed(n_queries, n_keys, head, sizes.n_heads)
            seconds += sizes.n_layers * once
    return seconds


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(side(Path(sys.argv[1]), *sys.argv[2:])))
