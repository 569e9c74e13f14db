"""Files are replaced whole or not at all, locks exclude each other, and CPUs are those that the container allows."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dali_diffusemix.base import cpus as cpus_module
from dali_diffusemix.base.cpus import affinity, cpus, quota
from dali_diffusemix.base.files import locked, new_folder, remove_temporary, replacing, write

# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write(file, b"old")
    with replacing(file) as stream:
        stream.write(b"new")
        (temporary,) = set(tmp_path.iterdir()) - {file}
        assert temporary.match(".file.????????.tmp") and file.read_bytes() == b"old"
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    file = tmp_path / "file"
    write(file, b"old")
    with pytest.raises(error), replacing(file) as stream:
        stream.write(b"new")
        raise error
    with pytest.raises(error), new_folder(tmp_path / "folder") as folder:
        write(folder / "file", b"new")
        raise error
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x" * 255, "ß" * 127, "x" * 99 + "ß" * 78, os.fsdecode(b"\xff" * 255)])
def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def sync(descriptor: int) -> None:
        done.append(f"{Path(f'/proc/self/fd/{descriptor}').readlink().suffix or 'folder'}, {(tmp_path / 'f').exists()}")

    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path / "f", b"content")
    assert done == [".tmp, False", "folder, True"]
    write(tmp_path / "f", b"scratch", durable=False)
    assert len(done) == 2 and (tmp_path / "f").read_bytes() == b"scratch"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from dali_diffusemix.base.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as stream:\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")])
    assert done.returncode == -signal.SIGKILL
    write(tmp_path / "other", b"")
    assert len(list(tmp_path.iterdir())) == 2
    for pattern, seconds in (("other", 0), ("*", 3600)):
        remove_temporary(tmp_path, pattern, seconds=seconds)
        assert len(list(tmp_path.iterdir())) == 2
    remove_temporary(tmp_path, "file")
    assert list(tmp_path.iterdir()) == [tmp_path / "other"]


def test_a_folder_of_a_faster_process_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as ours:
        write(ours / "file", b"ours")
        with new_folder(tmp_path / "folder") as theirs:
            write(theirs / "file", b"theirs")
    assert (tmp_path / "folder" / "file").read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


# Locks ----------------------------------------------------------------------------------------------------------------

HOLD = (
    "import sys; from pathlib import Path; from dali_diffusemix.base.files import locked\n"
    "with locked(Path(sys.argv[1]), eval(sys.argv[2]), wait=False) as held:\n"
    "    print(held, flush=True)\n    sys.stdin.read()\n"
)


@pytest.mark.parametrize(
    ("ours", "theirs", "free"),
    [
        (None, None, False),
        (range(1), range(1), False),
        (range(2, 2**40), range(2**40 - 1, 2**40 + 5), False),
        (range(1), range(1, 2**41), True),
        (range(5, 9), range(9, 10), True),
    ],
)
def test_locks_that_overlap_exclude_each_other(
    tmp_path: Path, ours: range | None, theirs: range | None, free: bool
) -> None:
    file = tmp_path / "lock"
    with locked(file, ours) as held:
        assert held
        with locked(file, theirs, wait=False) as in_this_process:
            assert in_this_process == free
        command = [sys.executable, "-c", HOLD, str(file), repr(theirs)]
        assert subprocess.run(command, input="", capture_output=True, text=True).stdout == f"{free}\n"
    with locked(file, theirs, wait=False) as held:
        assert held
    assert file.read_bytes() == b""


@pytest.mark.parametrize("part", [None, range(3, 7)])
def test_a_lock_ends_with_its_process_and_is_waited_for(tmp_path: Path, part: range | None) -> None:
    file, got = tmp_path / "lock", threading.Event()

    def wait() -> None:
        with locked(file, part):
            got.set()

    command = [sys.executable, "-c", HOLD, str(file), repr(part)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"True\n"
        thread = threading.Thread(target=wait)
        thread.start()
        assert not got.wait(0.1)
        holder.kill()
    thread.join(10)
    assert got.is_set()


@pytest.mark.parametrize("part", [None, range(3, 7)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_keep_a_lock(tmp_path: Path, part: range | None) -> None:
    with locked(tmp_path / "lock", part):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with locked(tmp_path / "lock", part, wait=False) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# CPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/\n", {}, None),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "30000 100000\n"}, 0.3),
        # Version 2, nested: the lowest limit on the way to the root; other groups do not count.
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000", "cpu.max": "400000 100000"}, 2.5),
        ("0::/a/b\n", {"a/b/cpu.max": "120000 100000", "a/cpu.max": "250000 100000", "a/c/cpu.max": "1 100000"}, 1.2),
        # The path is the machine's, the files are the container's.
        ("0::/docker/0123\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/../../x\n", {"cpu.max": "200000 100000\n"}, 2),
        # Version 1, one tree per controller.
        ("4:memory:/\n2:cpu,x:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "20000"}, 2.5),
        ("2:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "20000"}, 2.5),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("2:cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "20000"}, None),
        # Both: the lower one.
        (
            "1:cpu:/\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "30000", "cpu.max": "20000 10000"},
            2,
        ),
        # Damaged.
        ("0::/\n", {"cpu.max": ""}, None),
        ("0::/\n", {"cpu.max": "100000"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("0::/\n", {"cpu.max": "-5 100000"}, None),
        ("0::/\n", {"cpu.max": "many of them"}, None),
        ("0::/\n", {"cpu.max": b"\xff\xfe"}, None),
        ("0::/\n", {"cpu.max/is a folder": ""}, None),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "90000"}, None),
        ("no line of such a file\n\n", {"cpu.max": "50000 100000"}, None),
        (None, {"cpu.max": "50000 100000"}, None),
    ],
)
def test_quotas_of_control_groups(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: str | None,
    files: dict[str, str | bytes],
    limit: float | None,
) -> None:
    groups = tmp_path / "groups"
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_bytes(content.encode() if isinstance(content, str) else content)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cpus_module, "_GROUPS", groups)
    monkeypatch.setattr(cpus_module, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert quota() == limit
    assert cpus() == (8 if limit is None else max(1, -(-limit // 1)))


def test_cpus_where_the_system_tells_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus_module, "_OWN", tmp_path / "none")
    assert cpus() == affinity() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, expected in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert cpus() == affinity() == expected
