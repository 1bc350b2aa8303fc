"""The METAL of metal_device.py itself: what it computes, and what it rejects."""

import metal_device
import numpy as np
import pytest
from metal_device import Memory, MetalCompiler, MetalProgram
from tinygrad.device import CompileError

pytestmark = pytest.mark.skipif(metal_device.find_clang() is None, reason=metal_device.NO_CLANG)
POSITIONS = (
    "uint3 gid [[threadgroup_position_in_grid]], uint3 lid [[thread_position_in_threadgroup]]"
)
SHARED = "threadgroup __attribute__((aligned(16))) float temp0[%d];"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def kernel(body: str, parameters: str = "device float* a, device float* b") -> str:
    lines = "#include <metal_stdlib>", "using namespace metal;"
    return "\n".join([*lines, f"kernel void test({parameters}, {POSITIONS}) {{", body, "}"])


def run(source: str, *arrays: np.ndarray, groups: int, threads: int) -> None:
    """Run a kernel with these arrays as its buffers."""
    program = MetalProgram("test", MetalCompiler().compile(source))
    memory = [Memory(array, array.ctypes.data, array.nbytes) for array in arrays]
    program(*memory, global_size=(groups, 1, 1), local_size=(threads, 1, 1))


def reverse(barrier: str) -> tuple[np.ndarray, np.ndarray]:
    """Each group of 64 threads writes its 64 numbers in reverse, and what it ought to write."""
    a, b = np.random.default_rng(0).random((2, 4, 64), np.float32)
    body = [
        SHARED % 64,
        "int i = lid.x;",
        "temp0[i] = a[gid.x * 64 + i];",
        barrier,
        "b[gid.x * 64 + i] = temp0[63 - i];",
    ]
    run(kernel("\n".join(body)), a, b, groups=4, threads=64)
    return b, a[:, ::-1]


def test_threads_wait_at_a_barrier():
    np.testing.assert_array_equal(*reverse(BARRIER))


def test_a_missing_barrier_changes_the_result():
    found, expected = reverse("")
    assert (found != expected).any(axis=1).all()  # in both orders of the threads


def test_a_barrier_that_some_threads_pass_by_is_an_error():
    a = np.zeros(64, np.float32)
    for condition in ("lid.x < 32", "lid.x >= 32"):
        with pytest.raises(RuntimeError, match="different barriers"):
            run(kernel(f"if ({condition}) {BARRIER}"), a, a, groups=1, threads=64)


@pytest.mark.parametrize(("name", "bits"), [("float", 24), ("half", 11), ("bfloat", 8)])
def test_matrices_of_a_simd_group(name, bits):
    """Two groups of 32 threads each multiply two 8x8 matrices of numbers that the type can hold."""
    numbers = np.random.default_rng(bits).integers(-128, 128, (3, 4, 8, 8))
    a, b, c = numbers.astype(np.float32)
    body = f"""
int t = lid.x % 32, at = (gid.x * 2 + lid.x / 32) * 64;
at += (t / 16 * 4 + t / 2 % 4) * 8 + t / 8 % 2 * 4 + t % 2 * 2;
simdgroup_{name}8x8 x, y; simdgroup_float8x8 z;
for (int e = 0; e < 2; e++) {{
  x.thread_elements()[e] = a[at + e]; y.thread_elements()[e] = b[at + e];
  z.thread_elements()[e] = c[at + e];
}}
simdgroup_multiply_accumulate(z, x, y, z);
simdgroup_multiply_accumulate(z, y, x, z);
for (int e = 0; e < 2; e++) c[at + e] = z.thread_elements()[e];
"""
    source = kernel(body, "device float* a, device float* b, device float* c")
    expected = c + a @ b + b @ a
    run(source, a, b, c, groups=2, threads=64)
    np.testing.assert_array_equal(c, expected)


def test_rounding_to_bfloat():
    a = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, np.nan], np.float32)
    b = np.empty_like(a)
    run(kernel("b[lid.x] = (float)((bfloat)(a[lid.x]));"), a, b, groups=1, threads=5)
    # to nearest; halfway, to even
    np.testing.assert_array_equal(b, np.float32([1, 1 + 2**-6, 1 + 2**-7, np.inf, np.nan]))


@pytest.mark.parametrize(
    ("body", "parameters", "message"),
    [
        ("*b = *a * 0.5;", 2, "double"),
        ("device float* c = a; threadgroup float* d = a;", 2, "an lvalue of type 'device float"),
        ("*b = *a * c;", 2, "undeclared identifier 'c'"),
        ("*b = *a;", 32, "32 buffers"),
        (SHARED % 8193, 2, "32772 bytes"),
        ("int i = lid.x; /* 64 */ int j = lid.y; /* 32 */", 2, "2048 threads"),
        ("long i = lid.x;", 2, "long"),
    ],
)
def test_what_is_no_metal(body, parameters, message):
    names = ["a", "b", *(f"data{i}" for i in range(2, parameters))]
    with pytest.raises(CompileError, match=message):
        MetalCompiler().compile(kernel(body, ", ".join(f"device float* {name}" for name in names)))


def test_an_unknown_attribute_is_no_metal():
    with pytest.raises(CompileError, match="unknown attribute"):
        MetalCompiler().compile(kernel("").replace("position_in_grid", "position_in_grit"))


def test_too_many_threads():
    a = np.zeros(1, np.float32)
    with pytest.raises(RuntimeError, match="threads in a group"):
        run(kernel(""), a, a, groups=1, threads=1025)
