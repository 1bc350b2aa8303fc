"""One product and its gradients in an emulator of tensor cores; prints how many kernels used them.

Arguments: fp32 or bf16. DEV names the emulator, such as PYTHON::sm_80. Printed: the number of
tensor-core kernels of the product, and of an optimizer's product, which is always of float32.
"""

import sys

import numpy as np
from references import PRODUCTS, check_product, factors, round_to_bf16
from tinygrad import Context, Tensor
from tinygrad.runtime.ops_python import PythonProgram
from tinygrad.uop.ops import Ops

from pico_tg.matmul import bmm

programs = set()
make = PythonProgram.__init__


def watch(self, *args, **kwargs):
    make(self, *args, **kwargs)
    if any(uop[0] is Ops.WMMA for uop in self.uops):
        programs.add(id(self))


PythonProgram.__init__ = watch
bf16 = sys.argv[1] == "bf16"
shape = PRODUCTS[3]
with Context(PICO_BF16=int(bf16)):
    check_product("transposed", shape, round_to_bf16 if bf16 else np.float64, tolerance=2e-6)
count = len(programs)
a, b = (x.reshape(6, *x.shape[-2:]) for x in factors("transposed", shape))
found, expected = bmm(Tensor(a), Tensor(b).transpose(1, 2)).numpy(), a @ b.swapaxes(1, 2)
np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
print(count, len(programs) - count)
