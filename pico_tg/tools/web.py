"""Serve a page on localhost that shows a continuation as it is generated, shaded by router weight.

python examples/web.py [PATH RUN] [--port 8000]     (default: the model that comes with pico_tg)

The server listens on 127.0.0.1 only and answers only its own page: it refuses requests with another
Host (DNS rebinding) or another Origin (a page of another site), and bodies that are too large or
malformed. It generates one continuation at a time; closing the page or pressing Stop ends it.
"""

import argparse
import contextlib
import json
import math
import secrets
import sys
import threading
from collections.abc import Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pico_tg
from pico_tg.progress import escape_code, visible
from pico_tg.tools.html import STYLE
from pico_tg.tools.terminal import Character, characters

SHIPPED = (Path(__file__).parent / "stories", "first")
MAX_BODY = 1 << 16  # bytes of a request
WAIT = 10  # seconds that a request waits for the end of the one before it
# name of a field, its type, least and greatest value (of text: of its length in UTF-8)
FIELDS = {
    "prompt": (str, 0, 8192),
    "temperature": (float, 0, 5),
    "seed": (int, 0, 2**32 - 1),
    "max_bytes": (int, 1, 4096),
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style nonce="{nonce}">{style}
form {{ display: grid; gap: .8rem }}
textarea {{ height: 5rem; resize: vertical }}
input {{ width: 7rem }}
label {{ color: var(--muted); font-size: .875rem }}
input, textarea, button {{
  font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .4rem .6rem;
}}
textarea {{ width: 100%; display: block }}
.row {{ display: flex; flex-wrap: wrap; gap: .8rem; align-items: end }}
.row label {{ display: grid }}
button {{ cursor: pointer; padding: .4rem 1.2rem }}
button:disabled {{ opacity: .5; cursor: default }}
#text {{ min-height: 9rem; margin-top: 1rem }}
#status {{ color: var(--muted); font-size: .875rem; min-height: 1.5em }}
</style>
<h1>{title}</h1>
<form>
<label>prompt <textarea name="prompt" maxlength="8192">Once upon a time</textarea></label>
<div class="row">
<label>temperature <input name="temperature" type="number" min="0" max="5" step="0.05" value="0.7">
</label>
<label>seed <input name="seed" type="number" min="0" max="4294967295" value="1"></label>
<label>bytes <input name="max_bytes" type="number" min="1" max="4096" value="600"></label>
<button id="write">Write</button>
<button id="stop" type="button" disabled>Stop</button>
</div>
</form>
<ul class="legend">
<li>router weight 0<span class="scale"></span>1
<li>a dot: through the latent blocks
<li><span class="text"><b class="d">underlined</b></span>: an accepted draft
<li>point at a character for more
</ul>
<div id="text" class="text"></div>
<p id="status" role="status"></p>
<script nonce="{nonce}">
const [form, text, state, write, stop] =
  ["form", "#text", "#status", "#write", "#stop"].map(name => document.querySelector(name));
let controller = null;

function show(part) {{
  if (part.error) state.textContent = part.error;
  if (part.stats) state.textContent = part.stats;
  if (!part.text) return;
  const b = document.createElement("b");
  b.textContent = part.text;
  b.className = (part.routed ? "r " : "") + (part.drafted ? "d " : "")
    + (part.text === "\\n" ? "n" : "");
  b.style.setProperty("--w", part.weight);
  b.dataset.tip = part.tip;
  text.append(b);
}}

async function read(response) {{
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {{
    const {{ done, value }} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\\n");
    rest = lines.pop();
    for (const line of lines) show(JSON.parse(line));
  }}
}}

form.onsubmit = async event => {{
  event.preventDefault();
  const values = Object.fromEntries(new FormData(form));
  for (const name of ["temperature", "seed", "max_bytes"]) values[name] = Number(values[name]);
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = values.prompt;
  text.replaceChildren(prompt);
  state.textContent = "writing";
  write.disabled = !(stop.disabled = false);
  controller = new AbortController();
  try {{
    await read(await fetch("/generate", {{
      method: "POST", headers: {{ "Content-Type": "application/json" }},
      body: JSON.stringify(values), signal: controller.signal,
    }}));
  }} catch (error) {{
    state.textContent = controller.signal.aborted ? "stopped" : "the server does not answer";
  }}
  if (state.textContent === "writing") state.textContent = "the continuation broke off";
  write.disabled = !(stop.disabled = true);
}};
stop.onclick = () => controller.abort();
</script>
"""


class Refused(Exception):
    """A request that is refused: the HTTP status, and why."""


class Server(ThreadingHTTPServer):
    """Serves the page of one model on 127.0.0.1; port 0 takes a free one."""

    daemon_threads = True

    def __init__(self, model: pico_tg.Pico, title: str, port: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.title = title
        self.decoder = pico_tg.Decoder(model)
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
        page = PAGE.format(title=escape(self.server.title), style=STYLE, nonce=nonce)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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
            options = read_options(body)
            if not self.server.one_at_a_time.acquire(timeout=WAIT):
                raise Refused(503, "another continuation is being written")
        except Refused as refused:
            return self.refuse(refused)
        try:
            self.start(200, "application/x-ndjson")
            for part in continuation(self.server.decoder, options):
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
        if self.command == "GET":  # a browser shows plain text, and would download JSON lines
            self.start(status, "text/plain; charset=utf-8")
            self.wfile.write(f"{why}\n".encode())
        else:
            self.start(status, "application/x-ndjson")
            self.wfile.write(line(error=why))

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


def read_options(body: bytes) -> dict[str, str | float | int]:
    """The checked fields of a request. Raises Refused, naming the field."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(given, dict) or given.keys() != FIELDS.keys():
        raise Refused(400, f"the body must be an object of {', '.join(FIELDS)}")
    for name, (kind, least, most) in FIELDS.items():
        value = given[name]
        if kind is str:
            if not isinstance(value, str) or not is_unicode(value):
                raise Refused(400, f"{name} must be text")
            size = len(value.encode())
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole and (kind is int or not isinstance(value, float)):
                raise Refused(400, f"{name} must be a {'whole ' * (kind is int)}number")
            size = value
        if not least <= size <= most:  # also NaN
            unit = " bytes long" if kind is str else ""
            raise Refused(400, f"{name} must be from {least} to {most}{unit}")
    return given


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def continuation(decoder: pico_tg.Decoder, options: dict) -> Iterator[bytes]:
    """Lines of JSON: one for each character as soon as it is complete, then one of statistics.

    In place of the statistics, an error is the last line.
    """
    stats = pico_tg.Stats()
    prompt = options["prompt"].encode()
    given = {name: options[name] for name in ("temperature", "seed", "max_bytes")}
    try:
        records = pico_tg.generate(decoder.model, prompt, decoder=decoder, stats=stats, **given)
        for character in characters(records):
            yield describe_character(character)
    except pico_tg.PicoError as error:
        yield line(error=str(error))
    except Exception as error:  # whatever breaks it off, the page says so
        yield line(error=f"the continuation broke off: {type(error).__name__}: {error}")
        raise
    else:
        seconds = max(1e-9, stats.seconds)
        yield line(
            stats=f"{stats.bytes} bytes, {stats.bytes / seconds:.0f} bytes/s, "
            f"{stats.bytes / max(1, stats.passes):.2f} bytes per pass, "
            f"{100 * stats.routed / max(1, stats.bytes):.0f} % through the latent blocks"
        )


def describe_character(character: Character) -> bytes:
    if not character.valid:
        shown = "".join(f"\\x{byte:02x}" for byte in character.data)
    elif character.text.isprintable() or character.text in "\n\t":
        shown = character.text
    else:
        shown = escape_code(character.text)
    probability = math.exp(sum(record.logprob for record in character.records))
    return line(
        text=shown,
        weight=round(character.weight, 3),
        routed=bool(character.routed),
        drafted=character.drafted,
        tip=f"router weight {character.weight:.2f}, "
        f"{'routed' if character.routed else 'not routed'}\n"
        f"probability {100 * probability:.3g} %\n"
        f"{'accepted draft' if character.drafted else 'not drafted'}",
    )


def line(**values: object) -> bytes:
    return json.dumps(values).encode() + b"\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", nargs="?", default=SHIPPED[0], metavar="PATH")
    parser.add_argument("run", nargs="?", default=SHIPPED[1], metavar="RUN")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one")
    args = parser.parse_args()
    pico_tg.enable_compile_cache()
    try:
        model = pico_tg.load(args.path, args.run)
        server = Server(model, f"{Path(args.path).resolve().name}, {args.run}", args.port)
    except pico_tg.PicoError as error:
        sys.exit(visible(f"web.py: {error}"))
    except (OSError, OverflowError) as error:
        sys.exit(f"web.py: cannot listen on port {args.port}: {error}; choose another --port")
    print(f"{server.url}  (Ctrl-C ends)", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
