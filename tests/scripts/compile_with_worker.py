"""Record six kernels; print how many this process compiled, the worker's id, and the results.

While it records, it waits until the worker has put all six into the cache file. With the argument
"killed" it ends by SIGKILL afterwards.
"""

import os
import signal
import sqlite3
import sys
import time

import numpy as np
import tinygrad.codegen

made = []
compile_kernel = tinygrad.codegen.do_to_program
tinygrad.codegen.do_to_program = lambda *args: made.append(args[0]) or compile_kernel(*args)

from tinygrad import Tensor, TinyJit  # noqa: E402

import pico_tg  # noqa: E402
from pico_tg.backend import jit_cache  # noqa: E402

with open(os.environ["CACHEDB"] + ".starts", "a") as file:
    file.write("once\n")  # the worker must not run this file
pico_tg.enable_compile_cache()
jit_cache.MIN_FOR_WORKER = 4
x = Tensor(np.arange(60, dtype=np.float32)).realize()
made.clear()


def count_kept() -> int:
    with sqlite3.connect(os.environ["CACHEDB"]) as file:
        try:
            return file.execute("SELECT count(*) FROM pico_kernels_22").fetchone()[0]
        except sqlite3.OperationalError:  # no such table
            return 0


def step(x):
    parts = [(x[: 10 + i] * i + i).contiguous() for i in range(6)]
    Tensor.realize(*parts)
    deadline = time.time() + 120
    while jit_cache._workers and count_kept() < 6 and time.time() < deadline:
        time.sleep(0.05)
    return parts


jit = TinyJit(step)
jit.cnt = 1  # record the first call
values = [part.tolist() for part in jit(x)]
workers = [worker._process.pid for worker in jit_cache._workers]
print(len(made), workers[0] if workers else 0, values, flush=True)
if "killed" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
