"""Progress: a bar on a terminal, plain lines elsewhere, and never the end of the work."""

import io
import os
import sys
import threading
import time

import pytest

from pico_tg import progress
from pico_tg.progress import Bar, Status, duration, say


class Stream(io.StringIO):
    """Standard error; a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """The seconds of both clocks that a bar reads."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def work(clock, monkeypatch, terminal: bool) -> str:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with Bar(total=60, desc="evaluating", unit="step") as bar:
        for second in range(60):
            clock[0] += 1
            bar.update()
            if second == 30:
                bar.say("half")
    return stream.getvalue()


def test_plain_lines(clock, monkeypatch):
    """One after three seconds, then every ten and at the end, without control characters."""
    lines = work(clock, monkeypatch, False).split("\n")
    assert lines.pop() == ""
    assert lines.pop(3) == "half"
    assert [line.split()[1] for line in lines] == [f"{n}/60" for n in (3, 13, 23, 33, 43, 53, 60)]
    assert lines[2] == "evaluating: 23/60 step [00:23<00:37,  1.00step/s]"
    assert all(line.isprintable() for line in lines)


def test_bar(clock, monkeypatch):
    text = work(clock, monkeypatch, True)
    assert "\revaluating: 100%|" in text
    assert "half\n" in text
    assert text.count("\n") == 2  # after the message and after the bar


def test_nothing_where_it_is_disabled(monkeypatch):
    for terminal in (True, False):
        stream = Stream(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with Bar(total=2, desc="evaluating", disable=True) as bar:
            bar.update()
        assert stream.getvalue() == ""


def test_a_status_without_a_terminal(clock, monkeypatch):
    """A line after three seconds, and then every ten."""
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    start = clock[0]
    with Status(lambda: f"compiling {duration(clock[0] - start)}") as status:
        for _ in range(25):
            clock[0] += 1
            status.refresh()
    assert stream.getvalue().split("\n")[:-1] == [
        f"compiling 0:{second:02}" for second in (3, 13, 23, 25)
    ]


@pytest.mark.parametrize("options", [{"disable": True}, {"leave": False}])
def test_a_status_that_leaves_nothing(options, monkeypatch):
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    with Status(lambda: "measuring", **options):
        pass
    assert stream.getvalue() == ""


def test_a_bar_moves_by_itself(monkeypatch):
    """While the main thread compiles, before the first update."""
    stream = Stream(False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    with Bar(total=2, desc="compiling"):
        deadline = time.monotonic() + 60
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert stream.getvalue().startswith("compiling: 0/2")


def test_a_status_moves_by_itself(monkeypatch):
    """While the main thread works; on a terminal, and no wider than that."""
    stream = Stream(True)
    monkeypatch.setattr(sys, "stderr", stream)
    asked, moved = [], threading.Event()

    def text() -> str:
        asked.append(threading.current_thread())
        if asked[-1] is not threading.main_thread():
            moved.set()
        return "compiling"

    with Status(text):
        assert moved.wait(60)
    shown = stream.getvalue()
    assert shown.count("\rcompiling") >= 2
    assert shown.endswith("\n")


def test_durations():
    found = [duration(seconds) for seconds in (0, 5.4, 59.6, 125, 3599, 3600, 3725, 36 * 3600)]
    assert found == ["0:00", "0:05", "1:00", "2:05", "59:59", "1h00", "1h02", "36h00"]


@pytest.mark.parametrize("disable", [True, False])
def test_without_an_error_stream(disable, monkeypatch, capsys):
    """As under pythonw; standard output stays empty."""
    monkeypatch.setattr(sys, "stderr", None)
    with Bar(total=1, desc="training", disable=disable) as bar:
        bar.update()
        bar.say("a message")
    say("a message")
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_terminal_does_not_obey_names(monkeypatch):
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    say("from a\x1b[31m.txt\nand\tb\x9b.txt")
    with Bar(total=1, desc="caching a\x1b[31m.txt"):
        pass
    shown = stream.getvalue()
    assert "from a\\x1b[31m.txt\nand\tb\\x9b.txt\n" in shown
    assert "\x1b[31m" not in shown


def test_an_error_stream_that_fails_ends_nothing(monkeypatch):
    """As a closed terminal or a full disk does; later messages are dropped."""
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        say("a message")
        with Bar(total=1, desc="training") as bar:
            bar.update()
            bar.say("a message")
