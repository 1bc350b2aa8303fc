"""The scheduled products against plain `@`: values, both gradients, jitted, switched off."""

import numpy as np
import pytest
from tinygrad import Device, GlobalCounters, Tensor, TinyJit
from tinygrad.helpers import Context

from pico_tg import ops
from pico_tg.cpu import loops
from pico_tg.ops import linear, matmul, matmul_transposed
from pico_tg.ops import matmul as cpu_matmul
from pico_tg.runtime import write_into

SHAPES = [  # (leading, M, L, N)
    ((), 64, 32, 48),
    ((), 37, 41, 29),
    ((3,), 16, 8, 16),
    ((2,), 24, 20, 16),  # as many matrices as threads
    ((2, 3), 19, 13, 23),
    ((5,), 8, 50, 1),
    ((), 8, 372, 20),
    ((1,), 100, 1, 7),
]
FORMS = {"matmul": matmul, "matmul_transposed": matmul_transposed, "linear": linear}


@pytest.fixture
def all_scheduled(monkeypatch):
    monkeypatch.setattr(ops, "SMALL", 0)
    if not ops._scheduled(Tensor.ones(8, 8), 8, 8, 8):
        pytest.skip(f"{Device.DEFAULT} has no schedules of ours")


def inputs(form, shape, seed=0):
    lead, M, L, N = shape
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((*lead, M, L)).astype(np.float32)
    sizes = {"matmul": (*lead, L, N), "matmul_transposed": (*lead, N, L), "linear": (N, L)}
    return a, rng.standard_normal(sizes[form]).astype(np.float32)


def value_and_gradients(form, a, b):
    """The product, and the gradients of a weighted sum of it."""
    out = FORMS[form](a, b)
    weights = (Tensor.arange(out.numel()).reshape(out.shape) % 7 - 3).float()
    found = [out, *(out * weights).sum().gradient(a, b)]
    Tensor.realize(*found)
    return found


def expected(form, a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    right = b if form == "matmul" else b.swapaxes(-1, -2)
    out = a @ right
    g = (np.arange(out.size).reshape(out.shape) % 7 - 3).astype(np.float64)
    d_right = a.swapaxes(-1, -2) @ g
    if form == "linear":
        d_right = d_right.reshape(-1, *d_right.shape[-2:]).sum(0)
    return (
        out,
        g @ right.swapaxes(-1, -2),
        d_right if form == "matmul" else d_right.swapaxes(-1, -2),
    )


@pytest.mark.parametrize("rows", [64, 37])
def test_a_tensor_times_itself(rows, all_scheduled):
    """Where it need not be padded in two ways, both factors are one argument of the kernel."""
    a = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    for form in ("linear", "matmul_transposed"):
        x = Tensor(a).realize()
        out = FORMS[form](x, x)
        (gradient,) = (out.square().sum() / 64).gradient(x)
        assert np.allclose(out.numpy(), a @ a.T, atol=1e-4)
        assert np.allclose(gradient.numpy(), a @ a.T @ a / 16, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_numpy(form, shape, all_scheduled):
    a, b = inputs(form, shape)
    found = value_and_gradients(form, *(Tensor(x).clone().realize() for x in (a, b)))
    for ours, theirs in zip(found, expected(form, a, b), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("tall", [6, 8])
@pytest.mark.parametrize("shape", [((), 37, 41, 29), ((), 100, 7, 50), ((3,), 16, 8, 16)], ids=str)
def test_other_processors(shape, tall, cores, all_scheduled, monkeypatch):
    """Tiles of AVX2 and of AVX-512; rows and matrices that do not divide by the cores."""
    monkeypatch.setattr(cpu_matmul, "tile_m", lambda: tall)
    monkeypatch.setattr(cpu_matmul, "PARALLEL", 0)
    with Context(CPU_COUNT=cores):
        test_against_numpy("linear", shape, all_scheduled)


@pytest.mark.parametrize("dtype", ["half", "double", "int"])
def test_other_numbers_become_float32(dtype, all_scheduled):
    a = (np.arange(64 * 64).reshape(64, 64) % 7 - 3).astype(np.float32)
    x = Tensor(a).cast(dtype).realize()
    for out in (linear(x, x), matmul(x, x.T), ops.bmm(x[None], x[None], trans_b=True)[0]):
        np.testing.assert_array_equal(out.numpy(), a @ a.T)


def test_more_numbers_than_an_int_counts(all_scheduled, monkeypatch):
    """Addresses are of 64 bits then."""
    monkeypatch.setattr(loops, "INT", 1 << 10)
    test_against_numpy("linear", ((2,), 24, 20, 16), all_scheduled)


def test_lookup_and_swiglu(all_scheduled, monkeypatch):
    """Values and gradients against the plain expressions, by hand and not."""
    rng = np.random.default_rng(0)
    index = Tensor(rng.integers(0, 7, (2, 30)).astype(np.int32)).realize()
    g = Tensor(rng.standard_normal((2, 30, 12)).astype(np.float32)).realize()
    weight = Tensor(rng.standard_normal((7, 24)).astype(np.float32)).clone().realize()

    def found(x, out):
        (gradient,) = (out * g).sum().gradient(weight)
        Tensor.realize(x, out, gradient)
        return [t.numpy() for t in (x, out, gradient)]

    plain = weight[index]
    value, gate = plain.chunk(2, dim=-1)
    expected = found(plain, gate.silu() * value)
    for switch in "10":
        monkeypatch.setenv("PICO_KERNELS", switch)
        ours = ops.lookup(weight, index)
        for a, b in zip(found(ours, ops.swiglu(ours)), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_jit_and_the_switch(form, all_scheduled, monkeypatch):
    jitted = TinyJit(lambda a, b: value_and_gradients(form, a, b))
    for seed in range(4):
        tensors = [Tensor(x).clone().realize() for x in inputs(form, SHAPES[3], seed)]
        ours = [t.numpy() for t in jitted(*tensors)]
        monkeypatch.setenv("PICO_KERNELS", "0")
        for found, plain in zip(ours, value_and_gradients(form, *tensors), strict=True):
            np.testing.assert_allclose(found, plain.numpy(), rtol=0, atol=1e-4)
        monkeypatch.delenv("PICO_KERNELS")


def test_operands_keep_their_memory_in_a_jit(all_scheduled):
    """A product as the last reader of what an earlier realize of the same function made."""
    right = Tensor(inputs("matmul", ((1,), 32, 32, 32))[1]).clone().realize()

    @TinyJit
    def step(x):
        doubled = (x * 2).contiguous().realize()
        tripled = (x * 3).contiguous().realize()  # must not lie where `doubled` does
        out = ops.bmm(Tensor.stack(doubled), right).realize()
        return out, tripled.sum().realize()

    for seed in range(4):
        x = inputs("matmul", ((), 32, 32, 32), seed)[0]
        out = step(Tensor(x).clone().realize())[0]
        np.testing.assert_allclose(out.numpy()[0], 2 * x @ right.numpy()[0], rtol=0, atol=1e-4)


def test_the_switch_switches(all_scheduled, monkeypatch):
    x = Tensor.ones(16, 16)
    monkeypatch.setenv("PICO_KERNELS", "0")
    assert not ops._scheduled(x, 16, 16, 16)


def test_products_are_computed_once(all_scheduled):
    """Forward and both gradients: three times 2MNL, and next to nothing else."""
    a, b = (Tensor.ones(256, 256).contiguous().realize() for _ in range(2))
    GlobalCounters.reset()
    value_and_gradients("linear", a, b)
    assert GlobalCounters.global_ops <= 1.03 * 3 * 2 * 256**3


def test_small_or_foreign_products_are_left_to_tinygrad():
    assert not ops._scheduled(Tensor.ones(1, 512), 1, 512, 512)  # decoding one byte
    assert not ops._scheduled(Tensor.ones(64, 512, device="NULL"), 64, 512, 512)


def test_threads_share_evenly(monkeypatch):
    monkeypatch.setattr(loops, "CPU_COUNT", type("Count", (), {"value": 4}))
    assert [loops.even_threads(n) for n in (1, 2, 3, 8, 9, 10)] == [1, 2, 3, 4, 3, 2]


def test_write_into_is_seen_by_a_jit():
    buffer = Tensor(np.arange(4, dtype=np.int32)).clone().realize()
    double = TinyJit(lambda x: (x * 2).realize())
    for step in range(4):
        write_into(buffer, np.full(4, step, np.int32))
        assert double(buffer).tolist() == [2 * step] * 4
    with pytest.raises(AssertionError, match="size"):
        write_into(buffer, np.zeros(3, np.int32))
