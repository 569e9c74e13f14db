"""remote: a store behind a URL is the local store, over connections that break, sources that lie and full disks."""

import json
import logging
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm

from dali_diffusemix.catalog import Catalog
from dali_diffusemix.errors import ConfigError, DecodeError, MissingDependencyError, StoreError
from dali_diffusemix.images.reading import Extent
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan import MixSpec, TrainCrop
from dali_diffusemix.store import (
    Decisions,
    EditName,
    EditStore,
    OriginalStore,
    ShardWriter,
    StoreWriter,
    UnfinishedStoreWarning,
    Wish,
    mirror,
)
from dali_diffusemix.store.mirror import Mirror, MirrorError, MirrorLimitWarning, is_url
from dali_diffusemix.store.pack import PackConfig, pack

moto = pytest.importorskip("moto.server", reason="needs moto[server], a real S3 server: pip install -e '.[dev]'")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[s3]'")
fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install -e '.[s3]'")

pytestmark = pytest.mark.slow

ORIGINALS, PER_SHARD = 18, 3
SHARDS = ORIGINALS // PER_SHARD
FIRST = "shards/edits-000000"


def jpeg_of(original: int, seed: int) -> bytes:
    """Something that differs for every edit, and takes a few ranges to fetch."""
    return np.random.default_rng([original, seed]).bytes(60_000 + 100 * original)


def build(store: Path, *, seed: int = 0, leave_out: tuple[int, ...] = ()) -> Path:
    paths = [f"all/{row}.jpg".encode() for row in range(ORIGINALS)]
    catalog = Catalog.from_arrays(paths, [0] * ORIGINALS, ["all"], np.full((ORIGINALS, 2), 9))
    with StoreWriter.open(store, catalog, {"editor": "none"}) as writer:
        writer.order(Wish(prompts={"autumn": None}, variants=1, originals_per_shard=PER_SHARD))
        for shard in writer.shards():
            if shard.number not in leave_out:
                with ShardWriter(store, catalog, shard) as files:
                    for original in shard.rows:
                        files.add(original, 0, 0, seed=0, image=jpeg_of(original, seed), height=9, width=9)
        if not leave_out:
            writer.finish()
    return store


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("local") / "edits")


class Proxy:
    """Stands before a server, counts what is asked for, and treats its connections badly."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.asked: list[tuple[str, str, int]] = []  # method, path, first byte
        self.cut_between: tuple[int, int] | None = None  # bytes that a connection gives before it breaks
        self.wait = 0.0  # seconds before each 16 KiB
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def asked_for(self, ending: str) -> list[tuple[str, int]]:
        return [(path, first) for method, path, first in self.asked if method == "GET" and path.endswith(ending)]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            for work in (self._up, self._down):
                threading.Thread(target=work, args=[client, server], daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        head = b""
        with suppress(OSError):
            while data := client.recv(65536):
                head += data
                while b"\r\n\r\n" in head:
                    request, _, head = head.partition(b"\r\n\r\n")
                    if found := re.match(rb"(GET|HEAD) ([^ ?]+)", request):
                        first = re.search(rb"(?i)\r\nrange: bytes=(\d+)-", request)
                        self.asked.append((found[1].decode(), found[2].decode(), int(first[1]) if first else 0))
                server.sendall(data)
        _end(client, server)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        given, most = 0, None if self.cut_between is None else random.randint(*self.cut_between)
        with suppress(OSError):
            while data := server.recv(16384):
                if most is not None and given + len(data) > most:
                    break
                time.sleep(self.wait)
                client.sendall(data)
                given += len(data)
        _end(client, server)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def proxy(s3_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """Between the program and the S3 server. Requests are small, and hurry, so that a lot happens in a short time."""
    proxy = Proxy(s3_port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR", str(tmp_path / "mirrors"))
    monkeypatch.setattr(mirror, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(mirror, "_MOST_BYTES", 1 << 16)
    monkeypatch.setattr(mirror, "_LEAST_BYTES", 1 << 13)
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(proxy: Proxy, s3_port: int, request: pytest.FixtureRequest) -> "Bucket":
    return Bucket(s3_port, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:60].strip("-"))


class Bucket:
    """A bucket of its own for each test, filled past the proxy."""

    def __init__(self, port: int, name: str) -> None:
        self._files = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{port}", use_listings_cache=False)
        self._name = name
        self._files.mkdir(name)

    def upload(self, store: Path, name: str = "edits") -> str:
        self._files.put(f"{store}/", f"{self._name}/{name}/", recursive=True)
        return f"s3://{self._name}/{name}"

    def put(self, name: str, data: bytes) -> None:
        self._files.pipe_file(f"{self._name}/edits/{name}", data)

    def get(self, name: str) -> bytes:
        return bytes(self._files.cat_file(f"{self._name}/edits/{name}"))

    def remove(self, name: str) -> None:
        self._files.rm_file(f"{self._name}/edits/{name}")


@pytest.fixture(scope="module")
def unchanged(s3_port: int, local: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        return Bucket(s3_port, "unchanged").upload(local)


@pytest.fixture
def url(request: pytest.FixtureRequest, proxy: Proxy, local: Path) -> str:
    """A store in the test's own bucket, if it wants one, else in one that no test changes."""
    if "bucket" in request.fixturenames:
        bucket: Bucket = request.getfixturevalue("bucket")
        return bucket.upload(local)
    unchanged: str = request.getfixturevalue("unchanged")
    return unchanged


def check(store: EditStore | OriginalStore, local: EditStore | OriginalStore) -> None:
    """One store is the other."""
    assert len(store) == len(local) > 0
    assert store.index.tobytes() == local.index.tobytes()
    for row, extent in enumerate(store.extents(np.arange(len(store)))):
        assert isinstance(extent, Extent)
        data = os.pread(extent.file.descriptor, extent.length, extent.offset)
        assert data == store.encoded(row).tobytes() == local.encoded(row).tobytes()


def tars(copy: Mirror) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in (copy.folder / "shards").glob("*.tar")}


def mirror_of(store: EditStore | OriginalStore) -> Mirror:
    assert store.mirror is not None
    return store.mirror


# The same store ------------------------------------------------------------------------------------------------------


def test_a_store_in_s3_is_the_local_store(url: str, local: Path, proxy: Proxy) -> None:
    store = EditStore.open(url)
    assert repr(store) == f"<EditStore {url!r}: {ORIGINALS} edits of {ORIGINALS} originals>"
    assert not tars(mirror_of(store)) and not proxy.asked_for(".idx")
    check(store, EditStore.open(local))
    assert store.catalog.paths[:] == EditStore.open(local).catalog.paths[:]
    # A second opening fetches what nothing vouches for, and no more.
    proxy.asked.clear()
    check(EditStore.open(url + "/"), EditStore.open(local))
    assert {Path(path).suffix for path, _ in proxy.asked_for("")} <= {".json", ""}


def test_other_protocols(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them a web server that knows neither ranges nor sizes."""
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR", str(tmp_path / "mirrors"))
    monkeypatch.setattr(mirror, "_MOST_BYTES", 1 << 16)
    fsspec.filesystem("memory").put(f"{local}/", "/test_other_protocols/", recursive=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    def handler(*args: Any) -> Quiet:
        return Quiet(*args, directory=str(local))

    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for url in (f"file://{local}", "memory://test_other_protocols", f"http://127.0.0.1:{server.server_port}"):
            check(EditStore.open(url), EditStore.open(local))
        server.shutdown()


def test_training_from_urls_gives_the_same_samples(
    photos: Path, edits: Path, tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    pack(photos, tmp_path / "packed", PackConfig())
    packed_url, edits_url = bucket.upload(tmp_path / "packed", "packed"), bucket.upload(edits, "edits")
    packed = OriginalStore.find(packed_url)
    assert packed is not None
    check(packed, OriginalStore.open(tmp_path / "packed"))
    here, there = (
        DiffuseMixDataset(root, edits=edits, mix=MixSpec(fractal_weight=0), crop=TrainCrop(32), seed=3)
        for root, edits in ((tmp_path / "packed", edits), (packed_url, edits_url))
    )
    for (image, label), (expected, expected_label) in zip(
        there.__getitems__(range(len(there))), here.__getitems__(range(len(here))), strict=True
    ):
        assert label == expected_label and bool((image == expected).all())


def test_an_unfinished_store_at_a_url(tmp_path: Path, bucket: Bucket) -> None:
    build(tmp_path / "edits", leave_out=(1, 4))
    url = bucket.upload(tmp_path / "edits")
    for path in (tmp_path / "edits", url, url):
        with pytest.warns(UnfinishedStoreWarning, match="2 of its 6 shards are missing"):
            store = EditStore.open(path)
        assert len(store) == ORIGINALS - 2 * PER_SHARD
        assert [store.encoded(edit).tobytes() for edit in range(len(store))] == [
            jpeg_of(int(original), 0) for original in store.index["original"]
        ]


def test_a_store_of_an_older_release_has_no_hashes_of_its_index(local: Path, bucket: Bucket, url: str) -> None:
    stored = json.loads(bucket.get("index.json"))
    del stored["files"]
    bucket.put("index.json", json.dumps(stored).encode())
    check(EditStore.open(url), EditStore.open(local))


def test_a_store_that_was_made_anew_is_fetched_anew(tmp_path: Path, bucket: Bucket, url: str, local: Path) -> None:
    """Its files have the same names and sizes."""
    store = EditStore.open(url)
    check(store, EditStore.open(local))
    other = build(tmp_path / "edits", seed=1)
    bucket.upload(other)
    check(EditStore.open(url), EditStore.open(other))
    assert store.encoded(0).tobytes() == jpeg_of(0, 0)  # what is open stays


# Breaking connections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [(50_000, 50_000), (0, 200_000)], ids=["early", "at random"])
def test_cut_connections_are_gone_on_with(after: tuple[int, int], url: str, local: Path, proxy: Proxy) -> None:
    proxy.cut_between = after  # 64 KiB are asked for at once
    check(EditStore.open(url), EditStore.open(local))
    starts = [first for path, first in proxy.asked_for(f"{FIRST}.tar")]
    assert len(starts) >= 3 and starts == sorted(starts)


def test_a_killed_process_is_gone_on_with(url: str, local: Path, proxy: Proxy) -> None:
    proxy.wait = 0.05
    script = (
        "import sys; from dali_diffusemix.store import mirror; from dali_diffusemix.store import EditStore\n"
        "mirror._MOST_BYTES = 1 << 14\n"
        "EditStore.open(sys.argv[1]).encoded(0)"
    )
    part = Mirror(url).folder / "shards" / ".edits-000000.part"
    with warm.Script("-c", script, url) as process:
        deadline = time.monotonic() + 20
        while not part.exists() or part.stat().st_size < 50_000:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    proxy.wait = 0
    proxy.asked.clear()
    done = part.stat().st_size
    check(EditStore.open(url), EditStore.open(local))
    starts = [first for path, first in proxy.asked_for(f"{FIRST}.tar")]
    assert starts[0] == min(starts) == done >= 50_000
    assert not part.exists()


def test_a_damaged_beginning_is_thrown_away_once(url: str, local: Path, proxy: Proxy) -> None:
    store = EditStore.open(url)
    for content in (b"\0" * 70_000, b"\0" * 10_000_000):
        (mirror_of(store).folder / "shards" / ".edits-000000.part").write_bytes(content)
        (mirror_of(store).folder / "shards" / "edits-000000.tar").unlink(missing_ok=True)
        store = EditStore.open(url)
        assert store.encoded(0).tobytes() == jpeg_of(0, 0)


def test_a_source_that_is_gone_ends_the_wait(url: str, proxy: Proxy) -> None:
    store = EditStore.open(url)
    proxy.cut_between = 0, 0
    for read in (lambda: store.encoded(0), lambda: store.extents(np.arange(3)), lambda: EditStore.open(url)):
        with pytest.raises(MirrorError, match=rf"{url}/.*: cannot be read, after 6 attempts .*check the address"):
            read()
    proxy.cut_between = None
    assert store.encoded(0).tobytes() == jpeg_of(0, 0)


def test_a_source_that_is_gone_replaces_no_sample(
    photos: Path, edits: Path, tmp_path: Path, bucket: Bucket, proxy: Proxy
) -> None:
    """Under DataLoader too a network that fails ends the run, rather than giving every sample unmixed."""
    pack(photos, tmp_path / "packed", PackConfig())
    packed_url, edits_url = bucket.upload(tmp_path / "packed", "packed"), bucket.upload(edits, "edits")
    for root, url in ((photos, edits_url), (packed_url, edits)):
        dataset = DiffuseMixDataset(
            root, edits=url, mix=MixSpec(fractal_weight=0, probability=1, seam_width=1), crop=TrainCrop(32)
        )
        proxy.cut_between = 0, 0
        with pytest.raises(MirrorError, match="cannot be read, after 6 attempts"):
            _ = dataset[0]
        assert len(dataset.quarantine) == 0
        proxy.cut_between = None


# Sources that are wrong ----------------------------------------------------------------------------------------------


def test_a_corrupted_object_is_an_error_until_it_is_corrected(url: str, local: Path, bucket: Bucket) -> None:
    tar = bucket.get(f"{FIRST}.tar")
    expected = json.loads(bucket.get(f"{FIRST}.json"))["files"]["tar"]["sha256"]
    bucket.put(f"{FIRST}.tar", tar[:5000] + b"!" + tar[5001:])
    store = EditStore.open(url)
    with pytest.raises(StoreError, match=rf"{url}/{FIRST}\.tar: .* SHA-256 must be {expected}, found [0-9a-f]{{64}}"):
        store.encoded(0)
    extents = store.extents(np.arange(ORIGINALS))
    assert [isinstance(extent, DecodeError) for extent in extents] == [row < PER_SHARD for row in range(ORIGINALS)]
    assert "edits-000000.tar" not in tars(mirror_of(store))
    bucket.put(f"{FIRST}.tar", tar)
    check(EditStore.open(url), EditStore.open(local))


@pytest.mark.parametrize("name", ["index.npy", "starts.npy", "catalog"])
def test_corrupted_tables(name: str, url: str, local: Path, bucket: Bucket) -> None:
    if name == "catalog":
        name = f"catalog/{next((local / 'catalog').glob('sizes-*.npy')).name}"
    data = bucket.get(name)
    bucket.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StoreError, match=rf"{url}/{name}: is damaged: its SHA-256 must be .*, found .*upload it again"):
        EditStore.open(url)
    bucket.put(name, data)
    check(EditStore.open(url), EditStore.open(local))


def test_a_shard_that_changes_after_opening_is_an_error(url: str, bucket: Bucket) -> None:
    store = EditStore.open(url)
    tar, record = bucket.get(f"{FIRST}.tar"), bucket.get(f"{FIRST}.json")
    bucket.put(f"{FIRST}.tar", tar[:100_000])
    bucket.remove("shards/edits-000001.tar")
    with pytest.raises(StoreError, match=rf"{FIRST}\.tar: must have {len(tar)} bytes, found 100000"):
        store.encoded(0)
    with pytest.raises(StoreError, match=r"edits-000001\.tar: is missing; upload"):
        store.encoded(PER_SHARD)
    stored = json.loads(record)
    stored["files"]["tar"]["bytes"] += 512
    bucket.put("shards/edits-000002.json", json.dumps(stored).encode())
    with pytest.raises(StoreError, match=r"was changed since the store was opened: it must have \d+ bytes, found \d+"):
        store.encoded(2 * PER_SHARD)
    with pytest.raises(StoreError, match=rf"{url}/{FIRST}\.tar: must have \d+ bytes, found 100000; upload the store"):
        EditStore.open(url)
    bucket.remove(f"{FIRST}.tar")
    with pytest.raises(StoreError, match=rf"{url}/{FIRST}\.tar: is missing; upload the store again") as caught:
        EditStore.open(url)
    assert "generate" not in str(caught.value)


def test_what_is_wrong_with_a_url_is_said_at_once(
    url: str, bucket: Bucket, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        StoreError, match=r"s3://no-bucket/edits: there is no edit store .*bucket does not exist.*upload"
    ):
        EditStore.open("s3://no-bucket/edits")
    with pytest.raises(StoreError, match=r"/nothing: there is no packed store \(store\.json: .*upload"):
        OriginalStore.find(url + "/nothing")
    with pytest.raises(StoreError, match=r"'magic' must be .*the edit store, is given as edits"):
        OriginalStore.find(url)
    with pytest.raises(StoreError, match="the URL cannot be used"):
        EditStore.open("nonsense://bucket/edits")
    with pytest.raises(MissingDependencyError, match="pip install"):
        EditStore.open("gs://bucket/edits")
    with (
        pytest.raises(StoreError, match="found a URL; give a folder"),
        StoreWriter.open(url, EditStore.open(local).catalog, {}),
    ):
        pass
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(MirrorError, match=rf"{url}/store\.json: access is refused .*AWS_ACCESS_KEY_ID"):
        EditStore.open(url)


def test_what_is_a_url() -> None:
    assert all(map(is_url, ("s3://bucket/x", "memory://x", "https://x.org/y", "simplecache::s3://bucket/x")))
    assert not any(map(is_url, ("data/train", "/data/train", "C:/data", Path("s3://bucket/x"), "s3:/x", "data:x")))


# Many processes ------------------------------------------------------------------------------------------------------


def digest_of(store: EditStore) -> list[int]:
    return [int(store.encoded(edit).sum()) for edit in range(len(store))]


def test_a_spawned_process_opens_the_same_store(url: str, local: Path) -> None:
    store = EditStore.open(url)
    expected = digest_of(EditStore.open(local))
    assert digest_of(pickle.loads(pickle.dumps(store))) == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest_of, [store]) == expected


def test_a_forked_process_goes_on_by_itself(url: str, local: Path, proxy: Proxy) -> None:
    """The fork comes while the parent's threads are fetching."""
    store = EditStore.open(url)
    proxy.wait = 0.01
    mirror_of(store).prefetch([])
    time.sleep(0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which DataLoader makes
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(digest_of, [store, store]) == [digest_of(EditStore.open(local))] * 2
    check(store, EditStore.open(local))


def test_two_processes_fetch_each_shard_once(url: str, local: Path, proxy: Proxy) -> None:
    script = (
        "import sys, numpy as np; from dali_diffusemix.store import EditStore\n"
        "store = EditStore.open(sys.argv[1]); store.extents(np.arange(len(store)))\n"
        "print([int(store.encoded(edit).sum()) for edit in range(len(store))])"
    )
    processes = [warm.Script("-c", script, url) for _ in range(2)]
    outputs = [process.communicate(60)[0] for process in processes]
    assert [json.loads(output) for output in outputs] == [digest_of(EditStore.open(local))] * 2
    assert len(proxy.asked_for(".tar")) == len(set(proxy.asked_for(".tar"))) == SHARDS
    for name in ("index.npy", "starts.npy"):
        assert len(proxy.asked_for(f"/edits/{name}")) == 1


# Ahead of use, and bounded -------------------------------------------------------------------------------------------


def test_a_batch_has_all_shards_fetched_and_its_own_first(
    url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_THREADS", 1)
    proxy.wait = 0.01
    store = EditStore.open(url)
    store.extents(np.array([ORIGINALS - 1]))
    store.encoded(ORIGINALS - 1 - PER_SHARD)  # jumps the queue
    order = list(dict.fromkeys(int(path[-10:-4]) for path, _ in proxy.asked_for(".tar")))
    assert order in ([SHARDS - 1, SHARDS - 2], [SHARDS - 1, 0, SHARDS - 2], [SHARDS - 1, 0, SHARDS - 2, 1])
    deadline = time.monotonic() + 20
    while len(tars(mirror_of(store))) < SHARDS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mirror_of(store).close()
    with pytest.raises(MirrorError, match="its mirror was closed; open the store again"):
        store.encoded(0)


def test_a_store_that_nobody_holds_is_fetched_no_more(url: str, proxy: Proxy) -> None:
    proxy.wait = 0.01
    store = EditStore.open(url)
    mirror_of(store).prefetch([])
    del store
    deadline = time.monotonic() + 20
    while any(thread.name == "mirror" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mirror_keeps_its_limit(url: str, local: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = max(file.stat().st_size for file in (local / "shards").glob("*.tar"))
    total = sum(file.stat().st_size for file in (local / "shards").glob("*.tar"))
    limit = 2 * shard + 1000
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR_LIMIT", str(limit))
    with pytest.warns(
        MirrorLimitWarning, match=rf"{url}: its shards have {total} bytes, but the mirror may take {limit}"
    ):
        store = EditStore.open(url)
    mirror, expected = mirror_of(store), EditStore.open(local)
    for edit in [*range(len(store)), *range(len(store))]:
        assert store.encoded(edit).tobytes() == expected.encoded(edit).tobytes()
        assert sum(tars(mirror).values()) <= limit
    # Those used last are there; they are used without being fetched.
    assert set(tars(mirror)) == {f"edits-{number:06d}.tar" for number in (SHARDS - 2, SHARDS - 1)}
    proxy.asked.clear()
    store.encoded(len(store) - 1), store.encoded(len(store) - 1 - PER_SHARD)
    assert not proxy.asked_for(".tar")
    # What a batch holds stays, whatever the limit; when it is let go of, so is the room.
    extents = store.extents(np.arange(len(store)))
    assert len(tars(mirror)) == SHARDS
    for row, extent in enumerate(extents):
        assert isinstance(extent, Extent)
        assert os.pread(extent.file.descriptor, extent.length, extent.offset) == expected.encoded(row).tobytes()
    del extents, extent
    (mirror.folder / "shards" / "edits-000000.tar").unlink()
    mirror.close()
    with pytest.warns(MirrorLimitWarning):
        EditStore.open(url).encoded(0)
    assert sum(tars(mirror).values()) <= limit
    # Nothing is given up for what nobody waits for.
    with pytest.warns(MirrorLimitWarning):
        store = EditStore.open(url)
    store.encoded(0)
    before = tars(mirror)
    mirror_of(store).prefetch([])
    time.sleep(0.3)
    assert tars(mirror_of(store)) == before


def test_a_full_disk_is_an_error_that_says_what_to_do(url: str, local: Path) -> None:
    store = EditStore.open(url)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MirrorError, match=rf"the mirror of {url} cannot be written .*the shards have \d+ bytes"):
            store.encoded(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check(store, EditStore.open(local))


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR_LIMIT", "200 GB")
    with pytest.raises(ConfigError, match="must be a number of bytes, found '200 GB'"):
        Mirror("memory://x")
    with pytest.raises(ConfigError, match="at least 1 byte, found 0"):
        Mirror("memory://x", limit=0)
    monkeypatch.delenv("DALI_DIFFUSEMIX_MIRROR_LIMIT")
    monkeypatch.delenv("DALI_DIFFUSEMIX_MIRROR", raising=False)
    cache = Path(os.environ["DALI_DIFFUSEMIX_CACHE"])
    assert Mirror("memory://x").folder.parent == cache / "mirrors"
    assert Mirror("memory://x").folder == Mirror("memory://x/").folder != Mirror("memory://y").folder


def test_a_local_store_needs_none_of_it(local: Path) -> None:
    script = (
        "import sys, threading, numpy as np; from dali_diffusemix.store import EditStore\n"
        f"store = EditStore.open({str(local)!r}); store.extents(np.arange(3)); store.encoded(0)\n"
        "print(threading.active_count(), 'fsspec' in sys.modules, 'asyncio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "False"]


# Decisions ------------------------------------------------------------------------------------------------------------


def test_decisions_beside_a_store_at_a_url_are_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are fetched each time that the store is opened."""
    monkeypatch.setenv("DALI_DIFFUSEMIX_MIRROR", str(tmp_path / "mirrors"))
    store = build(tmp_path / "edits")
    url = f"file://{store}"
    assert len(EditStore.open(url)) == ORIGINALS
    bad = [EditName(f"all/{row}.jpg", "autumn", 0, row // PER_SHARD) for row in (2, 7)]
    Decisions.of(store).add("reject", bad)
    edits = EditStore.open(url)
    assert len(edits) == ORIGINALS - 2
    assert edits.encoded(2).tobytes() == jpeg_of(3, 0) and len(pickle.loads(pickle.dumps(edits))) == ORIGINALS - 2
    Decisions.of(store).add("undo", bad[:1])
    assert len(EditStore.open(url)) == ORIGINALS - 1
    Decisions.of(store).file.unlink()
    assert len(EditStore.open(url)) == ORIGINALS
