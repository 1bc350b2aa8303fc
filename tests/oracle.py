"""Reference implementation of Pico in plain NumPy, slow and obvious, to test `pico_tg` against.

Only the fields of Config come from `pico_tg`. Everything is float64, one sequence at a time, with
dense T x T attention and gradients by hand. Every operation returns its output and a function
`backward(d_output, grads)`, which returns the gradient of the operation's input and adds those of
its weights to the dict `grads`. `decode` implements the model a second time, one byte at a time
with lists as KV caches, and shares only the arithmetic of one position with the rest.

Shape letters: B sequences, N bytes of a sequence, S selected bytes, T positions (N or S), D dim,
H query heads, K key/value heads, G = H // K, C head_dim, P next_tokens (heads of prediction).
"""

import math
import string
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pico_tg.config import Config
from pico_tg.routing import RULES

Weights = dict[str, np.ndarray]
Backward = Callable[[np.ndarray, Weights], np.ndarray]

RMS_EPS = 2.0**-23
PHI = 1.618


# --- weights


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint, by its name."""
    dim, head_dim = config.dim, config.dim // config.att_q_heads
    qkv_heads = config.att_q_heads + 2 * config.att_kv_heads
    table = {"embedding.weight": (256, dim)}
    for stack, count in (
        ("fb_in", config.fb_num_blocks),
        ("latent", config.latent_num_blocks),
        ("fb_out", config.fb_num_blocks),
    ):
        for i in range(count):
            block = f"{stack}.blocks.{i}"
            table[f"{block}.norm1.weight"] = (dim,)
            table[f"{block}.att.fused_qkv.weight"] = (qkv_heads * head_dim, dim)
            table[f"{block}.att.proj.weight"] = (dim, config.att_q_heads * head_dim)
            table[f"{block}.norm2.weight"] = (dim,)
            table[f"{block}.glu.fc1.weight"] = (2 * dim, dim)
            table[f"{block}.glu.fc2.weight"] = (dim, dim)
    table["latent.router.weight"] = (1, dim)
    table["norm.weight"] = (dim,)
    table["unembedding.weight"] = (config.next_tokens * 256, dim)
    table["unembedding.bias"] = (config.next_tokens * 256,)
    return table


def random_weights(config: Config, rng: np.random.Generator) -> Weights:
    """Fresh float32 weights: Linear uniform +-1/sqrt(fan_in), embedding N(0, 1), norms 1."""
    weights = {}
    for name, shape in shapes(config).items():
        if name == "embedding.weight":
            value = rng.standard_normal(shape)
        elif "norm" in name:
            value = np.ones(shape)
        else:
            fan_in = config.dim if name == "unembedding.bias" else shape[1]
            value = rng.uniform(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), shape)
        weights[name] = value.astype(np.float32)
    return weights


def _float64(weights: Weights) -> Weights:
    return {name: value.astype(np.float64) for name, value in weights.items()}


# --- positions


class Alibi:
    """Position encoding by a penalty on the score, slope_h * (i - j) (arXiv 2108.12409).

    Every position encoding has these three methods.
    """

    def rotate(self, vectors: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Queries or keys [T, heads, C] at integer positions [T], before their product."""
        return vectors

    def rotate_backward(self, d_rotated: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The gradient of `rotate` for its vectors: [T, heads, C]."""
        return d_rotated

    def bias(self, heads: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """The term added to the scores of queries at i [I] for keys at j [J]: [heads, I, J]."""
        slopes = np.array([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)])
        return -slopes[:, None, None] * (i[:, None] - j[None, :])


class Rope(Alibi):
    """Channels j and j + C // 2 rotated by position * 10000^(-2j / C) (arXiv 2104.09864).

    If C is odd, the last channel is not rotated, and C - 1 takes the place of C.
    """

    def rotate(self, vectors: np.ndarray, positions: np.ndarray, sign: int = 1) -> np.ndarray:
        rotated = vectors.astype(np.float64)
        pairs = vectors.shape[-1] // 2
        for j in range(pairs):
            angle = sign * positions * 10000.0 ** (-2 * j / (2 * pairs))  # (T,)
            cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
            a, b = vectors[..., j], vectors[..., j + pairs]
            rotated[..., j] = a * cos - b * sin
            rotated[..., j + pairs] = a * sin + b * cos
        return rotated

    def rotate_backward(self, d_rotated: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.rotate(d_rotated, positions, sign=-1)

    def bias(self, heads: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.zeros((heads, len(i), len(j)))


POSITIONS = {"alibi": Alibi(), "rope": Rope()}


# --- operations: each returns (output, backward)


def linear(weights: Weights, name: str, x: np.ndarray) -> tuple[np.ndarray, Backward]:
    """x [T, in] times the transposed weight [out, in], plus the bias if there is one: [T, out]."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    y = x @ weight.T
    if bias is not None:
        y = y + bias

    def backward(dy: np.ndarray, grads: Weights) -> np.ndarray:
        grads[f"{name}.weight"] += dy.T @ x
        if bias is not None:
            grads[f"{name}.bias"] += dy.sum(axis=0)
        return dy @ weight

    return y, backward


def rms_norm(weights: Weights, name: str, x: np.ndarray) -> tuple[np.ndarray, Backward]:
    """x [T, D] / sqrt(mean(x^2) + eps) * scale [D] (arXiv 1910.07467)."""
    scale = weights[f"{name}.weight"]
    inverse = 1 / np.sqrt((x**2).mean(axis=1, keepdims=True) + RMS_EPS)  # (T, 1)
    normed = x * inverse

    def backward(dy: np.ndarray, grads: Weights) -> np.ndarray:
        grads[f"{name}.weight"] += (dy * normed).sum(axis=0)
        d_normed = dy * scale
        # through the root mean square, each output depends on all of x
        along = (d_normed * normed).mean(axis=1, keepdims=True)  # (T, 1)
        return inverse * (d_normed - along * normed)

    return normed * scale, backward


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-z), without overflow."""
    return np.exp(-np.logaddexp(0, -z))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis; a score of -inf gets no weight."""
    exps = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def swiglu(weights: Weights, name: str, x: np.ndarray) -> tuple[np.ndarray, Backward]:
    """fc2(silu(gate) * value), where fc1's first half is the value (arXiv 2002.05202): [T, D]."""
    both, fc1_backward = linear(weights, f"{name}.fc1", x)
    value, gate = np.split(both, 2, axis=1)  # (T, D) each
    s = sigmoid(gate)
    silu = gate * s
    y, fc2_backward = linear(weights, f"{name}.fc2", silu * value)

    def backward(dy: np.ndarray, grads: Weights) -> np.ndarray:
        d_product = fc2_backward(dy, grads)
        d_value = d_product * silu
        d_gate = d_product * value * (s + gate * s * (1 - s))
        return fc1_backward(np.concatenate([d_value, d_gate], axis=1), grads)

    return y, backward


def split_qkv(config: Config, fused: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T, (H + 2K) * C] -> q [T, H, C], k [T, K, C], v [T, K, C]."""
    H, K, C = config.att_q_heads, config.att_kv_heads, config.dim // config.att_q_heads
    heads = fused.reshape(len(fused), H + 2 * K, C)  # (T, H + 2K, C)
    return heads[:, :H], heads[:, H : H + K], heads[:, H + K :]


def attention(
    weights: Weights, name: str, config: Config, window: int, positions: Alibi, x: np.ndarray
) -> tuple[np.ndarray, Backward]:
    """Grouped-query attention of x [T, D] over itself and the `window` positions before: [T, D]."""
    T = len(x)
    H, K, C = config.att_q_heads, config.att_kv_heads, config.dim // config.att_q_heads
    G = H // K
    at = np.arange(T)

    fused, qkv_backward = linear(weights, f"{name}.fused_qkv", x)
    q, k, v = split_qkv(config, fused)
    q, k = positions.rotate(q, at), positions.rotate(k, at)
    k, v = np.repeat(k, G, axis=1), np.repeat(v, G, axis=1)  # (T, H, C): head h reads h // G

    scores = np.einsum("ihc,jhc->hij", q, k) / math.sqrt(C) + positions.bias(H, at, at)
    i, j = at[:, None], at[None, :]
    visible = (i - window <= j) & (j <= i)  # (T, T)
    attended = softmax(np.where(visible, scores, -np.inf))  # (H, T, T)
    heads = np.einsum("hij,jhc->ihc", attended, v)  # (T, H, C)
    y, proj_backward = linear(weights, f"{name}.proj", heads.reshape(T, H * C))

    def backward(dy: np.ndarray, grads: Weights) -> np.ndarray:
        d_heads = proj_backward(dy, grads).reshape(T, H, C)
        d_attended = np.einsum("ihc,jhc->hij", d_heads, v)
        d_v = np.einsum("hij,ihc->jhc", attended, d_heads)
        mean = (d_attended * attended).sum(axis=2, keepdims=True)  # (H, T, 1)
        d_scores = attended * (d_attended - mean) / math.sqrt(C)
        d_q = np.einsum("hij,jhc->ihc", d_scores, k)
        d_k = np.einsum("hij,ihc->jhc", d_scores, q)
        # a key/value head receives gradients from the G query heads that share it
        d_k = d_k.reshape(T, K, G, C).sum(axis=2)  # (T, K, C)
        d_v = d_v.reshape(T, K, G, C).sum(axis=2)  # (T, K, C)
        d_q, d_k = positions.rotate_backward(d_q, at), positions.rotate_backward(d_k, at)
        d_fused = np.concatenate([d_q, d_k, d_v], axis=1).reshape(T, (H + 2 * K) * C)
        return qkv_backward(d_fused, grads)

    return y, backward


def block(
    weights: Weights, name: str, config: Config, window: int, positions: Alibi, x: np.ndarray
) -> tuple[np.ndarray, Backward]:
    """y + glu(norm2(y)), where y = x + att(norm1(x)): [T, D]."""
    normed, norm1_backward = rms_norm(weights, f"{name}.norm1", x)
    att, att_backward = attention(weights, f"{name}.att", config, window, positions, normed)
    middle = x + att
    normed, norm2_backward = rms_norm(weights, f"{name}.norm2", middle)
    glu, glu_backward = swiglu(weights, f"{name}.glu", normed)

    def backward(dy: np.ndarray, grads: Weights) -> np.ndarray:
        d_middle = dy + norm2_backward(glu_backward(dy, grads), grads)
        return d_middle + norm1_backward(att_backward(d_middle, grads), grads)

    return middle + glu, backward


def blocks(
    weights: Weights, stack: str, config: Config, positions: Alibi, x: np.ndarray
) -> tuple[np.ndarray, Backward]:
    """All blocks of `stack` (fb_in, latent or fb_out), one after another: [T, D]."""
    window, backwards = _window(config, stack), []
    for i in range(_count(config, stack)):
        x, back = block(weights, f"{stack}.blocks.{i}", config, window, positions, x)
        backwards.append(back)

    def backward(dy: np.ndarray, grads: Weights) -> np.ndarray:
        for back in reversed(backwards):
            dy = back(dy, grads)
        return dy

    return x, backward


def _window(config: Config, stack: str) -> int:
    return config.latent_att_window_size if stack == "latent" else config.fb_att_window_size


def _count(config: Config, stack: str) -> int:
    return config.latent_num_blocks if stack == "latent" else config.fb_num_blocks


# --- the model


def in_word(byte: int) -> bool:
    """A letter, a digit, or a byte that continues a character of UTF-8."""
    return chr(byte) in string.ascii_letters + string.digits or byte >> 6 == 0b10


def select(config: Config, byte: int, before: int | None, z: float) -> bool:
    """Whether causal routing selects a byte; `before` is the byte before it.

    A learned router selects a logit z above 0.
    """
    if config.router == "space":
        return before is not None and in_word(before) and not in_word(byte)
    return config.router == "all" if config.router in RULES else z > 0


def slots(config: Config, length: int) -> int:
    """The limit of selected bytes, the first of a sequence, that training processes."""
    if config.router in ("all", "none"):
        return length if config.router == "all" else 0
    return int(length * config.latent_capacity_factor)


def decide(
    router_logits: np.ndarray, x: np.ndarray | bytes, config: Config, causal: bool
) -> np.ndarray:
    """Which bytes of one sequence are selected: logits [N], bytes [N] -> bool [N].

    The router `learned` selects in training the int(N * factor) bytes of the largest logits (a tie
    goes to the earlier byte). Otherwise see `select`. Logits have the order of their sigmoids
    before rounding.
    """
    if causal or config.router in RULES:
        before = [None, *map(int, x[:-1])]
        selected = [select(config, int(x[n]), before[n], router_logits[n]) for n in range(len(x))]
        return np.array(selected, bool)
    capacity = int(len(router_logits) * config.latent_capacity_factor)
    by_rank = sorted(range(len(router_logits)), key=lambda n: (-router_logits[n], n))
    decisions = np.zeros(len(router_logits), bool)
    decisions[by_rank[:capacity]] = True
    return decisions


class _Sequence(NamedTuple):
    """The outputs of one sequence, and its backward pass."""

    logits: np.ndarray  # (N, P, 256)
    router_logits: np.ndarray  # (N,)
    decisions: np.ndarray  # (N,)
    backward: Callable[[np.ndarray, np.ndarray, Weights], None]


def _sequence(
    weights: Weights,
    config: Config,
    x: np.ndarray,
    causal: bool,
    decisions: np.ndarray | None,
) -> _Sequence:
    """One sequence of bytes x [N]. backward takes (d_logits, d_router_logits, grads)."""
    N, positions = len(x), POSITIONS[config.position]
    h = weights["embedding.weight"][x]  # (N, D)
    h, fb_in_backward = blocks(weights, "fb_in", config, positions, h)

    z, router_backward = linear(weights, "latent.router", h)  # (N, 1)
    r = sigmoid(z)
    if decisions is None:
        decisions = decide(z[:, 0], x, config, causal)
    selected = np.flatnonzero(decisions)  # (S,), in sequence order
    selected = selected[: N if causal else slots(config, N)]
    if len(selected):
        into = h[selected]
        deep, latent_backward = blocks(weights, "latent", config, positions, into)
        h = h.copy()
        h[selected] += (deep - into) * r[selected]

    h, fb_out_backward = blocks(weights, "fb_out", config, positions, h)
    h, norm_backward = rms_norm(weights, "norm", h)
    logits, unembedding_backward = linear(weights, "unembedding", h)  # (N, P * 256)
    logits = logits.reshape(N, config.next_tokens, 256)

    def backward(d_logits: np.ndarray, d_router_logits: np.ndarray, grads: Weights) -> None:
        d_logits = d_logits.reshape(N, config.next_tokens * 256)
        d_h = norm_backward(unembedding_backward(d_logits, grads), grads)
        d_h = fb_out_backward(d_h, grads)

        d_z = d_router_logits.reshape(N, 1).copy()
        if len(selected):
            d_added = d_h[selected]  # (S, D)
            r_selected = r[selected]  # (S, 1)
            d_r = ((deep - into) * d_added).sum(axis=1, keepdims=True)  # (S, 1)
            d_z[selected] += d_r * r_selected * (1 - r_selected)
            d_deep = d_added * r[selected]
            d_h = d_h.copy()
            d_h[selected] += latent_backward(d_deep, grads) - d_deep
        d_h = d_h + router_backward(d_z, grads)

        d_h = fb_in_backward(d_h, grads)
        for n in range(N):
            grads["embedding.weight"][x[n]] += d_h[n]

    return _Sequence(logits, z[:, 0], decisions, backward)


def forward(
    weights: Weights,
    config: Config,
    x: np.ndarray,
    causal: bool = False,
    decisions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes x [B, N] -> (logits [B, N, P, 256], router_logits [B, N], decisions bool [B, N]).

    `decisions` [B, N] replaces the router's, for comparisons where two logits are nearly equal.
    """
    weights = _float64(weights)
    sequences = [
        _sequence(weights, config, x[b], causal, None if decisions is None else decisions[b])
        for b in range(len(x))
    ]
    return (
        np.stack([s.logits for s in sequences]),
        np.stack([s.router_logits for s in sequences]),
        np.stack([s.decisions for s in sequences]),
    )


def head_shares(config: Config) -> np.ndarray:
    """The weight of each prediction head in the loss: 1.618^(P-1-k), normalized to sum 1: [P]."""
    shares = np.array([PHI ** (config.next_tokens - 1 - k) for k in range(config.next_tokens)])
    return shares / shares.sum()


def loss(
    logits: np.ndarray,
    router_logits: np.ndarray,
    decisions: np.ndarray,
    targets: np.ndarray,
    config: Config,
) -> tuple[float, float, float]:
    """(loss, aux_loss, next_byte_loss) in nats, for targets [B, N, P].

    Training minimizes loss = 0.9 * LM + 0.1 * aux_loss. aux_loss is the router loss before the
    factor 0.1. next_byte_loss is head 0's cross-entropy alone, unweighted.
    """
    log_sum = np.logaddexp.reduce(logits, axis=-1)  # (B, N, P)
    at_target = np.take_along_axis(logits, targets[..., None].astype(int), axis=-1)[..., 0]
    per_head = (log_sum - at_target).mean(axis=(0, 1))  # (P,)
    z, t = router_logits, decisions.astype(np.float64)
    lm, aux_loss = (per_head * head_shares(config)).sum(), 0.0
    lm_share, aux_share = 1.0, 0.0
    if config.router == "learned":
        lm_share, aux_share = 0.9, 0.1
        aux_loss = (np.maximum(z, 0) - z * t + np.log1p(np.exp(-np.abs(z)))).mean()
    return float(lm_share * lm + aux_share * aux_loss), float(aux_loss), float(per_head[0])


def loss_and_grads(
    weights: Weights,
    config: Config,
    x: np.ndarray,
    targets: np.ndarray,
    decisions: np.ndarray | None = None,
) -> tuple[tuple[float, float, float], Weights]:
    """The training losses, as `loss` returns them, and the float64 gradients of the first one.

    x [B, N], targets [B, N, P]. The gradients have the names and shapes of the weights. Decisions
    count as constants; `decisions` [B, N] replaces them.
    """
    weights = _float64(weights)
    B, N = x.shape
    sequences = [
        _sequence(weights, config, x[b], False, None if decisions is None else decisions[b])
        for b in range(B)
    ]
    grads = {name: np.zeros_like(value) for name, value in weights.items()}
    for b, sequence in enumerate(sequences):
        # softmax minus one-hot, times the head's share of the mean over B * N positions
        one_hot = np.eye(256)[targets[b]]  # (N, P, 256)
        shares = head_shares(config)[None, :, None]  # (1, P, 1)
        lm_share = 0.9 if config.router == "learned" else 1.0
        d_logits = lm_share * shares * (softmax(sequence.logits) - one_hot) / (B * N)
        r, d_z = sigmoid(sequence.router_logits), np.zeros(N)
        if config.router == "learned":
            d_z = 0.1 * (r - sequence.decisions) / (B * N)
        sequence.backward(d_logits, d_z, grads)
    losses = loss(
        np.stack([s.logits for s in sequences]),
        np.stack([s.router_logits for s in sequences]),
        np.stack([s.decisions for s in sequences]),
        targets,
        config,
    )
    return losses, grads


# --- decoding


def decode(weights: Weights, config: Config, data: bytes) -> np.ndarray:
    """The logits after each byte of `data`, computed one byte at a time: [N, P, 256].

    Each block keeps lists of its keys and values. A latent block receives only selected bytes, and
    its positions count only these.
    """
    weights = _float64(weights)
    keys: dict[str, list[np.ndarray]] = defaultdict(list)
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    before = [None, *data[:-1]]
    pairs = zip(data, before, strict=True)
    return np.array([_step(weights, config, *pair, keys, values) for pair in pairs])


def _step(weights, config, byte, before, keys, values) -> np.ndarray:
    """The logits [P, 256] after one more byte."""
    h = weights["embedding.weight"][byte]  # (D,)
    h = _step_blocks(weights, "fb_in", config, h, keys, values)
    z = float(weights["latent.router.weight"][0] @ h)
    if select(config, byte, before, z):
        deep = _step_blocks(weights, "latent", config, h, keys, values)
        h = h + (deep - h) / (1 + math.exp(-z))
    h = _step_blocks(weights, "fb_out", config, h, keys, values)
    h = _rms(h, weights["norm.weight"])
    logits = weights["unembedding.weight"] @ h + weights["unembedding.bias"]  # (P * 256,)
    return logits.reshape(config.next_tokens, 256)


def _step_blocks(weights, stack, config, h, keys, values) -> np.ndarray:
    """h [D] through all blocks of a stack, each of which appends one key and value: [D]."""
    H, K, C = config.att_q_heads, config.att_kv_heads, config.dim // config.att_q_heads
    window, positions = _window(config, stack), POSITIONS[config.position]
    for n in range(_count(config, stack)):
        name = f"{stack}.blocks.{n}"
        fused = weights[f"{name}.att.fused_qkv.weight"] @ _rms(h, weights[f"{name}.norm1.weight"])
        q, k, v = split_qkv(config, fused[None])  # (1, H, C), (1, K, C), (1, K, C)
        i = len(keys[name])
        q, k = positions.rotate(q, np.array([i])), positions.rotate(k, np.array([i]))
        keys[name].append(k[0])
        values[name].append(v[0])
        visible = range(max(0, i - window), i + 1)
        bias = positions.bias(H, np.array([i]), np.array(visible))[:, 0]  # (H, J)
        heads = []
        for head in range(H):
            shared = head // (H // K)
            scores = [q[0, head] @ keys[name][j][shared] / math.sqrt(C) for j in visible]
            attended = softmax(np.array(scores) + bias[head])  # (J,)
            seen = [values[name][j][shared] for j in visible]  # J of (C,)
            heads.append(attended @ np.array(seen))  # (C,)
        h = h + weights[f"{name}.att.proj.weight"] @ np.concatenate(heads)  # (H * C,) -> (D,)
        both = weights[f"{name}.glu.fc1.weight"] @ _rms(h, weights[f"{name}.norm2.weight"])
        value, gate = both[: config.dim], both[config.dim :]  # (D,) each
        h = h + weights[f"{name}.glu.fc2.weight"] @ (gate * sigmoid(gate) * value)
    return h


def _rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + RMS_EPS) * scale
