"""How a sample looks as text: bytes to characters, plain or colored for a terminal."""

import codecs
import math
import os
import signal
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..files import PicoError

if TYPE_CHECKING:
    from ..generation import GeneratedByte


BAD = "\ufffd"  # stands for bytes that are not UTF-8


RESET = "\x1b[0m"


# 256-color codes of (background, text) by eighths of the router weight: greys up to 0.5, oranges
# above it, where bytes are routed; each pair is legible by itself, on dark and on light terminals
SHADES = (
    None,
    (238, 231),
    (240, 231),
    (242, 231),
    (94, 231),
    (130, 231),
    (166, 16),
    (208, 16),
)


@dataclass(frozen=True)
class Character:
    """One character of a sample, or a few bytes that are none.

    text: the character, or U+FFFD; data: its bytes; records: those of the bytes that were
    generated, which are all but those that the prompt ended in.
    """

    text: str
    data: bytes
    records: tuple["GeneratedByte", ...]

    @property
    def valid(self) -> bool:
        """Whether the bytes are UTF-8."""
        return self.text.encode() == self.data

    @property
    def weight(self) -> float:
        """The highest router weight of its bytes."""
        return max((record.router_weight for record in self.records), default=0.0)

    @property
    def routed(self) -> int:
        """How many of its bytes went through the latent blocks."""
        return sum(record.router_decision for record in self.records)

    @property
    def drafted(self) -> bool:
        """Whether all of its bytes were accepted drafts."""
        return bool(self.records) and all(record.drafted for record in self.records)


def characters(records: Iterable["GeneratedByte"], begun: bytes = b"") -> Iterator[Character]:
    """The characters of one sample, each as soon as its last byte is there.

    Bytes that cannot become a character are given out as U+FFFD as soon as that is certain, and the
    stream goes on behind them. `begun`: bytes that come before the first record, see
    `split_prompt`.
    """
    data, kept = begun, []

    def decided() -> Iterator[Character]:
        nonlocal data, kept
        while data:
            try:
                text, size = data.decode(), len(data)
            except UnicodeDecodeError as error:
                if error.end == len(data) and error.reason == "unexpected end of data":
                    return
                text, size = BAD, error.end
            generated = len(kept) - (len(data) - size)
            yield Character(text, data[:size], tuple(kept[: max(generated, 0)]))
            data, kept = data[size:], kept[max(generated, 0) :]

    for record in records:
        data += bytes([record.byte])
        kept.append(record)
        yield from decided()
    if data:
        yield Character(BAD, data, tuple(kept))


def split_prompt(prompt: bytes) -> tuple[str, bytes]:
    """The text of a prompt, and the bytes of a character that it ends in the middle of.

    A sample may complete that character. Bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return decoder.decode(prompt), decoder.getstate()[0]


def split_samples(
    records: Iterable["GeneratedByte"], count: int
) -> Iterator[Iterator["GeneratedByte"]]:
    """The records of each of `count` samples, which may be empty; to be read in that order."""
    source = iter(records)
    ahead: list[GeneratedByte] = []  # the first record of a later sample

    def sample(number: int) -> Iterator["GeneratedByte"]:
        while record := ahead.pop() if ahead else next(source, None):
            if record.sample != number:
                ahead.append(record)
                return
            yield record

    return map(sample, range(count))


def decode_text(
    records: Iterable["GeneratedByte"], mark: str = "", begun: bytes = b""
) -> Iterator[str]:
    """The text of one sample as far as it is decided after each byte; `mark` before routed bytes.

    A byte that is not valid UTF-8 becomes U+FFFD. The mark of a byte inside a character stands
    before that character. `begun`: see `characters`.
    """
    for character in characters(records, begun):
        yield mark * character.routed + character.text


def colored_text(
    records: Iterable["GeneratedByte"], mark: str = "", begun: bytes = b""
) -> Iterator[str]:
    """`decode_text` with ANSI colors: background by router weight, accepted drafts underlined.

    Each piece ends with a reset, so that the terminal is never left colored. A line break is shown
    as a shaded space before it. Control characters are made visible.
    """
    for character in characters(records, begun):
        shade = SHADES[max(0, math.ceil(character.weight * len(SHADES)) - 1)]
        codes = ["4"] if character.drafted else []
        if shade:
            codes += [f"48;5;{shade[0]}", f"38;5;{shade[1]}"]
        # a colored line break would color the rest of the line in many terminals
        text, after = (" ", "\n") if character.text == "\n" else (visible(character.text), "")
        shown = f"\x1b[{';'.join(codes)}m{text}{RESET}" if codes else text
        yield mark * character.routed + shown + after


def visible(text: str) -> str:
    """The text with escapes such as \\x1b for control characters, but for line breaks and tabs.

    A terminal would obey them.
    """
    return "".join(
        escape_code(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def escape_code(character: str) -> str:
    """How Python would write a character that is not ASCII or shows nothing: \\x1b, \\u200e."""
    return character.encode("unicode_escape").decode()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class StopSignals:
    """While it lasts, Ctrl-C and SIGTERM ask for a stop after the step; a second one is final.

    Signals within a second are one: whoever forwards a signal often sends it twice.
    """

    asked_at: float | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            say("\nstopping after this step (again: at once, without saving)")
        elif now - self.asked_at > 1:
            os._exit(130)

    def __call__(self) -> bool:
        return self.asked_at is not None

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def show_training(records: Iterator[dict]) -> str:
    """A progress bar, and a line a validation; returns the last checkpoint's path."""
    checkpoint, smoothed = "", None
    with tqdm(unit="step", desc="compiling", dynamic_ncols=True) as bar:
        for shown, record in enumerate(records, 1):
            bits = record["bits_per_byte"]
            smoothed = bits if smoothed is None else 0.9 * smoothed + 0.1 * bits
            if shown <= 2:
                # The first two steps compile, and the steps of a run that is resumed took no time
                # here: the clock starts after them, or the time left would be theirs to say.
                bar.reset(record["steps"])
                bar.n = bar.last_print_n = bar.initial = record["step"]
            else:
                bar.update(1)
            if shown == 2:
                bar.set_description("training", refresh=False)
            bar.set_postfix_str(
                f"loss {record['loss']:.3f}, {smoothed:.3f} bits/byte, "
                f"{record['router_rate']:.0%} routed, lr {record['lr']:.1e}, "
                f"{record['bytes_per_second']:,.0f} bytes/s"
            )
            checkpoint = record.get("checkpoint", checkpoint)
            if "validation_bits_per_byte" in record:
                tqdm.write(
                    f"step {record['step']}: validation "
                    f"{record['validation_bits_per_byte']:.3f} bits/byte as used, "
                    f"{record['validation_bits_per_byte_top_k']:.3f} with training's routing, "
                    f"{record['validation_router_rate']:.0%} of the bytes routed "
                    f"({record['validation_seconds']:.1f} s)",
                    file=sys.stderr,
                )
    return checkpoint


def put(piece: str | bytes) -> None:
    """Write to standard output, where it arrives at once."""
    try:
        if isinstance(piece, bytes):
            sys.stdout.buffer.write(piece)
        else:
            sys.stdout.write(piece)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise PicoError(f"cannot write to standard output: {error.strerror}") from error


def drop_output() -> None:
    """Keep Python's own flush at exit from complaining about output that nobody takes."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
