"""Mixture-of-Depths routing (arXiv 2404.02258): which bytes the latent blocks process.

`learned` selects the `capacity` bytes of largest router logit in training, and those of logit above
0 when causal. Two more routers are causal in training as well: `threshold` (expert threshold, arXiv
2603.11535) selects logits above a cutoff, the running average of the capacity-th largest; `ratio`
(arXiv 2507.07955) those above 0, with a loss that pulls their share to the capacity factor. Fixed
rules, for comparison, are causal too: `space` (arXiv 2404.14408), a byte that is not a letter,
digit or UTF-8 continuation byte and follows one; `stride`, every n-th byte; `all`; `none`.

In training the latent blocks process the first `Config.slots` selected bytes of a sequence; when
causal, all. The router weight scales their output, under rules as well; under `ratio` it is 1 with
the gradient of the sigmoid.

Shape letters: B batch, N bytes, S slots.
"""

from functools import partial

import numpy as np
from tinygrad import Tensor, dtypes

TOP_K_STEPS = 100  # first training steps of `threshold`, which select the top-k

Array = Tensor | np.ndarray


def in_word(x: Array) -> Array:
    """Where x, bytes as wider integers [...], holds letters, digits or UTF-8 continuation bytes."""
    letter = ((x >= 65) & (x <= 90)) | ((x >= 97) & (x <= 122))
    return letter | ((x >= 48) & (x <= 57)) | ((x >= 128) & (x < 192))


def rule_decisions(router: str, x: Array, before: Array, position: Array, stride: int) -> Array:
    """Which of the bytes x a rule selects: bool [..., N].

    x and the bytes before them, `before`, signed integers [..., N]; their positions, int [N]. The
    byte before a sequence counts as 0.
    """
    everywhere = x >= 0
    if router == "space":
        return in_word(before) & ~in_word(x)
    if router == "stride":
        return everywhere & (position % stride == stride - 1)
    if router in ("all", "none"):
        return everywhere if router == "all" else ~everywhere
    raise ValueError(f"{router!r} is not a rule")


def top_k_decisions(router_logits: Tensor, capacity: int) -> Tensor:
    """The `capacity` largest logits of each row of [B, N], ties to the earlier byte: bool [B, N].

    One O(N^2) integer kernel ranks all bytes, where `Tensor.topk` runs 67 kernels at N = 1024.
    Logits are compared instead of sigmoids, which have the same order but are rounded to ties.
    """
    z, N = router_logits.detach().contiguous(), router_logits.shape[1]
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
    order = decisions.cast(dtypes.int32).cumsum(axis=1) - 1
    slot = (decisions & (order < count)).where(order, -1).contiguous()  # (B, N)
    # at most one byte has slot s, so a sum over N finds the byte's index without a sort
    arange = partial(Tensor.arange, device=slot.device)
    here = slot.unsqueeze(1) == arange(count).reshape(count, 1)  # (B, S, N)
    index = here.where(arange(slot.shape[1]), 0).sum(axis=2, dtype=dtypes.int32)  # (B, S)
    return index.contiguous(), slot
