"""Benchmarks: records whose numbers agree with each other and with counts by hand."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import FLAGS, TINY
from tinygrad import Device, GlobalCounters, Tensor, TinyJit

from pico_tg.backend.runtime import has_cpu_kernels, jit_method
from pico_tg.costs import decoding_flops, training_flops
from pico_tg.cpu import kernels
from pico_tg.tools import bench, cli


def records(capsys, *arguments):
    assert cli.main(["bench", *arguments, *FLAGS, "--repeats", "2", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {record.pop("measured"): record for record in map(json.loads, lines)}


def check(record, bytes_, model_flops, gemm):
    assert record["bytes_per_second"] == pytest.approx(bytes_ / record["seconds"])
    assert record["model_flops"] == pytest.approx(model_flops, abs=1)
    gflops = record["model_flops"] / record["seconds"] / 1e9
    assert record["gflops"] == pytest.approx(gflops, rel=1e-3)
    assert record["mfu"] == pytest.approx(record["gflops"] / gemm)
    # the kernels execute at least what the mathematics requires
    assert record["operations"] >= record["model_flops"]
    more = record["operations"] / record["model_flops"]
    assert record["hfu"] / record["mfu"] == pytest.approx(more, rel=1e-3)
    assert record["kernels"] > 10


@pytest.mark.slow
def test_training(capsys):
    sizes = ["--context-len", "40", "--batch-size", "2", "--precision", "fp32"]
    found = records(capsys, "train", *sizes)
    assert list(found) == [
        "start-up", "machine", "step", "step with refresh", "memory", "forward and backward",
    ]  # fmt: skip
    machine = found["machine"]
    assert machine["parameters"] == TINY.parameters
    assert machine["precision"] == "fp32"
    model_flops = training_flops(TINY, 40, 2)
    for name in ("step", "step with refresh", "forward and backward"):
        check(found[name], 2 * 40, model_flops, machine["peak_gflops"])
    step, gradients = found["step"], found["forward and backward"]
    assert gradients["operations"] < step["operations"]
    assert gradients["kernels"] < step["kernels"]
    assert found["step with refresh"]["operations"] == step["operations"]
    start = found["start-up"]
    assert 0 < start["first_step_seconds"] < start["third_step_seconds"]
    # weights, SOAP's state (moments, GG, Q) and gradients are in memory, float32
    assert found["memory"]["tensor_memory"] > 4 * 4 * TINY.parameters


@pytest.mark.slow
def test_decoding(capsys):
    found = records(capsys, "decode", "--context-len", "70")
    assert list(found) == [
        "start-up", "machine", "writing", "pass of 1 byte", "pass of 4 bytes", "reading", "memory",
    ]  # fmt: skip
    gemm = found["machine"]["peak_gflops"]
    writing = found["writing"]
    rate = writing["router_rate"]
    assert 0 <= rate <= 1
    check(writing, 1, decoding_flops(TINY, 70, rate), gemm)
    # an accepted draft saves a pass
    assert 0 < writing["passes_per_second"] <= writing["bytes_per_second"]
    bytes_a_pass = writing["bytes_per_second"] / writing["passes_per_second"]
    assert bytes_a_pass == pytest.approx(1 + writing["accepted_per_pass"], abs=0.05)
    for size in (1, 4):
        record = found[f"pass of {size} byte{'s' if size > 1 else ''}"]
        none, all_routed = (size * decoding_flops(TINY, 70, rate) for rate in (0, 1))
        assert none - 1 <= record["model_flops"] <= all_routed + 1
        check(record, size, record["model_flops"], gemm)
    assert found["pass of 4 bytes"]["model_flops"] > 2 * found["pass of 1 byte"]["model_flops"]
    assert found["reading"]["first_byte_seconds"] > 0
    assert found["start-up"]["first_byte_seconds"] > 0


@pytest.mark.skipif(not has_cpu_kernels(Device.DEFAULT), reason="measures CPU kernels")
def test_the_peak_is_the_higher_of_two_rates(monkeypatch):
    """NumPy's is measured in a process without the variables that make OpenBLAS slower."""
    call, operations = kernels.fused_multiply_adds("CPU")
    GlobalCounters.reset()
    call()
    assert GlobalCounters.global_ops == operations
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    monkeypatch.setattr(bench, "run_once", lambda call: (0.5, 1, operations))
    ours = operations / 0.5 / 1e9
    for numpy, name in ((ours / 2, "a kernel of multiply-adds"), (ours * 2, "NumPy's matmul")):

        def run(command, env, numpy=numpy, **_):
            assert not {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"} & env.keys()
            return SimpleNamespace(stdout=str(numpy).encode())

        monkeypatch.setattr(bench.subprocess, "run", run)
        assert bench.peak("fp32", "CPU") == (max(ours, numpy), name)


def test_mistakes(capsys):
    """They end before anything is computed."""
    for arguments, named in (
        (["decode", "--batch-size", "2"], "--batch-size"),
        (["decode", "--devices", "2"], "--devices"),
        (["train", "--model", "nowhere"], "nowhere"),
        (["train", "--context-len", "2"], "--context-len 2"),
        (["decode", "--context-len", "0"], "--context-len"),
        (["--repeats", "0"], "repeats"),
    ):
        assert cli.main(["bench", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line


def test_the_model_of_a_folder(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "bench_train", lambda config, *rest, **more: seen.append(config) or [])
    assert cli.main(["init", str(tmp_path / "m"), *FLAGS]) == 0
    assert cli.main(["bench", "--model", str(tmp_path / "m"), "--dim", "32"]) == 0
    assert seen == [dataclasses.replace(TINY, dim=32)]


def test_the_text_of_a_record():
    record = {"measured": "step", "seconds": 0.5, "bytes_per_second": 2048.0, "kernels": 700}
    record |= {"operations": 3e9, "model_flops": 2e9, "gflops": 4.0, "mfu": 0.25, "hfu": 0.375}
    assert cli.describe_measured(record).split() == [
        "step", "0.5000", "2,048", "700", "3", "2", "4.0", "25.0%", "37.5%",
    ]  # fmt: skip
    start = {"measured": "start-up", "first_step_seconds": 3.04, "third_step_seconds": 5.5}
    assert cli.describe_measured(start).endswith("first step 3.0 s, third step 5.5 s")


def test_kernels_of_a_graph_are_counted():
    def three(x):
        return (((x + 1).contiguous() * 2).contiguous() - 3).contiguous().realize()

    jitted, x = TinyJit(three), Tensor(np.ones(8, np.float32)).realize()
    for _ in range(4):
        with bench.count_kernels() as count:
            jitted(x)
        assert count == [3]


def test_a_replay_counts_its_kernels_and_operations():
    class Three:
        def method(self, x):
            return (((x + 1).contiguous() * 2).contiguous() - 3).contiguous().realize()

    three = Three()
    graph, x = jit_method(three.method), np.ones(64, np.float32)
    runs = [bench.run_once(lambda: graph(x)) for _ in range(4)]
    assert [run[1:] for run in runs[1:]] == [(3, 3 * 64)] * 3
