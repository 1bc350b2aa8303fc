"""Schedules and compiled programs kept between processes."""

import os
import sqlite3
import subprocess
import sys

import pytest
from tinygrad.helpers import CPU_COUNT

SCRIPT = """
import numpy as np, tinygrad.codegen, tinygrad.schedule
made = []
make, cut = tinygrad.codegen.do_to_program, tinygrad.schedule.get_kernel_graph
tinygrad.codegen.do_to_program = lambda *a: made.append(a[0]) or make(*a)
tinygrad.schedule.get_kernel_graph = lambda *a: made.append(a[0]) or cut(*a)
import pico_tg
from tinygrad import GlobalCounters, Tensor
x = Tensor(np.arange(4096, dtype=np.float32).reshape(64, 64) / 4096).realize()
GlobalCounters.reset()
y = ((x @ x.T).contiguous() + 1).numpy().sum()
# the gradient's function lies elsewhere in each process
g = pico_tg.ops.linear(x, (x * 2).contiguous()).sum().gradient(x)[0].numpy().sum()
halves = Tensor(np.arange(8, dtype=np.uint8).reshape(2, 4)).shard(("CPU:0", "CPU:1"), axis=0)
print(len(made), GlobalCounters.global_ops, y, g, (halves + 1).tolist())
"""


# six kernels; this process takes its time for each, a forked one does not
HELPED = """
import os, time
import numpy as np, tinygrad.codegen
made, us, make = [], os.getpid(), tinygrad.codegen.do_to_program
def slowly(*given):
    if os.getpid() == us:
        made.append(given[0])
        time.sleep(2)
    return make(*given)
tinygrad.codegen.do_to_program = slowly
import pico_tg
from tinygrad import Tensor
pico_tg.jit_cache.MANY = 4
x = Tensor(np.arange(60, dtype=np.float32)).realize()
Tensor.realize(*(parts := [(x[: 10 + i] * i + i).contiguous() for i in range(6)]))
print(len(made), [part.tolist() for part in parts])
"""

# how many kernels are in the file while a function is still being recorded
RECORDED = """
import os, sqlite3, time
import numpy as np, pico_tg
from tinygrad import Tensor, TinyJit
pico_tg.jit_cache.MANY = 4

def kept():
    with sqlite3.connect(os.environ["CACHEDB"]) as file:
        names = [name for (name,) in file.execute("SELECT name FROM sqlite_master")]
        table = next((n for n in names if n.startswith("pico_kernels")), None)
        return file.execute(f"SELECT count(*) FROM {table}").fetchone()[0] if table else 0

def step(x):
    parts = [(x[: 10 + i] * i + i).contiguous() for i in range(6)]
    Tensor.realize(*parts)
    until = time.time() + 20
    while (found := kept()) < 6 and time.time() < until and os.environ["CPU_COUNT"] != "1":
        time.sleep(0.1)
    print(found)
    return parts

jit = TinyJit(step)
jit.cnt = 1  # recorded at once
print([part.tolist() for part in jit(Tensor(np.arange(60, dtype=np.float32)).realize())])
"""


def run(cache, script=SCRIPT, **environment) -> tuple[int, str]:
    """How many schedules and kernels were made, and what came out."""
    environment = {**os.environ, "CACHEDB": str(cache), **environment}
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    made, rest = out.stdout.split(maxsplit=1)
    return int(made), rest


def test_a_second_process_makes_no_kernel(tmp_path):
    first, expected = run(tmp_path / "a.db")
    assert first > 0
    assert run(tmp_path / "a.db") == (0, expected)
    assert run(tmp_path / "a.db", CACHELEVEL="0") == (first, expected)
    assert run(tmp_path / "a.db", NOOPT="1")[0] > 0  # other kernels


def test_a_damaged_cache_is_made_again(tmp_path):
    first, expected = run(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db") as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master")]
        for table in (name for name in tables if name.startswith("pico_")):
            file.execute(f"UPDATE '{table}' SET val = substr(val, 1, 20)")
    assert run(tmp_path / "a.db") == (first, expected)


@pytest.mark.skipif(sys.platform != "linux" or CPU_COUNT.value < 2, reason="nobody helps here")
def test_a_second_process_makes_kernels_meanwhile(tmp_path):
    made, found = run(tmp_path / "a.db", HELPED, DEV="CPU")
    expected = [[float(n * i + i) for n in range(10 + i)] for i in range(6)]
    assert found.strip() == str(expected)
    assert 1 <= made < 6
    assert run(tmp_path / "a.db", HELPED, DEV="CPU")[0] == 0
    alone, same = run(tmp_path / "b.db", HELPED, DEV="CPU", CPU_COUNT="1")
    assert (alone, same) == (6, found)


@pytest.mark.skipif(sys.platform != "linux" or CPU_COUNT.value < 2, reason="nobody helps here")
def test_it_begins_while_a_function_is_recorded(tmp_path):
    settings = {"DEV": "CPU", "CPU_COUNT": "2"}
    kept, found = run(tmp_path / "a.db", RECORDED, **settings)
    assert kept == 6
    alone, same = run(tmp_path / "b.db", RECORDED, **settings | {"CPU_COUNT": "1"})
    assert (alone, same) == (0, found)
