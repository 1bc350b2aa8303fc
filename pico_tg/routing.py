"""Mixture-of-Depths routing (arXiv 2404.02258): which bytes the deep blocks process.

`learned` selects the `capacity` bytes of largest router logit in training, and those of logit above
0 when causal. Fixed rules, for comparison, are causal in training as well: `space` (arXiv
2404.14408), a byte that is not a letter, digit or UTF-8 continuation byte and follows one; `all`;
`none`.

In training the deep blocks (`latent`) process the first `capacity` selected bytes of a sequence;
when causal, all. Their output is multiplied by the router weight, under rules as well.

Shape letters: B batch, N bytes, S slots.
"""

import math
from collections.abc import Callable

from tinygrad import Tensor, dtypes

MAX_RANKED = 2048  # bytes; longer sequences take algorithms below O(N^2), which run more kernels


def in_word(x: Tensor) -> Tensor:
    """Where x, bytes as wider integers [...], holds letters, digits or UTF-8 continuation bytes."""
    letter = ((x >= 65) & (x <= 90)) | ((x >= 97) & (x <= 122))
    return letter | ((x >= 48) & (x <= 57)) | ((x >= 128) & (x < 192))


# A rule says which of the bytes x are selected, bool [..., N]: from x and the bytes before them,
# int32 [..., N]. The byte before a sequence counts as 0.
RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "space": lambda x, before: in_word(before) & ~in_word(x),
    "all": lambda x, before: x >= 0,
    "none": lambda x, before: x < 0,
}


def causal_decisions(router: str, x: Tensor, before: Tensor, router_logits: Tensor) -> Tensor:
    """Which bytes the router selects without looking ahead: bool [..., N].

    x, before: see RULES; router_logits float32 [..., N], of which the router `learned` selects
    those above 0.
    """
    return RULES[router](x, before) if router in RULES else router_logits > 0


def top_k_decisions(router_logits: Tensor, capacity: int) -> Tensor:
    """The `capacity` largest logits of each row of [B, N], ties to the earlier byte: bool [B, N].

    Up to MAX_RANKED bytes, one O(N^2) kernel ranks them; beyond, 14 kernels find the smallest
    selected logit in O(N). `Tensor.topk` runs 67 kernels at N = 1024. Logits are compared instead
    of sigmoids, which have the same order but are rounded to ties. With logits that are NaN, the
    O(N^2) kernel may select more bytes.
    """
    z, N = router_logits.detach().contiguous(), router_logits.shape[1]
    if N > MAX_RANKED:
        return _above_threshold(z, capacity)
    z_i, z_j = z.unsqueeze(2), z.unsqueeze(1)  # (B, N, 1), (B, 1, N)
    position = Tensor.arange(N, device=z.device)
    earlier = position.reshape(1, N) < position.reshape(N, 1)  # (N, N)
    ahead = (z_j > z_i) | ((z_j == z_i) & earlier)  # (B, N, N)
    return ahead.sum(axis=2, dtype=dtypes.int32) < capacity


def _above_threshold(z: Tensor, capacity: int) -> Tensor:
    """`top_k_decisions` from a radix search for T, the capacity-th largest of each row of z.

    Four rounds determine 8 bits of T each: a round counts, for 255 candidates, the logits that are
    not smaller.
    """
    # float32 as int32 of the same order; -0.0 equals 0.0
    bits = (z == 0).where(0.0, z).bitcast(dtypes.int32)
    key = (bits < 0).where(bits ^ 0x7FFFFFFF, bits).contiguous()  # (B, N)
    T, digit, counts = 0, Tensor.arange(1, 256, device=z.device), []
    for shift in (24, 16, 8, 0):
        lowest = -128 if shift == 24 else 0  # signed: T may not overflow, as tinygrad assumes
        candidate = (T + (digit + lowest) * (1 << shift)).reshape(-1, 255, 1)  # (B or 1, 255, 1)
        count = (key.unsqueeze(1) >= candidate).sum(axis=2, dtype=dtypes.int32).contiguous()
        reached = (count >= capacity).sum(axis=1, keepdim=True, dtype=dtypes.int32)  # (B, 1)
        T = T + (reached + lowest) * (1 << shift)
        counts.append(count)
    T, count = T.contiguous(), Tensor.cat(*counts, dim=1)  # (B, 1), (B, 4 * 255)
    # T + 1 was a candidate, unless T is the largest int32
    above = (count < capacity).where(count, 0).max(axis=1, keepdim=True).contiguous()  # (B, 1)
    tied = (key == T).contiguous()
    return (key > T) | (tied & (tied.cast(dtypes.int32).cumsum(axis=1) <= capacity - above))


def slots(decisions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Assign decisions bool [B, N] to `count` slots: index int32 [B, count], slot int32 [B, N].

    `index` is the byte in each slot, `slot` the slot of each byte, -1 for a byte without a slot:
    inverse maps, as `ops.gather` and `ops.scatter` need. Slots are filled in sequence order; once
    all slots are full, further selected bytes get -1. Unused slots hold index 0.
    """
    N = decisions.shape[1]
    selected = decisions.cast(dtypes.int32).cumsum(axis=1).contiguous()  # up to each byte; (B, N)
    slot = (decisions & (selected <= count)).where(selected - 1, -1).contiguous()  # (B, N)
    # slot s holds the first byte n with selected[n] > s, and `selected` never decreases: count the
    # bytes before n, in long sequences first the whole blocks of `size` bytes, then in one block
    s = Tensor.arange(count, device=slot.device).reshape(count, 1)
    if N <= MAX_RANKED:
        index = (selected.unsqueeze(1) <= s).sum(axis=2, dtype=dtypes.int32)  # (B, S)
    else:
        size = math.isqrt(N)
        ends = selected[:, size - 1 :: size].unsqueeze(1)  # (B, 1, blocks)
        start = (ends <= s).sum(axis=2, keepdim=True, dtype=dtypes.int32).contiguous() * size
        n = start + Tensor.arange(size, device=slot.device)  # (B, S, size)
        block = selected.gather(1, n.minimum(N - 1).flatten(1)).reshape(n.shape)
        index = start.squeeze(2) + ((n < N) & (block <= s)).sum(axis=2, dtype=dtypes.int32)
    return (index < N).where(index, 0).contiguous(), slot
