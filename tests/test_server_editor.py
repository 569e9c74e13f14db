"""generate.editors.server: a real server on loopback that answers well, badly or not at all."""

import json
import logging
import pickle
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from edit_server import MODEL, EditServer, edited
from material import photograph, write_photograph
from numpy.typing import NDArray
from test_cli import run, run_json
from test_options_file import options

from dali_diffusemix import EditStore
from dali_diffusemix.cli.generate import _config_of, _engine_of
from dali_diffusemix.errors import ConfigError, DiffuseMixError, WorkerError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import EditTask
from dali_diffusemix.generate.editors.server import KEY, ServerConfig
from dali_diffusemix.generate.engines.local import LocalEngine
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.store import UnfinishedStoreWarning

IMAGES = [photograph(seed, 32, 48) for seed in range(3)]
TASKS = [
    EditTask(image=image, prompt=prompt, seed=seed)
    for image in range(3)
    for prompt in ("autumn", "snöwy")
    for seed in (7, 2**64 - 1)
]


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture(scope="module")
def running() -> Iterator[EditServer]:
    with EditServer() as server:
        yield server


@pytest.fixture
def server(running: EditServer) -> EditServer:
    running.plan()
    return running


def config(server: EditServer, **changed: Any) -> ServerConfig:
    return ServerConfig(**{"url": server.url, "model": MODEL, "template": "make it {prompt}"} | changed)


def edits(config: ServerConfig, tasks: Sequence[EditTask] = TASKS) -> list[NDArray[np.uint8]]:
    return config.load(["autumn", "snöwy"], device="cpu", batch_size=1).edit(IMAGES, tasks)


def expected(task: EditTask) -> NDArray[np.uint8]:
    return edited(IMAGES[task.image], f"make it {task.prompt}", 1 + task.seed % (2**31 - 1))


def assert_made(made: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask] = TASKS) -> None:
    assert len(made) == len(tasks)
    for edit, task in zip(made, tasks, strict=True):
        assert edit.dtype == np.uint8
        np.testing.assert_array_equal(edit, expected(task))


# What is sent ---------------------------------------------------------------------------------------------------------


def test_an_edit_is_a_function_of_image_text_and_seed(server: EditServer) -> None:
    assert_made(edits(config(server)))
    assert len(server.seen()["forms"]) == len(TASKS)


def test_the_form_has_the_fields_that_servers_know(server: EditServer) -> None:
    given = config(
        server,
        template="a {class}, {prompt}",
        steps=20,
        guidance=4,
        negative_prompt="blurred",
        fields={"true_cfg_scale": 2.5, "enable_teacache": True, "layers": 4},
    )
    task = EditTask(image=0, prompt="in snöw\r\n--x", seed=2**31 - 2, class_name="yellow warbler")
    edits(given, [task])
    (form,) = server.seen()["forms"]
    assert form == {
        "path": "/v1/images/edits",
        "pixels": [48, 32],
        "file": ["image.png", "image/png"],
        "prompt": ["a yellow warbler, in snöw\r\n--x"],
        "model": [MODEL],
        "n": ["1"],
        "size": ["48x32"],
        "response_format": ["b64_json"],
        "output_format": ["png"],
        "seed": ["2147483647"],
        "num_inference_steps": ["20"],
        "guidance_scale": ["4"],
        "negative_prompt": ["blurred"],
        "true_cfg_scale": ["2.5"],
        "enable_teacache": ["true"],
        "layers": ["4"],
    }
    server.plan()
    edits(config(server), [EditTask(image=0, prompt="autumn", seed=0)])
    (form,) = server.seen()["forms"]
    assert form["seed"] == ["1"]  # 0 is a random seed to some
    assert form.keys().isdisjoint({"num_inference_steps", "guidance_scale", "negative_prompt"})


def test_no_more_requests_at_once_than_asked_for(server: EditServer) -> None:
    server.plan(*["slow:0.05"] * len(TASKS))
    assert_made(edits(config(server, requests=3)))
    assert server.seen()["at_once"] == 3


def test_edits_come_in_the_order_of_the_tasks(server: EditServer) -> None:
    server.plan("slow:0.4", "slow:0.2", "slow:0.1")
    assert_made(edits(config(server, requests=4)))


def test_settings_name_the_model_and_not_the_server(server: EditServer) -> None:
    given = config(server, revision="7 May", guidance=4, fields={"b": True, "a": "x"}, requests=2, patience=3)
    assert given.settings() == {
        "editor": "server",
        "model": MODEL,
        "revision": "7 May",
        "steps": None,
        "guidance": 4.0,
        "negative_prompt": None,
        "template": "make it {prompt}",
        "multiple": 16,
        "field a": "x",
        "field b": True,
    }
    assert pickle.loads(pickle.dumps(given)) == given
    sizes = GenerateConfig(editor=given, size=64)
    assert sizes.shard_length == 64  # as for a model on this machine
    with pytest.raises(ConfigError, match="edit_size must be divisible by 16"):
        GenerateConfig(editor=given, size=100)


# What may come back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        ["500", "502", "503", "504", "408", "409", "425", "429", "close", "cut", "noise", "chunked"],
        ["text:", "text:<html>hello</html>", "text:[]", "text:" + "[" * 100_000, 'text:{"data": []}', "damaged", "bomb"]
        + [
            f'text:{{"data": [{one}]}}'
            for one in ("1", "{}", '{"b64_json": null}', '{"b64_json": "?"}', '{"b64_json": "aGk="}')
        ],
    ],
    ids=["no answer", "no image"],
)
def test_a_failure_is_repeated(server: EditServer, plan: list[str]) -> None:
    assert len(plan) == len(TASKS)
    server.plan(*plan)
    assert_made(edits(config(server, requests=len(TASKS))))
    assert server.seen()["forms"]


@pytest.mark.parametrize(
    ("plan", "found"),
    [
        ("500", r"it answers HTTP 500 \(as planned\), 5 times; look at the server's log"),
        ("damaged", "its image cannot be decoded"),
        ("bomb", "no image that can be read .*limit"),
    ],
)
@pytest.mark.slow
def test_failures_do_not_go_on_for_ever(server: EditServer, plan: str, found: str) -> None:
    server.plan(*[plan] * 100)
    with pytest.raises(WorkerError, match=found):
        edits(config(server, requests=1), TASKS[:1])
    server.plan()


@pytest.mark.parametrize(
    ("plan", "found"), [("close", "the connection broke"), ("cut", "the connection broke"), ("503", "HTTP 503")]
)
def test_a_server_that_is_away_has_not_answered(server: EditServer, plan: str, found: str) -> None:
    """So it is waited for, instead of counting failures."""
    server.plan(plan)
    with pytest.raises(WorkerError, match=f"but for 0 s: {found}"):
        edits(config(server, patience=0), TASKS[:1])


def test_a_server_may_refuse_before_it_has_read_everything() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 7\r\n\r\ntoo big")
                connection.shutdown(socket.SHUT_WR)
                time.sleep(0.2)  # the client writes, until this end is closed

        thread = threading.Thread(target=answer)
        thread.start()
        noise = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), dtype=np.uint8)
        given = ServerConfig(url=f"http://127.0.0.1:{listening.getsockname()[1]}/v1", model="a", patience=0)
        with pytest.raises(ConfigError, match=r"HTTP 413 \(too big\)"):
            given.load([], device="cpu", batch_size=1).edit([noise], [EditTask(image=0, prompt="a", seed=1)])
        thread.join()


@pytest.mark.parametrize("status", [400, 404, 405, 413, 422])
def test_what_the_server_refuses_is_not_repeated(server: EditServer, status: int) -> None:
    server.plan(*[f"refuse:{status}"] * 100)
    with pytest.raises(ConfigError, match=rf"found HTTP {status} .*not so many") as caught:
        edits(config(server, requests=1))
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    assert ("usually ends in /v1" in str(caught.value)) == (status in (404, 405))
    server.plan()


@pytest.mark.parametrize("size", ["64x96", "32x47", "48x32"])
def test_an_edit_of_another_size_is_refused(server: EditServer, size: str) -> None:
    server.plan(f"sized:{size}")
    with pytest.raises(ConfigError, match=r"an edit of 32 x 48 pixels.*found .*; set edit_size to a side"):
        edits(config(server), TASKS[:1])


def test_an_edit_behind_a_url_is_refused(server: EditServer) -> None:
    server.plan('text:{"data": [{"b64_json": null, "url": "http://localhost/a.png"}]}')
    with pytest.raises(ConfigError, match="as response_format b64_json asks"):
        edits(config(server), TASKS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("after", ["seconds", "date"])
def test_the_server_says_when_to_come_again(server: EditServer, after: str) -> None:
    wanted = "2" if after == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=3), usegmt=True)
    server.plan(f"429:{wanted}")
    begin = time.monotonic()
    assert_made(edits(config(server), TASKS[:1]), TASKS[:1])
    assert time.monotonic() - begin >= 1.9
    server.plan("429:3600")  # it is asked again when patience ends, no later
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"for 1 s: HTTP 429"):
        server.plan(*["429:3600"] * 9)
        edits(config(server, patience=1), TASKS[:1])
    assert time.monotonic() - begin < 10


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["slow:60", "trickle"])
def test_an_answer_has_to_come_in_time(server: EditServer, plan: str) -> None:
    server.plan(plan)
    begin = time.monotonic()
    assert_made(edits(config(server, timeout=1), TASKS[:1]), TASKS[:1])
    assert 1 <= time.monotonic() - begin < 20


def test_the_first_error_ends_the_call(server: EditServer) -> None:
    """Whatever the order: the rest is neither waited for nor asked for."""
    server.plan("slow:5", "refuse:400")
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="HTTP 400"):
        edits(config(server, requests=2))
    assert time.monotonic() - begin < 4
    assert len(server.seen()["forms"]) < len(TASKS)


# A server that is away ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dali_diffusemix")
    with EditServer() as server:
        editor = config(server, patience=120).load([], device="cpu", batch_size=1)
        server.kill()
        threading.Timer(6, server.start).start()
        assert_made(editor.edit(IMAGES, TASKS))
        server.plan()  # it has started, so the timer is done
    warned, again = caplog.records
    assert re.search(
        r"is away or busy: no connection \(.*refused\). Waiting for it, for up to 11\d s", warned.getMessage()
    )
    assert warned.levelno == logging.WARNING and again.levelno == logging.INFO
    assert "answers again" in again.getMessage()


@pytest.mark.slow
def test_patience_has_an_end() -> None:
    with EditServer() as server:
        pass
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"must answer, but for 3 s: no connection .*; start it or correct its URL"):
        edits(config(server, patience=3))
    assert 3 <= time.monotonic() - begin < 20
    with pytest.raises(WorkerError, match="for 1 s"):
        config(server, patience=1).check([])


@pytest.mark.slow
def test_check_waits_for_the_server() -> None:
    with EditServer() as server:
        server.kill()
        threading.Timer(2, server.start).start()
        config(server, patience=60).check([])
        server.plan()


RUN = """
import logging, signal, sys
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors.server import ServerConfig
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    logging.basicConfig(level=logging.WARNING)
    root, store, url = sys.argv[1:]
    editor = ServerConfig(url=url, model="test/editor")
    def progress(done, total):
        print(done, flush=True)
    try:
        config = GenerateConfig(editor=editor, prompts=("autumn",), size=32, batch_size=2)
        generate(root, store, config, progress=progress)
    except KeyboardInterrupt as error:
        print(error, flush=True)
        sys.exit(130)
"""


@pytest.mark.slow
def test_ctrl_c_while_the_server_is_away(tmp_path: Path) -> None:
    """The first is noted, the second ends the run at once; so does one while the server is looked for."""
    for place in range(40):
        write_photograph(tmp_path / "train" / "a" / f"{place:02}.jpg", place, 40, 40)
    with EditServer(delay=0.05) as server:
        with warm.Script("-c", RUN, tmp_path / "train", tmp_path / "edits", server.url) as script:
            while int(script.stdout.readline()) < 4:
                pass
            server.kill()
            assert "Waiting for it, for up to" in script.stderr.readline()
            begin = time.monotonic()
            script.send_signal(signal.SIGINT)
            assert "Ctrl-C again stops at once" in script.stderr.readline()
            script.send_signal(signal.SIGINT)
            assert script.wait(10) == 130
            assert time.monotonic() - begin < 5
        with warm.Script("-c", RUN, tmp_path / "train", tmp_path / "edits", server.url) as script:
            assert "Waiting for it" in script.stderr.readline()
            script.send_signal(signal.SIGINT)
            assert script.wait(10) == 130
        server.start()
        warm.run("-c", RUN, tmp_path / "train", tmp_path / "edits", server.url)
    assert len(EditStore.open(tmp_path / "edits")) > 0


# Trust ----------------------------------------------------------------------------------------------------------------

SECRET = "sk-aBc123-very-secret"


@pytest.fixture(scope="module")
def guarded() -> Iterator[EditServer]:
    with EditServer(key=SECRET) as server:
        yield server


def test_the_key_is_sent_and_kept_nowhere(
    guarded: EditServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    write_photograph(tmp_path / "train" / "a" / "0.jpg", 0, 40, 40)
    editor = config(guarded)
    monkeypatch.setenv(KEY, f" {SECRET}\n")
    summary = generate(
        tmp_path / "train", tmp_path / "edits", GenerateConfig(editor=editor, prompts=("autumn",), size=32)
    )
    assert summary.made == 1
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    loaded = editor.load([], device="cpu", batch_size=1)
    assert SECRET.encode() not in kept + pickle.dumps(editor)
    assert SECRET not in caplog.text + repr(editor) + repr(loaded) + repr(editor.settings())


def test_a_wrong_key_is_not_repeated_in_the_error(guarded: EditServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the server repeats it."""
    guarded.plan()
    with pytest.raises(ConfigError, match=rf"HTTP 401 \(.*\); set {KEY} to it"):
        config(guarded).check([])
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)  # this one is for one host only
    with pytest.raises(ConfigError, match="HTTP 401"):
        edits(config(guarded))
    monkeypatch.setenv(KEY, "sk-mistaken")
    for asked in (lambda: config(guarded).check([]), lambda: edits(config(guarded))):
        with pytest.raises(ConfigError, match=rf"Bearer \*\*\*\); set {KEY} to another one") as caught:
            asked()
        assert "mistaken" not in str(caught.value)
    monkeypatch.setenv(KEY, "sk-two\nlines-mistaken")
    with pytest.raises(ConfigError, match=f"{KEY} must be printable ASCII") as caught:
        edits(config(guarded))
    assert "mistaken" not in str(caught.value)


def test_redirects_are_not_followed(server: EditServer, guarded: EditServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    guarded.plan()
    server.plan(f"redirect:{guarded.url}/images/edits")
    with pytest.raises(ConfigError, match=rf"a redirect \(HTTP 307\) to '{guarded.url}/images/edits'"):
        edits(config(server), TASKS[:1])
    assert guarded.seen()["forms"] == []


def test_no_proxy_is_asked(server: EditServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert_made(edits(config(server), TASKS[:2]), TASKS[:2])
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


class _Tls(EditServer):
    def plan(self, *doings: str) -> None:
        """Its control speaks TLS too, which no test needs."""


def test_https_and_whom_to_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: EditServer) -> None:
    files = certificate(tmp_path)
    with _Tls(tls=files) as secure:
        with pytest.raises(ConfigError, match=r"whose certificate is trusted, found 'localhost' .*SSL_CERT_FILE"):
            edits(config(secure), TASKS[:1])
        monkeypatch.setenv("SSL_CERT_FILE", str(files[0]))
        config(secure).check([])
        assert_made(edits(config(secure)))
    with pytest.raises(ConfigError, match=r"http:// is for servers without TLS"):
        edits(config(server, url=server.url.replace("http:", "https:")), TASKS[:1])


# Checks before a run --------------------------------------------------------------------------------------------------


def test_check_knows_the_models(server: EditServer) -> None:
    config(server).check(["anything"])
    with pytest.raises(ConfigError, match=f"one that the server serves, found 'other'; these are {MODEL}"):
        config(server, model="other").check([])
    config(server, url=f"http://localhost:{server.port}", model="other").check([])  # it has no /models


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"url": "localhost:8000"}, "must be a URL such as"),
        ({"url": "ftp://localhost/v1"}, "must be a URL such as"),
        ({"url": "http:///v1"}, "must be a URL such as"),
        ({"url": "http://localhost:many/v1"}, "wrong host or port"),
        ({"url": "http://localhost:70000/v1"}, "wrong host or port"),
        ({"url": "http://local host/v1"}, "must be a URL such as"),
        ({"url": "http://localhost/v1\r\nX: y"}, "must be a URL such as"),
        ({"url": "http://me:secret@localhost/v1"}, "without a name and a password"),
        ({"url": "http://localhost/v1?key=secret"}, r"without \? and #"),
        ({"url": "http://localhost/v1/images/edits"}, "before /images/edits"),
        ({"model": ""}, "set model"),
        ({"template": "snow"}, "template must hold"),
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"requests": True}, "requests must be a whole number"),
        ({"multiple": 0}, "multiple must be"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"patience": -1}, "patience must be"),
        ({"timeout": 0}, "timeout must be more than 0"),
        ({"fields": 3}, "fields must be a table"),
        ({"fields": {"seed": 3}}, "found 'seed'; leave it out"),
        ({"fields": {"size": "1x1"}}, "found 'size'; set edit_size instead"),
        ({"fields": {'a"b': 3}}, "names of letters"),
        ({"fields": {"a": [1]}}, "strings, numbers, true or false"),
    ],
)
def test_a_config_checks_itself(changed: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        ServerConfig(**{"url": "http://localhost/v1", "model": "a/b"} | changed)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_any_address_is_connected_to(host: str) -> None:
    family = socket.AF_INET6 if host == "[::1]" else socket.AF_INET
    try:
        listening = socket.create_server((host.strip("[]"), 0), family=family)
    except OSError:
        pytest.skip("no IPv6 here")
    with listening:
        port = listening.getsockname()[1]

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                asked = connection.recv(4096)
                text = json.dumps({"data": [{"id": f"{asked.decode().splitlines()[1]}"}]}).encode()
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + text)  # its end is the connection's

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match=rf"these are Host: {re.escape(host)}:{port}\."):
            ServerConfig(url=f"http://{host}:{port}/v1/", model="a").check([])
        thread.join()


# The command ----------------------------------------------------------------------------------------------------------


def test_options_of_a_server(tmp_path: Path) -> None:
    given = options(
        tmp_path,
        'editor = "http://here:8000/v1"\nmodel = "a/b"\nrevision = "1"\ntemplate = "{prompt}"\nsteps = 4\n'
        "guidance = 2\n"
        'negative_prompt = "x"\nfields = {true_cfg_scale = 4.0}\nrequests = 3\npatience = 5\n',
    )
    made = _config_of(given, {}, tmp_path / "store")
    assert made.editor == ServerConfig(
        url="http://here:8000/v1",
        model="a/b",
        revision="1",
        template="{prompt}",
        steps=4,
        guidance=2,
        negative_prompt="x",
        fields={"true_cfg_scale": 4.0},
        requests=3,
        patience=5,
    )
    assert _engine_of(given, False, remote=True).devices == ("cpu",)
    for text, found in (
        ('editor = "http://here/v1"', "set model"),
        ('editor = "http://here/v1"\nmodel = "a"\nscheduler = "ddim"', "scheduler must be left out for a server"),
        ('editor = "a/b"\nmodel = "a"', "model must be left out for the model 'a/b'"),
        ("requests = 3", "requests must be left out for the procedural editor"),
    ):
        with pytest.raises(ConfigError, match=found):
            _config_of(options(tmp_path, text), {}, tmp_path / "store")


def test_the_command_edits_with_a_server(server: EditServer, tmp_path: Path) -> None:
    write_photograph(tmp_path / "train" / "a" / "0.jpg", 0, 60, 40)
    arguments = ("generate", tmp_path / "train", tmp_path / "edits", "--size", 32, "--prompts", "autumn,made of glass")
    wrong = run(*arguments, "--editor", server.url, "--model", "other", code=1)
    assert f"these are {MODEL}" in wrong.stderr
    made = run_json(*arguments, "--editor", server.url, "--model", MODEL)
    assert made["made"] == 2
    settings = EditStore.open(tmp_path / "edits").settings
    assert (settings["editor"], settings["model"], settings["revision"]) == ("server", MODEL, None)
    assert str(server.port) not in str(settings)
    assert not verify(tmp_path / "edits").problems


# 200 edits, with kills ------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def stored(store: Path) -> int:
    """Shards that are whole."""
    return len(list((store / "shards").glob("*.json")))


COMMAND = "from dali_diffusemix.cli import main; main()"


@pytest.mark.slow
def test_kills_of_client_and_server_change_no_byte(tmp_path: Path) -> None:
    """200 edits; the client is killed five times, the server twice, while edits are made."""
    for place in range(50):
        write_photograph(tmp_path / "train" / "ab"[place % 2] / f"{place:02}.jpg", place, 40, 56)
    (tmp_path / "edits.toml").write_text(
        'prompts = ["autumn", "snowy"]\nvariants = 2\nsize = 64\nedit_size = 48\nbatch_size = 2\n'
        f'originals_per_shard = 5\nmodel = "{MODEL}"\nrequests = 4\n',
        encoding="utf-8",
    )

    def begin(name: str, server: EditServer) -> warm.Script:
        arguments = ("generate", tmp_path / "train", tmp_path / name, "--config", tmp_path / "edits.toml")
        return warm.Script("-c", COMMAND, *arguments, "--editor", server.url)

    with EditServer(delay=0.05) as server:
        with begin("whole", server) as script:
            assert "200 made now" in script.communicate(120)[0] and script.returncode == 0
        seen = server.seen()
        assert len(seen["forms"]) == 200 and seen["at_once"] == 4
        whole = content(tmp_path / "whole")

        killed, store = 0, tmp_path / "killed"
        while killed < 5:
            with begin("killed", server) as script:
                there, until = stored(store), time.monotonic() + 60
                # After another shard, and a little into the next one.
                while stored(store) == there and time.monotonic() < until:
                    time.sleep(0.01)
                if killed in (1, 3):
                    server.kill()
                    time.sleep(0.3)
                    server.start()
                time.sleep(0.1 + 0.05 * killed)
                assert script.poll() is None, script.communicate(5)
                script.kill()
                script.wait(10)
                killed += 1
        assert 5 <= stored(store) < 10
        with begin("killed", server) as script:
            time.sleep(0.5)
            server.kill()
            time.sleep(0.5)
            server.start()
            assert script.wait(120) == 0, script.stderr.read()
    assert content(store).keys() == whole.keys()
    assert content(store) == whole
    checked = verify(store)
    assert not checked.problems and not checked.missing


@pytest.mark.slow
def test_a_run_that_the_server_left_keeps_its_edits(tmp_path: Path) -> None:
    """All but the two batches under way, and the next run makes the same store."""
    for place in range(8):
        write_photograph(tmp_path / "train" / "a" / f"{place:02}.jpg", place, 40, 40)
    with EditServer(delay=0.05) as server:

        def make(name: str, **changed: Any) -> int:
            made = GenerateConfig(editor=config(server, **changed), prompts=("autumn",), size=32, batch_size=1)
            summary = generate(tmp_path / "train", tmp_path / name, made, progress=leave if changed else None)
            return summary.made

        def leave(done: int, total: int) -> None:
            if done == 3:
                server.kill()

        assert make("whole") == 8
        with pytest.raises(WorkerError, match="must answer, but for 1 s"):
            make("left", patience=1)
        with pytest.warns(UnfinishedStoreWarning):
            assert 2 <= len(EditStore.open(tmp_path / "left")) < 8
        server.start()
        assert 3 <= make("left") <= 5
    assert content(tmp_path / "left") == content(tmp_path / "whole")


def test_the_servers_answer_is_the_stored_edit(server: EditServer, tmp_path: Path) -> None:
    """Without loss, in a format without loss."""
    image = photograph(5, 32, 32)
    (tmp_path / "train" / "a").mkdir(parents=True)
    write_photograph(tmp_path / "train" / "a" / "0.png", 5, 32, 32)
    made = GenerateConfig(editor=config(server), prompts=("autumn",), size=32, format="raw")
    generate(tmp_path / "train", tmp_path / "edits", made)
    store = EditStore.open(tmp_path / "edits")
    seed = int(server.seen()["forms"][0]["seed"][0])
    header = len(b"P6\n32 32\n255\n")
    np.testing.assert_array_equal(
        np.frombuffer(store.encoded(0)[header:], np.uint8).reshape(32, 32, 3), edited(image, "make it autumn", seed)
    )


def test_errors_can_be_passed_on(server: EditServer) -> None:
    """Worker processes send them to the one that runs them."""
    server.plan("refuse:400")
    with pytest.raises(DiffuseMixError) as caught:
        edits(config(server), TASKS[:1])
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ConfigError and str(again) == str(caught.value)


@pytest.mark.slow
def test_worker_processes_make_the_same_store(server: EditServer, tmp_path: Path) -> None:
    for place in range(6):
        write_photograph(tmp_path / "train" / "a" / f"{place}.jpg", place, 40, 40)
    given = GenerateConfig(editor=config(server, requests=2), prompts=("autumn",), size=32, originals_per_shard=2)
    for name, workers in (("one", 1), ("two", 2)):
        generate(tmp_path / "train", tmp_path / name, given, engine=LocalEngine(("cpu",) * workers))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    server.plan(*["refuse:400"] * 9)
    with pytest.raises(ConfigError, match="HTTP 400"):
        generate(tmp_path / "train", tmp_path / "none", given, engine=LocalEngine(("cpu",) * 2))
