"""Messages and progress on stderr: a bar on a terminal, plain lines in a pipe or a log.

Output errors never interrupt the work: if stderr cannot be written (a closed terminal, a full
disk), messages are dropped.
"""

import os
import sys
import time
import unicodedata
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0  # least time between two plain lines, except for the last line
LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


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
    """A tqdm bar; if stderr is not a terminal, a line every LINE_SECONDS and one at the end."""

    def __init__(self, desc: str = "", **options: Any) -> None:
        self.has_bar = sys.stderr is not None and sys.stderr.isatty()
        self.last_line = time.monotonic()
        plain = {} if self.has_bar else {"bar_format": LINE}
        options |= {"desc": visible(desc), "file": sys.stderr, "dynamic_ncols": True}
        super().__init__(**plain, **options)

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
        if not self.disable and not self.has_bar:
            say(str(self))
            self.disable = True  # keeps tqdm from printing a last bar
        super().close()
