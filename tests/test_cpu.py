"""The CPU's hand-scheduled kernels: other processors' tiles, thread counts, wide addresses."""

import math
import re

import numpy as np
import pytest
from references import check_attention, check_product
from tinygrad import Context, Device, Tensor, TinyJit
from tinygrad.codegen import to_program
from tinygrad.helpers import DEV
from tinygrad.uop.ops import Ops

import pico_tg.matmul as matmuls
from pico_tg import ops
from pico_tg.attention import banded_attention
from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.cpu import band_attention, decoding, launcher, loops, matmul

pytestmark = pytest.mark.skipif(
    not has_cpu_kernels(Device.DEFAULT), reason="needs the hand-scheduled CPU kernels"
)


@pytest.fixture
def any_size(monkeypatch):
    """Matmuls of any size take the hand-scheduled kernel, in several shares per thread."""
    monkeypatch.setattr(matmuls, "SMALL", 0)
    monkeypatch.setattr(matmul, "LONG", 0)


@pytest.mark.parametrize(("cores", "tile_m"), [(1, 6), (3, 8)])
@pytest.mark.parametrize(
    "shape",
    [((), 37, 41, 29), ((), 37, 43, 31), ((), 100, 7, 50), ((), 50, 40, 5), ((3,), 16, 8, 16)],
    ids=str,
)
def test_products_on_other_processors(shape, tile_m, cores, any_size, monkeypatch):
    """Tiles of AVX2 and of AVX-512; rows and matrices that the threads do not divide."""
    monkeypatch.setattr(matmul, "tile_m", lambda: tile_m)
    monkeypatch.setattr(launcher, "worth_threads", lambda _: True)
    with Context(CPU_COUNT=cores):
        check_product("linear", shape)


@pytest.mark.parametrize(("cores", "tile_m"), [(1, 6), (3, 6), (3, 8)])
@pytest.mark.parametrize("shape", [(1, 100, 9), (3, 37, 20), (2, 16, 9)], ids=str)
def test_gram_matrices_are_matmuls(shape, tile_m, cores, any_size, monkeypatch):
    """X Xᵀ, of which half is computed, is symmetric and equals the matmul of X and a copy of Xᵀ."""
    monkeypatch.setattr(matmul, "tile_m", lambda: tile_m)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    x, copy = Tensor(x).realize(), Tensor(x).realize()
    with Context(CPU_COUNT=cores):
        for trans_a in (False, True):
            half, whole = (matmuls.bmm(x, y, trans_a, not trans_a).numpy() for y in (x, copy))
            np.testing.assert_allclose(half, whole, rtol=0, atol=1e-4)
            np.testing.assert_array_equal(half, half.swapaxes(1, 2))


@pytest.mark.skipif(DEV.renderer != "LLVM", reason="reads LLVM's IR")
def test_addresses_of_shared_matmuls():
    """No address of 32 bits, which LLVM would extend by itself where it depends on core_id."""
    with Context(CPU_COUNT=2):
        program = matmul._gemm.__wrapped__((64 * 64, 64 * 40, 64 * 40), 1, 64, 64, 40, False, False)
    source = to_program(program, Device["CPU"].renderer).src[3].arg
    addresses = re.findall(r"getelementptr.* %data\d+, (\w+) %", source)
    assert set(addresses) == {"i64"}
    assert "%core_id" in source


def test_graphs_hold_no_operations():
    """A pass of tinygrad over a graph takes time for each operation."""
    a, b = (Tensor.empty(1, 64, 64) for _ in range(2))
    call = matmul.gemm(a, b, 64, 64, 64).schedule_linear().src[-1]
    assert call.src[0].op is Ops.PROGRAM
    assert len(call.src[0].toposort()) < 20


@pytest.mark.parametrize("cores", [1, 3])
@pytest.mark.parametrize("D", [16, 32, 36, 48, 96, 372, 7, 1])
def test_column_sums(D, cores, nan_memory, monkeypatch):
    """One vector of columns; blocks of vectors, the last of which overlaps; fewer columns."""
    monkeypatch.setattr(launcher, "worth_threads", lambda _: True)
    rng = np.random.default_rng(0)
    shapes = (4, 5, D), (4, 5, D), (4, 5, 1)
    factors = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    expected = math.prod(factors).sum(axis=(0, 1))
    with Context(CPU_COUNT=cores):
        found = ops.column_sums(*(Tensor(x).realize() for x in factors)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tile_m", [6, 8])
def test_a_product_of_one_term(tile_m, nan_memory, monkeypatch):
    """Panels of one row; `pico_tg.matmul` leaves such products to tinygrad."""
    monkeypatch.setattr(matmul, "tile_m", lambda: tile_m)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1, n)).astype(np.float32) for n in (20, 40))
    found = matmul.gemm(Tensor(a).realize(), Tensor(b).realize(), 20, 40, 1, trans_a=True)
    np.testing.assert_allclose(found.numpy()[0], a.T @ b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keys", [16, 48])
def test_exponentials(keys, nan_memory):
    """Of one vector a row, too: powers of 2 below the row's largest score."""
    scores = 20 * np.random.default_rng(0).standard_normal((9, keys)).astype(np.float32)
    scores[0, 1:] = -np.inf
    found = band_attention.exps(Tensor(scores).realize()).numpy()
    expected = np.exp2(scores - scores.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("cores", "tile_m"), [(1, 8), (3, 6)])
@pytest.mark.parametrize(
    "shape",
    [(2, 2, 2, 20, 4, 18), (1, 2, 1, 300, 5, 130), (2, 4, 2, 90, 43, 89), (1, 3, 1, 1, 8, 1)],
)
def test_attention_on_other_processors(shape, tile_m, cores, nan_memory, monkeypatch):
    """Tiles of AVX2 and of AVX-512, other thread counts; what is not computed is not read."""
    for module in (matmul, band_attention):
        monkeypatch.setattr(module, "tile_m", lambda: tile_m)
    monkeypatch.setattr(matmul, "LONG", 0)
    with Context(CPU_COUNT=cores):
        check_attention(shape)


def test_attention_is_the_same_on_one_thread_and_under_jit():
    """Values and gradients, bit for bit."""

    def step(q, k, v):
        out = banded_attention(q, k, v, 8)
        found = [out, *out.square().sum().gradient(q, k, v)]
        Tensor.realize(*found)
        return found

    rng = np.random.default_rng(1)
    jitted = TinyJit(step)
    for _ in range(4):
        arrays = [rng.standard_normal((1, h, 50, 6)).astype(np.float32) for h in (4, 2, 2)]
        tensors = [Tensor(a).clone().realize() for a in arrays]
        ours = [t.numpy() for t in jitted(*tensors)]
        with Context(CPU_COUNT=1):
            one_thread = [t.numpy() for t in step(*tensors)]
        for found, expected in zip(ours, one_thread, strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 512])
@pytest.mark.parametrize("length", [1, 16, 17, 513, 514, 5000])
def test_tiles_cover_the_band(window, length):
    queries, lookback, blocks = band_attention.tiles(length, window)
    assert (blocks - 1) * queries < length <= blocks * queries
    assert queries % loops.TILE_N == 0
    if blocks > 1:
        assert lookback >= window
        assert lookback % queries == 0


def test_threads_share_evenly():
    with Context(CPU_COUNT=4):
        assert [decoding.even_threads(n) for n in (1, 2, 3, 8, 9, 10)] == [1, 2, 3, 4, 3, 2]
