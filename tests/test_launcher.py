"""The native launcher of captured graphs against tinygrad's own: the same bits, whoever helps."""

import platform
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import TINY
from tinygrad import Device, Tensor, TinyJit
from tinygrad.engine.realize import get_graph_runtime
from tinygrad.helpers import CPU_COUNT, DEV, Context
from tinygrad.runtime.graph.hcq import HCQGraph

from pico_tg import decoder
from pico_tg.cpu import decoding, launcher
from pico_tg.kv_cache import PackedLinear
from pico_tg.matmul import linear
from pico_tg.model import Linear, Pico

pytestmark = pytest.mark.skipif(
    not Device.DEFAULT.startswith("CPU") or launcher._launcher() is None,
    reason="the launcher is for Linux, with LLVM or clang",
)


@pytest.fixture
def graph_of(monkeypatch):
    """graph_of(helpers): captured graphs are native from now on; None: tinygrad's own."""

    def choose(helpers, library=None):
        device = Device["CPU"]
        if helpers is None:
            monkeypatch.setattr(device, "graph", HCQGraph)
            return
        if library is None:
            compiler = device.renderer.compiler
            if DEV.renderer == "CLANGJIT":
                compiler = launcher.IRCompiler(compiler.arch)
            library = compiler.compile_cached(launcher._source(platform.machine()))
        own = launcher.Launcher(library, helpers)
        monkeypatch.setattr(launcher, "_launcher", lambda: own)
        monkeypatch.setattr(device, "graph", launcher.NativeGraph)

    return choose


def run(calls=3):
    """Outputs of `calls` replays of a captured function with several kernels of several shares."""
    rng = np.random.default_rng(0)
    weight = Tensor(rng.standard_normal((64, 64)).astype(np.float32)).realize()

    def function(x):
        h = linear(x, weight).tanh().contiguous()
        h = linear(h, weight).contiguous() + h.sum(axis=1, keepdim=True).contiguous()
        return linear(h, weight).realize()

    jit = TinyJit(function)
    inputs = [rng.standard_normal((96, 64)).astype(np.float32) for _ in range(2 + calls)]
    outputs = [jit(Tensor(x).realize()).numpy() for x in inputs]
    graphs = [c.src[0] for c in jit.captured.linear.src if c.src[0].arg == "graph"]
    assert graphs
    return outputs[2:], [get_graph_runtime(graph) for graph in graphs]


@pytest.mark.parametrize("cores", [1, 2, 3])
@pytest.mark.parametrize("helpers", [0, 1, 2])
def test_same_bits_whoever_helps(graph_of, cores, helpers):
    with Context(CPU_COUNT=cores):
        graph_of(None)
        expected, _ = run()
        graph_of(helpers)
        found, graphs = run()
    assert all(graph.launcher is not None for graph in graphs)
    shares = max(ast.arg.global_size[0] for graph in graphs for _, ast, _, _ in graph.calls)
    assert (shares > 1) == (cores > 1)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_same_bits_with_competing_processes(graph_of):
    """Helpers lose the cores in the middle of their shares, and main threads have to sleep."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with Context(CPU_COUNT=3):
            graph_of(None)
            expected, _ = run(20)
            graph_of(2)
            found, _ = run(20)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("elements", [1000, 1 << 17])  # one share, and several
@pytest.mark.parametrize("terms", [2, 3, 7, 8, 30, 94])
def test_any_number_of_arguments(graph_of, terms, elements):
    """A kernel is called with more arguments than it has, up to those of the next call."""
    graph_of(1)
    jit = TinyJit(lambda *xs: (sum(xs[1:], xs[0]).contiguous() * 2).realize())
    inputs = [Tensor.full((elements,), float(i)).contiguous().realize() for i in range(terms)]
    for _ in range(3):
        found = jit(*inputs).numpy()
    np.testing.assert_array_equal(found, terms * (terms - 1))
    (graph,) = (c.src[0] for c in jit.captured.linear.src if c.src[0].arg == "graph")
    graph = get_graph_runtime(graph)
    assert graph.launcher is not None
    assert max(len(buffers) for _, _, buffers, _ in graph.calls) == terms + 1


def test_from_several_threads(graph_of):
    graph_of(1)
    weight = Tensor(np.eye(64, dtype=np.float32)).realize()
    jits = []
    with Context(CPU_COUNT=2):
        for _ in range(2):
            jit = TinyJit(lambda x: (linear(x, weight) + 1).contiguous().sum(axis=1).realize())
            for _ in range(3):
                jit(Tensor.ones(96, 64).contiguous().realize())
            jits.append(jit)
            (graph,) = (c.src[0] for c in jit.captured.linear.src if c.src[0].arg == "graph")
            assert get_graph_runtime(graph).launcher is not None
    inputs = [Tensor.full((96, 64), float(i)).contiguous().realize() for i in range(2)]
    found = {}

    def replay(i):
        found[i] = [jits[i](inputs[i]).numpy() for _ in range(50)]

    threads = [threading.Thread(target=replay, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        np.testing.assert_array_equal(found[i], np.full((50, 96), 64.0 * (i + 1)))


def test_other_graphs_are_left_to_tinygrad(graph_of, monkeypatch):
    graph_of(None)
    expected, _ = run()
    graph_of(1)
    monkeypatch.setattr(launcher, "MAX_ARGUMENTS", 1)
    found, graphs = run()
    assert all(graph.launcher is None for graph in graphs)
    np.testing.assert_array_equal(expected, found)


def test_linked_graphs_of_a_decoding_pass(monkeypatch, graph_of):
    """A pass in one native call gives the bits of a pass in three graphs, whatever is selected."""
    graph_of(1)
    model = Pico(TINY, seed=7)
    rng = np.random.default_rng(0)
    linked, separate = decoder.Decoder(model), decoder.Decoder(model)
    link, made = launcher.link_graphs, []
    for tested, function in (
        (linked, lambda *graphs: made.append(link(*graphs)) or made[-1]),
        (separate, lambda *graphs: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(launcher, "link_graphs", function)
            for rows in (1, 4):  # compiles both passes
                tested.forward(bytes(rows))
    assert [bool(run) for run in made] == [True, True]
    for use_latent in (True, False):
        for tested in (linked, separate):
            tested.reset(use_latent)
        for n in rng.permutation([1, 1, 1, 1, 2, 3, 3, 4, 4, 20]).tolist():
            data, rejected = rng.bytes(n), int(rng.integers(min(n, 4)))
            found = [tested.forward(data) for tested in (linked, separate)]
            for ours, theirs in zip(*found, strict=True):
                np.testing.assert_array_equal(ours, theirs)
            np.testing.assert_array_equal(linked.last_decisions, separate.last_decisions)
            for tested in (linked, separate):
                tested.rollback(min(rejected, len(tested.last_decisions)))
            assert linked.selected == separate.selected
        assert (linked.selected > 0) == use_latent


def test_an_interrupt_waits_for_the_end_of_the_graph(graph_of):
    """A signal handler that raises runs before a graph or after it: no kernel is left out."""
    graph_of(1)
    x = Tensor(np.zeros((64, 64), np.float32)).realize()
    counter = Tensor(np.zeros((64, 64), np.float32)).realize()
    copies = [Tensor(np.zeros((64, 64), np.float32)).realize() for _ in range(40)]

    def count():  # the copies in sequence: an interrupt between two would leave them unequal
        counter.assign(counter + 1).realize()
        for copy in copies:
            copy.assign(counter + x).realize()
        return counter

    jit = TinyJit(count)
    with Context(JIT_BATCH_SIZE=0):  # one graph
        for _ in range(3):
            jit()
    running = False

    def interrupt(*_):
        if running:  # not once the loop has ended
            raise KeyboardInterrupt

    before, interrupts = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for delay in np.linspace(2e-5, 2e-3, 100):
            try:
                running = True
                signal.setitimer(signal.ITIMER_REAL, delay)
                for _ in range(20):
                    jit()
                running = False
            except KeyboardInterrupt:
                interrupts += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            values = {float(t.numpy()[0, 0]) for t in (counter, *copies)}
            assert len(values) == 1, values
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 20


@pytest.fixture
def clang(monkeypatch) -> str:
    """A clang of this machine compiles the launcher; skips the test if there is none."""
    names = "clang", *(f"clang-{version}" for version in range(23, 14, -1))
    command = next(filter(None, map(shutil.which, names)), None)
    if command is None:
        pytest.skip("no clang")
    monkeypatch.setattr(launcher, "getenv", lambda *_: command)
    return command


def test_clang_compiles_the_launcher(clang, graph_of):
    arch = Device["CPU"].renderer.compiler.arch
    library = launcher.IRCompiler(arch).compile(launcher._source(platform.machine()))
    with Context(CPU_COUNT=2):
        graph_of(None)
        expected, _ = run()
        graph_of(1, library)
        found, graphs = run()
    assert all(graph.launcher is not None for graph in graphs)
    np.testing.assert_array_equal(expected, found)


def test_found_inside_a_tinygrad_function():
    """A model's first matmul may be in one; tinygrad 0.13 lets no device be opened there."""
    with Context(ALLOW_DEVICE_USAGE=0):
        assert launcher._launcher.__wrapped__() is not None


def test_machine_code_for_arm64(clang):
    """The launcher needs no runtime library (for example for atomics), which nothing would link."""
    targets = subprocess.run([clang, "--print-targets"], capture_output=True, text=True).stdout
    if "aarch64" not in targets:  # as in the extra `clang`
        pytest.skip("this clang compiles for x86 only")
    compiler = launcher.IRCompiler("arm64")
    compiler.args = ["-mcpu=generic"]  # not this machine's processor
    library = compiler.compile(launcher._source("aarch64"))
    assert b"\x3f\x20\x03\xd5" in library  # the instruction yield


@pytest.mark.skipif(CPU_COUNT.value < 2, reason="tinygrad allows CPU_COUNT threads")
@pytest.mark.parametrize(("rows", "tile_m"), [(1, 8), (8, 6), (8, 8)])
def test_packed_matmul_on_several_threads(graph_of, monkeypatch, rows, tile_m):
    """The shares are columns: the same bits as on one thread. Tiles of AVX2 and of AVX-512."""
    monkeypatch.setattr(launcher, "worth_threads", lambda _: True)
    monkeypatch.setattr(decoding, "tile_m", lambda: tile_m)
    rng = np.random.default_rng(0)
    weight, x = (Tensor(rng.standard_normal(s).astype(np.float32)) for s in ((128, 52), (rows, 52)))
    layer = Linear(52, 128)
    layer.weight = weight.realize()
    linear = PackedLinear(layer)
    x = x.realize()
    found = []
    for cores in (1, 2):
        with Context(CPU_COUNT=cores):
            graph_of(cores - 1)
            jit = TinyJit(lambda: linear(x).realize())
            for _ in range(3):
                found.append(jit().numpy().copy())
    (call,) = jit.captured.linear.src
    assert call.src[0].arg.global_size[0] == 2
    np.testing.assert_array_equal(found[0], found[-1])
    np.testing.assert_allclose(found[0], x.numpy() @ weight.numpy().T, atol=1e-4)
