"""Schedules and compiled kernels kept between processes, and the worker that compiles."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tinygrad import UOp, dtypes
from tinygrad.uop.ops import Ops

from pico_tg.backend import jit_cache

SCRIPTS = Path(__file__).parent / "scripts"
WORKER = {"DEV": "CPU", "CPU_COUNT": "2"}


def run(script, cache, *arguments, **environment) -> tuple[int, str]:
    """How many schedules and kernels the process made, and what else it printed."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    environment = {**os.environ, "CACHEDB": str(cache), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 or "killed" in arguments, done.stderr
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
        assert {"pico_kernels", "pico_schedules"} <= {name.rsplit("_", 1)[0] for name in tables}
        for table in (name for name in tables if not name.startswith("sqlite_")):
            file.execute(f"UPDATE '{table}' SET val = substr(val, 1, 20)")
    assert run("count_compiled.py", tmp_path / "a.db") == (first, expected)  # damaged values


def test_the_worker_compiles_while_a_function_is_recorded(tmp_path):
    made, rest = run("compile_with_worker.py", tmp_path / "a.db", **WORKER)
    worker, found = rest.split(maxsplit=1)
    assert made == 0
    assert found.strip() == str([[float(n * i + i) for n in range(10 + i)] for i in range(6)])
    assert (tmp_path / "a.db.starts").read_text() == "once\n"
    assert has_ended(int(worker))
    alone, rest = run("compile_with_worker.py", tmp_path / "b.db", **WORKER | {"CPU_COUNT": "1"})
    assert alone == 6
    assert rest == f"0 {found}"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_the_worker_ends_with_a_killed_process(tmp_path):
    _, rest = run("compile_with_worker.py", tmp_path / "a.db", "killed", **WORKER)
    assert has_ended(int(rest.split()[0]))


def has_ended(pid: int) -> bool:
    """Within a minute; where nobody reaps it (a container without init), it stays as a zombie."""
    stat, deadline = Path(f"/proc/{pid}/stat"), time.time() + 60
    while time.time() < deadline:
        try:
            os.kill(pid, 0)
            if stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_buffers_with_a_number_of_this_process_are_not_stored(monkeypatch):
    """In a process that gave the number to another buffer, both would share their memory."""
    file = {}
    monkeypatch.setattr(jit_cache, "_write", lambda table, key, value: file.update({key: value}))
    monkeypatch.setattr(jit_cache, "_read", lambda table, key: file.get(key))
    numbered = UOp.new_buffer(("CPU", "CPU:1"), 4, dtypes.float32)
    local = numbered.replace(src=(UOp(Ops.LUNIQUE, arg=0), numbered.src[1]))
    plain, with_number = (
        UOp(Ops.LINEAR, src=(UOp(Ops.SINK).call(buffer.mselect(0)),))
        for buffer in (local, numbered)
    )
    for schedule, stored in ((plain, True), (with_number, False)):
        for graph in (schedule, UOp(Ops.LINEAR, src=(schedule.call(),))):  # also in a function
            file.clear()
            jit_cache.Schedules()[b"graph"] = graph
            assert bool(file) == stored
            file[jit_cache._key(b"graph")] = graph  # as older versions stored it
            assert (jit_cache.Schedules().get(b"graph") is graph) == stored
