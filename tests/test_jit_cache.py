"""Schedules and compiled kernels kept between processes."""

import os
import sqlite3

import pytest
from helpers import run_script
from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from pico_tg.backend.jit_cache import Schedules


def run(script, cache, *arguments, **environment) -> tuple[int, str]:
    """How many graphs, schedules and kernels the process made, and what else it printed."""
    done = run_script(script, *arguments, CACHEDB=str(cache), **environment)
    made, rest = done.stdout.split(maxsplit=1)
    return int(made), rest


@pytest.mark.slow
def test_a_second_process_makes_nothing_again(tmp_path):
    first, expected = run("count_compiled.py", tmp_path / "a.db")
    assert first > 0
    assert run("count_compiled.py", tmp_path / "a.db") == (0, expected)
    # options that change the kernels, or turn the cache off
    assert run("count_compiled.py", tmp_path / "a.db", CACHELEVEL="0") == (first, expected)
    assert run("count_compiled.py", tmp_path / "a.db", NOOPT="1")[0] > 0
    with sqlite3.connect(tmp_path / "a.db") as file:
        tables = [name for (name,) in file.execute("SELECT name FROM sqlite_master")]
        expected_tables = {"pico_kernels", "pico_schedules_3", "pico_captured_2"}
        assert expected_tables <= {name.rsplit("_", 1)[0] for name in tables}
        for table in (name for name in tables if not name.startswith("sqlite_")):
            file.execute(f"UPDATE '{table}' SET val = substr(val, 1, 20)")
    assert run("count_compiled.py", tmp_path / "a.db") == (first, expected)  # damaged values


def test_buffers_with_a_number_of_this_process_are_not_stored():
    """In a process that gave the number to another buffer, both would share their memory."""
    numbered = UOp.new_buffer(("CPU", "CPU:1"), 4, dtypes.float32)
    local = numbered.replace(src=(UOp(Ops.LUNIQUE, arg=0), numbered.src[1]))
    for buffer, stored in ((local, True), (numbered, False)):
        schedule = UOp(Ops.LINEAR, src=(UOp(Ops.SINK).call(buffer.mselect(0)),))
        for graph in (schedule, UOp(Ops.LINEAR, src=(schedule.call(),))):  # also in a function
            key = os.urandom(16)
            Schedules()[key] = graph
            assert (Schedules().get(key) is graph) == stored


@pytest.mark.slow(minutes=1)
def test_a_second_process_builds_no_graph_of_training(tmp_path):
    """Steps that differ in a constant, a step of micro-batches with AdamW, and a validation."""
    made, expected = run("count_traced.py", tmp_path / "a.db")
    assert made == 5
    assert run("count_traced.py", tmp_path / "a.db") == (0, expected)
    # a script may have replaced functions of the package
    assert run("count_traced.py", tmp_path / "a.db", "script")[0] == 2
