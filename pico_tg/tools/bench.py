"""Measuring: how fast a train step and the decoder are here, beside what the mathematics asks for.

`bench_train` and `bench_decode` yield records, dicts that are valid JSON, and print nothing. Data
and weights are random. A time is the median of several, after everything is compiled.

A record of something measured has

- measured: what
- seconds, bytes_per_second: of a step or pass, and of the bytes that it takes in or makes
- kernels: how many run in it; operations: what they do, counted by tinygrad
- needed: what the mathematics asks for (`pico_tg.flops`), products only, no optimizer
- gflops: needed / seconds; of_gemm: gflops as a share of what a plain matrix product reaches here

and the first record, `machine`, says what that is: NumPy's float32 product of 1536 x 1536 matrices
on a CPU, on an accelerator tinygrad's in the same precision, the largest of several sizes.
"""

import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, dtypes, nn

from ..backend import describe_backend
from ..config import Config, TrainSettings
from ..decoder import DECODE_ROWS, Decoder
from ..files import PicoError
from ..flops import decoding_flops, training_flops
from ..generation import GeneratedByte, Stats, generate
from ..model import Pico, inputs_and_targets, loss_fn
from ..progress import Progress
from ..remat import graph_context
from ..runtime import count_kernels, jit_method, on_devices
from ..training import TrainStep

Record = dict[str, Any]
IMPORTED = time.perf_counter()
WARM_UP = 3  # steps: one as it is, one captured, one replayed
LEARNING_RATE = 1e-5  # small: random bytes teach nothing


def bench_train(
    config: Config,
    settings: TrainSettings,
    devices: tuple[str, ...] = (),
    repeats: int = 5,
    progress: bool = False,
) -> Iterator[Record]:
    """Measure training; `settings` say the context, the batch, the optimizer and the precision.

    Records: `machine`; `start-up` (first_step_seconds, third_step_seconds: from the start of the
    process to the end of that step); `step` (all of it, optimizer included); with SOAP `step with
    refresh`; `memory` (see `Memory`); `forward and backward` (without optimizer, losses read).
    """
    _check(repeats)
    if config.router != "none" and config.capacity(settings.context_len) < 1:
        raise PicoError(f"context_len {settings.context_len} is too short: no byte is selected")
    precision = "bf16" if graph_context(settings, devices).kwargs["PICO_BF16"] else "fp32"
    before = process_seconds()
    gemm = gemm_rate(precision, (devices or (Device.DEFAULT,))[0])
    calibrating = process_seconds() - before
    yield _machine(config, precision, gemm, devices)

    accumulation, batch_size = settings.grad_accumulation_steps, settings.batch_size
    length = settings.context_len
    size = (accumulation, batch_size, length + config.next_tokens)
    rng = np.random.default_rng(0)
    needed = accumulation * training_flops(config, length, batch_size)

    def record(name: str, call: Callable[[], Any], times: int = repeats) -> Record:
        runs = [run_once(call) for _ in range(times)]
        return _measured(name, runs, accumulation * batch_size * length, needed, gemm)

    memory = Memory()
    train_step = TrainStep(Pico(config, seed=0), settings, devices)

    def step(train_step: TrainStep) -> None:
        train_step(rng.integers(0, 256, size).astype(np.uint8), LEARNING_RATE)

    ends = []
    with (
        memory,
        Progress(total=WARM_UP, desc="compiling", unit="step", disable=not progress) as bar,
    ):
        for _ in range(WARM_UP):
            step(train_step)
            ends.append(process_seconds() - calibrating)
            bar.update()
    yield {
        "measured": "start-up",
        "first_step_seconds": ends[0],
        "third_step_seconds": ends[2],
    }
    again = partial(step, train_step)
    yield record("step", again)
    if settings.optimizer == "soap":
        train_step.optimizer.precondition_frequency = 1
        yield record("step with refresh", again, min(repeats, 3))
    yield {"measured": "memory"} | memory.peak()

    model = train_step.model
    del train_step, again  # and with them their graphs' memory
    gc.collect()
    products = ForwardBackward(model)
    with Tensor.train(), graph_context(settings, devices):
        windows = [
            on_devices(rng.integers(0, 256, size[1:]).astype(np.uint8), devices, 0)
            for _ in range(accumulation)
        ]

        def forward_backward() -> None:
            for x in windows:
                products(x)

        with Progress(total=2, desc="compiling", unit="step", disable=not progress) as bar:
            for _ in range(2):
                forward_backward()
                bar.update()
        yield record("forward and backward", forward_backward)


class ForwardBackward:
    """Loss and all gradients of a model, compiled, and the loss read."""

    def __init__(self, model: Pico) -> None:
        self.model = model
        self.graph = jit_method(self._graph)

    def _graph(self, windows: Tensor) -> Tensor:
        x, targets = inputs_and_targets(windows, self.model.config.next_tokens)
        learned = self.model.config.router == "learned"
        loss, _, _ = loss_fn(*self.model(x), targets, learned)
        gradients = loss.gradient(*nn.state.get_parameters(self.model))
        Tensor.realize(loss, *gradients)
        return loss

    def __call__(self, windows: Tensor) -> float:
        return self.graph(windows).item()


def bench_decode(
    config: Config, context_len: int = 1024, repeats: int = 5, progress: bool = False
) -> Iterator[Record]:
    """Measure decoding after `context_len` random bytes.

    Random weights guess no byte, so that hardly a draft is accepted: what text costs at the worst.

    Records: `machine`; `start-up` (first_byte_seconds: from the start of the process); `writing`
    (of a byte; passes_per_second, accepted_per_pass, router_rate); `pass of 1 byte`, `pass of 8
    bytes` (fed at once); `reading` (the prompt; first_byte_seconds: to have read it and to have
    sampled a byte); `memory` (see `Memory`).
    """
    _check(repeats)
    if context_len < 1:
        raise PicoError(f"context_len must be at least 1, not {context_len}")
    before = process_seconds()
    gemm = gemm_rate("fp32", Device.DEFAULT)
    calibrating = process_seconds() - before
    yield _machine(config, "fp32", gemm, ())
    rng = np.random.default_rng(0)
    prompt = rng.bytes(context_len)
    bytes_ = 64
    memory = Memory()
    decoder = Decoder(Pico(config, seed=0))

    def text(seed: int, stats: Stats) -> Iterator[GeneratedByte]:
        options = {"max_bytes": bytes_ + 1, "ignore_end": True, "raw_prompt": True}
        return generate(decoder.model, prompt, seed=seed, stats=stats, decoder=decoder, **options)

    total = 1 + (len(DECODE_ROWS) + 1) * WARM_UP
    with memory, Progress(total=total, desc="compiling", unit="pass", disable=not progress) as bar:
        next(text(0, Stats()))
        first_byte = process_seconds() - calibrating
        bar.update()
        for _ in range(WARM_UP):
            for size in DECODE_ROWS:
                for _ in range(WARM_UP):  # as many as are routed, so many kinds of passes
                    decoder.forward(rng.bytes(size))
                bar.update()
            for _ in text(0, Stats()):  # also what depends on how many bytes are routed
                pass
            bar.update()
    yield {"measured": "start-up", "first_byte_seconds": first_byte}

    def measured(name: str, runs: list[Run], fed: int, rate: float, position: int) -> Record:
        needed = fed * decoding_flops(config, position, rate)
        return _measured(name, runs, fed, needed, gemm)

    runs, first, all_stats = [], [], []
    for seed in range(repeats):
        stats = Stats()
        records = text(seed, stats)
        next(records)
        first.append(stats.first_byte_seconds)
        all_stats.append(stats)
        runs.append(run_once(lambda records=records: [None for _ in records]))
    passes, made, routed, accepted = (
        sum(getattr(stats, name) for stats in all_stats)
        for name in ("passes", "bytes", "routed", "accepted")
    )
    rate = routed / made
    runs = [tuple(x / bytes_ for x in run) for run in runs]
    writing = measured("writing", runs, 1, rate, context_len)
    yield writing | {
        "passes_per_second": writing["bytes_per_second"] * passes / made,
        "accepted_per_pass": accepted / passes,
        "router_rate": rate,
    }
    for size in (1, 8):
        name = f"pass of {size} byte{'s' if size > 1 else ''}"
        runs, routed = [], 0
        for _ in range(repeats):
            data = rng.bytes(size)
            runs.append(run_once(lambda data=data: decoder.forward(data)))
            routed += int(decoder.last_decisions.sum())
        yield measured(name, runs, size, routed / size / repeats, context_len)
    runs = []
    for _ in range(repeats):
        decoder.position = decoder.selected = 0
        runs.append(run_once(lambda: decoder.forward(prompt)))
    rate = decoder.selected / decoder.position
    # on average half of what was read in the end is before a byte
    reading = measured("reading", runs, context_len, rate, context_len // 2)
    yield reading | {"first_byte_seconds": statistics.median(first)}
    yield {"measured": "memory"} | memory.peak()


Run = tuple[float, float, float]  # seconds, kernels, operations


def run_once(call: Callable[[], Any]) -> Run:
    """Time and count one call, which must wait for what it computes."""
    operations = GlobalCounters.global_ops
    with count_kernels() as kernels:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    return seconds, kernels[0], GlobalCounters.global_ops - operations


def gemm_rate(precision: str, device: str) -> float:
    """What a plain matrix product reaches on this machine, in GFLOPS."""
    if device.split(":")[0] == "CPU":
        size = 1536
        a, b = np.random.default_rng(0).standard_normal((2, size, size)).astype(np.float32)
        return max(2 * size**3 / run_once(lambda: a @ b)[0] for _ in range(8)) / 1e9
    best = 0.0
    dtype = dtypes.bfloat16 if precision == "bf16" else dtypes.float32
    for size in (64, 256, 1024, 4096):
        a, b = (Tensor.rand(size, size, device=device).cast(dtype).realize() for _ in range(2))
        product = TinyJit(lambda a, b: a.matmul(b, dtype=dtypes.float32).realize())

        def call(product: TinyJit = product, a: Tensor = a, b: Tensor = b) -> None:
            product(a, b)
            Device[device].synchronize()

        seconds = [run_once(call)[0] for _ in range(WARM_UP + 4)][WARM_UP:]
        best = max(best, 2 * size**3 / min(seconds) / 1e9)
        if min(seconds) > 0.01:  # the next would take 64 times as long
            break
    return best


class Memory:
    """Peak memory, watched while it lasts.

    `peak()`: tensor_memory, the most bytes of all buffers at once, sampled every 2 ms; and on a CPU
    resident_memory, the most bytes that the process ever had in memory, all its libraries too.
    """

    def __enter__(self) -> "Memory":
        self.tensors, self.over = GlobalCounters.mem_used, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.002):
            self.tensors = max(self.tensors, GlobalCounters.mem_used)

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()

    def peak(self) -> dict[str, int]:
        found = {"tensor_memory": max(self.tensors, GlobalCounters.mem_used)}
        if Device.DEFAULT.split(":")[0] == "CPU" and os.name == "posix":
            import resource  # not on Windows

            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found["resident_memory"] = most * (1 if sys.platform == "darwin" else 1024)
        return found


def process_seconds() -> float:
    """How long this process has been running; without /proc, since this module was imported."""
    try:
        started = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        now = Path("/proc/uptime").read_text().split()[0]
        return float(now) - int(started) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - IMPORTED


def _machine(config: Config, precision: str, gemm: float, devices: tuple[str, ...]) -> Record:
    return {
        "measured": "machine",
        "backend": describe_backend().split(";")[0],
        "devices": list(devices),
        "precision": precision,
        "gemm_gflops": gemm,
        "parameters": config.parameters,
    }


def _measured(name: str, runs: list[Run], bytes_: int, needed: float, gemm: float) -> Record:
    seconds, kernels, operations = (statistics.median(x) for x in zip(*runs, strict=True))
    gflops = needed / seconds / 1e9
    return {
        "measured": name,
        "seconds": seconds,
        "bytes_per_second": bytes_ / seconds,
        "kernels": round(kernels),
        "operations": round(operations),
        "needed": round(needed),
        "gflops": gflops,
        "of_gemm": gflops / gemm,
    }


def _check(repeats: int) -> None:
    if repeats < 1:
        raise PicoError(f"repeats must be at least 1, not {repeats}")
