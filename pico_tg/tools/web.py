"""A page on localhost that shows a continuation as it is generated, shaded by router weight.

The server listens on 127.0.0.1 only and answers only its own page: it refuses requests with another
Host (DNS rebinding) or another Origin (a page of another site), and bodies that are too large or
malformed. It generates one continuation at a time; closing the page or pressing Stop ends it.
"""

import contextlib
import dataclasses
import json
import secrets
import threading
from collections.abc import Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from string import Template

from ..decoder import Decoder
from ..files import PicoError
from ..generation import GeneratedByte, SampleSettings, Stats, generate, to_sentence
from ..model import Pico
from .html import STYLE, choices, mark_up
from .report import describe_routing
from .terminal import characters

MAX_BODY = 1 << 16  # bytes of a request
WAIT = 10  # seconds that a request waits for the end of the one before it
SENTENCE = 200  # bytes after which a text ends, though its sentence does not
MAX_PROMPT, MAX_BYTES = 8192, 4096  # bytes of a prompt, and of a continuation without SENTENCE
PAGE = Template((Path(__file__).parent / "web.html").read_text("utf-8"))


class Refused(Exception):
    """A request that is refused: the HTTP status, and why."""


class Server(ThreadingHTTPServer):
    """Serves the page of one model on 127.0.0.1; port 0 takes a free one.

    Raises PicoError if it cannot listen on the port.
    """

    daemon_threads = True

    def __init__(self, model: Pico, title: str, port: int) -> None:
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            why = str(error).rstrip(".")
            raise PicoError(
                f"cannot listen on port {port}: {why}; choose another --port"
            ) from error
        self.title = title
        self.decoder = Decoder(model)
        self.one_at_a_time = threading.Lock()
        self.hosts = host_names(self.server_port)
        self.url = f"http://{self.hosts[0]}/"


class Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 30  # seconds without a byte, after which the connection is closed

    def do_GET(self) -> None:
        try:
            self.check_host()
            if self.path != "/":
                raise Refused(404, "there is only one page: /")
        except Refused as refused:
            return self.refuse(refused)
        nonce = secrets.token_urlsafe()
        page = PAGE.substitute(
            title=escape(self.server.title),
            style=STYLE,
            nonce=nonce,
            choices=choices(drafts=self.server.decoder.model.config.next_tokens > 1),
        )
        # style-src-attr: the shade of a character is an attribute; older browsers show none
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "style-src-attr 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        self.start(200, "text/html; charset=utf-8", {"Content-Security-Policy": policy})
        self.wfile.write(page.encode())

    def do_POST(self) -> None:
        try:
            body = self.body()  # first: closing with unread bytes may reset the connection
            self.check_host()
            if self.headers["Origin"] not in [f"http://{host}" for host in self.server.hosts]:
                raise Refused(403, "this request is not from the server's own page")
            if self.path != "/generate":
                raise Refused(404, "the only address to post to is /generate")
            prompt, settings = read_options(body)
            if not self.server.one_at_a_time.acquire(timeout=WAIT):
                raise Refused(503, "another continuation is being written")
        except Refused as refused:
            return self.refuse(refused)
        try:
            self.start(200, "application/x-ndjson")
            for part in continuation(self.server.decoder, prompt, settings):
                self.wfile.write(part)
        finally:
            self.server.one_at_a_time.release()

    def check_host(self) -> None:
        """Refuse other host names: by DNS rebinding, another site's page could read this one."""
        if self.headers["Host"] not in self.server.hosts:
            port = self.server.server_port
            raise Refused(
                403,
                f"the address of this page is {self.server.url}; a port that is forwarded to it "
                f"must have the same number, {port}",
            )

    def body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "the body must be application/json")
        length = self.headers["Content-Length"] or ""
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "Content-Length is missing or not a number")
        if len(length) > 9 or int(length) > MAX_BODY:
            raise Refused(413, f"the body is longer than {MAX_BODY:,} bytes")
        return self.rfile.read(int(length))

    def start(self, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        safe = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        same = {"Cross-Origin-Resource-Policy": "same-origin", "Referrer-Policy": "no-referrer"}
        for name, value in ({"Content-Type": kind} | safe | same | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, refused: Refused) -> None:
        status, why = refused.args
        self.start(status, "text/plain; charset=utf-8")
        self.wfile.write(f"{why}\n".encode())

    def handle(self) -> None:
        # the page was closed, or its stop button pressed
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def host_names(port: int) -> list[str]:
    """What browsers send as Host for this page: they leave out port 80."""
    names = ["127.0.0.1", "localhost"]
    return [f"{name}:{port}" for name in names] + names * (port == 80)


def read_options(body: bytes) -> tuple[bytes, SampleSettings]:
    """The prompt and the settings of a request. Raises Refused, naming what is wrong."""
    try:
        given = json.loads(body)
        prompt = given.pop("prompt").encode()
        settings = SampleSettings(**given)
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError):
        # UnicodeEncodeError is a ValueError: JSON may hold half of a surrogate pair
        raise Refused(400, "the body must be a JSON object of a prompt and settings") from None
    except PicoError as error:
        raise Refused(400, str(error)) from None
    if len(prompt) > MAX_PROMPT:
        raise Refused(400, f"prompt must be at most {MAX_PROMPT} bytes long")
    if not 0 < (settings.max_bytes or 0) <= MAX_BYTES:
        raise Refused(400, f"max_bytes must be from 1 to {MAX_BYTES}")
    if settings.num_samples > 1:  # each of up to max_bytes
        raise Refused(400, "the page shows one sample; leave num_samples out")
    return prompt, settings


def continuation(decoder: Decoder, prompt: bytes, settings: SampleSettings) -> Iterator[bytes]:
    """Lines of JSON: one for each character as soon as it is complete, then one of statistics.

    In place of the statistics, an error is the last line.
    """
    stats, shown = Stats(), []
    given = dataclasses.asdict(settings) | {"max_bytes": settings.max_bytes + SENTENCE}
    try:
        records = generate(decoder.model, prompt, decoder=decoder, stats=stats, **given)
        for character in characters(to_sentence(records, settings.max_bytes)):
            shown += character.records
            yield line(html=mark_up(character))
    except PicoError as error:
        yield line(error=str(error))
    except Exception as error:  # whatever breaks it off, the page says so
        yield line(error=f"the continuation broke off: {type(error).__name__}: {error}")
        raise
    else:
        yield line(stats=describe_continuation(shown, stats))


def describe_continuation(shown: list[GeneratedByte], stats: Stats) -> str:
    """What the router selected, and how fast the bytes came."""
    passes = f", {stats.bytes / max(1, stats.passes):.2f} bytes per pass" if stats.drafts else ""
    speed = stats.bytes / max(1e-9, stats.seconds)
    return f"{describe_routing(shown)} {len(shown)} bytes, {speed:.0f} bytes/s{passes}."


def line(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"
