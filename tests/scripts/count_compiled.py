"""Print how many schedules and kernels this process makes, and the results, with the cache on."""

import numpy as np
import tinygrad.codegen
import tinygrad.schedule

made = []
compile_kernel, schedule = tinygrad.codegen.do_to_program, tinygrad.schedule.get_kernel_graph
tinygrad.codegen.do_to_program = lambda *args: made.append(args[0]) or compile_kernel(*args)
tinygrad.schedule.get_kernel_graph = lambda *args: made.append(args[0]) or schedule(*args)

from tinygrad import GlobalCounters, Tensor  # noqa: E402

import pico_tg  # noqa: E402
from pico_tg import matmul  # noqa: E402
from pico_tg.backend.block_function import run_blocks  # noqa: E402

pico_tg.enable_compile_cache()
x = Tensor(np.arange(4096, dtype=np.float32).reshape(64, 64) / 4096).realize()
GlobalCounters.reset()
y = ((x @ x.T).contiguous() + 1).numpy().sum()
# the gradients' functions are at other addresses in each process
weight = (x * 2).contiguous().realize()
out = run_blocks(lambda x: matmul.linear(x, weight), [[weight]], x)
g = out.sum().gradient(x)[0].numpy().sum()
halves = Tensor(np.arange(8, dtype=np.uint8).reshape(2, 4)).shard(("CPU:0", "CPU:1"), axis=0)
print(len(made), GlobalCounters.global_ops, y, g, (halves + 1).tolist())
