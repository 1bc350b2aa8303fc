"""Mixture-of-Depths routing (arXiv 2404.02258): which bytes the latent blocks process.

The `learned` router selects the `capacity` bytes of largest weight in training, and those of weight
above 0.5 when causal. The others are fixed rules for comparison: `space` (arXiv 2404.14408), a byte
that is not a letter, digit or UTF-8 continuation byte and follows one; `stride`, every n-th byte;
`all`; `none`. A rule never reads later bytes. In training, the latent blocks process the first
`capacity` bytes that a rule selects; when causal, all of them. Under a rule the router weight does
not select, but still scales the output of the latent blocks.

Shape letters: B batch, N bytes, S slots.
"""

from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes


def in_word(x: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Where x, bytes as wider integers [...], holds letters, digits or UTF-8 continuation bytes."""
    letter = ((x >= 65) & (x <= 90)) | ((x >= 97) & (x <= 122))
    return letter | ((x >= 48) & (x <= 57)) | ((x >= 128) & (x < 192))


def rule_decisions(router: str, x: Tensor, stride: int, limit: int | None) -> Tensor:
    """Which of the bytes x, int [B, N], a rule selects: bool [B, N].

    `space` does not select the first byte of a sequence, which has no byte before it. `limit` keeps
    only the first `limit` selected bytes of each sequence.
    """
    if router == "space":
        word = in_word(x)
        decisions = word[:, :-1].pad((None, (1, 0))) & word.logical_not()
    elif router == "stride":
        position = Tensor.arange(x.shape[1], device=x.device)
        decisions = (position % stride == stride - 1).expand(*x.shape)
    else:
        decisions = Tensor.full(x.shape, router == "all", dtype=dtypes.bool, device=x.device)
    if router in ("space", "stride") and limit is not None:
        decisions = decisions.contiguous()
        decisions = decisions & (decisions.cast(dtypes.int32).cumsum(axis=1) <= limit)
    return decisions.contiguous()


def next_decisions(router: str, data: bytes, position: int, stride: int) -> np.ndarray:
    """`rule_decisions` without a limit for the n bytes from `position` on: bool [n].

    data: the n bytes, preceded by the byte at position - 1 unless position is 0.
    """
    first = min(1, position)
    if router == "space":
        word = in_word(np.frombuffer(data, np.uint8).astype(np.int32))
        before = np.concatenate([np.zeros(1 - first, bool), word[:-1]])
        return before & ~word[first:]
    at = position + np.arange(len(data) - first)
    return at % stride == stride - 1 if router == "stride" else np.full(at.shape, router == "all")


def top_k_decisions(router_logits: Tensor, capacity: int) -> Tensor:
    """The `capacity` largest logits of each row of [B, N], ties to the earlier byte: bool [B, N].

    One O(N^2) integer kernel ranks all bytes, where `Tensor.topk` runs 67 kernels at N = 1024.
    Logits are compared instead of sigmoids, which have the same order but are rounded to ties.
    """
    z = router_logits.detach().contiguous()
    N = z.shape[1]
    z_i, z_j = z.unsqueeze(2), z.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    position = Tensor.arange(N, device=z.device)
    earlier = position.reshape(1, N) < position.reshape(N, 1)  # (N, N)
    ahead = (z_j > z_i) | ((z_j == z_i) & earlier)  # (B, N, N)
    return ahead.sum(axis=2, dtype=dtypes.int32) < capacity


def slots(decisions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Assign decisions bool [B, N] to `count` slots: index int32 [B, count], slot int32 [B, N].

    `index` is the byte in each slot, `slot` the slot of each byte, -1 for a byte without a slot:
    inverse maps, as `ops.gather` and `ops.scatter` need. Slots are filled in sequence order; once
    all slots are full, further selected bytes get -1. Unused slots hold index 0.
    """
    N = decisions.shape[1]
    order = decisions.cast(dtypes.int32).cumsum(axis=1) - 1
    slot = (decisions & (order < count)).where(order, -1).contiguous()  # (B, N)
    # at most one byte has slot s, so a sum over N finds the byte's index without a sort
    arange = partial(Tensor.arange, device=slot.device)
    here = slot.unsqueeze(1) == arange(count).reshape(count, 1)  # (B, S, N)
    index = here.where(arange(N), 0).sum(axis=2, dtype=dtypes.int32).contiguous()  # (B, S)
    return index, slot
