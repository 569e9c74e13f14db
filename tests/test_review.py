"""review: choosing edits by hand, with keys, in a real Chromium; and that nobody else can."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browsing import until
from material import write_photograph
from PIL import Image

from dali_diffusemix.catalog import index
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect import gallery, review
from dali_diffusemix.inspect.gallery import current_rows
from dali_diffusemix.inspect.report import write_report
from dali_diffusemix.inspect.review import ReviewServer, open_browser
from dali_diffusemix.store import SHARD_ROW, VERDICTS
from dali_diffusemix.store.decisions import Decisions

NASTY = "<img src=x onerror=alert(1)>'\" & 100%</script><script>alert(2)</script>".replace("/", "\u2215")
NOT_UTF8 = os.fsdecode(b"caf\xe9")
PROMPTS = ("autumn", "snowy", "mosaic", "sunset")
CONFIG = GenerateConfig(
    prompts=PROMPTS,
    size=48,
    format="jpeg",
    originals_per_shard=8,
    deny={"b*": ("mosaic",)},
    thresholds=Thresholds(unlike=0.75),  # strict enough that some are rejected
)
PROGRAM = [sys.executable, "-c", "from dali_diffusemix.cli import main; main(prog_name='dali-diffusemix')"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty photographs in four classes; one is cut short, some have evil names."""
    root = tmp_path_factory.mktemp("review") / "train"
    names = {4: f"{NASTY}\nsecond line.jpg", 5: f"{NOT_UTF8}.jpg"}
    for place in range(20):
        file = root / ("ants", "bees", NASTY, f"{NOT_UTF8} two")[place % 4] / names.get(place, f"photo.{place}.jpg")
        write_photograph(file, place, 600 if place == 6 else 60 + 3 * place, 800 if place == 6 else 80, quality=92)
    index(root)
    file = root / "ants" / "photo.8.jpg"
    file.write_bytes(file.read_bytes()[:900])
    return root


@pytest.fixture(scope="module")
def made(root: Path) -> Path:
    generate(root, root.with_name("edits"), CONFIG)
    return root.with_name("edits")


@contextmanager
def serving(store: Path, **options: Any) -> Iterator[ReviewServer]:
    server = ReviewServer(store, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@pytest.fixture
def server(made: Path, root: Path, tmp_path: Path) -> Iterator[ReviewServer]:
    """The server of a copy of the store, without decisions."""
    with serving(Path(shutil.copytree(made, tmp_path / "edits")), root=root) as found:
        yield found


class Answer(SimpleNamespace):
    status: int
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: ReviewServer, inner: str | None, *, method: str = "GET", body: bytes | None = None, **headers: str | None
) -> Answer:
    """Ask for an address below the page's, or for any if it begins with a slash; a header None is left out."""
    target = inner if inner is not None and inner.startswith("/") else server.address.split("/", 3)[3] + (inner or "")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, f"/{target.lstrip('/')}" if inner != "//" else inner, skip_host=True)
    sent = {"Host": f"127.0.0.1:{server.port}", **{name.replace("_", "-"): text for name, text in headers.items()}}
    if body is not None:
        sent.setdefault("Content-Length", str(len(body)))
    for name, text in sent.items():
        if text is not None:
            connection.putheader(name, text)
    connection.endheaders(body)
    response = connection.getresponse()
    answer = Answer(status=response.status, headers=response.headers, body=response.read())
    connection.close()
    return answer


def accepted(server: ReviewServer) -> list[list[int]]:
    rows = server.view.rows[server.view.accepted()]
    return np.stack([rows["shard"], rows["row"]], 1).tolist()


def post(server: ReviewServer, content: object, **headers: str | None) -> Answer:
    """As the page does."""
    sent = {"Origin": server.address[:-1].rpartition("/")[0], "Content_Type": "application/json", **headers}
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return ask(server, "decisions", method="POST", body=body, **sent)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_a_later_shard_takes_the_place_of_an_earlier_one_unless_it_was_not_made() -> None:
    def table(*rows: tuple[int, int, int, str]) -> np.ndarray:
        made = np.zeros(len(rows), SHARD_ROW)
        for at, (original, prompt, variant, verdict) in enumerate(rows):
            made[at]["original"], made[at]["prompt"], made[at]["variant"] = original, prompt, variant
            made[at]["verdict"] = VERDICTS.index(verdict)
        return made

    shards = {
        0: table((1, 0, 0, "accepted"), (1, 1, 0, "accepted"), (0, 0, 0, "black"), (0, 1, 0, "not made yet")),
        2: table((1, 0, 0, "flat"), (0, 0, 1, "accepted"), (0, 0, 0, "accepted")),
        7: table((1, 0, 0, "not made yet"), (1, 1, 0, "denied"), (0, 0, 0, "accepted")),
    }
    store: Any = SimpleNamespace(
        shards=tuple(shards), shard_rows=shards.__getitem__, are_wanted=lambda rows: np.ones(len(rows), bool)
    )
    found = [
        (*map(int, row[["original", "prompt", "variant", "shard", "row"]]), VERDICTS[row["verdict"]])
        for row in current_rows(store)
    ]
    assert found == [
        (0, 0, 0, 7, 2, "accepted"),
        (0, 0, 1, 2, 1, "accepted"),
        (0, 1, 0, 0, 3, "not made yet"),
        (1, 0, 0, 2, 0, "flat"),
        (1, 1, 0, 7, 1, "denied"),
    ]
    assert (
        len(current_rows(SimpleNamespace(shards=(), shard_rows=None, are_wanted=lambda rows: np.ones(len(rows), bool))))
        == 0
    )  # type: ignore[arg-type]


# What is served -------------------------------------------------------------------------------------------------------


def test_the_page_and_its_parts(server: ReviewServer, root: Path) -> None:
    page = ask(server, "")
    assert page.status == 200 and b"<title>" in page.body
    assert NASTY.encode() not in page.body and b"onerror=alert(1)>" not in page.body.split(b"application/json")[0]
    for name, kind in (("gallery.js", "text/javascript"), ("gallery.css", "text/css")):
        assert ask(server, name).headers["Content-Type"] == f"{kind}; charset=utf-8"
    rows = ask(server, "rows/0").json()
    assert len(rows) == 80 == len(server.view.rows)
    assert {len(row["path"].splitlines()) for row in rows} == {1}
    assert any(row["path"].endswith("caf\\xe9.jpg") for row in rows)
    edits = server.view.edits
    for row in server.view.rows:
        answer = ask(server, f"edit/{row['shard']}/{row['row']}")
        data = edits.encoded_row(int(row["shard"]), row)
        assert (answer.status, answer.body) == (200, data) if data else answer.status == 404
        assert data is None or answer.headers["Content-Type"] == "image/jpeg"
    sizes = {edits.catalog.path(number): number for number in range(len(edits.catalog))}
    assert ask(server, f"original/{sizes['ants/photo.8.jpg']}").status == 404
    large = next(number for path, number in sizes.items() if path.endswith("photo.6.jpg"))
    assert Image.open(io.BytesIO(ask(server, f"original/{large}").body)).size == (512, 384)
    assert Image.open(io.BytesIO(ask(server, f"original/{large}/large").body)).size == (800, 600)


def test_raw_edits_are_shown_to_the_last_bit(root: Path, tmp_path: Path) -> None:
    generate(root, tmp_path / "edits", GenerateConfig(prompts=("autumn",), size=32, format="raw"))
    with serving(tmp_path / "edits") as server:
        edits = server.view.edits
        answer = ask(server, f"edit/{edits.index['shard'][0]}/0")
        assert answer.headers["Content-Type"] == "image/png"
        np.testing.assert_array_equal(decode(answer.body), decode(edits.encoded(0)))


def test_every_reply_has_the_headers_that_browsers_heed(server: ReviewServer) -> None:
    original = next(path for path in ("original/0", "original/1") if ask(server, path).status == 200)
    for inner in ("", "gallery.js", "rows/0", original, "nothing", "/", "/open/nothing", None):
        headers = ask(server, inner).headers
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and headers["X-Frame-Options"] == "DENY"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self';" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "form-action 'none'" in policy
        assert headers["Cache-Control"] == ("private, max-age=3600" if inner == original else "no-store")
        assert "Access-Control-Allow-Origin" not in headers and "Python" not in headers["Server"]
    for method in ("PUT", "OPTIONS", "DELETE", "<script>"):
        refused = ask(server, "", method=method)
        assert refused.status == 501 and refused.headers["X-Content-Type-Options"] == "nosniff"
        assert refused.headers["Content-Type"] == "text/plain"


def test_it_listens_on_loopback_only(server: ReviewServer) -> None:
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    addresses = {line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{server.port:04X}")}
    assert addresses == {f"0100007F:{server.port:04X}"}


@pytest.mark.parametrize(
    "inner",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "rows/-1", "rows/1e3", "rows/٣", "rows/99", "rows/0/0", "rows/",
     "edit/0", "edit/0/99999", "edit/9999999999/0", "edit/9999999999/9999999999", "original/99", "original/0/huge",
     "gallery.html", "gallery.js/", "gallery.js?x", "?x", "store.json", "edit//0/0", "decisions"],
)  # fmt: skip
def test_nothing_else_is_served(server: ReviewServer, inner: str) -> None:
    target = server.address.split("/", 3)[3] + inner
    request = f"GET /{target} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
    assert raw(server, request.encode()).startswith(b"HTTP/1.1 404 ")


def raw(server: ReviewServer, request: bytes) -> bytes:
    """Send bytes; all that comes back until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# Who is not answered --------------------------------------------------------------------------------------------------


def test_without_the_token_nothing_is_served(server: ReviewServer) -> None:
    token = server.address.split("/")[3]
    assert len(token) == 32
    wrong = [token[:-1], token + "x", token.swapcase(), token[1:], "", "é", "open", f"open/{token}", f"x/{token}"]
    for first in wrong:
        for inner in ("", "gallery.js", "rows/0", "edit/0/0", "original/0"):
            target = f"/{first}/{inner}".encode()
            answer = raw(server, b"GET " + target + f" HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            assert answer.startswith(b"HTTP/1.1 403 "), target
            assert token.encode() not in answer
    assert ask(server, "/").status == ask(server, "/favicon.ico").status == 403
    moved = ask(server, f"/{token}")
    assert (moved.status, moved.headers["Location"]) == (303, f"/{token}/")


@pytest.mark.parametrize("host", ["evil.test", "evil.test:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.:{port}",
                                  "[::1]:{port}", "127.0.0.1:{port}.evil.test", "", None])  # fmt: skip
def test_another_name_of_this_host_is_refused(server: ReviewServer, host: str | None) -> None:
    """A page of evil.test, whose name suddenly means 127.0.0.1, has the origin http://evil.test."""
    host = None if host is None else host.format(port=server.port)
    for inner in ("", "gallery.js", "rows/0"):
        answer = ask(server, inner, Host=host)
        assert answer.status == 403 and "Host must be" in answer.json()["error"]
    body = {"decision": "reject", "edits": accepted(server)[:1]}
    assert post(server, body, Host=host).status == 403
    assert not server.view.decisions.file.exists()
    assert ask(server, "", Host=f"localhost:{server.port}").status == 200


def test_two_hosts_are_refused(server: ReviewServer) -> None:
    host = f"Host: 127.0.0.1:{server.port}\r\n"
    path = "/" + server.address.split("/", 3)[3]
    assert raw(server, f"GET {path} HTTP/1.1\r\n{host}Host: evil.test\r\n\r\n".encode()).startswith(b"HTTP/1.1 403 ")
    assert raw(server, f"GET {path} HTTP/1.0\r\n\r\n".encode()).startswith(b"HTTP/1.1 403 ")


def test_a_decision_comes_from_the_page_of_this_server_or_not_at_all(server: ReviewServer) -> None:
    body = {"decision": "reject", "edits": accepted(server)[:1]}
    own = server.address[:-1].rpartition("/")[0]
    refused: list[tuple[int, dict[str, str | None]]] = [
        (403, {"Origin": None}),
        (403, {"Origin": "null"}),
        (403, {"Origin": "http://evil.test"}),
        (403, {"Origin": f"http://localhost:{server.port}"}),  # where Host is 127.0.0.1
        (403, {"Origin": f"https://127.0.0.1:{server.port}"}),
        (403, {"Origin": f"{own}.evil.test"}),
        (403, {"Sec_Fetch_Site": "cross-site"}),
        (403, {"Sec_Fetch_Site": "same-site"}),
        (403, {"Sec_Fetch_Site": "none"}),
        (415, {"Content_Type": "text/plain"}),
        (415, {"Content_Type": "application/x-www-form-urlencoded"}),
        (415, {"Content_Type": None}),
        (411, {"Content_Length": None}),
        (411, {"Content_Length": "-5"}),
        (411, {"Content_Length": "4_0"}),
        (411, {"Transfer_Encoding": "chunked"}),
        (413, {"Content_Length": str(1 << 30)}),
    ]
    for status, headers in refused:
        assert post(server, body, **headers).status == status, headers
    assert not server.view.decisions.file.exists()
    assert ask(server, "rows/0", Sec_Fetch_Site="cross-site").status == 403
    assert ask(server, "", Sec_Fetch_Site="cross-site").status == 200  # a link to the page
    assert (
        post(server, body, Sec_Fetch_Site="same-origin", Content_Type="application/json; charset=utf-8").status == 200
    )
    assert len(server.view.decisions.rejected()) == 1
    local = f"localhost:{server.port}"
    assert post(server, body, Host=local, Origin=f"http://{local}").status == 200


def test_the_body_of_a_refused_request_is_not_read_as_another(server: ReviewServer) -> None:
    path = "/" + server.address.split("/", 3)[3]
    inner = f"GET {path}rows/0 HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
    for line in (f"POST {path}decisions", "POST /", "GET /", f"GET {path}", f"GET {path}rows/0"):
        head = f"{line} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(inner)}\r\n\r\n"
        answers = raw(server, (head + inner).encode())
        assert answers.count(b"HTTP/1.1 ") == 1 and b'"path"' not in answers, line


def test_a_ticket_opens_the_page_once(server: ReviewServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line of a browser is no secret among the users of a machine."""
    browser, said = tmp_path / "browser", tmp_path / "said"
    browser.write_text(f'#!/bin/sh\necho "$1" > {said}.part; mv {said}.part {said}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    open_browser(server)
    until(said.exists)
    address = said.read_text().strip()
    assert server.address.split("/")[3] not in address
    target = "/" + address.split("/", 3)[3]
    moved = ask(server, target)
    assert moved.status == 303 and server.address.endswith(moved.headers["Location"])
    assert ask(server, target).status == 403


# Decisions ------------------------------------------------------------------------------------------------------------


def test_decisions_are_in_the_file_when_the_reply_comes(server: ReviewServer) -> None:
    pairs, decisions = accepted(server), server.view.decisions
    assert post(server, {"decision": "reject", "edits": pairs}).json() == {"saved": len(pairs)}
    names = decisions.rejected()
    edits = server.view.edits
    assert len(names) == len(pairs) == len(edits)
    assert {(name.path, name.prompt) for name in names} == {
        (edits.catalog.path(int(row["original"])), edits.prompts[row["prompt"]]) for row in edits.index
    }
    assert {name.shard for name in names} == {0, 1, 2}
    assert any(NOT_UTF8 in name.path for name in names) and any("\n" in name.path for name in names)
    assert server.view.rejected().sum() == len(pairs)
    assert post(server, {"decision": "undo", "edits": pairs[1:]}).status == 200
    rejected = np.flatnonzero(server.view.rejected())
    assert [[int(server.view.rows[name][place]) for name in ("shard", "row")] for place in rejected] == pairs[:1]


def test_only_accepted_edits_of_the_store_can_be_rejected(server: ReviewServer) -> None:
    rows = server.view.rows[~server.view.accepted()]
    bad = np.stack([rows["shard"], rows["row"]], 1).tolist()
    assert {VERDICTS[verdict] for verdict in rows["verdict"]} >= {"denied", "unreadable original", "structure_lost"}
    good = accepted(server)[0]
    for other in [*bad[:3], [0, 10**6], [5, 0], [-1, 0], [0, -1], [2**31, 0], [0, 2**32 + 1], [2**31 - 1, 2**31 - 1]]:
        answer = post(server, {"decision": "reject", "edits": [good, other]})
        assert answer.status == 400 and "Only accepted edits" in answer.json()["error"], other
    for body in (b"", b"{", b"\xff", b"null", b"[]", b"{}", b"[" * 10_000, {"decision": "reject"},
                 {"decision": "perhaps", "edits": [good]}, {"decision": ["reject"], "edits": [good]},
                 {"decision": "reject", "edits": good}, {"decision": "reject", "edits": [[0]]},
                 {"decision": "reject", "edits": [[0, 0, 0]]}, {"decision": "reject", "edits": [[True, 0]]},
                 {"decision": "reject", "edits": [[0.0, 0]]}, {"decision": "reject", "edits": [["0", "0"]]},
                 {"decision": "reject", "edits": "00"}, {"decision": "reject", "edits": [[10**30, 0]]},
                 {"decision": "reject", "edits": {"0": 0}}):  # fmt: skip
        assert post(server, body).status == 400, body
    assert not server.view.decisions.file.exists()


def test_a_decision_that_cannot_be_saved_is_an_error(server: ReviewServer) -> None:
    server.view.decisions.file.mkdir()
    answer = post(server, {"decision": "reject", "edits": accepted(server)[:1]})
    assert answer.status == 500 and "cannot be written (Is a directory)" in answer.json()["error"]
    server.view.decisions.file.rmdir()
    server.view.decisions.file.write_bytes(b"nonsense\n")
    answer = ask(server, "")
    assert answer.status == 500 and "line 1 must be a decision" in answer.json()["error"]


def test_several_pages_decide_at_once(server: ReviewServer) -> None:
    pairs = accepted(server)

    def choose(pair: list[int]) -> None:
        for decision in ("reject", "undo", "reject"):
            assert post(server, {"decision": decision, "edits": [pair]}).status == 200

    threads = [threading.Thread(target=choose, args=(pair,)) for pair in pairs[:12]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.view.decisions.rejected()) == 12


# The command ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_reviewed(made: Path, tmp_path: Path, server: ReviewServer) -> None:
    with pytest.raises(StoreError, match="there is no edit store"):
        ReviewServer(tmp_path)
    with pytest.raises(ConfigError, match="root must be the folder of the originals"):
        ReviewServer(made, root=tmp_path / "nothing")
    with pytest.raises(ConfigError, match=rf"port must be one that is free on 127\.0\.0\.1, found {server.port}: Addr"):
        ReviewServer(made, port=server.port)
    Decisions.of(made).file.write_text("nonsense\n")
    try:
        with pytest.raises(StoreError, match="line 1 must be a decision"):
            ReviewServer(made)
    finally:
        Decisions.of(made).file.unlink()


def test_without_originals_the_edits_are_shown(made: Path, tmp_path: Path) -> None:
    with serving(Path(shutil.copytree(made, tmp_path / "copy"))) as server:  # nobody noted where its originals are
        assert not server.view.originals.found
        assert {row["originalSize"] for row in ask(server, "rows/0").json()} == {None}
        assert ask(server, "original/0").status == 404


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c(made: Path, root: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(made, tmp_path / "edits"))
    command = [*PROGRAM, "review", str(store), "--root", str(root), "--no-open"]
    decisions = tmp_path / "edits.decisions.jsonl"
    with started([*command, "--json"]) as first, started(command) as second:  # beside each other
        said = json.loads(first.stdout.readline())
        assert said["edits"] == 80 and said["originals"] is True and str(said["port"]) in said["address"]
        assert said["decisions"] == str(decisions)
        server: Any = SimpleNamespace(address=said["address"], port=said["port"])
        assert post(server, {"decision": "reject", "edits": [[0, 0]]}).status == 200
        line = second.stdout.readline()
        assert re.fullmatch(r"80 edits at http://127\.0\.0\.1:\d+/[\w-]{32}/\n", line) and said["address"] not in line
        assert second.stdout.readline() == "Press Ctrl-C to end.\n"
        for process, last in ((second, f"1 edit is rejected, in {decisions}\n"), (first, "")):
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            assert (process.stdout.read(), process.stderr.read()) == (last, "")


@contextmanager
def started(command: list[str]) -> Iterator[Any]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


# In a browser ---------------------------------------------------------------------------------------------------------


class Reviewer:
    """A person at a keyboard."""

    def __init__(self, browser: Any, server: ReviewServer) -> None:
        from selenium.webdriver.common.keys import Keys

        self.browser, self.server, self.names = browser, server, Keys

    def open(self, filters: str = "") -> None:
        self.browser.get("about:blank")
        self.browser.get(self.server.address + filters)
        self.settled()

    def reload(self) -> None:
        self.browser.refresh()
        self.settled()

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser, duration=0).send_keys(*(getattr(self.names, key, key) for key in keys)).perform()

    def js(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def settled(self) -> None:
        """Wait until all that is in view is loaded, and nothing is being saved."""
        until(lambda: self.js("""
            return document.readyState === "complete" && document.getElementById("gallery")
              && !document.querySelector(".badge.saving") && [...document.querySelectorAll(".card")].every((card) =>
                card.querySelectorAll(".well img, .tile, .none").length === 2
                && [...card.querySelectorAll("img")].every((image) => image.complete && image.naturalWidth));
        """))  # fmt: skip

    def text(self, id: str) -> str:
        return str(self.js("return document.getElementById(arguments[0]).textContent", id))

    @property
    def count(self) -> str:
        return self.text("count")

    @property
    def here(self) -> str:
        """The label of what has the focus."""
        return str(self.js("return document.activeElement.getAttribute('aria-label') || document.activeElement.id"))

    def shown(self, what: str) -> int:
        return int(
            self.js(
                "return [...document.querySelectorAll(arguments[0])].filter((one) => one.offsetHeight).length", what
            )
        )

    def choose(self, id: str, text: str) -> None:
        """Set a filter."""
        from selenium.webdriver.support.ui import Select

        before = self.js("return location.hash")
        Select(self.browser.find_element("id", id)).select_by_visible_text(text)
        until(lambda: self.js("return location.hash") != before)
        self.settled()


@pytest.fixture
def reviewer(browser: Any, server: ReviewServer) -> Iterator[Reviewer]:
    browser.get_log("browser")
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # as if its window was in front
    yield Reviewer(browser, server)
    browser.get("about:blank")


@pytest.mark.slow
def test_thirty_edits_are_rejected_by_keys_alone(reviewer: Reviewer) -> None:
    decisions, total = reviewer.server.view.decisions, len(reviewer.server.view.edits)
    reviewer.open("#verdict=accepted")
    assert reviewer.count == f"1 of {total} seen, 0 rejected"
    reviewer.press(*["x", "ARROW_RIGHT"] * 30)
    until(lambda: reviewer.count == f"31 of {total} seen, 30 rejected")
    first = np.flatnonzero(reviewer.server.view.accepted())[:30]
    assert decisions.rejected() == {reviewer.server.view.name(place) for place in first.tolist()}

    reviewer.press("u")  # of the last one, which gets the focus
    until(lambda: "29 rejected" in reviewer.count)
    assert decisions.rejected() == {reviewer.server.view.name(place) for place in first[:-1].tolist()}
    assert "no longer rejected" in reviewer.text("news") and "rejected by hand" not in reviewer.here

    place = reviewer.here
    reviewer.reload()
    assert "29 rejected" in reviewer.count and reviewer.here == place and reviewer.count.startswith("31 of")
    reviewer.press("ARROW_LEFT")
    assert "rejected by hand" in reviewer.here
    reviewer.press("u")  # after a reload there is no step to undo: of the edit that has the focus
    until(lambda: "28 rejected" in reviewer.count)
    reviewer.press("x", "x", "x")
    until(lambda: "29 rejected" in reviewer.count and not reviewer.shown(".badge.saving"))
    reviewer.press("u", "u")
    until(lambda: "29 rejected" in reviewer.count and not reviewer.shown(".badge.saving"))
    assert len(decisions.rejected()) == 29
    reviewer.press("HOME", "ARROW_DOWN", "ARROW_UP")
    assert reviewer.js("return document.activeElement.closest('.card').dataset.position") == "0"
    reviewer.press("END")
    assert reviewer.js("return document.activeElement.closest('.card').dataset.position") == str(total - 1)
    assert reviewer.browser.get_log("browser") == []


@pytest.mark.slow
def test_filters_stay_in_the_address(reviewer: Reviewer) -> None:
    view = reviewer.server.view
    reviewer.open()
    everything = f"of {len(view.rows)} seen"
    assert everything in reviewer.count
    reviewer.choose("prompt", "snowy")
    reviewer.choose("class", "ants")
    reviewer.choose("sort", "worst first, by score")
    address = reviewer.browser.current_url
    assert address.endswith("#class=ants&prompt=snowy&sort=score")
    assert "of 5 seen" in reviewer.count and reviewer.text("filtered") == "· class ants, prompt snowy"
    reviewer.reload()
    assert reviewer.browser.current_url == address and "of 5 seen" in reviewer.count
    labels = reviewer.js("return [...document.querySelectorAll('.pair')].map((one) => one.getAttribute('aria-label'))")
    scores = [float(match[1]) for label in labels if (match := re.search(r"score ([\d.]+)", label))]
    assert len(labels) == 5 and len(scores) == 4 and scores == sorted(scores) and "unreadable" in labels[-1]
    reviewer.browser.back()
    until(lambda: reviewer.js("return document.getElementById('sort').value") == "")
    reviewer.browser.back()
    until(lambda: "of 20 seen" in reviewer.count)
    reviewer.browser.forward()
    until(lambda: "of 5 seen" in reviewer.count)
    reviewer.open("#class=nothing&prompt=snowy&verdict=&decision=undecided")  # of another store, or mistyped
    assert f"of {(view.edits.index['prompt'] == 1).sum()} seen" in reviewer.count
    reviewer.open("#class=bees&prompt=mosaic&verdict=accepted")
    assert reviewer.shown("#nothing") == 1
    reviewer.js("document.querySelector('#nothing button').click()")
    until(lambda: everything in reviewer.count)


@pytest.mark.slow
def test_keys_are_for_the_edits_again_after_a_menu(reviewer: Reviewer) -> None:
    """And whoever asks for another order begins at its first edit."""
    reviewer.open("#verdict=accepted")
    reviewer.press("END")
    position = "return document.activeElement.closest('.card')?.dataset.position"
    assert reviewer.js(position) != "0"
    reviewer.js("document.getElementById('sort').dispatchEvent(new PointerEvent('pointerdown'))")  # by the mouse
    reviewer.choose("sort", "worst first, by score")
    assert reviewer.js(position) == "0"
    reviewer.press("ARROW_RIGHT", "x")
    until(lambda: "1 rejected" in reviewer.count and not reviewer.shown(".badge.saving"))
    view = reviewer.server.view
    scores = np.where(view.accepted(), view.rows["score"], np.inf)
    assert view.rejected()[np.argsort(scores, kind="stable")[1]]
    # By keys: Esc leaves the menu.
    reviewer.js("document.getElementById('prompt').focus()")
    before = reviewer.js("return location.hash")
    reviewer.press("ARROW_DOWN")
    until(lambda: reviewer.js("return location.hash") != before)
    reviewer.settled()
    assert reviewer.here == "prompt"
    reviewer.press("ESCAPE", "x")
    until(lambda: "rejected" in reviewer.count and not reviewer.shown(".badge.saving"))
    assert reviewer.js(position) == "0" and view.rejected().sum() in (0, 2)


@pytest.mark.slow
def test_edits_are_sorted_by_any_score(
    made: Path, root: Path, tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = np.random.default_rng(0).random(80).astype(np.float32)
    kept[::7] = np.nan
    monkeypatch.setattr(gallery, "scores_of", lambda edits, rows: {"score": rows["score"], "kept": kept})
    with serving(Path(shutil.copytree(made, tmp_path / "edits")), root=root) as server:
        reviewer = Reviewer(browser, server)
        for chosen, wanted in (("lowest kept first", np.sort(kept)), ("highest kept first", -np.sort(-kept))):
            reviewer.open()
            reviewer.choose("sort", chosen)
            labels = reviewer.js("return [...document.querySelectorAll('.pair')].map((one) => one.ariaLabel)")
            found = [float(match[1]) for label in labels if (match := re.search(r"kept ([\d.e-]+)", label))]
            assert found == pytest.approx(wanted[: len(found)].tolist(), rel=0.01) and len(found) > 3
            reviewer.press("END")
            assert "kept" not in reviewer.here  # edits without the score are last
        browser.get("about:blank")


@pytest.mark.slow
def test_all_that_is_shown_is_rejected_and_that_is_undone_in_one_step(reviewer: Reviewer) -> None:
    view, decisions = reviewer.server.view, reviewer.server.view.decisions
    snowy = [place for place in np.flatnonzero(view.accepted()).tolist() if view.name(place).prompt == "snowy"]
    reviewer.open("#prompt=snowy")
    first = next(place for place in range(20) if reviewer_can(reviewer, place))
    reviewer.press("HOME", *["ARROW_RIGHT"] * first, "x")
    until(lambda: "1 rejected" in reviewer.count)
    reviewer.press("A")
    assert reviewer.text("confirm-text") == f"Reject {len(snowy) - 1} edits?"
    assert "prompt snowy" in reviewer.text("confirm-why")
    reviewer.press("ENTER")  # Cancel has the focus
    assert not reviewer.js("return document.getElementById('confirm').open") and len(decisions.rejected()) == 1
    reviewer.press("A", "TAB", "ENTER")
    until(lambda: f"{len(snowy)} rejected" in reviewer.count)
    assert decisions.rejected() == {view.name(place) for place in snowy}
    reviewer.press("u")
    until(lambda: "1 rejected" in reviewer.count)
    assert len(decisions.rejected()) == 1
    reviewer.press("u", "u")
    until(lambda: ", 0 rejected" in reviewer.count)
    assert decisions.rejected() == set() and reviewer.text("news") == "There is nothing to undo."
    assert reviewer.browser.get_log("browser") == []


def reviewer_can(reviewer: Reviewer, position: int) -> bool:
    """Whether the edit at a position among those shown can be rejected."""
    return bool(reviewer.js(f"return document.querySelector('.card[data-position=\"{position}\"] .mark') !== null"))


@pytest.mark.slow
def test_an_edit_is_judged_large(reviewer: Reviewer) -> None:
    reviewer.open("#class=ants&prompt=autumn")
    box = "document.getElementById('box')"
    reviewer.press("ENTER")
    assert reviewer.js(f"return {box}.open") and reviewer.shown("#box figure") == 2
    captions = reviewer.js("return [...document.querySelectorAll('#box figcaption')].map((one) => one.textContent)")
    assert captions[0].startswith("original, 80 × ") and captions[1].startswith("edit, 48 × 48, each pixel ")
    name = reviewer.text("box-facts")
    reviewer.press("x")
    until(lambda: reviewer.text("box-mark") == "rejected")
    assert len(reviewer.server.view.decisions.rejected()) == 1
    reviewer.press("SPACE")
    assert reviewer.shown("#box figure") == 1 and reviewer.text("box-pictures").startswith("original")
    reviewer.press("f")
    assert reviewer.text("box-pictures").startswith("edit")
    reviewer.press("ARROW_RIGHT")
    assert reviewer.text("box-facts") != name and "2 of 5" in reviewer.text("box-facts")
    reviewer.press("u")
    until(lambda: ", 0 rejected" in reviewer.count)
    assert reviewer.text("box-facts") == name
    reviewer.press("ESCAPE")
    until(lambda: not reviewer.js(f"return {box}.open"))
    assert reviewer.js("return document.activeElement.closest('.card').dataset.position") == "0"
    reviewer.press("ENTER", "ENTER")
    assert not reviewer.js(f"return {box}.open")
    assert reviewer.browser.get_log("browser") == []


@pytest.mark.slow
def test_what_quality_rejected_is_shown_and_cannot_be_chosen(reviewer: Reviewer) -> None:
    view = reviewer.server.view
    count = int((view.rows["verdict"] == VERDICTS.index("structure_lost")).sum())
    reviewer.open("#verdict=rejected")
    assert f"of {count} seen" in reviewer.count and reviewer.shown(".badge.quality") == reviewer.shown(".card") > 0
    assert reviewer.shown(".mark") == 0
    reviewer.press("x")
    assert "Only accepted edits can be rejected" in reviewer.text("news")
    reviewer.press("A")
    assert "No edit is shown that could be rejected" in reviewer.text("news")
    assert not view.decisions.file.exists()


@pytest.mark.slow
def test_a_choice_that_is_not_saved_is_not_shown_as_saved(reviewer: Reviewer) -> None:
    file = reviewer.server.view.decisions.file
    reviewer.open("#verdict=accepted")
    reviewer.press("x", "ARROW_RIGHT")
    until(lambda: "1 rejected" in reviewer.count)
    kept = file.read_bytes()
    file.unlink()
    file.mkdir()
    reviewer.press("x")
    until(lambda: reviewer.shown("#problem") == 1)
    assert "Not saved" in reviewer.text("problem") and "Is a directory" in reviewer.text("problem")
    assert "1 rejected" in reviewer.count and "rejected by hand" not in reviewer.here
    assert reviewer.shown(".badge.hand") == 1 and reviewer.shown(".badge.saving") == 0
    reviewer.press("ENTER", "x")  # large, the problem is in view too
    until(lambda: reviewer.text("box-mark") == "")
    assert reviewer.js("return document.getElementById('problem').closest('#box') !== null")
    reviewer.press("ESCAPE")
    file.rmdir()
    file.write_bytes(kept)
    reviewer.press("x")
    until(lambda: "2 rejected" in reviewer.count)
    assert reviewer.shown("#problem") == 0
    reviewer.press("u")
    until(lambda: "1 rejected" in reviewer.count)

    reviewer.server.stop()
    reviewer.server._server.server_close()
    reviewer.press("x")
    until(lambda: "the server does not answer" in reviewer.text("problem"))
    assert "1 rejected" in reviewer.count


@pytest.mark.slow
def test_evil_names_are_shown_and_do_nothing(reviewer: Reviewer) -> None:
    reviewer.open()
    text = reviewer.js(
        "return document.getElementById('class').textContent + document.getElementById('gallery').textContent"
    )
    assert NASTY in text and "caf\\xe9 two" in text
    seen = set()
    for _ in range(20):
        seen |= set(reviewer.js("return [...document.querySelectorAll('.words p + p')].map((one) => one.textContent)"))
        reviewer.press(*["ARROW_DOWN"] * 2)
        reviewer.settled()
    assert any(f"{NASTY}\\nsecond line.jpg" in path for path in seen) and any("caf\\xe9.jpg" in path for path in seen)
    reviewer.choose("class", NASTY)
    reviewer.reload()
    assert "of 20 seen" in reviewer.count and NASTY in reviewer.text("filtered")
    reviewer.press("ENTER", "ESCAPE", "A", "ESCAPE")
    injected = "main p img, header img, option img, #filtered img, script:not([src]):not([type])"
    assert reviewer.js("return document.querySelectorAll(arguments[0]).length", injected) == 0
    assert reviewer.browser.get_log("browser") == []  # no script ran, and none was refused


@pytest.mark.slow
def test_evil_prompts_and_settings_do_nothing_either(made: Path, root: Path, tmp_path: Path, browser: Any) -> None:
    """Of a store that somebody else made; the report has the same content."""
    evil = "</script><script>alert(3)</script>\n<b onclick=alert(4)>\u2028\u202e{{data}} winter"
    store = Path(shutil.copytree(made, tmp_path / "edits<i>{{policy}}"))
    content = json.loads((store / "store.json").read_text())
    content["prompts"][1], content["settings"]["model"] = evil, evil
    content["settings"][evil] = evil
    (store / "store.json").write_text(json.dumps(content))
    page = write_report(store, tmp_path / "report", root=root).page
    browser.get_log("browser")
    with serving(store, root=root) as server:
        for address in (server.address, page.as_uri()):
            browser.get(address)
            until(lambda: browser.execute_script("return document.querySelectorAll('.card').length"))
            text, scripts, title = browser.execute_script("""
                const shown = ["prompt", "gallery", "tally", "settings"].map((id) => document.getElementById(id));
                return [shown.map((one) => one.textContent), document.querySelectorAll("script:not([src])").length,
                  document.querySelector("h1").textContent];
            """)
            shown = evil.replace("\n", "\\n").replace("\u2028", "\\u2028").replace("\u202e", "\\u202e")
            assert all(shown in part for part in text) and "edits<i>{{policy}}" in title
            assert scripts == 1  # the content, which is no script
            assert browser.get_log("browser") == []
        reviewer = Reviewer(browser, server)
        reviewer.open()
        reviewer.press("ARROW_RIGHT", "x")
        until(lambda: "1 rejected" in reviewer.count)
        assert {name.prompt for name in server.view.decisions.rejected()} == {evil}
        browser.get("about:blank")


@pytest.mark.slow
def test_whoever_does_not_see_it_hears_what_it_is(reviewer: Reviewer) -> None:
    """Names and states of what can be used; and whoever has only keys sees where they are."""
    reviewer.open("#class=ants")
    for element in reviewer.browser.find_elements("css selector", "button, select, summary"):
        assert not element.is_displayed() or element.accessible_name, element.get_attribute("outerHTML")
    cards = reviewer.browser.find_elements("css selector", ".card")
    assert {card.aria_role for card in cards} == {"listitem"}
    assert [card.get_attribute("aria-posinset") for card in cards] == [str(n + 1) for n in range(len(cards))]
    names = [card.find_element("css selector", ".pair").accessible_name for card in cards]
    assert all(
        re.match(r"(autumn|snowy|mosaic|sunset), class ants, ants/.*, [a-z_]+, score 0\.\d+$", name) for name in names
    )
    assert len(reviewer.js("return [...document.querySelectorAll('.pair')].filter((one) => one.tabIndex === 0)")) == 1
    seen = []
    reviewer.js("document.getElementById('class').focus()")
    for _ in range(9):
        seen.append(reviewer.js("return document.activeElement.id || document.activeElement.className"))
        assert reviewer.js("""
            const at = document.activeElement;
            return [at, at.closest(".card")].some((one) => one && getComputedStyle(one).outlineStyle !== "none");
        """)
        reviewer.press("TAB")
    assert seen == ["class", "prompt", "verdict", "decision", "sort", "reject-all", "help", "pair", "mark reject"]
    reviewer.press("?")
    assert reviewer.js("return document.getElementById('keys').open")
    reviewer.press("ESCAPE")
    assert not reviewer.js("return document.getElementById('keys').open")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "columns"), [(390, 1), (768, 1), (1280, 2), (1920, 3)])
def test_it_fits_a_phone_and_a_desk(reviewer: Reviewer, width: int, columns: int) -> None:
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    reviewer.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        reviewer.open("#verdict=accepted")
        wide = reviewer.js("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1] <= width
        lefts = set(reviewer.js("return [...document.querySelectorAll('.card')].map((one) => one.style.left)"))
        assert len(lefts) == columns
        sides = reviewer.js("return [...document.querySelectorAll('.well')].map((one) => one.offsetWidth)")
        assert min(sides) >= (160 if width == 390 else 256)
        # Each picture is within its room, and small ones are enlarged by whole factors, and say so.
        sizes = reviewer.js("return [...document.querySelectorAll('.pixels')].map((one) => one.offsetWidth)")
        assert sizes and all(size % 48 == 0 or size % 80 == 0 for size in sizes)
        assert reviewer.shown(".size") == reviewer.shown(".pixels")
        reviewer.press("ENTER")
        sizes = reviewer.js("const box = document.getElementById('box'); return [box.scrollHeight, box.scrollWidth]")
        assert sizes[0] <= 844 and sizes[1] <= width
    finally:
        reviewer.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_a_hundred_thousand_edits_open_with_a_few_requests(
    made: Path, root: Path, tmp_path: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of a store, repeated: only the cards in view are made, and only what they show is asked for."""
    monkeypatch.setattr(review, "current_rows", lambda edits: np.tile(current_rows(edits), 1250))
    asked: list[str] = []
    answer = ReviewServer.answer

    def recorded(self: ReviewServer, method: str, target: str, *rest: Any) -> Any:
        asked.append(target.split("/", 2)[2])
        return answer(self, method, target, *rest)

    monkeypatch.setattr(ReviewServer, "answer", recorded)
    with serving(Path(shutil.copytree(made, tmp_path / "edits")), root=root) as server:
        reviewer = Reviewer(browser, server)
        reviewer.open("#sort=score")
        assert "of 100,000 seen" in reviewer.count and reviewer.shown(".card") < 20
        assert len(asked) < 60
        reviewer.press("END")
        reviewer.settled()
        assert reviewer.js("return document.activeElement.closest('.card').dataset.position") == "99999"
        reviewer.press("HOME", *["ARROW_RIGHT"] * 5)
        assert "7 of 100,000 seen" in reviewer.count and reviewer.shown(".card") < 30
        assert len([one for one in asked if one.startswith("rows/")]) < 30
        browser.get("about:blank")


# Other sites ----------------------------------------------------------------------------------------------------------

ATTACKS = """<!doctype html><title>evil</title><body><script>
const [base, token, body] = %s;
const tries = [];
const record = (name, made) =>
  tries.push(made.then((answer) => [name, answer], (error) => [name, "refused: " + error.name]));
const read = async (response) => response.type + " " + response.status + " " + (await response.text()).slice(0, 20);
for (const address of [base + "/decisions", base + "/" + token + "/decisions", base + "/x/decisions"]) {
  for (const credentials of ["omit", "include"]) {
    record("json " + credentials, fetch(address, { method: "POST", credentials, body,
      headers: { "Content-Type": "application/json" } }).then(read));
    for (const type of ["text/plain", "application/x-www-form-urlencoded"]) {
      const sent = { method: "POST", credentials, body, headers: { "Content-Type": type } };
      record("simple " + credentials, fetch(address, sent).then(read));
      record("no-cors " + credentials, fetch(address, { ...sent, mode: "no-cors" }).then(read));
    }
    record("no-cors json " + credentials, fetch(address, { method: "POST", mode: "no-cors", credentials,
      body: new Blob([body], { type: "application/json" }) }).then(read));
  }
  record("beacon", Promise.resolve(String(navigator.sendBeacon(address, body))));
  const form = document.createElement("form"), field = document.createElement("input");
  const frame = document.createElement("iframe");
  frame.name = address;
  Object.assign(form, { action: address, method: "POST", enctype: "text/plain", target: address });
  Object.assign(field, { name: body.slice(0, -1) + ', "x": "', value: '"}' });
  form.append(field);
  document.body.append(frame, form);
  form.submit();
}
for (const inner of ["rows/0", "", "gallery.js"]) {
  record("get", fetch(base + "/" + token + "/" + inner).then(read));
  record("get no-cors", fetch(base + "/" + token + "/" + inner, { mode: "no-cors" }).then(read));
}
for (const name of ["script", "img", "iframe"]) {
  const made = document.createElement(name);
  made.src = base + "/" + token + "/" + (name === "script" ? "gallery.js" : "original/1");
  record(name, new Promise((then) => { made.onload = () => then("loaded"); made.onerror = () => then("error"); }));
  document.body.append(made);
}
const wait = new Promise((then) => setTimeout(then, 1500));
Promise.all([...tries.map((one) => Promise.race([one, wait.then(() => ["late", ""])])), wait])
  .then((all) => { window.found = all; });
</script>"""


@contextmanager
def site(page: str) -> Iterator[str]:
    """Another site; its address."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://localhost:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_page_of_another_site_decides_and_reads_nothing(
    server: ReviewServer, browser: Any, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one that knows the token; it is at another port, of another host or of the same."""
    answers: list[tuple[str, int]] = []
    answer = ReviewServer.answer

    def recorded(self: ReviewServer, method: str, *rest: Any) -> Any:
        reply = answer(self, method, *rest)
        answers.append((method, int(reply.status)))
        return reply

    monkeypatch.setattr(ReviewServer, "answer", recorded)
    body = json.dumps({"decision": "reject", "edits": accepted(server)[:3]})
    values = json.dumps([f"http://{host}:{server.port}", server.address.split("/")[3], body])
    with site(ATTACKS % values) as address:
        browser.get(address)
        found = until(lambda: browser.execute_script("return window.found"))[:-1]
    browser.get("about:blank")
    browser.get_log("browser")
    assert not server.view.decisions.file.exists()
    posts = [status for method, status in answers if method == "POST"]
    assert len(posts) > 10 and set(posts) <= {403, 404, 415}  # they came, and were refused
    outcomes = {name: {one for what, one in found if what == name} for name, *_ in found if name != "late"}
    assert all(one.startswith(("refused", "opaque 0 ")) for name in outcomes for one in outcomes[name]
               if name not in ("beacon", "script", "img", "iframe")), outcomes  # fmt: skip
    assert all(len(one.split(" ", 2)[2]) == 0 for one in outcomes["get no-cors"] if one.startswith("opaque"))
    assert outcomes.get("script", {"error"}) == {"error"} and outcomes.get("img", {"error"}) == {"error"}


@pytest.mark.slow
def test_a_name_that_turns_to_this_host_reaches_nothing(server: ReviewServer, tmp_path: Path, browser: Any) -> None:
    """DNS rebinding, in a browser that believes that evil.test is 127.0.0.1."""
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for flag in ("headless", "no-sandbox", "disable-gpu", "host-resolver-rules=MAP evil.test 127.0.0.1"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    rebound = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        rebound.get(server.address.replace("127.0.0.1", "evil.test"))
        assert "Host must be" in rebound.page_source
        body = json.dumps({"decision": "reject", "edits": accepted(server)[:3]})
        done = rebound.execute_async_script(
            "const [body, done] = arguments; fetch('decisions', {method: 'POST', body, headers: "
            "{'Content-Type': 'application/json'}}).then((one) => done(one.status), (error) => done(String(error)))",
            body,
        )
    finally:
        rebound.quit()
    assert done == 403 or "Failed to fetch" in str(done)
    assert not server.view.decisions.file.exists()
