"""Formats the output of eval, info, run --stats and bench: pure functions from records to text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from ..evaluation import Evaluation
from ..generation import GeneratedByte, Stats
from .router_report import RouterReport, routed_kinds

GAP = 0.02  # bits per byte of causal minus top-k routing, above which it is shown
BOUNDARIES = {
    "word_start": "first byte of a word",
    "near": "within one byte of a boundary",
}


def printable(text: str) -> str:
    """The text without characters that UTF-8 or XML cannot represent.

    A file's name may hold control characters, and bytes that are not UTF-8 (Python's surrogates):
    bytes are decoded as UTF-8, and characters that cannot be represented become U+FFFD.
    """
    text = re.sub("[\0-\b\v\f\x0e-\x1f\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns: the first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def describe_validation(record: Mapping[str, Any]) -> str:
    """The line of a record of training that holds a validation."""
    gap, lost = record.get("validation_routing_gap", 0), record.get("router_overflow", 0)
    return (
        f"step {record['step']}: held out {record['validation_bits_per_byte']:.3f} bits/byte, "
        f"{record['validation_router_rate']:.0%} routed"
        + (f"; {gap:+.3f} relative to top-k routing" if abs(gap) > GAP else "")
        + (f"; in training {lost:.0%} have no slot" if lost >= 0.005 else "")
    )


def conclusion(measured: Evaluation, report: RouterReport) -> str:
    """An evaluation in two or three sentences."""
    kinds = {name: place.rate for name, place in report.places.items() if place.share_of_bytes}
    parts = [
        f"{measured.bits_per_byte:.3f} bits per byte "
        f"({measured.bits_per_byte_without_latent:.3f} without the deep blocks).",
        _routing(measured.router_rate, kinds),
    ]
    if report.surprisal_ratio is not None:
        parts.append(
            f"The byte after a routed one is {report.surprisal_ratio:.1f} times as surprising as "
            "the average byte."
        )
    return " ".join(parts)


def describe_routing(records: Sequence[GeneratedByte]) -> str:
    """A sentence: which of these bytes the router selected."""
    decisions = [record.router_decision for record in records]
    return _routing(sum(decisions) / max(1, len(decisions)), routed_kinds(records))


def _routing(share: float, kinds: Mapping[str, float]) -> str:
    """kinds: the share of routed bytes, by kind."""
    named = {"space": "of the spaces", "word_inside": "of the bytes inside words"}
    which = [f"{kinds[kind]:.0%} {words}" for kind, words in named.items() if kind in kinds]
    told = f": {' and '.join(which)}" if which and 0 < share < 1 else ""
    amount = f"{share:.0%}" if share else "none"
    return f"The router sends {amount} of the bytes through the deep blocks{told}."


def describe_evaluation(measured: Evaluation, report: RouterReport) -> str:
    """The figures of an evaluation, and of its router report, as tables."""
    head = [
        ("bytes of text", f"{measured.bytes:,}"),
        ("bytes of context", f"{measured.context_len:,}"),
        ("bits per byte", f"{measured.bits_per_byte:.4f}"),
        ("without the deep blocks", f"{measured.bits_per_byte_without_latent:.4f}"),
        ("share of bytes routed", f"{measured.router_rate:.1%}"),
    ]
    if measured.routing_gap is not None:
        head.append(("causal routing minus top-k, bits per byte", f"{measured.routing_gap:+.4f}"))
    if report.surprisal_ratio is not None:
        head.append(("surprisal after routed bytes / mean", f"{report.surprisal_ratio:.2f}"))
    for k, right in enumerate(measured.head_accuracy, 1):
        ahead = f"{k} bytes ahead" if k > 1 else "next byte"
        head.append((f"{ahead} guessed right", f"{right:.1%}"))
    places = [("kind of byte", "of all bytes", "of routed bytes", "share routed")]
    for name, place in report.places.items():
        if place.share_of_bytes < 0.0005:  # it would be shown as 0.0%
            continue
        places.append(
            (
                _words(name),
                f"{place.share_of_bytes:.1%}",
                f"{place.share_of_decisions:.1%}",
                f"{place.rate:.1%}",
            )
        )
    found = [("word boundaries at routed (at random) bytes", "precision", "recall", "F1")]
    for name, boundary in report.boundaries.items():
        pairs = zip(astuple(boundary.router), astuple(boundary.random), strict=True)
        found.append((BOUNDARIES[name], *(f"{a:.3f} ({b:.3f})" for a, b in pairs)))
    return "\n\n".join(map(table, (head, places, found)))


def describe_model(facts: Mapping[str, Any]) -> str:
    """What `tools.info.describe` returns, as tables."""
    parts, operations = facts["parameters"], facts["operations_a_byte"]
    length = operations["context_len"]
    sizes = [(name, str(value)) for name, value in facts["model"].items()]
    parameters = [("parameters", ""), *((_words(name), f"{n:,}") for name, n in parts.items())]
    routed = f"{operations['decoding_router_rate']:.0%} routed"
    costs = [
        (f"model FLOPs a byte, context {length:,}", ""),
        ("forward", f"{operations['forward']:,.0f}"),
        ("training", f"{operations['training']:,.0f}"),
        (f"decoding, after {length:,} bytes, {routed}", f"{operations['decoding']:,.0f}"),
        ("memory of the KV caches", f"{facts['cache_bytes']:,} bytes"),
    ]
    kernels = facts["kernel_cache"]
    kept = f"compiled kernels: {kernels['bytes'] / 1e6:,.0f} MB in {kernels['file']}"
    parts = [sizes, parameters, costs, kept]
    if runs := facts.get("runs"):
        parts.append(f"runs: {', '.join(runs)}; with a RUN, info lists its checkpoints")
    if run := facts.get("run"):
        data = [("data " + name, str(v)) for name, v in run["dataset"].items() if v is not None]
        own = [(name, str(value)) for name, value in run["settings"].items()]
        own += [("base_weights", run["base_weights"])] if run["base_weights"] else []
        trained = [("steps", f"{run['steps']:,}")] if run["steps"] else []  # of metrics.jsonl
        parts.append([("run", run["name"]), *trained, *data, *own])
        parts += [run["data"]] if run["data"] else []
        rows = [("checkpoint", "MB", "bits/byte of its step", "held out", "routed")]
        for checkpoint in run["checkpoints"]:
            figures = [
                format(checkpoint[name], style) if name in checkpoint else "-"
                for name, style in (
                    ("bits_per_byte", ".4f"),
                    ("validation_bits_per_byte", ".4f"),
                    ("router_rate", ".1%"),
                )
            ]
            size = f"{checkpoint['bytes'] / 1e6:.2f}"
            rows.append((f"step {checkpoint['step']}", size, *figures))
        parts.append(rows)
        parts += [run["edited"]] if run["edited"] else []
        parts += [c["defect"] for c in run["checkpoints"] if "defect" in c]
    return "\n\n".join(part if isinstance(part, str) else table(part) for part in parts)


def _words(name: str) -> str:
    return name.replace("_", " ")


def describe_stats(stats: Stats) -> str:
    """The lines of --stats."""
    passes, bytes_ = max(stats.passes, 1), max(stats.bytes, 1)
    later = stats.seconds - stats.first_byte_seconds
    afterwards = (stats.bytes - 1) / later if later > 0 else 0.0
    lines = {
        "bytes": f"{stats.bytes:,}",
        "bytes/s": f"{stats.bytes / stats.seconds if stats.seconds else 0:.1f}"
        f" ({afterwards:.1f} after the first byte)",
        "time to the first byte": f"{stats.first_byte_seconds:.2f} s",
        "passes": f"{stats.passes:,} ({stats.bytes / passes:.2f} bytes a pass)",
    }
    if stats.drafts:
        lines["accepted bytes a pass"] = (
            f"{stats.accepted / passes:.2f} (of {stats.drafts / passes:.2f} drafts)"
        )
    lines["share of bytes routed"] = f"{stats.routed / bytes_:.1%}"
    return "\n".join(f"{name}: {value}" for name, value in lines.items())


def describe_measured(record: dict) -> str:
    """One or two lines for a record of `pico_tg.tools.bench`."""
    name = record["measured"]
    if name == "machine":
        of = f"; {len(record['devices'])} devices" if record["devices"] else ""
        return (
            f"{record['backend']}{of}; {record['precision']}; {record['peak']} reaches "
            f"{record['peak_gflops']:,.0f} GFLOPS; {record['parameters']:,} parameters\n"
            f"{'':20}{'seconds':>10}{'bytes/s':>10}{'kernels':>9}{'executed':>10}{'model':>10}"
            f"{'GFLOPS':>9}{'MFU':>8}{'HFU':>8}"
        )
    if name == "start-up":
        ends = (f"{key[:-8].replace('_', ' ')} {value:.1f} s" for key, value in record.items()
                if key != "measured")  # fmt: skip
        return f"seconds since the start of the process: {', '.join(ends)}"
    if name == "memory":
        names = {"tensor_memory": "tensors", "resident_memory": "the process at most"}
        used = ", ".join(
            f"{name} {record[k] / 1e9:.2f} GB" for k, name in names.items() if k in record
        )
        return f"memory: {used}"
    line = (
        f"{name:20}{record['seconds']:>10.4f}{record['bytes_per_second']:>10,.0f}"
        f"{record['kernels']:>9}{record['operations'] / 1e9:>10.4g}"
        f"{record['model_flops'] / 1e9:>10.4g}{record['gflops']:>9.1f}{record['mfu']:>8.1%}"
        f"{record['hfu']:>8.1%}"
    )
    if "router_rate" in record:
        line += (
            f"\n{'':20}{record['passes_per_second']:.1f} passes/s, "
            f"{record['accepted_per_pass']:.2f} drafts accepted a pass, "
            f"{record['router_rate']:.0%} of the bytes routed"
        )
    if "first_byte_seconds" in record:
        line += f"\n{'':20}first byte after {record['first_byte_seconds']:.3f} s"
    return line
