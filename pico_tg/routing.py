"""Mixture-of-Depths routing (arXiv 2404.02258): which bytes the latent blocks process.

`learned` selects the `capacity` bytes of largest router logit in training, and those of logit above
0 when causal. Two more routers are causal in training as well: `threshold` (expert threshold, arXiv
2603.11535) selects logits above a cutoff, the running average of the capacity-th largest; `ratio`
(arXiv 2507.07955) those above 0, with a loss that pulls their share to the capacity factor. Fixed
rules, for comparison, are causal too: `space` (arXiv 2404.14408), a byte that is not a letter,
digit or UTF-8 continuation byte and follows one; `stride`, every n-th byte; `all`; `none`.

In training the latent blocks process the first `Config.slots` selected bytes of a sequence; when
causal, all. Their output is multiplied by the router weight, under rules as well; under `ratio`, by
1 with the gradient of the router weight.

Shape letters: B batch, N bytes.
"""

import numpy as np
from tinygrad import Tensor

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
