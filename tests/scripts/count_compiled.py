"""Print how many graphs, schedules and kernels this process makes, and results, with the cache."""

import functools

import numpy as np
import tinygrad.codegen
import tinygrad.schedule

made = []
compile_kernel, schedule = tinygrad.codegen.do_to_program, tinygrad.schedule.get_kernel_graph
tinygrad.codegen.do_to_program = lambda *args: made.append(args[0]) or compile_kernel(*args)
tinygrad.schedule.get_kernel_graph = lambda *args: made.append(args[0]) or schedule(*args)

from tinygrad import GlobalCounters, Tensor  # noqa: E402

import pico_tg  # noqa: E402
from pico_tg import Config, Decoder, Pico, matmul  # noqa: E402
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


def counted(method):
    return functools.wraps(method)(lambda *args: made.append(args) or method(*args))


for name in ("_encode", "_deepen", "_predict"):  # the graphs of a decoding pass
    setattr(Decoder, name, counted(getattr(Decoder, name)))
sizes = {"dim": 24, "att_q_heads": 2, "att_kv_heads": 1, "latent_num_blocks": 1}
decoder = Decoder(Pico(Config(**sizes), seed=0))
read = [decoder.forward(data) for data in (b"a", b"b", b" cde", b"f", b"gh") * 2]
decoded = [float(x.sum()) for pair in read for x in pair]
print(len(made), GlobalCounters.global_ops, y, g, (halves + 1).tolist(), decoded)
