"""How tinygrad's kernels become machine code on a CPU.

`extend_renderers` changes how code is written, for the kernels of this folder too:

- A vector may be at any address. tinygrad 0.13 promises the compiler multiples of its size.
- A square root is one instruction, and its reciprocal is no estimate. tinygrad 0.13 has no square
  root for LLVM on a CPU, and computes 2^(log2(x) / 2) from polynomials.
- LLVM checks a kernel once. tinygrad 0.13 lets it check after each of its passes.

`optimize` takes the place of tinygrad's `hand_coded_optimizations`, where the launcher runs graphs:

- Threads share the loops of kernels of at least SHARED iterations. tinygrad 0.13 leaves fewer than
  262,144 to one thread, since its own launch is slow.
- LLVM vectorizes an innermost loop over consecutive elements with the processor's widest vectors.
  tinygrad 0.13 unrolls that loop by 3 or 4 first: LLVM then finds vectors of at most 4 floats, and
  an exponential takes up to six times as long.
"""

import contextlib
import copy
import itertools
import math
import re

from tinygrad import codegen, dtypes
from tinygrad.codegen.opt import KernelOptError, Opt, OptOps, heuristic
from tinygrad.codegen.opt.postrange import Scheduler
from tinygrad.dtype import DType
from tinygrad.helpers import ContextVar
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.renderer.llvmir import CPULLVMRenderer, flags, ldt
from tinygrad.runtime.support.compiler_cpu import CPULLVMCompiler, llvm
from tinygrad.uop.ops import AxisType, Ops, PatternMatcher, UOp, UPat

SHARED = 1 << 16  # least number of iterations, or elements, that threads share
LONG = 32  # least number of iterations that LLVM is to vectorize
ROWS = 128  # least number of sums that LLVM is to vectorize: more than a pass of decoding has rows

# Which rules apply, in the compile cache's keys like all context variables: 0 for none, 3 for those
# of `extend_renderers`, 4 for all. Other values after a change of the rules.
RULES = ContextVar("PICO_CODEGEN", 0)

hand_coded_optimizations = heuristic.hand_coded_optimizations  # tinygrad's


def install() -> None:
    """Optimize all kernels that are compiled for CPU devices from now on by `optimize`."""
    if RULES.value != 4:
        RULES.value = 4
        heuristic.hand_coded_optimizations = optimize
        codegen.to_program_cache.clear()


def optimize(kernel: Scheduler) -> Scheduler:
    """In place of tinygrad's `hand_coded_optimizations`, which the kernels of GPUs still get."""
    renderer = kernel.ren
    if not renderer.has_threads or not all(isinstance(n, int) for n in kernel.full_shape):
        return hand_coded_optimizations(kernel)
    if is_vectorizable(kernel):
        kernel = kernel.copy()
    else:
        kernel.ren = copy.copy(renderer)
        kernel.ren.has_threads = False
        kernel = hand_coded_optimizations(kernel)
        kernel.ren = renderer
    worth = 2 * math.prod(kernel.full_shape) // SHARED  # threads of SHARED / 2 iterations or more
    most = min(worth, renderer.global_max[0])
    for threads, axis in itertools.product(range(most, 1, -1), kernel.axes_of(AxisType.LOOP)):
        with contextlib.suppress(KernelOptError):  # not a loop that threads can share
            kernel.apply_opt(Opt(OptOps.THREAD, axis, threads))
            break
    return kernel


def is_vectorizable(kernel: Scheduler) -> bool:
    """Whether the innermost loop is long, over consecutive elements, and without conditions.

    Of reductions, LLVM vectorizes sums; clang, which compiles C, may not change their order. Few
    sums keep tinygrad's order: passes of 1 and of 4 rows must have the same bits, or drafts would
    change the text.
    """
    sums = kernel.axes_of(AxisType.REDUCE)
    if sums and not (
        len(sums) == 1
        and kernel.reduceop.arg[0] is Ops.ADD
        and math.prod(kernel.full_shape) >= max(SHARED, ROWS * kernel.full_shape[sums[0]])
        and isinstance(kernel.ren, CPULLVMRenderer)
    ):
        return False
    loops = sums or kernel.axes_of(AxisType.LOOP)
    if not loops or kernel.full_shape[loops[-1]] < LONG:
        return False
    counter = kernel.rngs[loops[-1]]

    def is_consecutive(index: UOp) -> bool:
        address, condition = index.get_idx(), index.get_valid()
        used = counter in address.backward_slice_with_self
        return (not used or counter in address.split_uop(Ops.ADD)) and (
            counter not in condition.backward_slice
        )

    return all(is_consecutive(buffer.src[1]) for buffer in kernel.bufs)


def render_sum(ctx: dict[UOp, str], add: UOp) -> str | None:
    """LLVM IR that adds to a sum in one register: a loop of such additions has no order.

    None for other additions. Of the 4 terms of an unrolled sum only the first is marked, so that
    the order is kept. `ctx`: the names of values.
    """
    for term in add.src:
        while term.op in (Ops.LOAD, Ops.INDEX, Ops.AFTER):
            term = term.src[0]
        if term.op is Ops.DEFINE_REG and term.dtype.size == 1:
            a, b = (ctx[x] for x in add.src)
            return f"  {ctx[add]} = fadd reassoc{flags} {ldt(add.dtype)} {a}, {b}"
    return None


def render_sqrt(ctx: dict[UOp, str], sqrt: UOp) -> str:
    """LLVM IR of a square root."""
    kind = ldt(sqrt.dtype)
    return f"  {ctx[sqrt]} = call {kind} @llvm.sqrt.{SQRT[sqrt.dtype]}({kind} {ctx[sqrt.src[0]]})"


def render_prefetch(ctx: dict[UOp, str], prefetch: UOp) -> str:
    """LLVM IR that moves a cache line into the first cache."""
    (pointer,) = prefetch.src
    write = int(prefetch.arg == PREFETCH["write"])
    address = f"{ldt(pointer.dtype)} {ctx[pointer]}"
    return f"  call void @llvm.prefetch.p0({address}, i32 {write}, i32 3, i32 1)"


def render_vector(ctx: dict[UOp, str], x: UOp) -> str:
    """LLVM IR of a load or a store of a vector at any address."""
    return f"{TINYGRAD.rewrite(x, ctx)}, align 4"


def vector_prefix(renderer: ClangRenderer, dtype: DType) -> str:
    """C of a type of vectors at any address."""
    return re.sub(r"aligned\(\d+\)", f"aligned({dtype.scalar().itemsize})", PREFIX(renderer, dtype))


def checked_once(compiler: CPULLVMCompiler, *arguments: object) -> None:
    """Check a kernel's IR once, not after every pass of LLVM, a seventh of its time."""
    INIT(compiler, *arguments)
    llvm.LLVMPassBuilderOptionsSetVerifyEach(compiler.pbo, False)


INIT = CPULLVMCompiler.__init__
TINYGRAD, PREFIX = CPULLVMRenderer.string_rewrite, ClangRenderer.render_vector_prefix
VECTORS = tuple(dtypes.float32.vec(n) for n in (6, 8, 16))
SQRT = {dtypes.float16: "f16", dtypes.float32: "f32", dtypes.float64: "f64"}
# statements of C; LLVM's are written by `render_prefetch`
PREFETCH = {"read": "__builtin_prefetch({0}, 0, 3);", "write": "__builtin_prefetch({0}, 1, 3);"}
# LLVM 18 and earlier do not declare their own functions
DECLARATIONS = "declare void @llvm.prefetch.p0(float*, i32, i32, i32)\n" + "".join(
    f"declare {ldt(dtype)} @llvm.sqrt.{name}({ldt(dtype)})\n" for dtype, name in SQRT.items()
)
# tinygrad 0.13 allows reciprocals, so that LLVM would estimate 1 / sqrt(x): 0 and inf gave nan
EXACT = ' "reciprocal-estimates"="none" }'
RENDERING = PatternMatcher(
    [
        (UPat(Ops.ADD, dtypes.float32, name="add"), render_sum),
        (UPat(Ops.SQRT, tuple(SQRT), name="sqrt"), render_sqrt),
        (UPat(Ops.CUSTOM, name="prefetch"), render_prefetch),
        (UPat(Ops.LOAD, VECTORS, (UPat(),), name="x"), render_vector),
        (UPat(Ops.STORE, src=(UPat(), UPat(dtype=VECTORS)), name="x"), render_vector),
    ]
)


def extend_renderers() -> None:
    """Write code for CPU devices as above, in the whole process."""
    renderer, footer = CPULLVMRenderer, CPULLVMRenderer._render_footer
    renderer.code_for_op = {**renderer.code_for_op, Ops.SQRT: lambda: None}
    renderer.string_rewrite = RENDERING + TINYGRAD
    renderer._render_footer = lambda self, uops: (
        DECLARATIONS + footer(self, uops).removesuffix(" }") + EXACT
    )
    ClangRenderer.render_vector_prefix = vector_prefix
    CPULLVMCompiler.__init__ = checked_once
    RULES.value = 3
    codegen.to_program_cache.clear()


extend_renderers()  # before any kernel of this folder is compiled
