"""A server for choosing edits by hand, on this machine only: the gallery of `report`, with keys that reject.

    http://127.0.0.1:PORT/TOKEN/                the page
                               gallery.css, gallery.js
                               rows/3           JSON: details of the fourth chunk of edits
                               edit/7/120       the image of row 120 of shard 7
                               original/55      an original, by its row in the catalog; at most 512 pixels a side
                               original/55/large    at most 2048
                               decisions        POST: {"decision": "reject" or "undo", "edits": [[shard, row], ...]}

Addresses hold numbers, never names of files. A page of another site can reach a server on this machine through its
user's browser. So a request is answered only if it has the token, which no other page knows, and names this server
(against DNS rebinding); and decisions are taken only from this server's own page.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from os import PathLike
from typing import Any, Final

import numpy as np

from dali_diffusemix.errors import ConfigError, DecodeError, DiffuseMixError
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.gallery import ASSETS, CHUNK, EditView, current_rows, encoded, shrunk
from dali_diffusemix.inspect.originals import FoundOriginals
from dali_diffusemix.store import EditStore
from dali_diffusemix.store.decisions import DECISIONS

__all__ = ["ReviewServer", "open_browser"]

PORT: Final = 8742
"""The first port that is tried: a browser remembers what was seen by address, so it should be the same each time."""
_PORTS: Final = 10
_HOST: Final = "127.0.0.1"
_SIDE: Final = 512  # pixels of an original, at most
_LARGE: Final = 2048
_MOST_BYTES: Final = 16 << 20  # of a request: a million edits
_SECONDS: Final = 60.0  # that a silent connection is kept
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": f"{_POLICY}; frame-ancestors 'none'",  # which a page cannot say itself
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_KEPT: Final = "private, max-age=3600"
_NUMBER: Final = r"(\d{1,10})"
_MAGIC: Final = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


@dataclass(frozen=True)
class _Reply:
    """The answer to a request."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    cache: str = "no-store"
    location: str | None = None


class _RefusedRequest(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class ReviewServer:
    """A server of the gallery of one store, on 127.0.0.1.

    Args:
        store: The edit store's folder.
        root: The originals, a folder or a packed store; by default the root of the last run that made edits.
        port: By default one of a few that are usually free.

    Raises:
        StoreError: There is no such store, or the decisions beside it are damaged.
        ConfigError: The port is not free, or `root` does not exist.
    """

    def __init__(
        self, store: str | PathLike[str], *, root: str | PathLike[str] | None = None, port: int | None = None
    ) -> None:
        edits = EditStore.open(store)
        rows = current_rows(edits)
        self.view: Final = EditView(edits, FoundOriginals(edits, root), rows)
        self._content: Final = self.view.content(rows, writable=True)
        self._accepted: Final = self.view.accepted()
        self._token: Final = secrets.token_urlsafe(24)
        self._tickets: Final[set[str]] = set()
        self._saving: Final = threading.Lock()
        self._server: Final = _bound(port, self)
        self.port: Final[int] = self._server.server_address[1]
        self._hosts: Final = (f"{_HOST}:{self.port}", f"localhost:{self.port}")

    @property
    def address(self) -> str:
        """The address of the page; whoever knows it may decide."""
        return f"http://{self._hosts[0]}/{self._token}/"

    def ticket(self) -> str:
        """An address that leads to the page once: other users of the machine can see a browser's command line."""
        ticket = secrets.token_urlsafe(24)
        self._tickets.add(ticket)
        return f"http://{self._hosts[0]}/open/{ticket}"

    def run(self) -> None:
        """Answer requests, in threads, until an exception (of a Ctrl-C) or `stop`."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            with self._saving:  # a decision on its way to the disk
                self._server.server_close()

    def stop(self) -> None:
        """End `run`, which another thread is in."""
        self._server.shutdown()

    # Requests ---------------------------------------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: Message, body: Callable[[int], bytes]) -> _Reply:
        """Answer a request.

        Args:
            method: GET or POST.
            target: The path that is asked for.
            headers: The request's.
            body: Reads so many bytes of its body.
        """
        try:
            inner = self._admitted(target, headers)
            if isinstance(inner, _Reply):
                return inner
            if method == "POST":
                return self._post(inner, headers, body)
            return self._get(inner, headers)
        except _RefusedRequest as refused:
            return _error(refused.status, str(refused))
        except DiffuseMixError as error:
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

    def _admitted(self, target: str, headers: Message) -> str | _Reply:
        """The target without the token; of a ticket the reply."""
        if headers.get_all("Host") not in [[host] for host in self._hosts]:
            raise _RefusedRequest(
                HTTPStatus.FORBIDDEN,
                f"Host must be {' or '.join(self._hosts)}; if you forward the port, forward it to the same number.",
            )
        _, first, inner = (*target.split("/", 2), "", "")[:3]
        if first == "open" and inner in self._tickets:
            self._tickets.discard(inner)
            return _moved(f"/{self._token}/")
        # Compared in constant time, as bytes: a target may hold anything.
        if not secrets.compare_digest(first.encode("utf-8", "replace"), self._token.encode()):
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, "Open the address that `dali-diffusemix review` printed.")
        if target == f"/{self._token}":  # the page's own addresses are relative
            return _moved(f"/{self._token}/")
        return inner

    def _get(self, inner: str, headers: Message) -> _Reply:
        if "Content-Length" in headers or "Transfer-Encoding" in headers:
            raise _RefusedRequest(HTTPStatus.BAD_REQUEST, "GET takes no body.")
        if inner == "":
            columns = {**self._content["columns"], "rejected": self.view.rejected_column()}
            page = self.view.page({**self._content, "columns": columns}, _POLICY)
            return _Reply(page.encode("utf-8"), "text/html; charset=utf-8")
        # A link elsewhere may lead to the page, but no other page may use its parts.
        if headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, "Sec-Fetch-Site must be same-origin.")
        for pattern, find in _ROUTES:
            if (match := re.fullmatch(pattern, inner, re.ASCII)) and (reply := find(self, *match.groups())):
                return reply
        raise _RefusedRequest(HTTPStatus.NOT_FOUND, "There is nothing at this address.")

    def _asset(self, name: str) -> _Reply:
        kind = {"js": "text/javascript", "css": "text/css"}[name.rpartition(".")[2]]
        return _Reply((ASSETS / name).read_bytes(), f"{kind}; charset=utf-8")

    def _rows(self, chunk: str) -> _Reply | None:
        if int(chunk) * CHUNK >= len(self.view.rows):
            return None
        return _json(self.view.details(int(chunk)))

    def _edit(self, shard: str, row: str) -> _Reply | None:
        place = int(self.view.places(np.array([[int(shard), int(row)]]))[0])
        data = None if place < 0 else self.view.file(place)
        if data is None:
            return None
        for magic, kind in _MAGIC.items():
            if data.startswith(magic):
                return _Reply(data, kind, cache=_KEPT)
        try:  # plain pixels, which browsers do not show
            kind, data = encoded(shrunk(decode(data), _LARGE), lossless=True)
        except DecodeError:
            return None
        return _Reply(data, kind, cache=_KEPT)

    def _original(self, original: str, large: str | None) -> _Reply | None:
        if int(original) >= len(self.view.edits.catalog):
            return None
        pixels = self.view.originals.pixels(int(original))
        if pixels is None:
            return None
        kind, data = encoded(shrunk(pixels, _LARGE if large else _SIDE))
        return _Reply(data, kind, cache=_KEPT)

    def _post(self, inner: str, headers: Message, body: Callable[[int], bytes]) -> _Reply:
        if inner != "decisions":
            raise _RefusedRequest(HTTPStatus.NOT_FOUND, "There is nothing at this address.")
        if headers.get_all("Origin") != [f"http://{headers['Host']}"]:
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, "Origin must be this server's page.")
        if headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            raise _RefusedRequest(HTTPStatus.FORBIDDEN, "Sec-Fetch-Site must be same-origin.")
        if headers.get_content_type() != "application/json":
            raise _RefusedRequest(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json.")
        length = headers.get_all("Content-Length", [])
        if len(length) != 1 or not re.fullmatch(r"\d{1,12}", length[0], re.ASCII) or "Transfer-Encoding" in headers:
            raise _RefusedRequest(HTTPStatus.LENGTH_REQUIRED, "Content-Length must be given.")
        if int(length[0]) > _MOST_BYTES:
            raise _RefusedRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Too many edits at once; filter them.")
        data = body(int(length[0]))
        if len(data) != int(length[0]):
            raise _RefusedRequest(HTTPStatus.BAD_REQUEST, "The body is cut short.")
        return self._decide(data)

    def _decide(self, data: bytes) -> _Reply:
        try:
            asked = json.loads(data)
            decision, edits = asked["decision"], asked["edits"]
            if decision not in DECISIONS or not all(type(one) is int for shard, row in edits for one in (shard, row)):
                raise ValueError
            pairs = np.array(edits, np.int64).reshape(-1, 2)
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
            raise _RefusedRequest(
                HTTPStatus.BAD_REQUEST, "A decision must be 'reject' or 'undo' of [shard, row] pairs."
            ) from error
        places = self.view.places(pairs)
        if (places < 0).any() or not self._accepted[places].all():
            raise _RefusedRequest(HTTPStatus.BAD_REQUEST, "Only accepted edits of this store can be rejected.")
        with self._saving:
            self.view.decisions.add(decision, map(self.view.name, places.tolist()))
        return _json({"saved": len(places)})


def open_browser(server: ReviewServer) -> None:
    """Open the page in the user's browser, if there is a desktop; returns at once."""
    desktop = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if desktop or os.environ.get("BROWSER"):  # otherwise a browser in the terminal would take it over
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(server.ticket(),), daemon=True).start()


_ROUTES: Final[tuple[tuple[str, Callable[..., _Reply | None]], ...]] = (
    (r"(gallery\.js|gallery\.css)", ReviewServer._asset),
    (rf"rows/{_NUMBER}", ReviewServer._rows),
    (rf"edit/{_NUMBER}/{_NUMBER}", ReviewServer._edit),
    (rf"original/{_NUMBER}(/large)?", ReviewServer._original),
)


def _json(content: Any, status: HTTPStatus = HTTPStatus.OK) -> _Reply:
    return _Reply(json.dumps(content, separators=(",", ":")).encode("ascii"), "application/json", status)


def _moved(location: str) -> _Reply:
    return _Reply(b"", status=HTTPStatus.SEE_OTHER, location=location)


def _error(status: HTTPStatus, why: str) -> _Reply:
    return _json({"error": why}, status)


# HTTP -----------------------------------------------------------------------------------------------------------------


class _Connection(BaseHTTPRequestHandler):
    """Hands the requests of a connection to the server."""

    protocol_version = "HTTP/1.1"
    timeout = _SECONDS
    error_content_type = "text/plain"
    error_message_format = "%(code)d %(message)s\n"
    server: "_HttpServer"

    def do_GET(self) -> None:
        self._reply("GET")

    def do_POST(self) -> None:
        self._reply("POST")

    def _reply(self, method: str) -> None:
        reply = self.server.review.answer(method, self.path, self.headers, self.rfile.read)
        if reply.status >= HTTPStatus.BAD_REQUEST:
            self.close_connection = True  # what is left of its body must not be read as another request
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.body)))
        self.send_header("Cache-Control", reply.cache)
        if reply.location is not None:
            self.send_header("Location", reply.location)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def end_headers(self) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "dali-diffusemix"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the address has the token."""


class _HttpServer(socketserver.ThreadingTCPServer):
    """Threads that end with the process. It listens from the beginning."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, review: ReviewServer) -> None:
        self.review = review
        self._open: set[Any] = set()
        super().__init__((_HOST, port), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for request in list(self._open):  # browsers keep them
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):  # a browser that turned to something else
            super().handle_error(request, client_address)


def _bound(port: int | None, review: ReviewServer) -> _HttpServer:
    for candidate in (*range(PORT, PORT + _PORTS), 0) if port is None else (port,):
        try:
            return _HttpServer(candidate, review)
        except OSError as error:
            taken = error
            if error.errno != errno.EADDRINUSE:
                break
    raise ConfigError(
        f"port must be one that is free on {_HOST}, found {candidate}: {taken.strerror}; name another with --port."
    ) from taken
