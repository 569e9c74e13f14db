"""Decisions beside a store: the last word about an edit counts, and nothing of a killed or failed writer harms it."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dali_diffusemix.errors import StoreError
from dali_diffusemix.store.decisions import Decisions, EditName

PLAIN = EditName("ants/0.jpg", "autumn", 0, 3)
ODD = [
    EditName(os.fsdecode(b"caf\xe9/\xff\xfe.jpg"), "snowy", 0, 0),
    EditName("a\nb/\"quoted\" 'twice'.jpg", 'a "prompt"\nof two lines \\n', 1, 0),
    EditName("<script>/\u202eevil\u2028.jpg", "\U0001f384 winter \x00\x1f", 32767, 2**31 - 1),
    EditName("x" * 4000 + "/é.jpg", "", 0, 0),
]


@pytest.fixture
def decisions(tmp_path: Path) -> Decisions:
    return Decisions.of(tmp_path / "edits")


def line(name: EditName = PLAIN, decision: str = "reject") -> bytes:
    return json.dumps({"decision": decision, **name._asdict(), "at": "2026-11-27T06:00:00+00:00"}).encode()


# The last decision counts ---------------------------------------------------------------------------------------------


def test_the_last_decision_about_an_edit_counts(decisions: Decisions) -> None:
    assert decisions.rejected() == set()
    other = PLAIN._replace(variant=1)
    decisions.add("reject", [PLAIN, other])
    decisions.add("undo", [PLAIN])
    assert decisions.rejected() == {other}
    decisions.add("undo", [PLAIN, other, other])
    assert decisions.rejected() == set()
    decisions.add("reject", iter([PLAIN]))
    assert decisions.rejected() == {PLAIN}
    assert len(decisions.file.read_bytes().splitlines()) == 7


def test_an_edit_that_is_made_again_begins_undecided(decisions: Decisions) -> None:
    decisions.add("reject", [PLAIN])
    assert PLAIN._replace(shard=4) not in decisions.rejected()


@pytest.mark.parametrize("name", ODD, ids=["not UTF-8", "quotes, line breaks", "signs", "long"])
def test_any_name_comes_back(decisions: Decisions, name: EditName) -> None:
    decisions.add("reject", [name, PLAIN])
    assert decisions.rejected() == {name, PLAIN}
    data = decisions.file.read_bytes()
    assert data.isascii() and data.count(b"\n") == 2
    decisions.add("undo", [name])
    assert decisions.rejected() == {PLAIN}


def test_no_decision_writes_no_file(decisions: Decisions) -> None:
    decisions.add("reject", [])
    assert not decisions.file.exists()


def test_a_store_has_one_file_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "real" / "edits"
    (store / "shards").mkdir(parents=True)
    (tmp_path / "link").symlink_to(store)
    monkeypatch.chdir(store)
    wanted = tmp_path / "real" / "edits.decisions.jsonl"
    for name in (store, str(store), tmp_path / "link", ".", "shards/..", f"{store}/"):
        assert Decisions.of(name).file == wanted, name
    assert Decisions.of(os.fsdecode(b"caf\xe9")).file.name == os.fsdecode(b"caf\xe9.decisions.jsonl")


# What killed processes and people leave -------------------------------------------------------------------------------


def test_a_line_cut_anywhere_spoils_neither_those_before_nor_those_after(decisions: Decisions) -> None:
    """By a process that was killed; what it did not finish does not count."""
    before, after = PLAIN._replace(variant=7), PLAIN._replace(variant=8)
    whole = line(ODD[1])
    for cut in range(len(whole)):
        decisions.file.write_bytes(line(before) + b"\n" + whole[:cut])
        assert decisions.rejected() == {before}
        decisions.add("reject", [after])
        assert decisions.rejected() == {before, after}
        decisions.add("undo", [before])
        assert decisions.rejected() == {after}


def test_a_whole_line_without_its_line_break_counts(decisions: Decisions) -> None:
    """Editors of people leave the last one out."""
    decisions.file.write_bytes(line() + b"\n\n" + line(decision="undo"))
    assert decisions.rejected() == set()
    decisions.file.write_bytes(line() + b"\r\n" + line(ODD[0]))
    assert decisions.rejected() == {PLAIN, ODD[0]}
    decisions.add("reject", [ODD[1]])
    assert decisions.rejected() == {PLAIN, ODD[0], ODD[1]}
    assert b"broken off" not in decisions.file.read_bytes()


@pytest.mark.parametrize("tail", [b"\0" * 300, b'{"decision": "reject", "path": "' + b"x" * 200_000])
def test_a_tail_of_any_kind_is_marked_once(decisions: Decisions, tail: bytes) -> None:
    """Zeros after a power failure; more than one look back."""
    decisions.file.write_bytes(line() + b"\n" + tail)
    decisions.add("reject", [ODD[0]])
    decisions.add("reject", [ODD[1]])
    assert decisions.rejected() == {PLAIN, ODD[0], ODD[1]}
    assert decisions.file.read_bytes().count(b" <- broken off\n") == 1


@pytest.mark.parametrize(
    "damaged",
    [
        b"nothing",
        b"[]",
        b"{}",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        line(decision="perhaps"),
        line().replace(b'"variant": 0', b'"variant": "0"'),
        line().replace(b'"variant": 0', b'"variant": 0.0'),
        line().replace(b'"shard": 3', b'"shard": true'),
        line().replace(b'"ants/0.jpg"', b"null"),
        line().replace(b'"decision": "reject"', b'"decision": ["reject"]'),
        line().replace(b'"prompt"', b'"promt"'),
    ],
)
def test_a_damaged_line_is_named(decisions: Decisions, damaged: bytes) -> None:
    decisions.file.write_bytes(line() + b"\n" + damaged + b"\n" + line() + b"\n")
    with pytest.raises(StoreError, match=r"edits\.decisions\.jsonl.*line 2 must be a decision.*correct or remove it"):
        decisions.rejected()


def test_a_line_that_lacks_something_says_what(decisions: Decisions) -> None:
    decisions.file.write_bytes(line().replace(b'"variant": 0, ', b"") + b"\n")
    with pytest.raises(StoreError, match=r"found b'.*' \(it lacks 'variant'\); correct"):
        decisions.rejected()


def test_a_file_that_cannot_be_read(decisions: Decisions) -> None:
    decisions.file.mkdir()
    with pytest.raises(StoreError, match=r"cannot be read \(Is a directory\)"):
        decisions.rejected()
    with pytest.raises(StoreError, match=r"cannot be written \(Is a directory\)"):
        decisions.add("reject", [PLAIN])


def test_later_versions_may_say_more_about_an_edit(decisions: Decisions) -> None:
    decisions.file.write_bytes(line()[:-1] + b', "by": "somebody"}\n')
    assert decisions.rejected() == {PLAIN}


# Disks that are full --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 4096 bytes; writing on is an error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_decisions_that_do_not_fit_are_not_kept_in_part(decisions: Decisions) -> None:
    decisions.add("reject", [PLAIN])
    content = decisions.file.read_bytes()
    many = [PLAIN._replace(variant=variant) for variant in range(100)]
    with pytest.raises(StoreError, match=r"cannot be written \(File too large\); make room"):
        decisions.add("reject", many)
    assert decisions.file.read_bytes() == content
    decisions.add("reject", many[1:3])
    assert decisions.rejected() == set(many[:3])


def test_a_full_device(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "edits.decisions.jsonl").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="cannot be written"):
        Decisions.of(tmp_path / "edits").add("reject", [PLAIN])


def test_a_folder_that_must_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot be written \(No such file or directory\)"):
        Decisions.of(tmp_path / "nowhere" / "edits").add("reject", [PLAIN])
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match=r"Permission denied\); make room, or permit writing"):
            Decisions.of(tmp_path / "edits").add("reject", [PLAIN])
    finally:
        tmp_path.chmod(0o755)


def test_an_error_while_writing_leaves_what_was_there(decisions: Decisions, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions.add("reject", [PLAIN])
    content = decisions.file.read_bytes()

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        decisions.add("undo", [PLAIN])
    assert decisions.file.read_bytes() == content


# Several writers ------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from dali_diffusemix.store.decisions import Decisions, EditName
decisions = Decisions.of(sys.argv[1])
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    names = [EditName(f"{sys.argv[2]}/{number}.jpg", "p" * 300, variant, 0) for variant in range(40)]
    decisions.add("reject", names)
    decisions.add("undo", names[1:])
    print(number, flush=True)
"""


def writer(store: Path, name: str, turns: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WRITER, str(store), name, str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(decisions: Decisions) -> None:
    store = decisions.file.with_name("edits")
    writers = [writer(store, name, 60) for name in "abc"]
    for one in writers:
        out, _ = one.communicate(timeout=120)
        assert one.returncode == 0 and out.split()[-1] == "59"
    wanted = {EditName(f"{name}/{number}.jpg", "p" * 300, 0, 0) for name in "abc" for number in range(60)}
    assert decisions.rejected() == wanted
    assert len(decisions.file.read_bytes().splitlines()) == 3 * 60 * 79


@pytest.mark.slow
def test_processes_that_are_killed_lose_no_decision_that_was_confirmed(decisions: Decisions) -> None:
    store, generator = decisions.file.with_name("edits"), random.Random(0)
    confirmed: set[EditName] = set()
    unconfirmed: set[str] = set()  # paths of the decisions that a killed process was about to confirm
    for turn in range(8):
        one = writer(store, str(turn), 10_000)
        assert one.stdout is not None
        with one.stdout:
            begun = [one.stdout.readline() for _ in range(generator.randint(1, 12))]
            one.kill()
            said = "".join([*begun, one.stdout.read()])
        one.wait()
        done = [int(number) for number in said.splitlines(keepends=True) if number[:-1].isdecimal()]
        confirmed |= {EditName(f"{turn}/{number}.jpg", "p" * 300, 0, 0) for number in done}
        unconfirmed.add(f"{turn}/{len(done)}.jpg")
        decisions.add("reject", [PLAIN._replace(variant=turn)])
        confirmed.add(PLAIN._replace(variant=turn))
        found = decisions.rejected()
        assert confirmed <= found and {name.path for name in found - confirmed} <= unconfirmed
