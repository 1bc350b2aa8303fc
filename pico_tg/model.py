"""Pico: a byte-level language model that learns which bytes deserve depth.

    bytes -> embedding -> full-bandwidth blocks -> latent blocks -> full-bandwidth blocks -> heads

- every block: pre-norm grouped-query attention in a band, with ALiBi or rotation, then
  SwiGLU
- full-bandwidth blocks (narrow window) run on every byte
- latent blocks (wide window) run on the bytes that a Mixture-of-Depths router selects: the top
  `capacity` of a sequence in training, those with weight > 0.5 when `causal`; or by a rule
- head k at position i predicts byte i + 1 + k

Shape letters: B batch, N bytes, S selected bytes, D dim, H query heads, K key/value heads,
C head_dim, T next_tokens.
"""

import math

import numpy as np
from tinygrad import Tensor, dtypes, nn

from .attention import banded_attention, rotate
from .config import Config
from .ops import as_index, linear, lookup, materialize, swiglu
from .remat import run_blocks
from .routing import gather, rule_decisions, scatter, slots, top_k_decisions
from .runtime import write_into

RMS_EPS = 2.0**-23  # float32's machine epsilon


class Linear:
    """y = x W^T, with W [out, in], which holds anything until it is drawn or loaded."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.weight = Tensor.empty(outputs, inputs)

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps), times a learned scale [D] (arXiv 1910.07467); as empty."""

    def __init__(self, dim: int) -> None:
        self.weight = Tensor.empty(dim)

    def __call__(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(axis=-1, keepdim=True) + RMS_EPS).rsqrt() * self.weight


class Attention:
    """Grouped-query attention; `fused_qkv` packs [query heads | key heads | value heads]."""

    def __init__(self, config: Config, window: int) -> None:
        self.heads, self.kv_heads = config.att_q_heads, config.att_kv_heads
        self.head_dim, self.window = config.head_dim, window
        self.position = config.position
        self.fused_qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.proj = Linear(self.heads * self.head_dim, config.dim)

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, D] -> q [B, H, N, C], k and v [B, K, N, C]."""
        B, N, _ = x.shape
        heads = self.fused_qkv(x).reshape(B, N, -1, self.head_dim).transpose(1, 2)
        # materialize one by one: the gradient of a split is otherwise a masked sum over all heads
        return tuple(
            map(materialize, heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1))
        )

    def output(self, heads: Tensor) -> Tensor:
        """[B, H, N, C] -> [B, N, D]."""
        return self.proj(materialize(heads.transpose(1, 2)).flatten(2))

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        if self.position == "rope":
            at = Tensor.arange(x.shape[1], device=x.device)
            q, k = materialize(rotate(q, at)), materialize(rotate(k, at))
        return self.output(banded_attention(q, k, v, self.window, self.position == "alibi"))


class SwiGLU:
    """fc2(silu(gate) * value), where fc1's first half is the value (arXiv 2002.05202)."""

    def __init__(self, dim: int) -> None:
        self.fc1 = Linear(dim, 2 * dim)
        self.fc2 = Linear(dim, dim)

    def __call__(self, x: Tensor) -> Tensor:
        return self.fc2(swiglu(self.fc1(x)))


class Block:
    """h + att(norm1(h)), then h + glu(norm2(h))."""

    def __init__(self, config: Config, window: int) -> None:
        self.norm1, self.norm2 = RMSNorm(config.dim), RMSNorm(config.dim)
        self.att = Attention(config, window)
        self.glu = SwiGLU(config.dim)

    def __call__(self, h: Tensor) -> Tensor:
        h = materialize(h + self.att(self.norm1(h)))
        return materialize(h + self.glu(self.norm2(h)))


def through(blocks: list[Block], h: Tensor) -> Tensor:
    """h [B, N, D] through one block after the other."""
    if Tensor.training:
        return run_blocks(blocks[0], [nn.state.get_parameters(block) for block in blocks], h)
    for block in blocks:
        h = block(h)
    return h


class FullBandwidth:
    """Blocks that see every byte through a narrow window."""

    def __init__(self, config: Config) -> None:
        window = config.fb_att_window_size
        self.blocks = [Block(config, window) for _ in range(config.fb_num_blocks)]

    def __call__(self, h: Tensor) -> Tensor:
        return through(self.blocks, h)


class Latent:
    """The router, and the blocks for the bytes that it selects."""

    def __init__(self, config: Config) -> None:
        window = config.latent_att_window_size
        self.router = Linear(config.dim, 1)
        self.blocks = [Block(config, window) for _ in range(config.latent_num_blocks)]

    def __call__(self, h: Tensor, router_logits: Tensor, decisions: Tensor, count: int) -> Tensor:
        """What the blocks add to h [B, N, D], given router_logits [B, N], decisions bool [B, N].

        `count` slots are computed; decisions beyond that many are not served.
        """
        index, slot = slots(decisions, count)
        selected = gather(h, index, slot)  # (B, S, D)
        weight = gather(router_logits.sigmoid().unsqueeze(2), index, slot)  # (B, S, 1)
        deep = through(self.blocks, selected)
        return scatter((deep - selected) * weight, index, slot)


class Pico:
    """The model, with fresh random weights: those of a `seed` >= 0 are the same on every device.

    With `fresh=False` they hold anything, until `load_weights` fills them.
    """

    def __init__(self, config: Config, seed: int | None = None, fresh: bool = True) -> None:
        self.config = config
        self.embedding = nn.Embedding(256, config.dim)
        self.fb_in = FullBandwidth(config)
        self.latent = Latent(config)
        self.fb_out = FullBandwidth(config)
        self.norm = RMSNorm(config.dim)
        self.unembedding = nn.Linear(config.dim, config.next_tokens * 256)
        weights = nn.state.get_state_dict(self)
        for weight in weights.values():
            weight.replace(Tensor.empty(*weight.shape))
        Tensor.realize(*weights.values())
        if fresh:
            self._draw(weights, np.random.default_rng(seed))

    def _draw(self, weights: dict[str, Tensor], rng: np.random.Generator) -> None:
        """The embedding N(0, 1), norms 1, the rest uniform in +-1/sqrt(inputs).

        By NumPy: a generator on the device is seconds of compiling, for once.
        """
        for name, weight in weights.items():
            if name == "embedding.weight":
                values = rng.standard_normal(weight.shape, np.float32)
            elif "norm" in name:
                values = np.ones(weight.shape, np.float32)
            else:  # the one bias belongs to a matrix of as many inputs as the model is wide
                inputs = weight.shape[1] if weight.ndim == 2 else self.config.dim
                values = (2 * rng.random(weight.shape, np.float32) - 1) / math.sqrt(inputs)
            write_into(weight, values)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes [B, N] -> hidden state [B, N, D] before the latent blocks, router logits [B, N]."""
        h = self.fb_in(materialize(lookup(self.embedding.weight, as_index(x))))
        # the router's logit is one number a byte: a plain sum is cheaper than a matrix product
        return h, materialize((h * self.latent.router.weight[0]).sum(axis=-1))

    def heads(self, h: Tensor) -> Tensor:
        """Hidden state [B, N, D] after the latent blocks -> logits [B, N, T, 256]."""
        return self.unembed(self.fb_out(h))

    def unembed(self, h: Tensor) -> Tensor:
        """Hidden state [B, N, D] after the last block -> logits [B, N, T, 256]."""
        logits = linear(self.norm(h), self.unembedding.weight)
        logits = materialize(logits + self.unembedding.bias)
        return logits.reshape(*h.shape[:2], self.config.next_tokens, 256)

    def decide(self, x: Tensor, router_logits: Tensor, causal: bool) -> Tensor:
        """Which bytes of x [B, N] the router selects, given its logits [B, N]: bool [B, N]."""
        router, capacity = self.config.router, self.config.capacity(x.shape[1])
        if router != "learned":
            most = None if causal else capacity
            return rule_decisions(router, as_index(x), self.config.stride, most)
        if causal:
            return (router_logits > 0).contiguous()
        return top_k_decisions(router_logits, capacity)

    def __call__(
        self, x: Tensor, causal: bool = False, count: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N] of uint8 or int -> (logits, router_logits, router_decisions).

        logits float32 [B, N, T, 256]; router_logits float32 [B, N], whose sigmoid is the router's
        weight; router_decisions bool [B, N]. Training routing takes the top `capacity` bytes of
        each sequence, `causal` those with weight > 0.5; other routers than the learned one see
        `pico_tg.routing`. `count` bounds how many bytes a sequence may send to the latent blocks
        when causal (default: all of them, at their full cost).
        """
        h, z = self.encode(x)
        decisions = self.decide(x, z, causal)
        if not causal:
            count = self.config.capacity(x.shape[1])
        elif count is None:
            count = x.shape[1]
        if count > 0 and self.config.router != "none":
            h = materialize(h + self.latent(h, z, decisions, count))
        return self.heads(h), z, decisions


def loss_fn(
    logits: Tensor,
    router_logits: Tensor,
    router_decisions: Tensor,
    targets: Tensor,
    learned: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, aux_loss, next_byte_loss), float32 scalars in nats a byte.

    logits [B, N, T, 256], router_logits [B, N], router_decisions [B, N], targets [B, N, T] of
    bytes. loss = 0.9 * LM + 0.1 * AUX; LM weighs head k's cross-entropy by 1.618^(T-1-k) / sum;
    AUX is the binary cross-entropy of the router against its own top-k decisions, so that a
    threshold can stand in for the top-k at inference; next_byte_loss is head 0's cross-entropy.
    Where the router is not `learned`, its decisions need no teaching: loss = LM and AUX is 0.
    """
    T = logits.shape[2]
    total = sum(1.618 ** (T - 1 - k) for k in range(T))
    head = Tensor.arange(T, dtype=dtypes.float32, device=logits.device)
    share = 1.618 ** (T - 1 - head) / total
    per_head = cross_entropy(logits, targets).mean(axis=(0, 1))  # (T,)
    lm_loss = (per_head * share).sum()
    if not learned:
        return lm_loss, lm_loss.zeros_like(), per_head[0]
    aux_loss = router_loss(router_logits, router_decisions)
    return 0.9 * lm_loss + 0.1 * aux_loss, aux_loss, per_head[0]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in nats: logits [..., 256], targets [...] -> [...]."""
    top = logits.max(axis=-1, keepdim=True).detach().contiguous()
    log_sum = (logits - top).exp().sum(axis=-1, keepdim=True).contiguous().log() + top
    hit = Tensor.arange(256, device=logits.device) == as_index(targets).unsqueeze(-1)
    return log_sum.squeeze(-1) - hit.where(logits, 0).sum(axis=-1)


def router_loss(router_logits: Tensor, router_decisions: Tensor) -> Tensor:
    """Mean binary cross-entropy of sigmoid(z) against decisions, from z so that it stays finite.

    router_logits [B, N], router_decisions [B, N] -> float32 scalar, in nats.
    """
    z, t = router_logits, router_decisions.cast(dtypes.float32).detach()
    return (z.maximum(0) - z * t + ((-z.abs()).exp() + 1).log()).mean()


def inputs_and_targets(windows: Tensor, next_tokens: int) -> tuple[Tensor, Tensor]:
    """Windows [B, N + T] of bytes -> inputs [B, N], targets [B, N, T]: byte n + 1 + k."""
    N = windows.shape[1] - next_tokens
    targets = Tensor.stack(*[windows[:, k : k + N] for k in range(1, next_tokens + 1)], dim=2)
    # neither is contiguous: of a lone window that would be a view, and through a view 0.13's graphs
    # read their first input for ever
    return windows[:, :N], targets
