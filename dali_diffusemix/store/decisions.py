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

from dali_diffusemix.errors import StoreError

Decision = Literal["reject", "undo"]
DECISIONS: Final[tuple[Decision, ...]] = ("reject", "undo")
DECISIONS_ENDING: Final = ".decisions.jsonl"
"""Of the file's name, which begins with the store's."""
_BROKEN_OFF: Final = b" <- broken off\n"


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
        """Those beside a store's folder."""
        store = Path(store).absolute()
        return cls(store.with_name(store.name + DECISIONS_ENDING))

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
            raise StoreError(f"{str(self.file)!r}: cannot be read ({error.strerror}).") from error
        lines = data.split(b"\n")
        lines.pop()  # empty; or a line that a killed process did not finish
        rejected: set[EditName] = set()
        for number, line in enumerate(lines, 1):
            if line.endswith(_BROKEN_OFF[:-1]):
                continue
            try:
                stored = json.loads(line)
                name = EditName(
                    str(stored["path"]), str(stored["prompt"]), int(stored["variant"]), int(stored["shard"])
                )
                if stored["decision"] not in DECISIONS:
                    raise ValueError(f"decision {stored['decision']!r}")
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise StoreError(
                    f"{str(self.file)!r}: line {number} must be a decision, found {line[:200]!r}; correct or remove it."
                ) from error
            if stored["decision"] == "reject":
                rejected.add(name)
            else:
                rejected.discard(name)
        return rejected

    def add(self, decision: Decision, edits: Iterable[EditName]) -> None:
        """Append decisions; they are on the disk when this returns. Several processes may append at once.

        Raises:
            StoreError: The file cannot be written.
        """
        when = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [json.dumps({"decision": decision, **edit._asdict(), "at": when}) + "\n" for edit in edits]
        try:
            # One write a call, which the system does not mix with another's.
            descriptor = os.open(self.file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                size = os.fstat(descriptor).st_size
                whole = not size or os.pread(descriptor, 1, size - 1) == b"\n"
                # A killed process may have left a part of a line, which nothing reads: it must not spoil ours.
                data = (b"" if whole else _BROKEN_OFF) + "".join(lines).encode("ascii")
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(
                f"{str(self.file)!r}: cannot be written ({error}); make room, or permit writing."
            ) from error
