"""The two halves of KVCache and PackedLinear compute the same: plain tinygrad and CPU kernels."""

import numpy as np
import pytest
from tinygrad import Device, Tensor

from pico_tg.attention import alibi_slopes
from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.decoder import PREFILL_CHUNK
from pico_tg.kv_cache import KVCache, PackedLinear


@pytest.fixture(autouse=True)
def cpu_kernels():
    if not has_cpu_kernels(Device.DEFAULT):
        pytest.skip(f"{Device.DEFAULT} has no CPU kernels")


def tensor(x: np.ndarray) -> Tensor:
    return Tensor(x.astype(np.float32)).realize()


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads"), [(1, 1, 1), (4, 2, 2), (8, 6, 3), (PREFILL_CHUNK, 6, 3)]
)
def test_attend(rows, heads, kv_heads, monkeypatch):
    """Before the ring buffer is full, when it just is, and long after."""
    C, window = 7, 9
    rng = np.random.default_rng(rows)
    caches = []
    for switch in "10":
        monkeypatch.setenv("PICO_KERNELS", switch)
        cache = KVCache(heads, kv_heads, C, window, PREFILL_CHUNK, alibi_slopes(heads))
        assert cache.has_cpu_kernels == (switch == "1")
        caches.append(cache)
    for start in (0, rows, 40, 40 + rows, 90, 1000):
        qkv = rng.standard_normal((rows, (heads + 2 * kv_heads) * C))
        at = Tensor(np.array([start], np.int32)).realize()
        one, other = (cache.attend(tensor(qkv), at).numpy() for cache in caches)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8, PREFILL_CHUNK])
def test_packed_linear(rows, monkeypatch):
    rng = np.random.default_rng(rows)
    weight, input_scale = rng.standard_normal((50, 21)), rng.standard_normal(21)
    x, scale = rng.standard_normal((rows, 21)), rng.standard_normal((rows, 1))
    residual = rng.standard_normal((rows, 64))
    for switch in "10":
        monkeypatch.setenv("PICO_KERNELS", switch)
        packed = PackedLinear(tensor(weight), tensor(input_scale))
        plain = packed(tensor(x)).numpy()[:, :50]
        np.testing.assert_allclose(plain, (x * input_scale) @ weight.T, rtol=0, atol=1e-4)
        found = packed(tensor(x), tensor(scale), tensor(residual[:, : packed.width]))
        expected = (x * input_scale) @ weight.T * scale + residual[:, :50]
        np.testing.assert_allclose(found.numpy()[:, :50], expected, rtol=0, atol=1e-4)
