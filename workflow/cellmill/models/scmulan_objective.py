"""How the questions of scMulan's objective (see `cellmill.models.scmulan`) are laid out, and summed in small pieces.

Of a sentence's t questions the last has the answer <E>; any other, number q, has the answers q, q + 1, ..., t - 2,
where number q is the word right behind question q. Each question has the same share of its sentence, each of its
answers the same weight in that.

The objective needs a logit of every token at every question, and a value of every answer at every question in front of
it. Neither matrix is ever whole: a block of it is made, summed, and multiplied into the gradient, while it lies in the
processor's cache. That is exact, and needs no second product in the backward pass.

Legend: B sentences, N slots of words, M slots of questions, D width, T tokens, G sentences of a group, L questions of
its longest one, R questions of a block.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cellmill.models.base import Inputs, Losses, LossTerm
from cellmill.models.packing import Layout, Packing
from cellmill.models.vocabulary_head import vocabulary_loss
from cellmill.views.ragged import offsets_of, spread
from cellmill.views.scmulan import Sentences

BLOCK = {"cpu": 2**18, "cuda": 2**24}
"""Values of a block: what fits into a core's cache, or keeps a GPU busy."""
ROWS = 256
"""Questions of a block of values at most: the answers in front of its first question are not computed."""


def questions(sentences: Sentences, layout: Layout, packing: Packing) -> Inputs:
    """The questions of training sentences, whose words without <E> lie in `layout`.

    A word that starts its sentence is asked for by none, and <E> is not in a sentence that does not end (its question
    stands there, with the share 0).

    Returns
    -------
    dict
        ``layout_asked``, of the questions; of them ``asked`` int64 [M], the slots of the words that they stand behind;
        ``next_tokens``, ``next_values`` int32 [M], of the words right behind; ``shares`` float32 [M], of a question in
        its sentence; ``weights`` float32 [M], of each of its answers; ``n_asked`` float32 [], sentences with questions.
    """
    lengths_B = np.minimum(sentences.targets_B, np.diff(sentences.offsets) - 1)
    offsets = offsets_of(lengths_B)
    layout_asked = (Packing("packed", packing.grain) if len(lengths_B) else packing).layout(lengths_B)
    number_M = np.arange(offsets[-1])
    behind_M = spread(offsets[1:], offsets) - 1 - number_M  # questions behind this one
    next_M = number_M + spread(sentences.offsets[1:] - offsets[1:], offsets)
    n_counted_B = lengths_B - ~sentences.ends_B
    shares_M = (1 / np.maximum(spread(n_counted_B, offsets), 1)).astype(np.float32)
    shares_M[(behind_M == 0) & ~spread(sentences.ends_B, offsets)] = 0
    arrays = {
        "asked": (number_M + spread(layout.ends - offsets[1:], offsets), np.int64),
        "next_tokens": (sentences.tokens[next_M], np.int32),
        "next_values": (sentences.values[next_M], np.int32),
        "shares": (shares_M, np.float32),
        "weights": (shares_M / np.maximum(behind_M, 1), np.float32),
    }
    placed = {name: torch.from_numpy(layout_asked.place(offsets, x, 0, dtype=t)) for name, (x, t) in arrays.items()}
    n_asked = torch.tensor(np.count_nonzero(n_counted_B > 0), dtype=torch.float32)
    return placed | {"layout_asked": layout_asked, "n_asked": n_asked}


def objective(h_MD: Tensor, entity_TD: Tensor, value_TD: Tensor, inputs: Inputs) -> Losses:
    """`entity`: cross-entropy (nats) and `value`: squared error (bins), sums over sentences of their means.

    Parameters
    ----------
    h_MD
        float32, the states at the questions.
    entity_TD, value_TD
        The heads' weights.
    inputs
        Those of `questions`.
    """
    with torch.autocast(h_MD.device.type, enabled=False):
        n_rows = max(_block(h_MD) // len(entity_TD), 1)
        normalisers = vocabulary_loss(h_MD, entity_TD, weights_M=inputs["shares"], n_rows=n_rows)
        token_M = inputs["next_tokens"]
        said, error = over_answers(h_MD, F.embedding(token_M, entity_TD), F.embedding(token_M, value_TD), inputs)
    return {"entity": LossTerm(normalisers - said, inputs["n_asked"]), "value": LossTerm(error, inputs["n_asked"])}


class OverAnswers(NamedTuple):
    """Two weighted sums over all questions and their answers."""

    said: Tensor
    """float32 [], of the products of the question's state and the answer's `e_MD`."""
    error: Tensor
    """float32 [], of the squared differences of such products with the answer's `v_MD` and the answer's value."""


def over_answers(h_MD: Tensor, e_MD: Tensor, v_MD: Tensor, inputs: Inputs) -> OverAnswers:
    """See `OverAnswers`; `e_MD` and `v_MD` are of the words right behind each question."""
    asked, y_M, w_M = inputs["layout_asked"], inputs["next_values"].float(), inputs["weights"]
    # <E>, the last answer, is that of the last question alone
    last_B = asked.on_device(asked.ends[asked.lengths > 0] - 1)
    h_BD, e_BD, v_BD = (x_MD.index_select(0, last_B) for x_MD in (h_MD, e_MD, v_MD))
    error_B = ((h_BD * v_BD).sum(1) - y_M[last_B]).square()
    is_word_M = torch.ones_like(w_M).index_fill_(0, last_B, 0)
    words = e_MD * is_word_M[:, None], v_MD * is_word_M[:, None], y_M * is_word_M
    said, error = _Words.apply(h_MD, *words, w_M, asked, torch.is_grad_enabled())
    return OverAnswers(said + (w_M[last_B] * (h_BD * e_BD).sum(1)).sum(), error + (w_M[last_B] * error_B).sum())


class _Words(torch.autograd.Function):
    """`OverAnswers`, where answer c is one of question q wherever c >= q, and <E> has zeros for e, v and y."""

    @staticmethod
    def forward(ctx, h_MD, e_MD, v_MD, y_M, w_M, asked, learns):
        said, error = h_MD.new_zeros(()), h_MD.new_zeros(())
        # a row of zeros behind them is what sentences have that are shorter than others of their group
        h, e, v, y, w = (torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in (h_MD, e_MD, v_MD, y_M, w_M))
        d_h_said, d_h_error, d_e, d_v = (torch.zeros_like(h) if learns else None for _ in range(4))
        for index_GL in _groups(asked, _block(h_MD)):
            h_GLD, e_GLD, v_GLD, y_GL, w_GL = (x[index_GL] for x in (h, e, v, y, w))
            remaining_GLD = e_GLD.flip(1).cumsum(1).flip(1)
            weighted_GLD = h_GLD * w_GL[:, :, None]
            said += (weighted_GLD * remaining_GLD).sum()
            d_h_GLD, d_v_GLD = (torch.zeros_like(h_GLD) if learns else None for _ in range(2))
            for start in range(0, index_GL.shape[1], ROWS):
                rows = slice(start, start + ROWS)
                error_GRL = torch.baddbmm(-y_GL[:, None, start:], h_GLD[:, rows], v_GLD[:, start:].mT).triu_()
                w_GR1 = w_GL[:, rows, None]
                error += (w_GR1 * torch.linalg.vector_norm(error_GRL, dim=2, keepdim=True).square()).sum()
                if learns:
                    error_GRL *= 2 * w_GR1
                    d_h_GLD[:, rows] = error_GRL @ v_GLD[:, start:]
                    d_v_GLD[:, start:] += error_GRL.mT @ h_GLD[:, rows]
            if learns:
                parts = w_GL[:, :, None] * remaining_GLD, d_h_GLD, weighted_GLD.cumsum(1), d_v_GLD
                for whole, part_GLD in zip((d_h_said, d_h_error, d_e, d_v), parts, strict=True):
                    whole[index_GL] = part_GLD
        ctx.save_for_backward(*(d[:-1] if learns else None for d in (d_h_said, d_h_error, d_e, d_v)))
        return said, error

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_said, grad_error):
        d_h_said, d_h_error, d_e, d_v = ctx.saved_tensors
        return grad_said * d_h_said + grad_error * d_h_error, grad_said * d_e, grad_error * d_v, *[None] * 4


def _groups(asked: Layout, block: int) -> Iterator[Tensor]:
    """Sentences of similar numbers of questions: int64 [G, L], their slots; behind a sentence M, the slot of zeros."""
    order_B = np.argsort(-asked.lengths, kind="stable")
    order_B = order_B[: np.count_nonzero(asked.lengths)]
    while len(order_B):
        length = int(asked.lengths[order_B[0]])
        n = max(block // (min(length, ROWS) * length), 1)
        group_G, order_B = order_B[:n], order_B[n:]
        place_L = np.arange(length)
        used_GL = place_L < asked.lengths[group_G, None]
        index_GL = np.where(used_GL, asked.starts[group_G, None] + place_L, asked.n_slots)
        yield asked.on_device(index_GL)


def _block(x: Tensor) -> int:
    return BLOCK.get(x.device.type, BLOCK["cuda"])
