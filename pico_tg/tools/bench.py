"""Benchmarks: speed of a training step and of the decoder on this machine, and their MFU.

`bench_train` and `bench_decode` yield records, dicts that are valid JSON, and show a bar. Data
and weights are random. Times are medians of several runs after compilation.

A record of a measurement has

- measured: the name of the step or pass
- seconds: time of the step or pass; bytes_per_second: rate of the bytes read or generated
- kernels: number of kernels executed; operations: FLOPs that the kernels execute, as counted by
  tinygrad
- model_flops: the FLOPs that the mathematics requires (`pico_tg.costs`), without the optimizer
- gflops: model_flops / seconds / 1e9
- mfu (model FLOPs utilization): gflops divided by the peak of this machine
- hfu (hardware FLOPs utilization): the same for operations

The record `machine` has the peak as peak_gflops, and as peak what reached it (`peak`).
"""

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, UOp, nn

from ..backend.cpu_kernels import cpu_kernels
from ..backend.device import describe_backend
from ..backend.precision import choose_precision, graph_context
from ..backend.runtime import Ops, jit_method, realize
from ..config import Config, TrainSettings
from ..costs import decoding_flops, gemm_rate, training_flops
from ..decoder import DECODE_ROWS, Decoder
from ..files import PicoError
from ..generation import GeneratedByte, Stats, generate
from ..model import Pico, inputs_and_targets, loss_fn
from ..progress import Bar
from ..training import TrainStep

Record = dict[str, Any]
IMPORTED = time.perf_counter()
WARM_UP = 3  # calls after which every graph is captured and was replayed
LEARNING_RATE = 1e-5  # small: there is nothing to learn in random bytes


def bench_train(
    config: Config,
    settings: TrainSettings,
    devices: tuple[str, ...] = (),
    repeats: int = 5,
) -> Iterator[Record]:
    """Measure training with the context, batch, optimizer and precision of `settings`.

    Records: `start-up` (first_step_seconds, third_step_seconds: from the start of the process to
    the end of that step); `machine`; `step` (with the optimizer); with SOAP `step with refresh`;
    `memory` (see `memory`); `forward and backward` (without the optimizer; the loss is read).
    """
    if config.router != "none" and config.capacity(settings.context_len) < 1:
        raise PicoError(f"context_len {settings.context_len} is too short: no byte is selected")
    accumulation, batch_size = settings.grad_accumulation_steps, settings.batch_size
    length = settings.context_len
    size = (accumulation, batch_size, length + config.next_tokens)
    rng = np.random.default_rng(0)
    train_step = TrainStep(Pico(config, seed=0), settings, devices)

    def step(train_step: TrainStep) -> None:
        train_step(rng.integers(0, 256, size).astype(np.uint8), LEARNING_RATE)

    ends = []
    with Bar(total=WARM_UP, desc="compiling", unit="step") as bar:
        for _ in range(WARM_UP):
            step(train_step)
            ends.append(process_seconds())
            bar.update()
    yield {
        "measured": "start-up",
        "first_step_seconds": ends[0],
        "third_step_seconds": ends[2],
    }
    precision = choose_precision(settings.precision, devices)
    top = peak(precision, (devices or (Device.DEFAULT,))[0])
    yield _machine(config, precision, top, devices)
    model_flops = accumulation * training_flops(config, length, batch_size)

    def record(name: str, call: Callable[[], Any], times: int = repeats) -> Record:
        runs = [run_once(call) for _ in range(times)]
        return _measured(name, runs, accumulation * batch_size * length, model_flops, top)

    one_step = partial(step, train_step)
    yield record("step", one_step)
    if settings.optimizer == "soap":
        train_step.optimizer.precondition_frequency = 1
        yield record("step with refresh", one_step, min(repeats, 3))
    yield memory()

    model = train_step.model
    del train_step, one_step  # frees the memory of their graphs
    gc.collect()
    loss_and_gradients = ForwardBackward(model, devices)
    with Tensor.train(), graph_context(settings, devices):
        windows = rng.integers(0, 256, size).astype(np.uint8)

        def forward_backward() -> None:
            for x in windows:
                loss_and_gradients(x)

        with Bar(total=2, desc="compiling", unit="step") as bar:
            for _ in range(2):
                forward_backward()
                bar.update()
        yield record("forward and backward", forward_backward)


class ForwardBackward:
    """Compiled forward and backward of a model; a call computes all gradients, returns the loss."""

    def __init__(self, model: Pico, devices: tuple[str, ...] = ()) -> None:
        self.model = model
        self.graph = jit_method(self._graph, devices=devices)

    def _graph(self, windows: Tensor) -> Tensor:
        x, targets = inputs_and_targets(windows, self.model.config.next_tokens)
        loss, _, _ = loss_fn(*self.model(x), targets, self.model.config)
        parameters = [t for t in nn.state.get_parameters(self.model) if t.is_param]
        gradients = loss.gradient(*parameters)
        Tensor.realize(loss, *gradients)
        return loss

    def __call__(self, windows: np.ndarray) -> float:
        return float(self.graph(windows))


def bench_decode(config: Config, context_len: int = 1024, repeats: int = 5) -> Iterator[Record]:
    """Measure decoding after `context_len` random bytes.

    Random weights predict nothing, so almost no draft is accepted: the worst case of decoding.

    Records: `start-up` (first_byte_seconds: from the start of the process); `machine`; `writing`
    (of one byte; passes_per_second, accepted_per_pass, router_rate); `pass of 1 byte`, `pass of 4
    bytes` (of one `Decoder.forward`); `reading` (of the prompt; first_byte_seconds: of reading the
    prompt and sampling a byte); `memory` (see `memory`).
    """
    rng = np.random.default_rng(0)
    prompt = rng.bytes(context_len)
    count = 64
    decoder = Decoder(Pico(config, seed=0))

    def text(seed: int, stats: Stats) -> Iterator[GeneratedByte]:
        options = {"max_bytes": count + 1, "ignore_end": True, "raw_prompt": True, "temperature": 1}
        return generate(decoder.model, prompt, seed=seed, stats=stats, decoder=decoder, **options)

    total = 1 + (len(DECODE_ROWS) + 1) * WARM_UP
    with Bar(total=total, desc="compiling", unit="pass") as bar:
        next(text(0, Stats()))
        first_byte = process_seconds()
        bar.update()
        for _ in range(WARM_UP):
            for size in DECODE_ROWS:
                for _ in range(WARM_UP):  # which pass runs depends on the number of routed bytes
                    decoder.forward(rng.bytes(size))
                bar.update()
            for _ in text(0, Stats()):
                pass
            bar.update()
    yield {"measured": "start-up", "first_byte_seconds": first_byte}
    top = peak("fp32", Device.DEFAULT)
    yield _machine(config, "fp32", top, ())

    def measured(name: str, runs: list[Run], rows: int, rate: float, position: int) -> Record:
        return _measured(name, runs, rows, rows * decoding_flops(config, position, rate), top)

    runs, first, all_stats = [], [], []
    for seed in range(repeats):
        stats = Stats()
        records = text(seed, stats)
        next(records)
        first.append(stats.first_byte_seconds)
        all_stats.append(stats)
        runs.append(run_once(lambda records=records: [None for _ in records]))
    passes, generated, routed, accepted = (
        sum(getattr(stats, name) for stats in all_stats)
        for name in ("passes", "bytes", "routed", "accepted")
    )
    rate = routed / generated
    runs = [tuple(x / count for x in run) for run in runs]
    writing = measured("writing", runs, 1, rate, context_len)
    yield writing | {
        "passes_per_second": writing["bytes_per_second"] * passes / generated,
        "accepted_per_pass": accepted / passes,
        "router_rate": rate,
    }
    for size in DECODE_ROWS:
        name = f"pass of {size} byte{'s' if size > 1 else ''}"
        runs, routed = [], 0
        for _ in range(repeats):
            data = rng.bytes(size)
            runs.append(run_once(lambda data=data: decoder.forward(data)))
            routed += int(decoder.last_decisions.sum())
        yield measured(name, runs, size, routed / size / repeats, context_len)
    runs = []
    for _ in range(repeats):
        decoder.reset()
        runs.append(run_once(lambda: decoder.forward(prompt)))
    rate = decoder.selected / decoder.position
    # on average, half of the prompt precedes a byte of the prompt
    reading = measured("reading", runs, context_len, rate, context_len // 2)
    yield reading | {"first_byte_seconds": statistics.median(first)}
    yield memory()


Run = tuple[float, float, float]  # seconds, kernels, operations


@contextlib.contextmanager
def count_kernels() -> Iterator[list[int]]:
    """Count the kernels that run inside the `with` block, in the yielded list's only element.

    It is valid after the block. GlobalCounters.kernel_count counts a captured graph that tinygrad
    replays as one kernel.
    """
    count, estimate = [-GlobalCounters.kernel_count], realize.estimate_uop

    def counting(call: UOp):  # tinygrad estimates each call that it executes
        ast = call.src[0]
        if ast.op is Ops.CUSTOM_FUNCTION and ast.arg == "graph":
            count[0] += len(ast.src[0].src) - 1
        return estimate(call)

    realize.estimate_uop = counting
    try:
        yield count
    finally:
        realize.estimate_uop = estimate
        count[0] += GlobalCounters.kernel_count


def run_once(call: Callable[[], Any]) -> Run:
    """Time and count one call, which must wait for its results."""
    operations = GlobalCounters.global_ops
    with count_kernels() as kernels:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return seconds, kernels[0], GlobalCounters.global_ops - operations


def memory() -> Record:
    """The bytes in use.

    tensor_memory: of all buffers; a captured graph keeps those of its intermediate results. On a
    CPU also resident_memory: the most that the whole process has used, its libraries included.
    """
    record = {"measured": "memory", "tensor_memory": GlobalCounters.mem_used}
    if Device.DEFAULT.split(":")[0] == "CPU" and os.name == "posix":
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record["resident_memory"] = peak * (1 if sys.platform == "darwin" else 1024)
    return record


def process_seconds() -> float:
    """Seconds since the start of this process, or, without /proc, since this module's import."""
    try:
        started = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        # /proc/uptime has hundredths of a second: a step of a tiny model takes less
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(started) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - IMPORTED


Peak = tuple[float, str]  # GFLOPS, what reached them


def peak(precision: str, device: str) -> Peak:
    """The most GFLOPS that arithmetic was seen to reach on `device`, and which arithmetic.

    On a CPU, the higher of multiply-adds in registers, by the kernels' own code generator, and of
    NumPy's matmul in a process without the variables that choose OpenBLAS's kernels, by which some
    environments make it half as fast. Elsewhere a plain matmul (`costs.gemm_rate`).
    """
    if device.split(":")[0] != "CPU":
        return gemm_rate(precision, device), "a plain matmul"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        environment.pop(name, None)
    code = "from pico_tg.costs import gemm_rate; print(gemm_rate('fp32', 'CPU'))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    rates = [(float(printed), "NumPy's matmul")]
    if cpu := cpu_kernels(device):
        call, operations = cpu.fused_multiply_adds(device)
        seconds = min(run_once(call)[0] for _ in range(8))
        rates.append((operations / seconds / 1e9, "a kernel of multiply-adds"))
    return max(rates)


def _machine(config: Config, precision: str, top: Peak, devices: tuple[str, ...]) -> Record:
    return {
        "measured": "machine",
        "backend": describe_backend().split(";")[0],
        "devices": list(devices),
        "precision": precision,
        "peak_gflops": top[0],
        "peak": top[1],
        "parameters": config.parameters,
    }


def _measured(name: str, runs: list[Run], bytes_: int, model_flops: float, top: Peak) -> Record:
    seconds, kernels, operations = (statistics.median(x) for x in zip(*runs, strict=True))
    gflops = model_flops / seconds / 1e9
    return {
        "measured": name,
        "seconds": seconds,
        "bytes_per_second": bytes_ / seconds,
        "kernels": round(kernels),
        "operations": round(operations),
        "model_flops": round(model_flops),
        "gflops": gflops,
        "mfu": gflops / top[0],
        "hfu": operations / seconds / 1e9 / top[0],
    }
