"""For every test: a data cache of its own, and a watch on TinyJit's memory planner.

With PICO_WITHOUT_CPU=1 the tests run as if the folder pico_tg/cpu did not exist.
"""

import ctypes
import gc
import os
import sys

import pytest
import tinygrad.engine.jit
from tinygrad import Device
from tinygrad.uop.ops import Ops

if os.environ.get("PICO_WITHOUT_CPU"):
    sys.modules["pico_tg.cpu"] = None  # its import then raises ImportError

import pico_tg
from pico_tg.backend import jit_cache
from pico_tg.backend.runtime import has_cpu_kernels

if os.environ.get("PICO_WITHOUT_CPU"):
    assert not has_cpu_kernels("CPU")
pico_tg.enable_compile_cache(training_graphs=True)
gc.set_threshold(50_000, 20, 100)  # as pico_tg.__main__ does


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for cached data, instead of the user's."""
    path = tmp_path / "cache"
    monkeypatch.setenv("PICO_CACHE", str(path))
    return path


@pytest.fixture
def without_stored_graphs(monkeypatch):
    """For a test that replaces a function of a training step or of a validation."""
    monkeypatch.setattr(jit_cache, "training_graphs", False)


@pytest.fixture(autouse=True)
def planned_memory(monkeypatch):
    """Fail where a captured graph reads a planned buffer through a view.

    TinyJit's planner (0.13) does not count a view as a use of its buffer, and may give the buffer's
    memory to another one while the view is still read.
    """
    plan = tinygrad.engine.jit.memory_plan_rewrite

    def checked(linear, held_bufs=None):
        views = {b for call in linear.src for b in call.src[1:] if b.op is Ops.BUFFER_VIEW}
        unseen = {view.src[0] for view in views} - {*(held_bufs or ())}
        assert all(buffer.op is not Ops.BUFFER for buffer in unseen), "views of planned buffers"
        return plan(linear, held_bufs)

    monkeypatch.setattr(tinygrad.engine.jit, "memory_plan_rewrite", checked)


@pytest.fixture
def nan_memory(monkeypatch):
    """New memory of the CPU device holds nan until it is written."""
    allocator = type(Device["CPU"].allocator)
    alloc = allocator.alloc

    def filled(self, size, options=None):
        buffer = alloc(self, size, options)
        if options is None or options.external_ptr is None:
            ctypes.memset(buffer.va_addr, 0xFF, size)
        return buffer

    monkeypatch.setattr(allocator, "alloc", filled)


def pytest_collection_modifyitems(items):
    """Run the slowest tests first, so that at the end no worker waits long for another."""

    def minutes(item: pytest.Item) -> float:
        mark = item.get_closest_marker("slow")
        return mark.kwargs.get("minutes", 0.1) if mark else 0

    items.sort(key=minutes, reverse=True)
