"""Print as JSON what kernels a training step and a decoding pass are on a NULL device.

Argument: fp32 or bf16. DEV=NULL:... schedules and renders kernels of a GPU, and compiles and runs
none. "sources" are those of all kernels, each once, first those that use tensor cores.
"""

import dataclasses
import json
import sys
import types

import numpy as np
from tinygrad.device import Compiler
from tinygrad.runtime.support import compiler_cuda

compiler_cuda.NVRTCCompiler = lambda *args, **options: Compiler()
sys.modules["tinygrad.runtime.ops_metal"] = types.SimpleNamespace(MetalCompiler=Compiler)

from helpers import TINY  # noqa: E402
from tinygrad import Tensor  # noqa: E402
from tinygrad.engine import realize  # noqa: E402
from tinygrad.uop.ops import Ops  # noqa: E402

from pico_tg import Decoder, Pico, TrainSettings  # noqa: E402
from pico_tg.optim.soap import all_finite  # noqa: E402
from pico_tg.training import TrainStep  # noqa: E402

kernels, estimate_uop = [], realize.estimate_uop  # kernels: since the last call of `taken`


def watch(call):  # tinygrad estimates each kernel that it executes
    estimate, program = estimate_uop(call), call.src[0]
    if program.op is Ops.PROGRAM:
        tensor_cores = any(uop.op is Ops.WMMA for uop in program.toposort())
        source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
        kernels.append((len(program.arg.globals), tensor_cores, estimate.ops, source))
    return estimate


def taken():
    result = kernels[:]
    kernels.clear()
    return result


def kernels_of_pass(use_latent):
    """The kernels of a new decoder and its first pass."""
    taken()
    Decoder(model, use_latent).forward(b"abc")
    return taken()


realize.estimate_uop = watch
# no size is a multiple of a tile: dim 83, heads of 41, as odd as the README's 372 and 41
model = Pico(dataclasses.replace(TINY, dim=83, att_q_heads=2, att_kv_heads=1))
taken()
settings = TrainSettings(context_len=1024, batch_size=8, precision=sys.argv[1])
windows = np.zeros((1, 8, 1024 + TINY.next_tokens), np.uint8)
TrainStep(model, settings)(windows, 1e-3)
train = taken()
decode, decode_without_latent = kernels_of_pass(True), kernels_of_pass(False)
Tensor.realize(all_finite([Tensor.empty(4, 4 + i) for i in range(90)]))  # as of a deep model
tensor_cores_first = sorted(
    (*train, *decode, *decode_without_latent), key=lambda kernel: -kernel[1]
)
sources = list(dict.fromkeys(source for _, _, _, source in tensor_cores_first))
operations = sum(work for _, _, work, _ in train)
print(
    json.dumps(
        {
            "train": len(train),
            "decode": len(decode),
            "decode_without_latent": len(decode_without_latent),
            "on_tensor_cores": sum(on for _, on, _, _ in train),
            "share": sum(work for _, on, work, _ in train if on) / operations,
            "buffers": max(count for count, *_ in (*train, *decode, *kernels)),
            "sources": sources,
        }
    )
)
