"""Packed weights and sliding-window KV caches for decoding.

Each class has two implementations of the same computation: plain tinygrad here, and hand-scheduled
CPU kernels in cpu/decoding.py.
"""

import math

import numpy as np
from tinygrad import Tensor

from .attention import alibi_slopes, rotate
from .backend.cpu_kernels import cpu_kernels
from .backend.runtime import from_host, read, round_up
from .config import Config
from .model import RMS_EPS, Attention, Linear, RMSNorm

PANEL = 32  # outputs of one panel of a PackedLinear; the slots of a cache are a multiple of PANEL
PREFILL_CHUNK = 64  # rows of the largest pass
VECTOR = 16  # the columns of a cache are a multiple of VECTOR; cpu.loops.TILE_N divides both


def padded_width(width: int, device: str) -> int:
    """`width`, rounded up to whole panels if the device has CPU kernels."""
    return round_up(width, PANEL) if cpu_kernels(device) else width


class PackedLinear:
    """A `Linear`, copied for decoding rows: x [R, I] -> norm(x) W^T + b + residual; no gradient.

    The scale of `norm` is folded into the copied weight. With CPU kernels the copy consists of
    panels [I, PANEL], each read sequentially, and rows are padded: x may have more than I columns,
    which are zeros, and the result has `width` >= O columns, of which those beyond O are zeros.
    """

    def __init__(self, linear: Linear, norm: RMSNorm | None = None) -> None:
        weight, device = read(linear.weight), linear.weight.device  # (O, I)
        self.outputs, self.inputs = weight.shape
        if norm is not None:
            weight = weight * read(norm.weight)
        self.width = padded_width(self.outputs, device)
        padding = (0, self.width - self.outputs)
        if cpu_kernels(device):
            weight = np.pad(weight, (padding, (0, 0)))
            weight = weight.reshape(-1, PANEL, self.inputs).swapaxes(1, 2)  # (panels, I, PANEL)
        self.weight, self.bias = from_host(weight, device), None
        if linear.bias is not None:
            self.bias = from_host(np.pad(read(linear.bias), padding).reshape(1, -1), device)

    def __call__(
        self, x: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x [R, I or more], residual [R, width] -> [R, width]; `norm` as in the constructor."""
        scale = None
        if norm is not None:  # 1 / RMS of each row: [R, 1]
            mean = x.square().sum(axis=-1, keepdim=True) / self.inputs
            scale = (mean + RMS_EPS).rsqrt().contiguous()
        if self.bias is not None:
            bias = self.bias.expand(x.shape[0], -1)
            residual = bias if residual is None else residual + bias
        if cpu := cpu_kernels(x.device):
            return cpu.packed_matmul(x, self.weight, self.outputs, scale, residual)
        out = x @ self.weight.T
        out = out if scale is None else out * scale
        return (out if residual is None else out + residual).contiguous()


def cache_shape(head_dim: int, window: int) -> tuple[int, int]:
    """(slots S, columns P) of a `KVCache`, whose keys are [K, C, S] and values [K, S, P].

    There is a slot for each position of the window and each row of the largest pass. The first
    head_dim columns hold values, the next one holds ones.
    """
    return round_up(window + PREFILL_CHUNK, PANEL), round_up(head_dim + 1, VECTOR)


def cache_bytes(config: Config) -> int:
    """Bytes of the KV caches of a `Decoder` of this model."""

    def size(window: int) -> int:
        slots, columns = cache_shape(config.head_dim, window)
        return 4 * config.att_kv_heads * slots * (config.head_dim + columns)

    byte_blocks = 2 * config.fb_num_blocks * size(config.fb_att_window_size)
    return byte_blocks + config.latent_num_blocks * size(config.latent_att_window_size)


class KVCache:
    """The keys and values of one attention layer for the newest positions.

    A ring buffer: position p is in slot p % slots. A pass of R rows at positions start, start + 1,
    … writes R slots. Because `slots` >= window + R, the overwritten positions are outside every
    later window. Rolling back is free: the next pass starts earlier. Rejected rows lie after every
    query, so the mask hides them until they are overwritten.

    H query heads, K key/value heads, G = H / K, C head_dim, S slots, P columns, R rows of a pass.
    """

    def __init__(self, attention: Attention) -> None:
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.head_dim, self.window = attention.head_dim, attention.window
        self.position, device = attention.position, attention.proj.weight.device
        if self.position == "alibi":
            self.slopes = alibi_slopes(self.heads, device).contiguous().realize()  # (H,)
        else:
            self.slopes = from_host(np.zeros(self.heads, np.float32), device)
        self.slots, columns = cache_shape(self.head_dim, self.window)
        keys = np.zeros((self.kv_heads, self.head_dim, self.slots), np.float32)
        values = np.zeros((self.kv_heads, self.slots, columns), np.float32)
        values[:, :, self.head_dim] = 1  # so that weights @ values also gives the sum of weights
        self.keys = from_host(keys, device)  # (K, C, S)
        self.values = from_host(values, device)  # (K, S, P)

    def attend(self, qkv: Tensor, start: Tensor) -> Tensor:
        """Store the keys and values of R rows, then let each row attend to itself and the window.

        qkv [R, H*C | K*C | K*C | padding] at positions start, start + 1, … (start: int32 [1])
        -> [R, H*C].
        """
        if self.position == "rope":
            qkv = self._rotate(qkv, start)
        if cpu := cpu_kernels(qkv.device):
            return cpu.attend(self, qkv, start)
        R, H, C = qkv.shape[0], self.heads, self.head_dim
        keys, values = self._store(qkv, start)
        scores = self._scores(qkv, keys, start)  # (K, G*R, S)
        weights = (scores - scores.max(axis=-1, keepdim=True)).exp()
        sums = (weights @ values).reshape(H, R, -1).transpose(0, 1)  # (R, H, P)
        return (sums[:, :, :C] / sums[:, :, C : C + 1]).reshape(R, H * C).contiguous()

    def _rotate(self, qkv: Tensor, start: Tensor) -> Tensor:
        """qkv [R, H*C | K*C | …] with rotary embeddings of the queries and keys."""
        R, heads, C = qkv.shape[0], self.heads + self.kv_heads, self.head_dim
        rotated = qkv[:, : heads * C].reshape(R, heads, C).transpose(0, 1)  # (H + K, R, C)
        rotated = rotate(rotated, start + Tensor.arange(R, device=start.device), same_bits=True)
        rotated = rotated.transpose(0, 1).reshape(R, heads * C)
        return rotated.cat(qkv[:, heads * C :], dim=1).contiguous()

    def _store(self, qkv: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        new = qkv[:, H * C : (H + 2 * K) * C].reshape(R, 2, K, C)
        row = (Tensor.arange(self.slots, device=start.device) + self.slots - start) % self.slots
        written = row < R  # (S,): the slots that this pass writes; `row` is the row for each
        row = written.where(row, 0)
        # new[:, i].contiguous() would be a view of `qkv` for one row. tinygrad 0.13's vector loads
        # assume an alignment that a view lacks: segmentation fault in test_kv_cache.test_attend
        keys, values = (new[:, i][row].permute(1, 0, 2) for i in range(2))  # (K, S, C)
        self.keys.assign(written.reshape(1, 1, -1).where(keys.transpose(1, 2), self.keys))
        values = values.pad((None, None, (0, self.values.shape[2] - C)))
        column = Tensor.arange(self.values.shape[2], device=start.device) < C
        written = written.reshape(1, -1, 1) & column.reshape(1, 1, -1)  # (1, S, P)
        self.values.assign(written.where(values, self.values))
        return self.keys, self.values

    def _scores(self, qkv: Tensor, keys: Tensor, start: Tensor) -> Tensor:
        R, H, K, C = qkv.shape[0], self.heads, self.kv_heads, self.head_dim
        q = qkv[:, : H * C].reshape(R, K, H // K, C).permute(1, 2, 0, 3)  # (K, G, R, C)
        scores = (q.reshape(K, -1, C) @ keys).reshape(K, H // K, R, self.slots)  # (K, G, R, S)
        distance = self._distances(start, R)  # (R, S)
        slopes = self.slopes.reshape(K, H // K, 1, 1)
        visible = (distance >= 0) & (distance <= self.window)
        scores = visible.where(scores / math.sqrt(C) - slopes * distance, -math.inf)
        return scores.reshape(K, -1, self.slots).contiguous()  # (K, G*R, S)

    def _distances(self, start: Tensor, rows: int) -> Tensor:
        """Position of each row minus the position of each slot's content: int [R, S]."""
        newest = start + rows - 1
        slot = Tensor.arange(self.slots, device=start.device)
        position = newest - (newest + self.slots - slot) % self.slots  # of the slot's content
        # a slot that was never written is outside the window
        position = (position >= 0).where(position, -self.slots - 1)
        row = start + Tensor.arange(rows, device=start.device)
        return row.reshape(-1, 1) - position.reshape(1, -1)  # (R, S)
