"""What every test gets: a data cache of its own, and a watch on TinyJit's memory planner."""

import pytest
import tinygrad.engine.jit
from tinygrad.uop.ops import Ops

import pico_tg

pico_tg.enable_compile_cache()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder of data; never the user's."""
    path = tmp_path / "cache"
    monkeypatch.setenv("PICO_CACHE", str(path))
    return path


@pytest.fixture(autouse=True)
def planned_memory(monkeypatch):
    """No kernel in any captured graph reads memory that the planner may have given to others.

    0.13's planner ends a buffer's life at its last use by name; views do not count as uses.
    """
    plan = tinygrad.engine.jit.memory_plan_rewrite

    def watched(linear, held_bufs=None):
        views = {b for call in linear.src for b in call.src[1:] if b.op is Ops.BUFFER_VIEW}
        unseen = {view.src[0] for view in views} - {*(held_bufs or ())}
        assert all(buffer.op is not Ops.BUFFER for buffer in unseen), "views of planned buffers"
        return plan(linear, held_bufs)

    monkeypatch.setattr(tinygrad.engine.jit, "memory_plan_rewrite", watched)


def pytest_collection_modifyitems(items):
    """The slow ones first, so that at the end no worker waits long for another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
