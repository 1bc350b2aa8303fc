"""Messages and progress on stderr: a bar on a terminal, plain lines in a pipe or a log.

Output errors never interrupt the work: if stderr cannot be written (a closed terminal, a full
disk), messages are dropped.
"""

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0  # least time between two plain lines, except for the last line
FIRST_SECONDS = 3.0  # time to the first plain line
LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Events:
    """What a long computation tells its user interface, and asks of it. This one is silent.

    bars: whether bars are shown while data are read and the machine is measured
    """

    bars = False

    def say(self, text: str) -> None:
        """Receive a message for the user, a line."""

    def phase(self, name: str) -> None:
        """Called with what is done from now on: compiling, training, validating."""

    def part(self, done: int, total: int) -> None:
        """Called after each of several micro-batches of a step, or batches of a validation."""

    def stop(self) -> bool:
        """Asked between these parts, and after every step.

        True saves the last complete step and ends training; a step in progress is discarded, and a
        validation is made up for by the resumed run.
        """
        return False


def duration(seconds: float) -> str:
    """2:05 for 125 seconds, 1h02 for 3,725."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}"


def visible(text: str) -> str:
    """The text with \\n for \\r\\n, and escapes (\\x1b) for control characters but \\n and \\t.

    A terminal would execute the characters that are escaped.
    """
    return "".join(
        escape_code(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c
        for c in text.replace("\r\n", "\n")
    )


def escape_code(character: str) -> str:
    """Python's escape of a character that is not ASCII or not printable: \\x1b, \\u200e."""
    return character.encode("unicode_escape").decode()


def say(text: str) -> None:
    """Print a line on stderr, if there is one: it is None where no console exists.

    Control characters, as in the name of a file, become escapes.
    """
    if sys.stderr is None:  # print() would write to stdout
        return
    try:
        print(visible(text), file=sys.stderr, flush=True)
    except OSError:
        drop_output()


def drop_output(*others: TextIO) -> None:
    """Redirect standard streams, and others, that cannot be written to the null device.

    Otherwise Python's flush at exit would fail again.
    """
    for stream in filter(None, (sys.stdout, sys.stderr, *others)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Bar(tqdm):
    """A tqdm bar, drawn again every second by a thread until `close`.

    If stderr is not a terminal, it is a line: after FIRST_SECONDS, then every LINE_SECONDS, and at
    the end.
    """

    def __init__(self, desc: str = "", **options: Any) -> None:
        self.has_bar = sys.stderr is not None and sys.stderr.isatty()
        self.last_line = time.monotonic() - LINE_SECONDS + FIRST_SECONDS
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        plain = {} if self.has_bar else {"bar_format": LINE}
        options |= {"desc": visible(desc), "file": sys.stderr, "dynamic_ncols": True}
        super().__init__(**plain, **options)
        if not self.disable:
            self.thread.start()

    def _tick(self) -> None:
        while not self.closed.wait(1):
            with self.get_lock():  # tqdm's refresh would keep its lock after an error
                self.refresh(nolock=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with self.external_write_mode(file=sys.stderr):
            say(text)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.has_bar:
            return super().display(msg, pos)
        now = time.monotonic()
        if now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            say(str(self))
        return True

    def clear(self, nolock: bool = False) -> None:
        if self.has_bar:
            super().clear(nolock)

    def close(self) -> None:
        self.closed.set()
        if self.thread.is_alive():
            self.thread.join()
        if not self.disable and not self.has_bar:
            if self.leave:
                say(str(self))
            self.disable = True  # keeps tqdm from printing a last bar
        super().close()


class Status(Bar):
    """A line that shows what `text` returns, in place of a bar."""

    def __init__(self, text: Callable[[], str], **options: Any) -> None:
        self.text = text
        super().__init__(**options)

    def __str__(self) -> str:
        return visible(self.text())[: self.format_dict["ncols"] or None]  # 0: a width unknown
