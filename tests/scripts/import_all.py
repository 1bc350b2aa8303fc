"""Import every module of the package; print whether CPU kernels are used, and one product."""

import importlib
import pkgutil

from tinygrad import Device, Tensor

import pico_tg
from pico_tg.backend.runtime import has_cpu_kernels
from pico_tg.matmul import linear

for module in pkgutil.walk_packages(pico_tg.__path__, "pico_tg."):
    if module.name.split(".")[1] not in ("cpu", "__main__"):
        importlib.import_module(module.name)
print(has_cpu_kernels(Device.DEFAULT), linear(Tensor.ones(1, 64), Tensor.ones(1, 64)).item())
