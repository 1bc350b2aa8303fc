"""Mixed precision, and the context in which a run builds its graphs.

Factors of matmuls may be bfloat16, on devices that have tensor cores for it.

Weights, sums, gradients and the optimizer stay float32.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tinygrad import Context, Device, Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import ALLOW_TF32, JIT, USE_TC, ContextVar

from .machine import renderer_of
from .runtime import has_cpu_kernels

if TYPE_CHECKING:
    from ..config import TrainSettings

# round the factors of matmuls to bfloat16 in graphs built within `with Context(PICO_BF16=1)`
BF16 = ContextVar("PICO_BF16", 0)
# recompute activations in the backward, in graphs built within `with Context(PICO_RECOMPUTE=1)`
RECOMPUTE = ContextVar("PICO_RECOMPUTE", 0)


def has_tensor_cores(device: str | tuple[str, ...], dtype: DType) -> bool:
    """Whether tinygrad uses the device's tensor cores for factors of `dtype`.

    bfloat16: on CUDA from sm_80, on Apple from the M3 on. float32: only on Apple, since CUDA's
    tensor cores would round factors to 10 bits of mantissa, which ALLOW_TF32=1 permits.
    """
    renderer = renderer_of(device)
    arch = renderer.target.arch
    if dtype == dtypes.bfloat16:
        apple = re.fullmatch(r"Apple(\d+)", arch)
        allowed = not apple or int(apple[1]) >= 9
    else:
        allowed = ALLOW_TF32 or not arch.startswith("sm_")
    return bool(USE_TC and allowed) and any(tc.dtype_in == dtype for tc in renderer.tensor_cores)


def rounded_factor(x: Tensor, to_bf16: bool) -> Tensor:
    """`x`, rounded to bfloat16 if `to_bf16`; for CPU kernels, rounded but stored as float32."""
    if not to_bf16:
        return x
    rounded = x.cast(dtypes.bfloat16)
    # x + (rounded - x): a cast to float32 and back would also round the gradient
    return x + (rounded.float() - x).detach() if has_cpu_kernels(x.device) else rounded


def choose_precision(precision: str, devices: tuple[str, ...] = ()) -> str:
    """fp32 or bf16; `auto`: bf16 if the devices (default: tinygrad's) have tensor cores for it."""
    if precision != "auto":
        return precision
    device = (devices or (Device.DEFAULT,))[0]
    return "bf16" if has_tensor_cores(device, dtypes.bfloat16) else "fp32"


def graph_context(settings: TrainSettings, devices: tuple[str, ...]) -> Context:
    """The context in which a run's graphs are built: precision, checkpointing, graph batching.

    On several devices JIT=2 keeps TinyJit from batching kernels into one graph: on two CPU devices,
    tinygrad 0.13's graphs read weights from before the update
    (test_training.test_two_devices_are_the_same_as_one).
    """
    options = {
        "PICO_BF16": int(choose_precision(settings.precision, devices) == "bf16"),
        "PICO_RECOMPUTE": int(settings.checkpoint_activations),
    }
    if len(devices) > 1 and JIT.value:
        options["JIT"] = 2
    return Context(**options)
