"""Products, lookup and SwiGLU against NumPy and plain tinygrad: values, gradients, operations."""

import numpy as np
import pytest
from references import FORMS, PRODUCTS, check_product, factors, product_and_gradients
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, dtypes
from tinygrad.codegen import to_program

from pico_tg import matmul, ops


@pytest.fixture
def any_size(monkeypatch):
    """Products of any size get the device's own kernels."""
    monkeypatch.setattr(matmul, "SMALL", 0)


@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_linear(shape, any_size):
    check_product("linear", shape)


@pytest.mark.parametrize("form", FORMS)
def test_plain_products(form, monkeypatch):
    monkeypatch.setenv("PICO_KERNELS", "0")
    check_product(form, PRODUCTS[3])


def test_a_tensor_times_itself_is_refused(any_size):
    """tinygrad merges equal arguments of a function, and with them their gradients."""
    x = Tensor.ones(16, 16).contiguous().realize()
    with pytest.raises(ValueError, match="itself"):
        matmul.linear(x, x)


@pytest.mark.parametrize("dtype", ["half", "double", "int"])
def test_other_dtypes_become_float32(dtype, any_size):
    a = (np.arange(64 * 64).reshape(64, 64) % 7 - 3).astype(np.float32)
    x, y = (Tensor(a).cast(dtype).clone().realize() for _ in range(2))
    for out in (matmul.linear(x, y), matmul.bmm(x[None], x[None], trans_b=True)[0]):
        np.testing.assert_array_equal(out.numpy(), a @ a.T)


@pytest.mark.parametrize("kernels", "10")
def test_lookup_and_swiglu(kernels, monkeypatch):
    """Values and gradients against the plain expressions, with CPU kernels and without."""
    monkeypatch.setenv("PICO_KERNELS", kernels)
    rng = np.random.default_rng(0)
    index = Tensor(rng.integers(0, 7, (2, 30)).astype(np.int32)).realize()
    g = Tensor(rng.standard_normal((2, 30, 12)).astype(np.float32)).realize()
    weight = Tensor(rng.standard_normal((7, 24)).astype(np.float32)).clone().realize()

    def values(x, out):
        (gradient,) = (out * g).sum().gradient(weight)
        Tensor.realize(x, out, gradient)
        return [t.numpy() for t in (x, out, gradient)]

    plain, ours = weight[index], ops.lookup(weight, index)
    value, gate = plain.chunk(2, dim=-1)
    pairs = zip(values(ours, ops.swiglu(ours, 12)), values(plain, gate.silu() * value), strict=True)
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_addresses_of_rows_have_32_bits():
    """WebGPU has no 64-bit integers, and other GPUs emulate them."""
    rows = ops._sum_rows(Tensor.empty(64, 24), Tensor.empty(64, dtype="int"), 256)
    calls = Tensor.linear_with_vars(rows)[0].src
    programs = [to_program(call.src[0], Device[rows.device].renderer) for call in calls]
    kernels = {program.arg.name: program.toposort() for program in programs}
    assert "sum_rows_256_24_64" in kernels
    found = {uop.dtype.scalar() for uops in kernels.values() for uop in uops}
    assert {dtype.itemsize for dtype in found if dtypes.is_int(dtype)} == {4}


def test_jit_and_the_switch(any_size, monkeypatch):
    """A captured matmul gives the results of PICO_KERNELS=0, for four inputs in succession."""
    jitted = TinyJit(lambda a, b: product_and_gradients("linear", a, b))
    for seed in range(4):
        tensors = [Tensor(x).clone().realize() for x in factors("linear", PRODUCTS[2], seed)]
        ours = [t.numpy() for t in jitted(*tensors)]
        monkeypatch.setenv("PICO_KERNELS", "0")
        for found, plain in zip(ours, product_and_gradients("linear", *tensors), strict=True):
            np.testing.assert_allclose(found, plain.numpy(), rtol=0, atol=1e-4)
        monkeypatch.delenv("PICO_KERNELS")


def test_factors_keep_their_memory_in_a_jit(any_size):
    """A matmul is the last reader of what an earlier realize of the same function computed."""
    right = Tensor(factors("matmul", ((1,), 32, 32, 32))[1]).clone().realize()

    @TinyJit
    def step(x):
        doubled = (x * 2).contiguous().realize()
        tripled = (x * 3).contiguous().realize()  # must not overwrite `doubled`
        out = matmul.bmm(Tensor.stack(doubled), right).realize()
        return out, tripled.sum().realize()

    for seed in range(4):
        x = factors("matmul", ((), 32, 32, 32), seed)[0]
        out = step(Tensor(x).clone().realize())[0]
        np.testing.assert_allclose(out.numpy()[0], 2 * x @ right.numpy()[0], rtol=0, atol=1e-4)


def test_a_gram_matrix_of_one_panel_in_a_jit(any_size):
    """Of 16 columns, the copy in panels would be a view, which TinyJit's planner overlooks."""

    @TinyJit
    def step(x):
        doubled = (x * 2).contiguous().realize()
        gram = matmul.bmm(doubled[None], doubled[None], trans_a=True)
        tripled = (x * 3).contiguous().realize()  # must not overwrite `doubled`
        return gram.realize(), tripled.sum().realize()

    for seed in range(4):
        x = factors("matmul", ((), 32, 16, 32), seed)[0]
        gram = step(Tensor(x).clone().realize())[0]
        np.testing.assert_allclose(gram.numpy()[0], 4 * x.T @ x, rtol=0, atol=1e-4)


def test_products_are_computed_once():
    """Forward and both gradients: three times 2MNL operations, and next to nothing else."""
    a, b = (Tensor.ones(256, 256).contiguous().realize() for _ in range(2))
    GlobalCounters.reset()
    product_and_gradients("linear", a, b)
    assert GlobalCounters.global_ops <= 1.03 * 3 * 2 * 256**3


def test_a_lone_byte_is_an_index():
    """tinygrad 0.13 drops the cast of a lone uint8: LLVM would read at 200 - 256."""
    weight = Tensor.arange(256).reshape(256, 1).float().contiguous().realize()
    byte = Tensor(np.array([200], np.uint8)).clone().realize()
    assert ops.lookup(weight, ops.as_index(byte)).item() == 200
