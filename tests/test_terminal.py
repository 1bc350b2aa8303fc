"""Samples on a terminal, as soon as they are decided; progress of training; signals."""

import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
from helpers import record, records
from hypothesis import given
from hypothesis import strategies as st

from pico_tg.progress import visible
from pico_tg.tools.terminal import (
    StopSignals,
    TrainingDisplay,
    characters,
    show_samples,
    split_prompt,
    split_samples,
)

GOOD = [text.encode() for text in ("a", "\n", "é", "€", "😀", "\ufffd")]
CUT_OFF = [b"\xc3", b"\xe2", b"\xe2\x82", b"\xf0\x9f"]
NEVER = [b"\xff", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"]
PARTS = st.sampled_from(GOOD + CUT_OFF + NEVER)


@given(st.one_of(st.binary(max_size=12), st.lists(PARTS, max_size=6).map(b"".join)), st.data())
def test_characters_are_those_of_python(data, draw):
    """Wherever the prompt ends, the text is that of all bytes; each byte is in one character."""
    cut = draw.draw(st.integers(0, len(data)))
    text, begun = split_prompt(data[:cut])
    found = list(characters(records(data[cut:]), begun))
    assert text + "".join(c.text for c in found) == data.decode(errors="replace")
    assert b"".join(c.data for c in found) == begun + data[cut:]
    generated = [r.byte for c in found for r in c.records]
    assert bytes(generated) == data[cut:]
    for c in found:
        assert c.data.endswith(bytes(r.byte for r in c.records))
        assert c.valid == (c.data.decode(errors="ignore") == c.text)


@pytest.mark.parametrize(
    ("data", "after"),
    [
        (b"ab", ["a", "b"]),
        ("é!".encode(), ["", "é", "!"]),
        (b"\xffa", ["�", "a"]),
        (b"\xe2\x82a", ["", "", "�a"]),
        (b"\xe2\xc3\xa9", ["", "�", "é"]),
    ],
)
def test_text_comes_as_soon_as_it_is_decided(data, after):
    """After each byte, whatever no later byte can change is there."""
    taken = 0

    def source():
        nonlocal taken
        for r in records(data):
            taken += 1
            yield r

    came = [""] * len(data)
    for character in characters(source()):
        came[taken - 1] += character.text
    assert came == after


def test_a_character_has_the_highest_weight_of_its_bytes():
    (c,) = characters([record(0xC3, 0.2, True), record(0xA9, 0.7, True)])
    assert (c.weight, c.routed, c.drafted) == (0.7, 1, True)
    (c,) = characters([record(0xC3, 0.2, False), record(0xA9, 0.1, True)])
    assert (c.weight, c.routed, c.drafted) == (0.2, 0, False)
    (c,) = characters([record(0xA9, 0.3, True)], begun=b"\xc3")
    assert (c.text, c.weight, c.drafted) == ("é", 0.3, True)
    (c,) = characters([], begun=b"\xc3")
    assert (c.text, c.weight, c.drafted) == ("�", 0.0, False)


def test_split_samples():
    """In order, also empty ones, and without reading further than needed."""
    source = iter([record(97, sample=1), record(98, sample=1), record(99, sample=3)])
    split = [bytes(r.byte for r in sample) for sample in split_samples(source, 5)]
    assert split == [b"", b"ab", b"", b"c", b""]
    source = iter([record(97), record(98)])
    assert next(next(split_samples(source, 1))).byte == 97
    assert next(source).byte == 98


def test_visible():
    assert visible("a\tb\n\x1b[31m\r\x7f\x85é\u200d") == "a\tb\n\\x1b[31m\\r\\x7f\\x85é\u200d"


def test_router_decisions_are_marked(capsys):
    """Before the character, of which the byte may be the second."""
    show_samples(records("aéb\r\n".encode(), [0.9, 0.1, 0.9, 0.1, 0.9, 0.1]), b"", marks=True)
    assert capsys.readouterr().out == "_a_éb_\r\n\n"


def test_a_prompt_may_end_within_a_character(capsys):
    show_samples(records(b"\xa9!"), b"caf\xc3")
    assert capsys.readouterr().out == "café!\n"


def test_a_terminal_does_not_obey_the_model(monkeypatch, capsys):
    """Escape sequences in the text are shown on a terminal, and unchanged in a file."""
    made = records(b"\x1b[31m")
    show_samples(made, b"\a")
    assert capsys.readouterr().out == "\a\x1b[31m\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_samples(made, b"\a")
    assert capsys.readouterr().out == "\\x07\\x1b[31m\n"


def test_a_line_break_of_windows(monkeypatch, capsys):
    """\\r\\n is one; a lone \\r is shown, and stays what it is in a file."""
    text = b"a\r\nb\rc\r\r\nd\r"
    assert [c.text for c in characters(records(text))] == re.findall(r"\r\n|(?s:.)", text.decode())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_samples(records(text), b"P\r\n")
    assert capsys.readouterr().out == "P\na\nb\\rc\\r\nd\\r\n"


SIGNALS = [getattr(signal, name) for name in StopSignals.NAMES if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_ask_first(number, monkeypatch, capfd):
    """The first one asks for a stop, a second one ends the process; handlers are restored.

    They may arrive during a print(), which a second print() must not enter.
    """

    def reentrant(text):
        raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys.stderr, "write", reentrant)
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    before = signal.getsignal(number)
    with StopSignals() as stopping:
        assert not stopping.stop()
        os.kill(os.getpid(), number)
        assert stopping.stop()
        assert left == []
        os.kill(os.getpid(), number)  # the same one, forwarded
        assert left == []
        stopping.asked_at -= 2
        os.kill(os.getpid(), number)
        assert left == [130]
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", SIGNALS)
def test_an_ignored_signal_stays_ignored(number, monkeypatch):
    """SIGHUP under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stopping:
            os.kill(os.getpid(), number)
            assert not stopping.stop()
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def step_record(step: int, steps: int = 1200, **more: object) -> dict:
    return {
        "step": step, "steps": steps, "bits_per_byte": 2.0, "router_rate": 0.24,
        "checkpoint": f"{step}",
    } | more  # fmt: skip


TIMED = {"minutes": 13 / 6, "max_minutes": 5.0, "seconds_left": 181.0}
LONG = {"minutes": 70 * 60.0, "max_minutes": 72 * 60.0, "seconds_left": 7200.0}
MEASURED = {
    "validation_bits_per_byte": 2.5, "validation_routing_gap": 0.06,
    "validation_router_rate": 0.3, "validation_seconds": 1.0,
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """The seconds of the display's clock."""
    now = [1000.0]
    fake = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("pico_tg.tools.terminal.time", fake)
    return now


def test_a_signal_before_the_first_step_ends_at_once(monkeypatch, capfd):
    """There is nothing to save; after a step, it is saved first."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    with TrainingDisplay() as display:
        with pytest.raises(SystemExit, match="130"):
            signal.raise_signal(signal.SIGINT)
        assert "stopped before the first step: nothing to save" in capfd.readouterr().err
        assert not display.stop()
        display.record = {"step": 1}
        signal.raise_signal(signal.SIGINT)
        assert display.stop()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, "training, step 260 of 1200, 2.00 bits/byte, 24% routed"),
        (
            {"seconds_left": 181.0},
            "training, step 260 of 1200, 2.00 bits/byte, 24% routed, 3:01 left",
        ),
        (TIMED, "training 2:10 of 5:00, step 260, 2.00 bits/byte, 24% routed, 3:01 left"),
        (
            LONG | {"step": 1_260_000},
            "training 70h00 of 72h00, step 1260000, 2.00 bits/byte, 24% routed, 2h00 left",
        ),
    ],
)
def test_the_line_of_training(record, expected, clock, capsys):
    """One number of bits, and the time; on 80 columns."""
    display, seen = TrainingDisplay(), []

    def made():
        display.phase("training")
        yield step_record(260) | record
        seen.append(display.text())

    display.show(made())
    assert seen == [expected]
    assert len(expected) <= 80


def test_the_line_names_what_is_done(clock, capsys):
    """The time that is left passes meanwhile; the last line is true."""
    display, seen = TrainingDisplay(lambda: seen.append(display.text()) or "The text"), []

    def lasts(seconds: float) -> None:
        clock[0] += seconds
        seen.append(display.text())

    def made():
        display.phase("compiling")
        lasts(20)
        yield step_record(1, bits_per_byte=8.0)
        lasts(4)
        display.phase("training")
        display.part(3, 40)
        lasts(1)
        display.phase("validating")
        lasts(3)
        display.part(1, 16)
        lasts(2)
        yield step_record(300, bits_per_byte=2.0, seconds_left=60.0, **MEASURED)
        display.phase("training")
        lasts(5)

    assert display.show(made()) == "300"
    first, last = "step 1 of 1200, 8.00 bits/byte", "step 300 of 1200, 4.00 bits/byte"
    assert seen == [
        "compiling 0:20",
        f"compiling 0:24, {first}, 24% routed",
        f"training 3/40, {first}, 24% routed",
        f"validating 0:03, {first}, 24% routed",
        f"validating 1/16, {first}, 24% routed",
        f"sampling 0:00, {last}, 24% routed, 1:00 left",
        f"training, {last}, 24% routed, 0:55 left",
    ]
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1] == f"trained, {last}, 24% routed"


def test_the_time_stands_still_while_something_compiles(clock, capsys):
    """The estimate of the time that is left does not contain it, so the time does not pass."""
    seen = []

    def lasts(seconds: float) -> None:
        clock[0] += seconds
        seen.append(display.text().partition("routed, ")[2])

    def sample() -> str:
        lasts(8)
        return "The text"

    def made():
        display.phase("training")
        yield step_record(1, seconds_left=60.0)
        lasts(1)
        display.phase("validating")
        lasts(10)
        display.part(1, 2)
        lasts(2)
        display.part(2, 2)
        lasts(10)  # before top-k, in the last validation
        display.part(1, 2)
        lasts(2)
        display.part(2, 2)
        yield step_record(2, seconds_left=50.0, **MEASURED)
        display.phase("training")
        lasts(3)

    display = TrainingDisplay(sample)
    display.show(made())
    assert [line.removesuffix(" left") for line in seen] == [
        "0:59", "0:59", "0:57", "0:57", "0:55", "0:50", "0:47",
    ]  # fmt: skip


def test_the_last_line_of_a_log_is_printed_once(monkeypatch, capsys):
    """Also if the next line of the log is due."""
    monkeypatch.setattr("pico_tg.progress.FIRST_SECONDS", 0.0)
    monkeypatch.setattr("pico_tg.progress.LINE_SECONDS", 0.0)
    display = TrainingDisplay()

    def made():
        display.phase("training")
        yield step_record(1, 1)

    display.show(made())
    shown = capsys.readouterr().err.splitlines()
    assert [line for line in shown if line.startswith("trained")] == shown[-1:]


def test_training_in_a_log(capsys):
    """A line for each validation, and a sample; one line at the end."""
    display = TrainingDisplay(lambda: "sample: The text")

    def made():
        for step in range(1, 9):
            display.phase("training")
            yield step_record(step, 8, **(MEASURED if step == 2 else {}))

    display.show(made())
    measured, sample, last = capsys.readouterr().err.splitlines()
    assert measured.startswith("step 2: held out 2.500 bits/byte, 30% routed; +0.060 relative")
    assert sample == "  sample: The text"
    assert last == "trained, step 8 of 8, 2.00 bits/byte, 24% routed"


def test_training_on_a_terminal(monkeypatch, capsys):
    """The line is there from the start, and below the messages."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = TrainingDisplay()

    def made():
        display.phase("compiling")
        display.say("a message")
        yield step_record(1, 1)

    display.show(made())
    shown = capsys.readouterr().err
    assert (
        shown.index("compiling 0:00") < shown.index("a message\n") < shown.index("trained, step 1")
    )
    assert shown.endswith(" routed\n")
