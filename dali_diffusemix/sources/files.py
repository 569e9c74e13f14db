"""The files of a source: from a path, a folder, a pattern or a list to files in order, each with a name."""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dali_diffusemix.errors import CatalogError, ConfigError

TARS: Final = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PARQUETS: Final = (".parquet", ".parq")

_BRACES = re.compile(r"\{([^{}]*)\}")
_COUNTING = re.compile(r"(\d+)\.\.(\d+)")
_SPLIT = re.compile(
    r"(?:\A|[-_.])(train|training|val|valid|validation|dev|test|testing|eval|holdout|extra)(?=[-_.\d])", re.IGNORECASE
)
_MOST_FILES: Final = 10_000_000


@dataclass(frozen=True)
class File:
    """A file of a source, as it was when it was listed."""

    path: Path
    name: str  # below the folder common to all, without the ending; distinct
    shown: str  # the same with the ending, for messages
    size: int  # bytes
    mtime: int  # nanoseconds

    def changed(self) -> str | None:
        """The reason why it is no longer the file that was listed; None if it is."""
        try:
            now = self.path.stat()
        except OSError as error:
            return f"{str(self.path)!r}: cannot be read ({error.strerror}); restore it, or list the source again."
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime):
            return f"{str(self.path)!r}: has changed since it was listed; list the source again."
        return None


def is_pattern(path: str) -> bool:
    """True if a path has a brace expression or a wildcard, and is not itself a file."""
    return (_BRACES.search(path) is not None or glob.has_magic(path)) and not Path(path).exists()


def expand(given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], endings: Sequence[str]) -> list[File]:
    """The files of a path, a folder's files with these endings, a pattern's in order, or a list's as they are.

    A pattern has wildcards, and braces as shells have them: {000..146} and {a,b}.

    Raises CatalogError: a file is missing, nothing matches, or a folder has files of several splits. ConfigError: a
    file is given twice.
    """
    if isinstance(given, str | os.PathLike):
        paths = _expanded(os.fspath(given), endings)
    else:
        paths = [path for one in given for path in _expanded(os.fspath(one), endings)]
    if not paths:
        raise CatalogError("the source must name at least one file, found an empty list.")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigError(f"every file of the source must be given once, found {str(twice)!r} twice.")
    files = []
    for path, name, shown in zip(paths, *_names(paths, endings), strict=True):
        try:
            found = path.stat()
        except OSError as error:
            raise CatalogError(
                f"{str(path)!r}: cannot be read ({error.strerror}); give files that are there."
            ) from error
        if not path.is_file():
            raise CatalogError(f"{str(path)!r}: must be a file; found none with {' or '.join(endings)}.")
        files.append(File(path, name, shown, found.st_size, found.st_mtime_ns))
    return files


def in_folder(folder: Path, endings: Sequence[str]) -> list[Path]:
    """The visible files of a folder, without those of its subfolders, that have one of these endings, by name."""
    return sorted(path for path in folder.iterdir() if _ending(path.name, endings) and not path.name.startswith("."))


def _expanded(text: str, endings: Sequence[str]) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        found = in_folder(path, endings)
        if not found:
            raise CatalogError(f"{text!r}: there is no file with {' or '.join(endings)} in this folder.")
        splits = sorted({match[1] for one in found if (match := _SPLIT.search(one.name))})
        if len(splits) > 1:
            pattern = str(path / f"*{splits[-1]}*{endings[0]}")
            raise CatalogError(
                f"{text!r}: its files must be of one split, found {', '.join(splits)}; give a pattern, as {pattern!r}."
            )
        return found
    if not is_pattern(text):
        return [path]
    found = []
    for one in _braces(text):
        if not glob.has_magic(one) or Path(one).exists():
            found.append(Path(one))
            continue
        matches = sorted(map(Path, glob.glob(one, recursive=True)))  # noqa: PTH207 - absolute patterns too
        if not matches:
            raise CatalogError(f"{text!r}: no file matches {one!r}; give a pattern of files that are there.")
        found += matches
    return found


def _braces(text: str) -> list[str]:
    """All texts that a brace expression stands for, in order."""
    done, pending = [], [text]
    while pending:
        one = pending.pop(0)
        match = _BRACES.search(one)
        if match is None:
            done.append(one)
            continue
        if counting := _COUNTING.fullmatch(match[1]):
            first, last = int(counting[1]), int(counting[2])
            if abs(last - first) >= _MOST_FILES:
                raise ConfigError(f"{text!r}: must stand for at most {_MOST_FILES} files, found {match[0]}.")
            digits = len(counting[1]) if counting[1].startswith("0") else 0
            step = 1 if first <= last else -1
            parts = [f"{number:0{digits}}" for number in range(first, last + step, step)]
        else:
            parts = match[1].split(",")
        pending = [one[: match.start()] + part + one[match.end() :] for part in parts] + pending
    return done


def _ending(name: str, endings: Sequence[str]) -> str:
    """The longest of these endings that a file's name has, whatever its case; '' if none."""
    return max((one for one in endings if name.lower().endswith(one)), key=len, default="")


def _names(paths: Sequence[Path], endings: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of files without and with the ending, below the folder common to all, so that it may be moved."""
    absolute = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - links stay as they are named
    common = Path(os.path.commonpath([path.parent for path in absolute]))
    whole = [path.relative_to(common).as_posix() for path in absolute]
    short = [name[: len(name) - len(_ending(name, endings))] or name for name in whole]
    return (short if len(set(short)) == len(short) else whole), whole


def name_of(files: Sequence[File]) -> str:
    """The name of a source of these files, for messages."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{str(files[0].path)!r}{more}"
