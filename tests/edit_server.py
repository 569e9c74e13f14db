"""A server with OpenAI's `/v1/images/edits`, in a process of its own: what it makes is a function of the form alone.

    with EditServer() as server:            # or EditServer(port=..., key=..., tls=(certificate, key file))
        server.plan("500", "429:1")         # what it does with the next requests; then it edits again
        ServerConfig(url=server.url, model=MODEL)...
        server.seen()                       # the forms that came, and how many requests there were at once

Run as a script it is the server; it prints its port. The form is parsed by Werkzeug, not by code of ours.
"""

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODEL = "test/editor"


def edited(image: NDArray[np.uint8], prompt: str, seed: int) -> NDArray[np.uint8]:
    """The server's edit: the image, tinted as prompt and seed say, (height, width, 3) uint8."""
    tint = np.frombuffer(hashlib.sha256(f"{prompt}\0{seed}".encode()).digest()[:3], np.uint8)
    return (np.roll(image, 1, axis=2).astype(np.uint16) * 3 // 5 + tint * np.uint16(2) // 5).astype(np.uint8)


class EditServer:
    """The server's process, and what a test asks of it."""

    def __init__(self, port: int = 0, key: str = "", tls: tuple[Path, Path] | None = None, delay: float = 0) -> None:
        self.port, self._key, self._tls, self._delay = port, key, tls, delay
        self.start()

    def start(self) -> None:
        """Start it, again at the same port after `kill`."""
        arguments = [str(self.port), str(self._delay), *map(str, self._tls or ())]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "KEY": self._key},
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://localhost:{self.port}/v1"

    def plan(self, *doings: str) -> None:
        """What it does with the next requests, each "DOING" or "DOING:DETAIL"; forget what was seen."""
        self._control("POST", json.dumps(doings))

    def seen(self) -> dict[str, Any]:
        """Since `plan`: the forms, their images' size, headers, and the most requests at once."""
        return json.loads(self._control("GET"))

    def _control(self, method: str, body: str | None = None) -> bytes:
        with contextlib.closing(http.client.HTTPConnection("localhost", self.port)) as connection:
            connection.request(method, "/control", body)
            return connection.getresponse().read()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# In the process -------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    plan: list[str]
    seen: dict[str, Any]
    now = 0
    inside = False
    key = ""
    delay = 0.0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def leave(self) -> None:
        with self.lock:
            type(self).now -= self.inside
            self.inside = False

    def send_response(self, code: int, message: str | None = None) -> None:
        self.leave()  # before the client can know, and send the next
        super().send_response(code, message)

    def answer(self, status: int, content: bytes | object, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/control":
            self.answer(200, self.seen)
        elif self.is_refused():
            pass
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def is_refused(self) -> bool:
        given = self.headers.get("Authorization")
        if not self.key or given == f"Bearer {self.key}":
            return False
        self.answer(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return True

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        cls = type(self)
        if self.path == "/control":
            with self.lock:
                cls.plan, cls.seen = json.loads(body), {"forms": [], "at_once": 0}
            self.answer(200, {})
            return
        with self.lock:
            cls.now += 1
            self.inside = True
            self.seen["at_once"] = max(self.seen["at_once"], self.now)
            doing, _, detail = (self.plan.pop(0) if self.plan else "edit").partition(":")
        try:
            if not self.is_refused():
                if doing.isdecimal():
                    self.status(int(doing), detail)
                else:
                    getattr(self, f"do_{doing}")(body, detail)
        finally:
            self.leave()

    def edit(self, body: bytes) -> NDArray[np.uint8]:
        from werkzeug.formparser import parse_form_data

        environ = {
            "REQUEST_METHOD": "POST",
            "CONTENT_TYPE": self.headers["Content-Type"],
            "CONTENT_LENGTH": str(len(body)),
            "wsgi.input": io.BytesIO(body),
        }
        _, form, files = parse_form_data(environ)
        (file,) = files.getlist("image")
        picture = Image.open(file.stream)
        assert picture.format == "PNG" and picture.mode == "RGB"
        with self.lock:
            self.seen["forms"].append(
                {
                    "path": self.path,
                    "pixels": picture.size,
                    "file": [file.filename, file.mimetype],
                    **{name: form.getlist(name) for name in form},
                }
            )
        time.sleep(self.delay)
        return edited(np.asarray(picture), form["prompt"], int(form["seed"]))

    def png(self, pixels: NDArray[np.uint8]) -> str:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()

    def made(self, body: bytes) -> bytes:
        data = [{"b64_json": self.png(self.edit(body)), "url": None, "revised_prompt": None}]
        return json.dumps({"created": 1, "data": data, "output_format": "png", "size": None}).encode()

    # What it does with a request: `doing` in a plan is the part of these names after do_.

    def do_edit(self, body: bytes, detail: str) -> None:
        self.answer(200, self.made(body))

    def do_slow(self, body: bytes, detail: str) -> None:
        time.sleep(float(detail))
        self.do_edit(body, "")

    def do_chunked(self, body: bytes, detail: str) -> None:
        content = self.made(body)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(content), 1000):
            chunk = content[start : start + 1000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        self.wfile.write(b"0\r\n\r\n")

    def do_trickle(self, body: bytes, detail: str) -> None:
        """An answer that never ends, with a sign of life now and then."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        for _ in range(100):
            self.wfile.write(b" ")
            time.sleep(0.1)

    def status(self, status: int, after: str) -> None:
        """Of a plan such as "429:1": a status, and the seconds or the date of Retry-After."""
        self.answer(status, {"detail": "as planned"}, **({"Retry_After": after} if after else {}))

    def do_refuse(self, body: bytes, detail: str) -> None:
        self.answer(int(detail), {"detail": "not so many\n\x1b[31m" + "x" * 5000})

    def do_close(self, body: bytes, detail: str) -> None:
        self.close_connection = True

    def do_cut(self, body: bytes, detail: str) -> None:
        content = self.made(body)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def do_noise(self, body: bytes, detail: str) -> None:
        self.wfile.write(b"\x15\x03\x01 this is not HTTP\r\n\r\n")
        self.close_connection = True

    def do_text(self, body: bytes, detail: str) -> None:
        self.answer(200, detail.encode())

    def do_damaged(self, body: bytes, detail: str) -> None:
        file = base64.b64decode(self.png(self.edit(body)))
        self.answer(200, {"data": [{"b64_json": base64.b64encode(file[: len(file) // 2]).decode()}]})

    def do_bomb(self, body: bytes, detail: str) -> None:
        """A PNG of a few bytes with 60,000 x 60,000 pixels."""
        file = bytearray(base64.b64decode(self.png(np.zeros((8, 8, 3), np.uint8))))
        file[16:24] = (60_000).to_bytes(4, "big") * 2
        file[29:33] = zlib.crc32(file[12:29]).to_bytes(4, "big")
        self.answer(200, {"data": [{"b64_json": base64.b64encode(file).decode()}]})

    def do_sized(self, body: bytes, detail: str) -> None:
        height, width = map(int, detail.split("x"))
        self.answer(200, {"data": [{"b64_json": self.png(np.zeros((height, width, 3), np.uint8))}]})

    def do_redirect(self, body: bytes, detail: str) -> None:
        self.answer(307, b"", Location=detail)


def _serve(port: str, delay: str, *tls: str) -> None:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients are killed here."""

    server = Server(("127.0.0.1", int(port)), _Handler)
    _Handler.plan, _Handler.seen = [], {"forms": [], "at_once": 0}
    _Handler.key, _Handler.delay = os.environ["KEY"], float(delay)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
