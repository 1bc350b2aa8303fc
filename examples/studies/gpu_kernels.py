"""List the kernels of a train step on a GPU, without one: their bytes, operations and workgroups.

    DEV=NULL:METAL:Apple9 python examples/studies/gpu_kernels.py 6144

Arguments: context length (1024), batch size (1), precision (fp32). The model is the README's. DEV
names a renderer of tinygrad's NULL device, which schedules and renders kernels and runs none; the
default is the one above, others are NULL:CUDA:sm_80 and NULL:WGSL. Prints totals, the ten kernels
that move the most bytes, and those of fewer than 32 workgroups whose threads iterate more than 512
times: most of the GPU is idle meanwhile. "MB" counts each buffer of a kernel once, "MB loaded"
every load.
"""

import collections
import json
import math
import os
import sys
import types

os.environ.setdefault("DEV", "NULL:METAL:Apple9")
# compile nothing, keep captured graphs as lists of kernels, keep to Metal's limit of 31 buffers
os.environ |= {"NULL_ALLOW_COPYOUT": "1", "JIT": "2", "MAX_KERNEL_BUFFERS": "31"}

import numpy as np
from tinygrad.device import Compiler
from tinygrad.engine import realize
from tinygrad.runtime.support import compiler_cuda
from tinygrad.uop.ops import Ops

compiler_cuda.NVRTCCompiler = lambda *args, **options: Compiler()
sys.modules["tinygrad.runtime.ops_metal"] = types.SimpleNamespace(MetalCompiler=Compiler)

from pico_tg import Config, Pico, TrainSettings  # noqa: E402
from pico_tg.training import TrainStep  # noqa: E402

FEW, MANY = 32, 512  # workgroups, iterations
Kernel = collections.namedtuple("Kernel", "name bytes loads operations workgroups threads loops")


def iterations(program) -> int:
    """How often a thread executes the body of a kernel's innermost loop: the largest of several."""
    found, nest = 0, [1]
    for uop in next(part for part in program.src if part.op is Ops.LINEAR).src:
        if uop.op is Ops.RANGE:
            nest.append(nest[-1] * (uop.vmax + 1))
            found = max(found, nest[-1])
        elif uop.op is Ops.END:
            nest.pop()
    return found


def kernels_of_a_step(config: Config, length: int, batch: int, precision: str) -> list[Kernel]:
    """The kernels of a step with SOAP, in order."""
    found, estimate_uop = [], realize.estimate_uop

    def watch(call):  # tinygrad estimates each kernel that it executes
        estimate, program = estimate_uop(call), call.src[0]
        if program.op is Ops.PROGRAM:
            info = program.arg
            sizes = (math.prod(size or (1,)) for size in (info.global_size, info.local_size))
            work = estimate.mem, estimate.lds, estimate.ops
            found.append(Kernel(info.function_name, *work, *sizes, iterations(program)))
        return estimate

    settings = TrainSettings(context_len=length, batch_size=batch, precision=precision)
    train_step = TrainStep(Pico(config, fresh=False), settings)
    realize.estimate_uop = watch
    try:
        train_step(np.zeros((1, batch, length + config.next_tokens), np.uint8), 1e-3)
    finally:
        realize.estimate_uop = estimate_uop
    return found


def table(kernels: dict[Kernel, int]) -> None:
    print("| times | kernel | MB | MB loaded | MFLOP | workgroups | threads | iterations |")
    print("|---|---|---|---|---|---|---|---|")
    for kernel, times in kernels.items():
        work = (f"{n / 1e6:.1f}" for n in kernel[1:4])
        print(f"| {times} | `{kernel.name}` | {' | '.join(map(str, (*work, *kernel[4:])))} |")


def main(length: str = "1024", batch: str = "1", precision: str = "fp32", sizes: str = "") -> None:
    readme = {"dim": 372, "latent_num_blocks": 8, "fb_att_window_size": 32}
    config = Config(**(json.loads(sizes) if sizes else readme))
    kernels = kernels_of_a_step(config, int(length), int(batch), precision)
    totals = (sum(column) / 1e9 for column in list(zip(*kernels, strict=True))[1:4])
    moved, loaded, operations = totals
    print(f"{os.environ['DEV']}, {batch} x {length} bytes, {precision}: {len(kernels)} kernels,")
    print(f"{moved:.2f} GB moved, {loaded:.2f} GB loaded, {operations:.1f} GFLOP")
    counts = collections.Counter(kernels)
    print("\nThe ten kernels that move the most bytes, all times together:\n")
    largest = sorted(counts, key=lambda kernel: -kernel.bytes * counts[kernel])[:10]
    table({kernel: counts[kernel] for kernel in largest})
    print(f"\nKernels of fewer than {FEW} workgroups and more than {MANY} iterations:\n")
    table({k: n for k, n in counts.items() if k.workgroups < FEW and k.loops > MANY})


if __name__ == "__main__":
    main(*sys.argv[1:])
