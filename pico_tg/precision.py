"""Which factors of matrix products are rounded to bfloat16, and which devices multiply it."""

import re

from tinygrad import Device, Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.helpers import ALLOW_TF32, USE_TC, Context, ContextVar

from .runtime import has_cpu_kernels

BF16 = ContextVar("PICO_BF16", 0)  # `with Context(PICO_BF16=1)` while a graph is made


def has_bf16_tensor_cores(device: str | tuple[str, ...]) -> bool:
    """Whether the device has matrix units for bfloat16 (CUDA from sm_80, Apple from the M3 on)."""
    return has_tensor_cores(device, dtypes.bfloat16)


def has_tensor_cores(device: str | tuple[str, ...], dtype: DType) -> bool:
    """Whether tinygrad uses matrix units of the device for factors of `dtype`.

    For float32 that is Apple's; CUDA's would round factors to 10 bits, which ALLOW_TF32=1 allows.
    """
    with Context(ALLOW_DEVICE_USAGE=1):  # also asked while a function is being made
        renderer = Device[device if isinstance(device, str) else device[0]].renderer
    arch = renderer.target.arch
    if dtype == dtypes.bfloat16:
        apple = re.fullmatch(r"Apple(\d+)", arch)
        allowed = not apple or int(apple[1]) >= 9
    else:
        allowed = ALLOW_TF32 or not arch.startswith("sm_")
    units = (core.dtype_in for core in renderer.tensor_cores)
    return bool(USE_TC and allowed) and dtype in units


def rounded_factor(x: Tensor, to_bf16: bool) -> Tensor:
    """What a product's factor is made of; kernels by hand read bfloat16's values as float32."""
    if not to_bf16:
        return x
    rounded = x.cast(dtypes.bfloat16)
    # added up so that a gradient is not rounded on its way back
    return x + (rounded.float() - x).detach() if has_cpu_kernels(x.device) else rounded


def choose_precision(precision: str, devices: tuple[str, ...] = ()) -> str:
    """fp32 or bf16, whatever `auto` means on these devices (none: the default one)."""
    if precision != "auto":
        return precision
    return "bf16" if has_bf16_tensor_cores((devices or (Device.DEFAULT,))[0]) else "fp32"
