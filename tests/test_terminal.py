"""Samples on a terminal, as soon as they are decided; progress of training; signals."""

import os
import re
import signal
import sys

import pytest
from helpers import record, records
from hypothesis import given
from hypothesis import strategies as st

from pico_tg.progress import visible
from pico_tg.tools.terminal import (
    RESET,
    StopSignals,
    TrainingDisplay,
    characters,
    colored_text,
    decode_text,
    show_samples,
    split_prompt,
    split_samples,
)


def test_decode_text_goes_on_after_bad_bytes():
    data = "é€".encode() + b"\xff" + b"a" + "é".encode()[:1]
    assert "".join(decode_text(records(data))) == "é€�a�"


def test_decode_text_marks_characters_not_bytes():
    assert "".join(decode_text(records("aéb".encode(), [0.9, 0.1, 0.9, 0.1]), "_")) == "_a_éb"


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
    for piece in decode_text(source()):
        came[taken - 1] += piece
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


SGR = re.compile(r"\x1b\[[\d;]*m")


def test_colored_text():
    shown = list(colored_text([record(97, 0.0), record(98, 0.9), record(99, 0.1, True)]))
    assert shown[0] == "a"
    assert re.fullmatch(r"\x1b\[48;5;\d+;38;5;\d+mb\x1b\[0m", shown[1])
    assert shown[2] == f"\x1b[4mc{RESET}"
    # each step of weight looks different, 0.5 like what is below it
    steps = [next(colored_text([record(97, (i + 0.5) / 8)])) for i in range(8)]
    assert len(set(steps)) == 8
    assert next(colored_text([record(97, 0.5)])) == steps[3]
    assert next(colored_text([record(97, 1.0)])) == steps[7]


@given(st.binary(max_size=30), st.data())
def test_colors_end_with_every_piece(data, draw):
    weights = [draw.draw(st.floats(0, 1)) for _ in data]
    shown = list(colored_text(records(data, weights), "_"))
    for piece in shown:
        codes = SGR.findall(piece)
        assert not codes or (len(codes) == 2 and codes[1] == RESET)
        assert "\n" not in piece or piece.endswith("\n")  # the break itself is not colored
        assert piece.count("\x1b") == len(codes)
    plain = SGR.sub("", "".join(shown)).replace(" \n", "\n").replace("_", "")
    assert plain == visible(data.decode(errors="replace")).replace(" \n", "\n").replace("_", "")


def test_visible():
    assert visible("a\tb\n\x1b[31m\r\x7f\x85é\u200d") == "a\tb\n\\x1b[31m\\r\\x7f\\x85é\u200d"


def test_router_decisions_are_marked(capsys):
    show_samples([record(97, 0.9), record(98)], b"", marks=True)
    assert capsys.readouterr().out == "_ab\n"


def test_samples_are_separated(capsys):
    made = [*records(b"a\xc3"), record(98, sample=2)]
    show_samples(made, b"> ", 3)
    assert capsys.readouterr().out == (
        "--- sample 1 of 3 ---\n> a\ufffd\n--- sample 2 of 3 ---\n> \n--- sample 3 of 3 ---\n> b\n"
    )


def test_a_prompt_may_end_within_a_character(capsys):
    show_samples(records(b"\xa9!"), b"caf\xc3")
    assert capsys.readouterr().out == "café!\n"


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}, {"NO_COLOR": ""}, {"TERM": "dumb"}])
@pytest.mark.parametrize("color", [True, False])
def test_colors_are_for_terminals(color, variables, is_terminal, monkeypatch, capsys):
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    show_samples([record(97, 0.9, drafted=True)], b"", color=color)
    out = capsys.readouterr().out
    if color and is_terminal and not any(variables.values()):
        assert out == "\x1b[4;48;5;208;38;5;16ma\x1b[0m\x1b[0m\n"
    else:
        assert out == "a\n"


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
    assert "".join(decode_text(records(text))) == text.decode()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_samples(records(text), b"P\r\n")
    assert capsys.readouterr().out == "P\na\nb\\rc\\r\nd\\r\n"
    (piece,) = colored_text(records(b"\r\n", [0.9, 0.1]), "_")
    assert piece == f"_\x1b[48;5;208;38;5;16m {RESET}\n"
    plain = re.sub(r"\x1b\[[\d;]*m", "", "".join(colored_text(records(text))))
    assert plain == "a \nb\\rc\\r \nd\\r"


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
    assert "stopping with a checkpoint of the last complete step" in capfd.readouterr().err


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


def step_record(step: int, steps: int, **more: object) -> dict:
    return {
        "step": step, "steps": steps, "bits_per_byte": 2.0, "loss": 1.4, "lr": 1e-3,
        "router_rate": 0.5, "bytes_per_second": 1e5, "checkpoint": f"{step}",
    } | more  # fmt: skip


@pytest.mark.parametrize("first", [0, 1500])
def test_time_left(first, monkeypatch, capsys):
    """The bar's rate is that of the steps after compilation, also where a run is resumed."""
    now = 1000.0
    monkeypatch.setattr("tqdm.std.time", lambda: now)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display, last, seen = TrainingDisplay(), first + 100, []

    def made():
        nonlocal now
        for step in range(first + 1, first + 51):
            now += 30 if step <= first + 2 else 0.125
            yield step_record(step, last)
            seen.append((step, display.bar.format_dict, str(display.bar)))

    assert display.show(made()) == f"{first + 50}"
    assert [state["n"] for _, state, _ in seen] == [step for step, _, _ in seen]
    assert [text.split(":")[0] for _, _, text in seen[:3]] == ["compiling", "training", "training"]
    for _, state, text in seen[:2]:
        assert state["elapsed"] == 0
        assert "[00:00<?" in text  # nothing is known yet
    for step, state, _ in seen[2:]:
        assert state["elapsed"] == pytest.approx((step - first - 2) / 8)
        rate = state["rate"] or (state["n"] - state["initial"]) / state["elapsed"]
        assert rate == pytest.approx(8)
    assert f"{first + 50}/{last} [00:06<00:06,  8.00" in seen[-1][2]
    assert f"{first + 50}/{last} [00:06<00:06,  8.00" in capsys.readouterr().err


MEASURED = {
    "validation_bits_per_byte": 2.5, "validation_bits_per_byte_top_k": 2.4,
    "validation_routing_gap": 0.06,
    "validation_router_rate": 0.3, "validation_seconds": 1.0,
}  # fmt: skip


def test_training_in_a_log(capsys):
    """A line for each validation, the sample after it, one line at the end, and no bar."""
    made = [step_record(1, 3), step_record(2, 3, **MEASURED), step_record(3, 3)]
    TrainingDisplay(lambda: "The text").show(made)
    validation, sample, last = capsys.readouterr().err.splitlines()
    expected = "step 2: validation 2.500 bits/byte with causal routing, +0.060 relative to top-k"
    assert validation.startswith(expected)
    assert sample == "  sample: The text"
    assert last.startswith("training: 3/3 step [")
    assert "loss 1.400" in last


def test_micro_batches_move_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    display = TrainingDisplay()
    display.micro_batch(1, 2)  # before the bar: nothing
    assert capsys.readouterr().err == ""

    def made():
        for step in range(1, 4):
            for done in range(1, 41):
                display.micro_batch(done, 40)
            yield step_record(step, 3)

    display.show(made())
    err = capsys.readouterr().err
    for shown in ("compiling, micro-batch 1/40", "training, micro-batch 40/40"):
        assert shown in err
