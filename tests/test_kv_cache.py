"""The two halves of KVCache and PackedLinear compute the same: plain tinygrad and CPU kernels."""

import dataclasses
import os

import numpy as np
import pytest
from helpers import TINY
from tinygrad import Device, Tensor

from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.kv_cache import PREFILL_CHUNK, KVCache, PackedLinear
from pico_tg.model import Attention, Linear, RMSNorm

CONFIG = dataclasses.replace(TINY, dim=42)


pytestmark = pytest.mark.skipif(
    not has_cpu_kernels(Device.DEFAULT), reason="needs the hand-scheduled CPU kernels"
)


def attend(switch, cache, qkv, at):
    os.environ["PICO_KERNELS"] = switch
    return cache.attend(tensor(qkv), at).numpy()


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(x.astype(np.float32)).realize()


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads"), [(1, 1, 1), (4, 2, 2), (8, 6, 3), (PREFILL_CHUNK, 6, 3)]
)
def test_attend(rows, heads, kv_heads, monkeypatch):
    """Before the ring buffer is full, when it just is, and long after."""
    C = CONFIG.dim // heads
    rng = np.random.default_rng(rows)
    caches = []
    attention = Attention(dataclasses.replace(CONFIG, att_q_heads=heads, att_kv_heads=kv_heads), 9)
    for switch in "10":
        monkeypatch.setenv("PICO_KERNELS", switch)
        assert (has_cpu_kernels(Device.DEFAULT)) == (switch == "1")
        caches.append((switch, KVCache(attention)))
    for start in (0, rows, 40, 40 + rows, 90, 1000):
        qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * C))
        at = Tensor(np.array([start], np.int32)).realize()
        one, other = (attend(switch, cache, qkv, at) for switch, cache in caches)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, PREFILL_CHUNK])
def test_packed_linear(rows, bias, monkeypatch):
    """norm(x) W^T + b + residual, as the Linear computes it; further columns are zeros."""
    rng = np.random.default_rng(rows)
    linear, norm = Linear(21, 50, bias), RMSNorm(21)
    linear.weight, norm.weight = tensor(rng.normal(size=(50, 21))), tensor(rng.normal(size=21))
    if bias:
        linear.bias = tensor(rng.normal(size=50))
    x, residual = tensor(rng.normal(size=(rows, 21))), rng.normal(size=(rows, 50))
    expected = linear(x).numpy(), linear(x, norm, tensor(residual)).numpy()
    for switch in "10":
        monkeypatch.setenv("PICO_KERNELS", switch)
        packed = PackedLinear(linear, norm if bias else None), PackedLinear(linear, norm)
        padded = np.pad(residual, ((0, 0), (0, packed[1].width - 50)))
        if not bias:
            np.testing.assert_allclose(packed[0](x).numpy()[:, :50], expected[0], rtol=0, atol=1e-4)
        found = packed[1](x, norm, tensor(padded)).numpy()
        np.testing.assert_allclose(found[:, :50], expected[1], rtol=0, atol=1e-4)
        assert not found[:, 50:].any()
