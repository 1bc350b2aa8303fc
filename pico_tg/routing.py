"""Mixture-of-Depths routing (arXiv 2404.02258): which bytes go deeper, and the way there and back.

A router decides which bytes are selected. `learned`: the `capacity` bytes of largest weight in
training, those of weight above 0.5 when causal. The others are rules, to compare it with, and
causal in training as well, where the first `capacity` bytes that they select are served (when
causal, all of them): `space` (arXiv 2404.14408), a byte that is no letter, digit or UTF-8
continuation byte, where the byte before is one; `stride`, every n-th; `all`; `none`. Under a rule
the weight is a gate as ever, but has no say in the decision.

A routing is a pair of maps that are each other's inverse: `index` [B, S], the byte in each slot,
and `slot` [B, N], the slot of each byte (-1: none). Since the map is one-to-one, the gradient of
`gather` is a `scatter` by the same pair and the reverse; both cost O(N * dim).
"""

from functools import partial
from typing import TypeVar

import numpy as np
from tinygrad import Tensor, dtypes, function
from tinygrad.uop.ops import UOp

Array = TypeVar("Array", Tensor, np.ndarray)


def in_word(x: Array) -> Array:
    """Where bytes [...], as wider integers, are letters, digits or UTF-8 continuation bytes."""
    letter = ((x >= 65) & (x <= 90)) | ((x >= 97) & (x <= 122))
    return letter | ((x >= 48) & (x <= 57)) | ((x >= 128) & (x < 192))


def rule_decisions(router: str, x: Tensor, stride: int, most: int | None) -> Tensor:
    """What a router that is no learned one selects of bytes x int [B, N]: bool [B, N].

    The first byte of a sequence has none before it, and so `space` does not select it. `most`: only
    the first so many of each sequence.
    """
    if router == "space":
        word = in_word(x)
        decisions = word[:, :-1].pad((None, (1, 0))) & word.logical_not()
    elif router == "stride":
        position = Tensor.arange(x.shape[1], device=x.device)
        decisions = (position % stride == stride - 1).expand(*x.shape)
    else:
        decisions = Tensor.full(x.shape, router == "all", dtype=dtypes.bool, device=x.device)
    if router in ("space", "stride") and most is not None:
        decisions = decisions.contiguous()
        decisions = decisions & (decisions.cast(dtypes.int32).cumsum(axis=1) <= most)
    return decisions.contiguous()


def next_decisions(router: str, data: bytes, position: int, stride: int) -> np.ndarray:
    """`rule_decisions` for the bytes from `position` on: bool [n].

    data: those n bytes, and before them the one at position - 1, if there is one.
    """
    first = min(1, position)
    if router == "space":
        word = in_word(np.frombuffer(data, np.uint8).astype(np.int32))
        before = np.concatenate([np.zeros(1 - first, bool), word[:-1]])
        return before & ~word[first:]
    at = position + np.arange(len(data) - first)
    return at % stride == stride - 1 if router == "stride" else np.full(at.shape, router == "all")


def top_k_decisions(router_logits: Tensor, capacity: int) -> Tensor:
    """The `capacity` largest of each row of [B, N], ties to the earlier one: bool [B, N].

    Ranks are counted in one O(N^2) kernel of integers; a sort would be 67 kernels at N = 1024. The
    order is that of the logits, which is the order of their sigmoids before rounding.
    """
    z = router_logits.detach().contiguous()
    N = z.shape[1]
    mine, other = z.unsqueeze(2), z.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    position = Tensor.arange(N, device=z.device)
    earlier = position.reshape(1, N) < position.reshape(N, 1)
    ahead = (other > mine) | ((other == mine) & earlier)
    return (ahead.sum(axis=2, dtype=dtypes.int32) < capacity).contiguous()


def slots(decisions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Maps for decisions bool [B, N] and `count` slots: index int32 [B, count], slot int32 [B, N].

    Slots are filled in sequence order. Slots left over point at byte 0 and no byte points back;
    decisions that find all slots taken get none.
    """
    N = decisions.shape[1]
    order = decisions.cast(dtypes.int32).cumsum(axis=1) - 1
    slot = (decisions & (order < count)).where(order, -1).contiguous()
    # the byte of slot s is the only one with slot == s: an integer sum over N, no sort
    arange = partial(Tensor.arange, device=slot.device)
    here = slot.unsqueeze(1) == arange(count).reshape(count, 1)  # (B, S, N)
    index = here.where(arange(N), 0).sum(axis=2, dtype=dtypes.int32).contiguous()
    return index, slot


def gather(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """x [B, N, dim] -> [B, S, dim], the bytes in their slots."""
    return _gather(x.contiguous(), index, slot).contiguous()


def scatter(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    """x [B, S, dim] -> [B, N, dim], the slots at their bytes and zeros elsewhere."""
    return _scatter(x.contiguous(), index, slot)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(2).expand(*index.shape, x.shape[2]))


def _place(x: Tensor, slot: Tensor) -> Tensor:
    return (slot >= 0).unsqueeze(2).where(_take(x, slot.maximum(0)), 0)


def _gather_gradient(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
    _, _, slot = (Tensor(uop) for uop in call.src[1:])
    return _place(Tensor(gradient).contiguous(), slot).uop, None, None


def _scatter_gradient(gradient: UOp, call: UOp) -> tuple[UOp | None, ...]:
    _, index, slot = (Tensor(uop) for uop in call.src[1:])
    taken = slot.gather(1, index) == Tensor.arange(index.shape[1], device=index.device)
    # a slot left over is of no byte, whatever its index says
    taken = taken.unsqueeze(2)
    return taken.where(_take(Tensor(gradient).contiguous(), index), 0).uop, None, None


# without these, tinygrad's gradient of an indexed load is a one-hot sum, O(N * S * dim)
@function(grad_fxn=_gather_gradient)
def _gather(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return _take(x, index) + 0 * slot[:, :1].unsqueeze(2)  # the gradient needs slot


@function(grad_fxn=_scatter_gradient)
def _scatter(x: Tensor, index: Tensor, slot: Tensor) -> Tensor:
    return _place(x, slot)
