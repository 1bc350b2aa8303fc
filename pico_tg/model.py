"""Pico: a byte-level language model whose router learns which bytes the deep blocks process.

    bytes -> embedding -> narrow blocks -> deep blocks -> narrow blocks -> heads

- Every block: pre-norm grouped-query attention in a band (ALiBi or rotary positions), then SwiGLU.
- Narrow blocks (`fb` for full-bandwidth; a narrow window) run on every byte.
- Deep blocks (`latent`; a wide window) run on the bytes that a Mixture-of-Depths router selects,
  see `pico_tg.routing`: by default the top `capacity` in training, those of weight > 0.5 when
  causal.
- Head k at position i predicts byte i + 1 + k.

Shape letters: B batch, N bytes, S slots of selected bytes, D dim, H query heads, K key/value heads,
C head_dim, T next_tokens. A layer allocates its weights; `Pico` or `load_weights` sets the values.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tinygrad import Tensor, dtypes, nn

from .attention import banded_attention, rotate
from .backend.block_function import run_blocks
from .backend.device import check_backend
from .backend.runtime import exclusive, write_into
from .config import Config
from .files import PicoError
from .matmul import linear
from .ops import (
    add_bias,
    as_index,
    cross_entropy,
    gather,
    lookup,
    materialize,
    rms_norm,
    scatter,
    swiglu,
)
from .routing import RULES, causal_decisions, slots, top_k_decisions
from .safetensors import write_safetensors

# packed queries, keys and values [..., H*C | K*C | K*C] -> weighted values [..., H*C]
Attend = Callable[[Tensor], Tensor]
Attends = Sequence[Attend]  # one for each block of a stack

RMS_EPS = 2.0**-23  # float32's machine epsilon


class Embedding:
    """Bytes [B, N] of any integer dtype -> rows of W [256, D]: [B, N, D]."""

    def __init__(self, dim: int) -> None:
        self.weight = Tensor.empty(256, dim)

    def __call__(self, x: Tensor) -> Tensor:
        return materialize(lookup(self.weight, as_index(x)))


class Linear:
    """x [..., I] -> norm(x) W^T + b + residual [..., O], with W [O, I] and an optional b [O].

    norm and residual [..., O] are optional: `PackedLinear`, which takes them too, fuses all in one
    kernel.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        self.weight = Tensor.empty(outputs, inputs)
        self.bias = Tensor.empty(outputs) if bias else None

    def __call__(
        self, x: Tensor, norm: "RMSNorm | None" = None, residual: Tensor | None = None
    ) -> Tensor:
        y = linear(x if norm is None else norm(x), self.weight)
        if self.bias is not None:
            y = add_bias(y, self.bias)
        return y if residual is None else materialize(residual + y)


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * w, with a scale w [D] (arXiv 1910.07467)."""

    def __init__(self, dim: int) -> None:
        self.weight = Tensor.empty(dim)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, RMS_EPS)


class Router:
    """h [B, N, D] -> logits [B, N]; the sigmoid of a logit is the router weight of the byte."""

    def __init__(self, dim: int) -> None:
        self.weight = Tensor.empty(1, dim)

    def __call__(self, h: Tensor) -> Tensor:
        # one output: a sum is cheaper than a matmul
        return materialize((h * self.weight[0]).sum(axis=-1))


class Attention:
    """h + proj(attention(fused_qkv(norm(h)))): [..., D] -> [..., D].

    `fused_qkv` packs [query heads | key heads | value heads].
    """

    def __init__(self, config: Config, window: int) -> None:
        self.heads, self.kv_heads = config.att_q_heads, config.att_kv_heads
        self.head_dim, self.window, self.position = config.head_dim, window, config.position
        self.fused_qkv = Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.proj = Linear(self.heads * self.head_dim, config.dim)

    def __call__(self, h: Tensor, norm: RMSNorm, attend: Attend | None = None) -> Tensor:
        attended = (attend or self.banded)(self.fused_qkv(h, norm))
        return self.proj(attended, residual=h)

    def banded(self, qkv: Tensor) -> Tensor:
        """Attention of whole sequences: [B, N, H*C | K*C | K*C] -> [B, N, H*C]."""
        B, N, _ = qkv.shape
        qkv = qkv.reshape(B, N, -1, self.head_dim).transpose(1, 2)  # (B, H+2K, N, C)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        if self.position == "rope":  # q and k at once: sines are computed once for both
            qk = rotate(qk.contiguous_backward(), Tensor.arange(N, device=qkv.device))
        # each gradient in memory: that of the split is otherwise a masked sum over all heads
        parts = *qk.split([self.heads, self.kv_heads], dim=1), v
        q, k, v = (x.contiguous_backward() for x in parts)
        out = banded_attention(q, k, v, self.window, self.position == "alibi")  # (B, H, N, C)
        return out.transpose(1, 2).flatten(2)  # (B, N, H*C)


class SwiGLU:
    """h + fc2(silu(gate) * value), [value | gate] = fc1(norm(h)) (arXiv 2002.05202): [..., D]."""

    def __init__(self, dim: int) -> None:
        self.hidden = dim  # width of value and gate
        self.fc1 = Linear(dim, 2 * self.hidden)
        self.fc2 = Linear(self.hidden, dim)

    def __call__(self, h: Tensor, norm: RMSNorm) -> Tensor:
        return self.fc2(swiglu(self.fc1(h, norm), self.hidden), residual=h)


class Block:
    """Attention, then SwiGLU, each with its norm and residual: [..., D] -> [..., D]."""

    def __init__(self, config: Config, window: int) -> None:
        self.norm1, self.norm2 = RMSNorm(config.dim), RMSNorm(config.dim)
        self.att = Attention(config, window)
        self.glu = SwiGLU(config.dim)

    def __call__(self, h: Tensor, attend: Attend | None = None) -> Tensor:
        return self.glu(self.att(h, self.norm1, attend), self.norm2)


class Blocks:
    """`count` blocks in sequence, all with the same window: [..., D] -> [..., D]."""

    def __init__(self, config: Config, window: int, count: int) -> None:
        self.blocks = [Block(config, window) for _ in range(count)]

    def __call__(self, h: Tensor, attends: Attends | None = None) -> Tensor:
        if attends is not None:
            for block, attend in zip(self.blocks, attends, strict=True):
                # realized one by one: blocks then have equal graphs, which are scheduled once
                h = block(h, attend).realize()
            return h
        # scheduled once for all blocks
        return run_blocks(self.blocks[0], [nn.state.get_parameters(b) for b in self.blocks], h)


class Latent(Blocks):
    """The router, and the wide-window blocks for the bytes that it selects."""

    def __init__(self, config: Config) -> None:
        self.router = Router(config.dim)
        super().__init__(config, config.latent_att_window_size, config.latent_num_blocks)


class Pico:
    """The model: three stages, `encode`, `deepen` and `predict`.

    Training and evaluation run the stages on whole sequences [B, N]. Decoding (`pico_tg.decoder`)
    runs them on rows [R], the bytes of one pass, with the attention of its KV caches (`attends`)
    and with packed weights. If `fresh`, weights are random; equal seeds give equal weights on any
    device.
    """

    @exclusive
    def __init__(self, config: Config, seed: int | None = None, fresh: bool = True) -> None:
        check_backend()
        self.config = config
        self.embedding = Embedding(config.dim)
        self.fb_in = Blocks(config, config.fb_att_window_size, config.fb_num_blocks)
        self.latent = Latent(config)
        self.fb_out = Blocks(config, config.fb_att_window_size, config.fb_num_blocks)
        self.norm = RMSNorm(config.dim)
        self.unembedding = Linear(config.dim, config.next_tokens * 256, bias=True)
        weights = nn.state.get_state_dict(self)
        Tensor.realize(*weights.values())
        if fresh:
            self._draw(weights, np.random.default_rng(seed))

    def _draw(self, weights: dict[str, Tensor], rng: np.random.Generator) -> None:
        """Draw the embedding ~ N(0, 1), the rest ~ U(+-1/sqrt(inputs)); norms are 1."""
        # NumPy draws: tinygrad's random number generator takes seconds to compile
        for name, weight in weights.items():
            if name == "embedding.weight":
                values = rng.standard_normal(weight.shape, np.float32)
            elif "norm" in name:
                values = np.ones(weight.shape, np.float32)
            else:  # the only bias is the unembedding's, which has `dim` inputs
                inputs = weight.shape[1] if weight.ndim == 2 else self.config.dim
                values = (2 * rng.random(weight.shape, np.float32) - 1) / math.sqrt(inputs)
            write_into(weight, values)

    @exclusive
    def weights(self) -> dict[str, np.ndarray]:
        """All weights, float32, under the names of the published implementation."""
        return {name: tensor.numpy() for name, tensor in nn.state.get_state_dict(self).items()}

    def __reduce__(self) -> tuple:
        """Copies and pickles hold the config and the weights, in buffers of the default device.

        By default, tinygrad 0.13 shares a copied tensor's buffer, and a pickled tensor takes over a
        buffer of the process that reads it (test_model.test_a_copy_is_a_copy).
        """
        return _rebuild, (self.config, self.weights())

    def __repr__(self) -> str:
        config = self.config
        return (
            f"<Pico {config.parameters:,} parameters, dim {config.dim}, next_tokens "
            f"{config.next_tokens}, latent_num_blocks {config.latent_num_blocks}, router "
            f"{config.router}>"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write model.json and the weights to `folder`, from which `pico_tg.load` reads them.

        The weights become the run `saved`, in place of those that were saved there before. Raises
        PicoError if `folder` is of another model, or cannot be written.
        """
        described, run = Path(folder) / "model.json", Path(folder) / "saved"
        known = self.config.exists(described)
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PicoError(f"cannot write to {folder}: {error.strerror or error}") from error
        if not known:
            self.config.to_json(described)
        write_safetensors(run / "00000000.safetensors", self.weights())

    def encode(self, x: Tensor, attends: Attends | None = None) -> tuple[Tensor, Tensor]:
        """Bytes x [...] -> (hidden states h [..., D], router logits [...])."""
        h = self.fb_in(self.embedding(x), attends)
        return h, self.latent.router(h)

    def decide(self, x: Tensor, router_logits: Tensor, causal: bool = False) -> Tensor:
        """Which bytes of x [B, N] are selected, given logits [B, N]: bool [B, N].

        By the rule, if the router is one; else the logits above 0 if `causal`, else the top-k.
        """
        if not causal and self.config.router == "learned":
            return top_k_decisions(router_logits, self.config.capacity(x.shape[1])).contiguous()
        x = as_index(x)
        before = x[:, :-1].pad((None, (1, 0)))
        return causal_decisions(self.config.router, x, before, router_logits).contiguous()

    def deepen(
        self,
        h: Tensor,
        router_logits: Tensor,
        index: Tensor,
        slot: Tensor,
        attends: Attends | None = None,
    ) -> Tensor:
        """h [..., N, D] plus weight * (deep blocks(h) - h) where a byte has a slot.

        router_logits [..., N]; index int32 [..., S] and slot int32 [..., N]: see `routing.slots`.
        """
        selected = gather(h, index, slot)  # (..., S, D)
        weight = gather(router_logits.sigmoid().unsqueeze(-1), index, slot)  # (..., S, 1)
        deep = self.latent(selected, attends)
        return materialize(h + scatter((deep - selected) * weight, index, slot))

    def predict(self, h: Tensor, attends: Attends | None = None) -> Tensor:
        """Hidden states h [..., D] -> logits [..., T, 256]."""
        logits = self.unembedding(self.fb_out(h, attends), self.norm)  # (..., T*256)
        return logits.reshape(*h.shape[:-1], -1, 256)

    def finish(self, h: Tensor, router_logits: Tensor, decisions: Tensor, count: int) -> Tensor:
        """`deepen` with slots for `count` of the decisions bool [B, N], then `predict`."""
        if count > 0 and self.config.router != "none":
            h = self.deepen(h, router_logits, *slots(decisions, count))
        return self.predict(h)

    def __call__(self, x: Tensor, causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N] of uint8 or int -> (logits, router_logits, router_decisions).

        logits float32 [B, N, T, 256], router_logits float32 [B, N], router_decisions bool [B, N].
        `causal` routes as decoding does, by default routing is that of training. The deep blocks
        process all selected bytes if `causal`, at the cost of N slots, else the first `capacity`.
        """
        h, router_logits = self.encode(x)  # (B, N, D), (B, N)
        decisions = self.decide(x, router_logits, causal)
        count = x.shape[1] if causal else self.config.capacity(x.shape[1])
        return self.finish(h, router_logits, decisions, count), router_logits, decisions


def _rebuild(config: Config, weights: dict[str, np.ndarray]) -> Pico:
    model = Pico(config, fresh=False)
    for name, tensor in nn.state.get_state_dict(model).items():
        write_into(tensor, weights[name])
    return model


def loss_fn(
    logits: Tensor,
    z: Tensor,
    decisions: Tensor,
    targets: Tensor,
    config: Config | None = None,
    extra_heads_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, aux_loss, next_byte_loss), float32 scalars in nats per byte.

    logits [B, N, T, 256], router logits z [B, N], targets [B, N, T] of bytes; decisions bool
    [B, N]: the router's, or, in router warm-up, `training.most_uncertain`.
    LM averages the heads' cross-entropies, weighted by 1.618^(T-1-k), or, with extra_heads_weight
    w > 0, by 1 for head 0 and w / (T-1) for each of the others. next_byte_loss: head 0's.
    loss = 0.9 * LM + 0.1 * AUX. AUX is the router's binary cross-entropy against the decisions.
    After router warm-up these are its own top-k, so that a threshold can replace top-k in
    inference. If the router of `config` (default: learned) is a rule, loss = LM and AUX = 0.
    """
    T = logits.shape[2]
    head = Tensor.arange(T, dtype=dtypes.float32, device=logits.device)
    per_head = cross_entropy(logits, targets).mean(axis=(0, 1))  # (T,)
    if extra_heads_weight and T > 1:
        extra = extra_heads_weight / (T - 1)
        shares = (head == 0).where(1.0, extra) / (1 + extra_heads_weight)
    else:
        shares = 1.618 ** (T - 1 - head) / sum(1.618 ** (T - 1 - k) for k in range(T))
    lm_loss = (per_head * shares).sum()
    if config and config.router in RULES:
        return lm_loss, lm_loss.zeros_like(), per_head[0]
    chosen = decisions.cast(dtypes.float32).detach()  # (B, N)
    # -log sigmoid(z) where selected, -log(1 - sigmoid(z)) elsewhere, in a form without overflow
    aux_loss = (z.maximum(0) - z * chosen + ((-z.abs()).exp() + 1).log()).mean()
    return 0.9 * lm_loss + 0.1 * aux_loss, aux_loss, per_head[0]


def inputs_and_targets(windows: Tensor, next_tokens: int) -> tuple[Tensor, Tensor]:
    """Bytes [B, N + T] -> inputs [B, N], targets [B, N, T]; targets[:, n, k] is byte n + 1 + k."""
    N = windows.shape[1] - next_tokens
    targets = Tensor.stack(*[windows[:, k : k + N] for k in range(1, next_tokens + 1)], dim=2)
    return windows[:, :N], targets
