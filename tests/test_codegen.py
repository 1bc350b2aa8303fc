"""How tinygrad's own kernels are compiled on a CPU: threads, vectors, square roots."""

import re

import numpy as np
import pytest
from tinygrad import Device, Tensor, TinyJit, codegen
from tinygrad.codegen.opt import heuristic
from tinygrad.engine.realize import get_graph_runtime
from tinygrad.helpers import CPU_COUNT, DEV, Context

from pico_tg.backend import jit_cache
from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.cpu import codegen as ours
from pico_tg.cpu import launcher

pytestmark = pytest.mark.skipif(
    not has_cpu_kernels(Device.DEFAULT) or not launcher.serves(),
    reason="the launcher is for Linux, with LLVM or clang",
)
llvm = pytest.mark.skipif(DEV.renderer != "LLVM", reason="of LLVM")


@pytest.fixture
def compiled(monkeypatch):
    """compiled(function, x): replayed outputs, and the programs, made by the rules in force."""
    launcher.install("CPU")

    def run(function, *arrays):
        monkeypatch.setattr(codegen, "to_program_cache", {})
        monkeypatch.setattr(jit_cache, "_programs", {})
        monkeypatch.setattr(jit_cache, "without_operations", lambda program: program)
        jit = TinyJit(lambda *inputs: [y.contiguous().realize() for y in function(*inputs)])
        tensors = [Tensor(x).realize() for x in arrays]
        with Context(CACHELEVEL=0):  # nothing of another version of the rules
            for _ in range(3):
                outputs = [y.numpy() for y in jit(*tensors)]
        programs = []
        for call in jit.captured.linear.src:
            is_graph = call.src[0].arg == "graph"
            calls = get_graph_runtime(call.src[0]).calls if is_graph else [(None, call.src[0])]
            programs += [program for _, program, *_ in calls]
        return outputs, programs

    return run


def shares(programs):
    return [(program.arg.global_size or (1,))[0] for program in programs]


def rows(side):
    return np.random.default_rng(0).standard_normal((side, side)).astype(np.float32)


@pytest.mark.skipif(CPU_COUNT.value < 2, reason="CPU_COUNT=1")
def test_threads_share_small_kernels(compiled, monkeypatch):
    """Kernels of 65,536 iterations, with the same bits; tinygrad leaves them to one thread."""

    def function(x):
        return (x * 2).exp(), x.sum(axis=1)

    found, programs = compiled(function, rows(256))
    assert min(shares(programs)) > 1
    assert shares(compiled(function, rows(128))[1]) == [1, 1]
    monkeypatch.setattr(type(Device["CPU"].renderer), "global_max", (1, 0, 0))
    expected, programs = compiled(function, rows(256))
    assert shares(programs) == [1, 1]
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_vectors_compute_what_tinygrad_does(compiled, monkeypatch):
    """Of each kind of loop: consecutive, reversed, broadcast, masked, sums and maxima of rows."""

    def function(x):
        row, column = x[:1], x[:, :1]
        yield from (x.exp() * row, x.flip(1) + column, x.pad(((0, 0), (3, 5))) - 1, x.T * row)
        yield from (x.sum(axis=1), (x - row).exp().sum(axis=1), x.max(axis=1), x.sum(axis=0))

    found, programs = compiled(function, rows(260))
    monkeypatch.setattr(heuristic, "hand_coded_optimizations", ours.hand_coded_optimizations)
    expected, plain = compiled(function, rows(260))
    assert [p.arg.name for p in programs] != [p.arg.name for p in plain]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@llvm
def test_long_loops_are_left_to_llvm(compiled):
    """One addition in the source, in a loop over a whole row: LLVM finds the vectors."""

    def additions(function, x):
        (program,) = compiled(function, x)[1]
        return re.findall(r"fadd (reassoc)?", program.src[3].arg)

    def sums(x):
        return [x.sum(axis=1)]

    assert additions(lambda x: [x + x[:1]], rows(256)) == [""]
    assert len(additions(lambda x: [x + x[:1]], rows(24))) > 1  # 24 iterations
    assert additions(sums, rows(256)) == ["reassoc"]
    assert additions(sums, rows(256)[:4]) == ["reassoc", "", "", ""]  # in order


@pytest.mark.parametrize("shape", [(4, 384), (64, 1024)])
def test_few_sums_keep_their_order(compiled, shape):
    """Passes of 1, 4 and 64 rows compute the same bits, or drafts would change the text."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    together = compiled(lambda x: [x.square().sum(axis=1)], x)[0][0]
    for row in (0, 1, shape[0] - 1):
        alone = compiled(lambda x: [x.square().sum(axis=1)], x[row : row + 1])[0][0]
        np.testing.assert_array_equal(together[row : row + 1], alone)


def test_square_roots(compiled):
    """Correctly rounded, and no estimates of reciprocals, which give nan for 0."""
    x = np.append(np.abs(rows(64)) ** 20, [0, 1e-38, np.inf]).astype(np.float32)
    roots, reciprocals = compiled(lambda x: [x.sqrt(), x.rsqrt()], x)[0]
    np.testing.assert_array_equal(roots, np.sqrt(x))
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(reciprocals, 1 / np.sqrt(x), rtol=2e-7)


@llvm
def test_square_roots_are_declared(compiled):
    """LLVM 18 and earlier read no undeclared function."""
    (program,) = compiled(lambda x: [x.sqrt()], rows(64))[1]
    assert "declare float @llvm.sqrt.f32(float)" in program.src[3].arg
