"""Decisions: the edits of a store that people rejected, in a file beside it.

    edits/                       the store, which never changes for a decision
    edits.decisions.jsonl        one JSON object a line, appended to; the last line about an edit counts

A line names an edit by the shard that holds it, so an edit that is made again, in a new shard, begins undecided.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

from dali_diffusemix.base.files import locked, sync_folder
from dali_diffusemix.errors import StoreError

Decision = Literal["reject", "undo"]
DECISIONS: Final[tuple[Decision, ...]] = ("reject", "undo")
DECISIONS_ENDING: Final = ".decisions.jsonl"
"""Of the file's name, which begins with the store's."""
_BROKEN_OFF: Final = b" <- broken off"
_TAIL: Final = 1 << 16  # bytes; longer than any line: a path has at most 4096, as JSON six times as many


class EditName(NamedTuple):
    """An edit, by what never changes."""

    path: str  # of its original, relative, as `Catalog.path` has it
    prompt: str  # without the template
    variant: int
    shard: int  # that holds it


@dataclass(frozen=True)
class Decisions:
    """The decisions about the edits of one store.

    Args:
        file: Where they are kept; it need not exist.
    """

    file: Path

    @classmethod
    def of(cls, store: str | os.PathLike[str]) -> "Decisions":
        """Those beside a store's folder; beside the folder itself where `store` is a link to it."""
        folder = Path(store).resolve()
        return cls(folder.with_name(folder.name + DECISIONS_ENDING))

    def rejected(self) -> set[EditName]:
        """The edits that are rejected at present.

        Raises:
            StoreError: The file cannot be read, or a line of it is damaged.
        """
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StoreError(
                f"{str(self.file)!r}: cannot be read ({error.strerror}); permit reading, or move it away."
            ) from error
        *lines, last = data.split(b"\n")
        if _is_whole(last):  # not what a killed process left: a person's editor wrote no line break
            lines.append(last)
        rejected: set[EditName] = set()
        for number, line in enumerate(lines, 1):
            if line.endswith(_BROKEN_OFF) or not line.strip():
                continue
            try:
                decision, name = _parsed(line)
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                lacking = f" (it lacks {error})" if isinstance(error, KeyError) else ""
                raise StoreError(
                    f"{str(self.file)!r}: line {number} must be a decision, found {line[:200]!r}{lacking}; correct or "
                    "remove it."
                ) from error
            if decision == "reject":
                rejected.add(name)
            else:
                rejected.discard(name)
        return rejected

    def add(self, decision: Decision, edits: Iterable[EditName]) -> None:
        """Append decisions; all of them are on the disk when this returns. Several processes may append at once.

        Raises:
            StoreError: The file cannot be written. None of these decisions is kept then.
        """
        when = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [json.dumps({"decision": decision, **edit._asdict(), "at": when}) + "\n" for edit in edits]
        if not lines:
            return
        try:
            with locked(self.file):
                self._append("".join(lines).encode("ascii"))
        except OSError as error:
            raise StoreError(
                f"{str(self.file)!r}: cannot be written ({error.strerror or error}); make room, or permit writing."
            ) from error

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            tail = os.pread(descriptor, _TAIL, max(0, size - _TAIL)).rpartition(b"\n")[2]
            if tail:  # of a killed process, unless it is whole: it must not spoil ours
                data = (b"\n" if _is_whole(tail) else _BROKEN_OFF + b"\n") + data
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            except BaseException:
                os.ftruncate(descriptor, size)  # whoever asked hears that it failed: no half may stay
                raise
        finally:
            os.close(descriptor)
        if not size:
            sync_folder(self.file.parent)


def _parsed(line: bytes) -> tuple[Decision, EditName]:
    """A line's decision. Raises ValueError, TypeError, LookupError, RecursionError."""
    stored = json.loads(line)
    decision, path, prompt, variant, shard = (
        stored[name] for name in ("decision", "path", "prompt", "variant", "shard")
    )
    if decision not in DECISIONS:
        raise ValueError(f"decision {decision!r}")
    # A number that JSON writes as 1.0, or true, would equal another one.
    if not (type(path) is type(prompt) is str and type(variant) is type(shard) is int):
        raise TypeError(f"{stored!r}")
    return decision, EditName(path, prompt, variant, shard)


def _is_whole(line: bytes) -> bool:
    try:
        _parsed(line)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
    return True
