"""The server editor: edits made by a model behind OpenAI's HTTP interface, `POST {url}/images/edits`.

    images --PNG, once for all their prompts--> forms ── requests, so many at once ──> server --base64--> edits
                                                 ^   away, busy: wait, up to `patience`   |
                                                 └── wrong answer: again, a few times ────┘

vLLM-Omni and SGLang serve it. One model on a cluster then serves any number of machines, and this process needs no GPU.

An edit is asked for by its image, text and seed, so it depends on nothing else here. Whether two answers to one request
are the same is up to the server: batching, several GPUs or another version may change pixels.

Requests go to the server directly, never through a proxy and never after a redirect, each over a connection of its own,
so that a load balancer can spread them. A key that the server wants is read from the variable DALI_DIFFUSEMIX_API_KEY
where it is used; it is in no config, store or log.
"""

import base64
import http.client
import io
import json
import logging
import math
import os
import random
import re
import secrets
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from threading import Event, Lock
from typing import ClassVar, Final
from urllib.parse import SplitResult, urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.base.workers import Workers
from dali_diffusemix.errors import ConfigError, DecodeError, WorkerError
from dali_diffusemix.generate.editors import INSTRUCTION, EditTask, check_template, instruction
from dali_diffusemix.images.codec import decode
from dali_diffusemix.images.formats import measure

_log = logging.getLogger(__name__)

KEY: Final = "DALI_DIFFUSEMIX_API_KEY"
"""The variable with the server's key. Not OPENAI_API_KEY: that one must not reach any server that is named here."""

_ATTEMPTS: Final = 5  # at one edit, while the server answers wrongly
_CONNECT: Final = 30.0  # seconds to connect within
_LONGEST: Final = 10.0  # seconds between two attempts, unless the server asks for more
_QUIET: Final = 2.0  # seconds that the server may be away before that is logged
_MOST_BYTES: Final = 1 << 27  # of an answer: base64 of 4096 x 4096 pixels, uncompressed, with alpha
_AWAY: Final = (408, 409, 425, 429, 502, 503, 504)  # of a server that is busy, or of a proxy whose server is away
_SEEDS: Final = 2**31 - 1
_FIELD: Final = re.compile(r"[A-Za-z0-9_.\[\]-]+")
_OURS: Final = {
    "image": "",
    "image[]": "",
    "prompt": "template",
    "model": "model",
    "n": "variants",
    "size": "edit_size",
    "response_format": "",
    "output_format": "",
    "stream": "",
    "seed": "",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative_prompt",
}
"""The fields of a form that the editor fills itself, and the option that decides each, if any."""

FieldValue = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A model that a server edits with. What is None is left to the server, and is not known here.

    More than ten fields: half decide the edits, half how the server is asked.

    Raises ConfigError if a field breaks its rule.
    """

    url: str  # of the interface, such as http://host:8000/v1; not recorded, since a store does not depend on it
    model: str  # the name under which the server serves it
    revision: str | None = None  # of the model, in your words, for the record
    template: str = INSTRUCTION  # {prompt} is replaced by the prompt, {class} by the class
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    fields: Mapping[str, FieldValue] = field(default_factory=dict)  # of the form, besides ours: true_cfg_scale
    multiple: int = 16  # the divisor of both sides of the images
    requests: int = field(default=8, metadata={"setting": False})  # at once
    timeout: float = field(default=600.0, metadata={"setting": False})  # seconds to answer one request within
    patience: float = field(default=600.0, metadata={"setting": False})  # seconds to wait for a server that is away

    accelerated: ClassVar[bool] = False
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checked_url(self.url)
        if not isinstance(self.fields, Mapping):
            raise ConfigError(f"fields must be a table of names and values, found {self.fields!r}.")
        object.__setattr__(self, "fields", dict(self.fields))
        if not self.model:
            raise ConfigError("model must be the name under which the server serves its model, found ''; set model.")
        check_template(self.template)
        for name, least, most in (("steps", 1, 1000), ("multiple", 1, 1024), ("requests", 1, 1024)):
            value = getattr(self, name)
            if value is None and name == "steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(f"{name} must be a whole number from {least} to {most}, found {value!r}.")
        for name, most in (("guidance", 100), ("timeout", 86400), ("patience", 86400)):
            value = getattr(self, name)
            if value is None and name == "guidance":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ConfigError(f"{name} must be a number from 0 to {most}, found {value!r}.")
        if self.timeout == 0:
            raise ConfigError("timeout must be more than 0 seconds, found 0.")
        for name, value in self.fields.items():
            _check_field(name, value)

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """The settings that an edit store records."""
        return {
            "editor": "server",
            "model": self.model,
            "revision": self.revision,
            "steps": self.steps,
            "guidance": None if self.guidance is None else float(self.guidance),
            "negative_prompt": self.negative_prompt,
            "template": self.template,
            "multiple": self.multiple,
            **{f"field {name}": self.fields[name] for name in sorted(self.fields)},
        }

    def check(self, prompts: Sequence[str]) -> None:
        """Ask the server for its models. Any prompt is valid.

        A server that is away is waited for, up to `patience`; one that does not list its models is taken as it is.

        Raises:
            ConfigError: It serves other models, or wants another key.
            WorkerError: It did not answer.
        """
        server, patience, attempt = _Server(self), _Patience(self), 0
        while True:
            try:
                answer = server.ask("GET", "/models", timeout=min(_CONNECT, self.timeout))
                break
            except _Wrong:
                return  # its edits decide
            except _Away as away:
                patience.away(away)
                time.sleep(patience.pause(attempt, away.wait))
                attempt += 1
        names = _models(answer.content) if answer.status == 200 else []
        if names and self.model not in names:
            raise ConfigError(
                f"model must be one that the server serves, found {self.model!r}; these are "
                f"{server.short(', '.join(names))}{did_you_mean(self.model, names)}"
            )

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> "ServerEditor":
        """Make the editor; device and batch size do not matter.

        Raises:
            ConfigError: The key cannot be sent.
        """
        return ServerEditor(self)


class ServerEditor:
    """Edits with a server; `ServerConfig.load` makes it.

    A request that fails because the server is away or busy (no connection, a broken one, HTTP 408, 409, 425, 429, 502,
    503, 504) is repeated until nothing has come from the server for `patience` seconds, at growing intervals, or those
    that the server asks for. Any other failure of the server (HTTP 500, no answer in time, an answer without an image)
    is repeated four times. A request that the server refuses is not repeated.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError if the key cannot be sent."""
        self._config = config
        self._server = _Server(config)
        self._patience = _Patience(config)
        self._threads = Workers(config.requests, "dali-diffusemix-server")

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[np.uint8]]:
        """Return one edit per task, in the tasks' order; see `Editor.edit`.

        Args:
            images: Originals, each (height, width, 3) uint8 RGB.
            tasks: The edits to make; under any prompt.

        Raises:
            ConfigError: The server refuses a request, or answers with an edit of another size.
            WorkerError: The server does not answer, or not with an image.
        """
        files = list(self._threads.map(_png, images))
        done: SimpleQueue[tuple[int, NDArray[np.uint8] | BaseException]] = SimpleQueue()
        stop = Event()

        def make(number: int) -> None:
            task = tasks[number]
            try:
                done.put((number, self._edit(files[task.image], images[task.image].shape[:2], task, stop)))
            except BaseException as error:
                done.put((number, error))

        edits: dict[int, NDArray[np.uint8]] = {}
        try:
            for number in range(len(tasks)):
                self._threads.submit(make, number)
            while len(edits) < len(tasks):
                number, made = done.get()
                if isinstance(made, BaseException):
                    raise made
                edits[number] = made
        finally:
            # After an error or a Ctrl-C nobody waits for the rest: what waits ends, what is under way comes to nothing.
            stop.set()
            self._threads.drop()
        return [edits[number] for number in range(len(tasks))]

    def _edit(self, image: bytes, shape: tuple[int, ...], task: EditTask, stop: Event) -> NDArray[np.uint8]:
        """One edit, (height, width, 3) uint8 of `shape`, however many requests it takes."""
        body, kind = _form(self._form_fields(shape, task), image)
        attempts = wrong = 0
        while True:
            try:
                answer = self._server.ask("POST", "/images/edits", body, kind, timeout=self._config.timeout)
                self._patience.there()
                return self._edit_in(answer, shape)
            except _Away as away:
                self._patience.away(away)
                wait = away.wait
            except _Wrong as error:
                self._patience.there()
                wrong, wait = wrong + 1, None
                if wrong == _ATTEMPTS:
                    raise WorkerError(
                        f"the server must answer with an edit, but {error}, {wrong} times; look at the server's log, "
                        "then run again to resume."
                    ) from error
            if stop.wait(self._patience.pause(attempts, wait)):
                raise WorkerError("the edit is not wanted any more.")  # another error came first
            attempts += 1

    def _form_fields(self, shape: tuple[int, ...], task: EditTask) -> dict[str, FieldValue]:
        config = self._config
        fields: dict[str, FieldValue | None] = {
            "prompt": instruction(config.template, task.prompt, task.class_name),
            "model": config.model,
            "n": 1,
            "size": f"{shape[1]}x{shape[0]}",
            "response_format": "b64_json",
            "output_format": "png",  # SGLang would send a JPEG
            # Servers keep seeds in 32 or 64 bits, with a sign or without; to some of them 0 means a random one.
            "seed": 1 + task.seed % _SEEDS,
            "num_inference_steps": config.steps,
            "guidance_scale": config.guidance,
            "negative_prompt": config.negative_prompt,
            **config.fields,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _edit_in(self, answer: "_Answer", shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The edit that an answer holds."""
        if answer.status >= 500:
            raise _Wrong(f"it answers HTTP {answer.status} ({self._server.message(answer.content)})")
        if answer.status >= 400:
            raise ConfigError(
                f"the server must accept the request, found HTTP {answer.status} "
                f"({self._server.message(answer.content)}); "
                + (
                    "editor must be the URL before /images/edits, and usually ends in /v1."
                    if answer.status in (404, 405)
                    else "change what it refuses, or see the server's log."
                )
            )
        file = _file_in(answer.content)
        size = measure(file)
        if isinstance(size, str):
            raise _Wrong(f"its answer holds no image that can be read ({self._server.short(size)})")
        if size != tuple(shape):
            side = round(math.sqrt(math.prod(size)))
            raise ConfigError(
                f"the server must answer with an edit of {shape[0]} x {shape[1]} pixels, as it is asked to, found "
                f"{size[0]} x {size[1]}; set edit_size to a side that the model makes, perhaps {side}: size is that of "
                "the stored edit, and can be any other."
            )
        try:
            return decode(file)
        except DecodeError as error:
            raise _Wrong(f"its image {self._server.short(str(error))}") from error


class _Away(Exception):
    """The server cannot answer now."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait
        """The seconds after which the server wants to be asked again."""


class _Wrong(Exception):
    """The server failed at a request; the text says how, of "it"."""


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """The answer to a request."""

    status: int
    content: bytes


class _Patience:
    """Measures for how long the server has been away; for all threads that ask it."""

    def __init__(self, config: ServerConfig) -> None:
        self._name = config.url
        self._limit = config.patience
        self._lock = Lock()
        self._since: float | None = None
        self._logged = False
        self._random = random.Random()  # the global generator is the user's

    def there(self) -> None:
        """Note that it answers."""
        with self._lock:
            if self._logged:
                _log.info("The server at %s answers again.", self._name)
            self._since, self._logged = None, False

    def away(self, away: _Away) -> None:
        """Note that it is away; raises WorkerError if it was for too long."""
        with self._lock:
            now = time.monotonic()
            self._since = now if self._since is None else self._since
            gone = now - self._since
            if gone >= self._limit:
                raise WorkerError(
                    f"the server at {self._name} must answer, but for {self._limit:.0f} s: {away}; start it or correct "
                    "its URL, and run again to resume."
                ) from away
            if gone >= _QUIET and not self._logged:
                self._logged = True
                _log.warning(
                    "The server at %s is away or busy: %s. Waiting for it, for up to %.0f s.",
                    *(self._name, away, self._limit - gone),
                )

    def pause(self, attempts: int, wait: float | None) -> float:
        """Seconds until the next attempt, after so many others; at least `wait`, if that is not too long."""
        pause: float = self._random.uniform(0.5, 1) * min(_LONGEST, 2 ** min(attempts, 10))
        if wait is not None:
            pause = max(pause, wait + self._random.uniform(0, 0.5))
        with self._lock:
            left = self._limit if self._since is None else self._limit - (time.monotonic() - self._since)
        return min(pause, max(left, 0.0))


class _Server:
    """Speaks HTTP with the server."""

    def __init__(self, config: ServerConfig) -> None:
        parts = _checked_url(config.url)
        assert parts.hostname is not None
        self._host, self._path = parts.hostname, parts.path.rstrip("/")
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._key = os.environ.get(KEY, "").strip()
        if re.fullmatch("[!-~]*", self._key) is None:
            raise ConfigError(f"{KEY} must be printable ASCII without spaces; set it to the server's key.")

    def ask(
        self, method: str, route: str, body: bytes | None = None, kind: str | None = None, *, timeout: float
    ) -> _Answer:
        """Make one request and return the answer.

        Raises:
            ConfigError: The server wants another key, redirects, or cannot be trusted.
            _Away: It does not answer, or wants to be asked later.
            _Wrong: It did not answer in time, or not in HTTP.
        """
        deadline = time.monotonic() + timeout
        headers = {"Accept": "application/json", "Connection": "close"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        headers |= {} if kind is None else {"Content-Type": kind}
        connection = self._connect(min(_CONNECT, timeout))
        try:
            line = connection.sock
            line.settimeout(timeout)
            with suppress(BrokenPipeError):  # it may refuse a request before it has read all of it
                connection.request(method, self._path + route, body, headers)
            with connection.getresponse() as response:
                content = _read(response, line, deadline)
        except TimeoutError as error:
            raise _Wrong(f"it does not answer within {timeout:.0f} s") from error
        except (OSError, http.client.IncompleteRead) as error:
            raise _Away(f"the connection broke ({self.short(str(error)) or type(error).__name__})") from error
        except http.client.HTTPException as error:
            raise _Wrong(f"its answer is not HTTP ({type(error).__name__})") from error
        finally:
            connection.close()
        return self._accepted(response, content)

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        """A new connection."""
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._tls)
        try:
            connection.connect()
            # A machine that vanished is noticed after two minutes, however long an answer may take.
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
                connection.sock.setsockopt(socket.IPPROTO_TCP, option, value)
        except OSError as error:
            connection.close()
            if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
                raise ConfigError(
                    f"editor must be the URL of a server whose certificate is trusted, found {self._host!r} ({error}); "
                    "SSL_CERT_FILE names the file of an authority of your own, and http:// is for servers without TLS."
                ) from error
            raise _Away(f"no connection ({error.strerror or error or type(error).__name__})") from error
        return connection

    def _accepted(self, response: http.client.HTTPResponse, content: bytes) -> _Answer:
        """The answer, unless it is one that any request may get."""
        status = response.status
        if status in _AWAY:
            raise _Away(f"HTTP {status} ({self.message(content)})", _seconds(response.headers.get("Retry-After")))
        if status in (401, 403):
            given = "another one" if self._key else "it"
            raise ConfigError(
                f"the server wants its key, HTTP {status} ({self.message(content)}); set {KEY} to {given}."
            )
        if 300 <= status < 400:
            target = self.short(response.headers.get("Location") or "")
            raise ConfigError(
                f"editor must be the server's own URL, found a redirect (HTTP {status}) to {target!r}; redirects are "
                "not followed: name that URL, if you trust it."
            )
        return _Answer(status=status, content=content)

    def message(self, content: bytes) -> str:
        """The message in the answer of an error, shortened."""
        return self.short(_message(content))

    def short(self, text: str) -> str:
        """A foreign text for a message: one line, not too long, without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        text = "".join(one if one.isprintable() else " " for one in text[:10_000])
        text = " ".join(text.split())
        return text if len(text) <= 300 else f"{text[:300]}..."


def _checked_url(url: str) -> SplitResult:
    """The parts of a URL that may be asked. Raises ConfigError without the URL, if that may hold a secret."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(
            "editor must be a URL such as http://host:8000/v1, found one with a wrong host or port."
        ) from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"editor must be a URL without a name and a password; set {KEY} to the server's key.")
    if parts.query or parts.fragment:
        raise ConfigError(f"editor must be a URL without ? and #; set {KEY} to the server's key.")
    plain = re.fullmatch("[!-~]+", url) is not None and port != 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(f"editor must be a URL such as http://host:8000/v1, found {url!r}.")
    if parts.path.rstrip("/").endswith("/images/edits"):
        raise ConfigError(f"editor must be the URL before /images/edits, found {url!r}; leave that out.")
    return parts


def _check_field(name: str, value: object) -> None:
    if name in _OURS:
        remedy = f"set {_OURS[name]} instead" if _OURS[name] else "leave it out"
        raise ConfigError(f"fields must be others than those that the editor fills, found {name!r}; {remedy}.")
    if _FIELD.fullmatch(name) is None:
        raise ConfigError(f"fields must have names of letters, digits and _, found {name!r}.")
    if not isinstance(value, FieldValue) or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"fields must have strings, numbers, true or false as values, found {value!r} for {name!r}.")


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=1)  # a local network is faster than zlib
    return stream.getvalue()


def _form(fields: Mapping[str, FieldValue], image: bytes) -> tuple[bytes, str]:
    """A multipart form with an image, and its content type."""
    boundary = secrets.token_hex(16)
    parts = []
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts.append((f'name="{name}"', text.encode("utf-8", "replace")))
    parts.append(('name="image"; filename="image.png"\r\nContent-Type: image/png', image))
    content = [
        f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode("ascii") + value + b"\r\n"
        for head, value in parts
    ]
    return b"".join([*content, f"--{boundary}--\r\n".encode("ascii")]), f"multipart/form-data; boundary={boundary}"


def _read(response: http.client.HTTPResponse, line: socket.socket, deadline: float) -> bytes:
    """The whole content of an answer. Raises TimeoutError, OSError, IncompleteRead or _Wrong."""
    content = bytearray()
    while response.length != 0 and not response.isclosed():
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        line.settimeout(left)
        content += response.read1(1 << 18)
        if len(content) > _MOST_BYTES:
            raise _Wrong(f"its answer has more than {_MOST_BYTES} bytes")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(content)


def _seconds(after: str | None) -> float | None:
    """The seconds of a Retry-After: a number, or a date."""
    if after is None:
        return None
    if after.strip().isdecimal():
        return float(after)
    try:
        then = parsedate_to_datetime(after)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _json(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _message(content: bytes) -> str:
    """The message of an error: of OpenAI's form, of FastAPI's, or the beginning of the text."""
    found = _json(content[:100_000])
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    if found is None:
        return content[:1000].decode("utf-8", "replace")
    return found if isinstance(found, str) else json.dumps(found)


def _models(content: bytes) -> list[str]:
    """The names in a list of models; none if it is no such list."""
    found = _json(content)
    models = found.get("data") if isinstance(found, dict) else None
    names = [model.get("id") for model in models if isinstance(model, dict)] if isinstance(models, list) else []
    return [name for name in names if isinstance(name, str)]


def _file_in(content: bytes) -> bytes:
    """The image's file in an answer."""
    found = _json(content)
    images = found.get("data") if isinstance(found, dict) else None
    if not isinstance(images, list) or len(images) != 1 or not isinstance(images[0], dict):
        raise _Wrong("its answer is no JSON with one image in data")
    text = images[0].get("b64_json")
    if isinstance(text, str) and text:
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise _Wrong("its answer has no base64 in data[0].b64_json") from error
    if images[0].get("url"):
        raise ConfigError(
            "the server must answer with the image itself, as response_format b64_json asks, found a URL, which is not "
            "fetched; see the server's options."
        )
    raise _Wrong("its answer has no image in data[0].b64_json")
