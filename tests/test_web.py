"""The page of `web`: what it writes, what it refuses, and the page in a headless Chromium."""

import contextlib
import dataclasses
import http.client
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time

import pytest
from helpers import TINY, AllDrafts, error_line, status

from pico_tg import Decoder, Pico, PicoError, generate, generation, save_weights
from pico_tg.generation import to_sentence
from pico_tg.tools import web
from pico_tg.tools.html import mark_up
from pico_tg.tools.terminal import characters

ASKED = {"prompt": "A", "temperature": 0.7, "top_p": 0.9, "seed": 3, "max_bytes": 20}


@pytest.fixture(scope="module")
def server():
    server = web.Server(Pico(TINY), "<tiny>, run a", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(server, body: object = ASKED, method: str = "POST", path: str = "/generate", **changes):
    """(status, headers, body) of a request as the page makes it, but for changed headers."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {
        "Host": server.hosts[0],
        "Origin": f"http://{server.hosts[0]}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(None if changes.get("Content_Length") else body)
        response = connection.getresponse()
        return response.status, response.headers, response.read()


def lines(body: bytes) -> list[dict]:
    return [json.loads(line) for line in body.splitlines()]


def test_continuation(server, monkeypatch):
    """It is the text of `generate`; the same request gives the same text, another seed another."""
    monkeypatch.setattr(generation, "DraftPolicy", AllDrafts)
    status, headers, body = ask(server)
    assert status == 200
    assert headers["Content-Type"] == "application/x-ndjson"
    *parts, last = lines(body)
    given = {"temperature": 0.7, "top_p": 0.9, "seed": 3}
    expected = generate(server.decoder.model, b"A", max_bytes=20 + web.SENTENCE, **given)
    expected = list(characters(to_sentence(expected, 20)))
    assert [part["html"] for part in parts] == [mark_up(c) for c in expected]
    assert len(parts) > 5
    assert last["stats"].startswith("The router sends")
    count = sum(len(character.records) for character in expected)
    assert count >= 20
    assert f" {count} bytes," in last["stats"]
    assert lines(ask(server)[2])[:-1] == parts
    assert lines(ask(server, ASKED | {"seed": 4})[2])[:-1] != parts


def test_page(server):
    for host in server.hosts:
        status, headers, body = ask(server, b"", "GET", "/", Host=host, Origin=None)
        assert status == 200
        assert b"<title>&lt;tiny&gt;, run a</title>" in body
        assert "style-src-attr 'unsafe-inline'" in headers["Content-Security-Policy"]
        nonce = headers["Content-Security-Policy"].split("'nonce-")[1].split("'")[0]
        assert body.count(f'nonce="{nonce}"'.encode()) == 2
        assert b"$" not in body  # every field of web.html is filled
        assert b"underline accepted drafts" in body
    assert nonce not in ask(server, b"", "GET", "/", Origin=None)[1]["Content-Security-Policy"]


def test_browsers_leave_out_port_80(server, monkeypatch):
    monkeypatch.setattr(server, "hosts", web.host_names(80))
    for host in ("127.0.0.1", "localhost", "localhost:80"):
        assert ask(server, Host=host, Origin=f"http://{host}")[0] == 200
    for host in ("localhost:8000", "pico.example"):
        assert ask(server, Host=host)[0] == 403
        assert ask(server, Origin=f"http://{host}")[0] == 403


def test_only_on_loopback(server):
    assert server.server_address[0] == "127.0.0.1"


REASONS = {
    403: b"page",
    404: b"only",
    411: b"Content-Length",
    413: b"longer than 65,536",
    415: b"application/json",
}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"Host": "pico.example:8000"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": None}, 403),
        ({"Origin": "http://pico.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": None}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": None}, 415),
        ({"Content_Length": "65537"}, 413),
        ({"Content_Length": "9" * 5000}, 413),
        ({"Content_Length": "-1"}, 411),
        ({"Content_Length": "1_0"}, 411),
        ({"Transfer_Encoding": "chunked", "Content_Length": None}, 411),
        ({"path": "/other"}, 404),
        ({"method": "GET", "path": "/", "Host": "localhost:9000"}, 403),
        ({"method": "GET", "path": "/../../etc/passwd"}, 404),
        ({"method": "PUT"}, 501),
        ({"method": "OPTIONS"}, 501),
    ],
)
def test_other_requests_are_refused(server, changes, status):
    got, headers, body = ask(server, **changes)
    assert got == status
    assert "Access-Control-Allow-Origin" not in headers
    if status != 501:  # the standard library's own page
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        assert REASONS[status] in body
        assert (b"; a port that is forwarded" in body) == ("Host" in changes)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "JSON"),
        (b"[" * 60_000, "JSON"),
        (b"\xff", "JSON"),
        ([], "object"),
        ({"prompt": "A"}, "max_bytes"),
        (ASKED | {"more": 1}, "unknown setting more"),
        (ASKED | {"prompt": 1}, "prompt"),
        (ASKED | {"prompt": "\ud800"}, "prompt"),
        (ASKED | {"prompt": "é" * 4097}, "prompt"),
        (ASKED | {"temperature": "1"}, "temperature"),
        (ASKED | {"temperature": float("nan")}, "temperature"),
        (ASKED | {"top_p": 1.1}, "top_p"),
        (ASKED | {"seed": True}, "seed"),
        (ASKED | {"max_bytes": 0}, "max_bytes"),
        (ASKED | {"max_bytes": 4097}, "max_bytes"),
        (ASKED | {"num_samples": 2}, "num_samples"),
    ],
)
def test_bad_bodies_are_refused(server, body, named):
    status, _, answer = ask(server, body)
    assert status == 400
    assert named in answer.decode()


@pytest.mark.parametrize("error", [RuntimeError("device lost"), PicoError("device lost")])
def test_a_continuation_that_breaks_off_says_so(server, error, monkeypatch):
    forward, passes = Decoder.forward, []

    def fail(decoder: Decoder, data: bytes):
        passes.append(data)
        if len(passes) > 3:
            raise error
        return forward(decoder, data)

    monkeypatch.setattr(Decoder, "forward", fail)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)  # prints the traceback
    *parts, last = lines(ask(server)[2])
    assert all(part["html"] for part in parts)
    assert "device lost" in last["error"]
    monkeypatch.undo()
    assert "bytes/s" in lines(ask(server)[2])[-1]["stats"]


def test_a_closed_connection_ends_the_continuation(server, monkeypatch):
    """Stop closes it, too. The decoder waits until it is closed."""
    closed, passes, forward = threading.Event(), [], Decoder.forward

    def wait_and_pass(decoder: Decoder, data: bytes):
        passes.append(data)
        assert closed.wait(60)
        return forward(decoder, data)

    monkeypatch.setattr(Decoder, "forward", wait_and_pass)
    body = json.dumps(ASKED | {"max_bytes": 4096, "temperature": 1}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {server.hosts[0]}\r\nOrigin: http://{server.hosts[0]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=300) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(15) == b"HTTP/1.0 200 OK"
    closed.set()
    with server.one_at_a_time:  # after the end of the continuation
        assert 0 < len(passes) < 4096 / 8  # a pass reads up to 8 bytes
    assert ask(server)[0] == 200


def test_two_continuations_at_a_time_are_refused(server, monkeypatch):
    monkeypatch.setattr(web, "WAIT", 0)
    with server.one_at_a_time:
        status, _, body = ask(server)
    assert status == 503
    assert body == b"another continuation is being written\n"


@pytest.fixture
def trained(tmp_path):
    """A model of one head, of random weights."""
    config = dataclasses.replace(TINY, next_tokens=1)
    config.to_json(tmp_path / "model.json")
    (tmp_path / "a").mkdir()
    save_weights(Pico(config), tmp_path / "a" / "00000001.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none"], "none is no model"),
        (["{model}", "b"], "has no run b; its runs are: a"),
        (["{model}", "--port", "{port}"], "choose another --port"),
        (["{model}", "a", "--port", "70000"], "choose another --port"),
    ],
)
def test_mistakes_of_the_user(server, arguments, named, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    known = {"model": trained, "port": server.server_port}
    assert status(["web", *(argument.format(**known) for argument in arguments)]) == 2
    assert named in error_line(capsys)


def test_the_command(trained, monkeypatch, capsys):
    """Without RUN, the newest run; a model of one head has no drafts to underline. Ctrl-C ends."""
    bodies = []

    def serve(server) -> None:
        thread = threading.Thread(target=http.server.HTTPServer.serve_forever, args=[server])
        thread.start()
        bodies.append(ask(server, b"", "GET", "/", Origin=None)[2].decode())
        server.shutdown()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(web.Server, "serve_forever", serve)
    assert status(["web", str(trained), "--port", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(f"loading {trained.name}, run a; backend ")
    assert captured.out.startswith("http://127.0.0.1:")
    (body,) = bodies
    assert f"<title>{trained.name}, run a</title>" in body
    assert "underline" not in body.split("</style>")[1]


# The page in a browser ----------------------------------------------------------------------------

CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1000,900",
]  # fmt: skip


class Browser:
    """A session of a WebDriver (https://www.w3.org/TR/webdriver2/), over plain HTTP."""

    def __init__(self, port: int) -> None:
        self.port, self.path = port, "/session"
        options = {"goog:chromeOptions": {"args": CHROMIUM}}
        session = self.call("", {"capabilities": {"alwaysMatch": options}})
        self.path += f"/{session['sessionId']}"

    def call(self, path: str, values: dict | None = None, method: str = "POST"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            body = None if values is None else json.dumps(values)
            connection.request(method, self.path + path, body)
            answer = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def script(self, code: str):
        return self.call("/execute/sync", {"script": code, "args": []})

    def click(self, selector: str) -> None:
        found = self.call("/element", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self.call(f"/element/{element}/click", {})


@pytest.fixture
def browser(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    session = None
    try:
        for _ in range(600):
            with contextlib.suppress(ConnectionError):
                session = Browser(port)
                break
            time.sleep(0.1)
        assert session, "chromedriver does not answer"
        yield session
    finally:
        if session:
            session.call("", None, "DELETE")
        driver.kill()
        driver.wait()


def wait_for(browser, condition: str) -> None:
    for _ in range(1200):
        if browser.script(f"return {condition}"):
            return
        time.sleep(0.1)
    pytest.fail(
        f"never: {condition}; the page shows {browser.script('return document.body.innerText')}"
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")), reason="needs Chromium"
)
def test_page_in_chromium(server, browser):
    """A continuation appears, shaded; another one is stopped before its end."""
    browser.call("/url", {"url": server.url})
    browser.script("document.querySelector('[name=prompt]').value = '<b>A'")
    browser.script("document.querySelector('[name=max_bytes]').value = 40")
    browser.click("#write")
    wait_for(browser, "document.querySelector('#status').textContent.startsWith('The router')")
    text = "document.querySelector('#text')"
    assert browser.script(f"return {text}.querySelector('.prompt').textContent") == "<b>A"
    count = browser.script(f"return {text}.querySelectorAll('b').length")
    assert 10 < count <= 40 + web.SENTENCE
    shade = "getComputedStyle(b).backgroundColor"
    clear = f"b => {shade}.startsWith('rgba(') && {shade}.endsWith(', 0)')"
    assert browser.script(f"return ![...{text}.querySelectorAll('b')].every({clear})")
    assert "disabled" not in browser.script("return document.querySelector('#write').outerHTML")

    browser.script("document.querySelector('[name=max_bytes]').value = 4096")
    browser.click("#write")
    wait_for(browser, f"{text}.querySelectorAll('b').length > 5")
    browser.click("#stop")
    wait_for(browser, "document.querySelector('#status').textContent == 'stopped'")
    assert browser.script(f"return {text}.querySelectorAll('b').length") < 4000
    assert ask(server)[0] == 200  # the server still answers
