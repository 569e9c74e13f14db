"""WebDataset: tars whose members are grouped into samples by their names, as webdataset groups them.

A member KEY.EXTENSION belongs to the sample KEY, which ends at the first dot of the file's name; members of a sample
follow one another. A path in the catalog is KEY.EXTENSION of the image; where a key comes in several tars, it is
TAR/KEY.EXTENSION in all of them, so paths are the same whenever the same tars are listed.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, cast

import numpy as np

from dali_diffusemix.catalog.headers import first_reason
from dali_diffusemix.catalog.table import Catalog
from dali_diffusemix.errors import CatalogError, ConfigError, DecodeError
from dali_diffusemix.images.codec import MOST_BYTES
from dali_diffusemix.images.formats import measure
from dali_diffusemix.sources.columns import LabelChoice
from dali_diffusemix.sources.files import File, name_of
from dali_diffusemix.sources.listed import Listed, ListedSource, Positions, check_rows
from dali_diffusemix.sources.source import Content, Progress

IMAGES: Final = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
"""The extensions of images, unless named."""

_LABEL: Final = "cls"
_FIRST: Final = 100  # samples that say which members there are, and if labels are numbers
_HEADER_BYTES: Final = 16384
_MOST_LABEL_BYTES: Final = 16 << 20
_NUMBER: Final = re.compile(r"[+-]?\d{1,18}")
_KEY: Final = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's
_META: Final = re.compile(r"__[^/]*__(?:/|\Z)")  # webdataset's
_DAMAGE: Final = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError, ValueError)
_OPENERS: Final[dict[bytes, Callable[..., object]]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class WebDatasetSource(ListedSource):
    """The samples of WebDataset tars, in order; tars may be compressed by gzip, bzip2 or xz.

    Args:
        files: The tars.
        image: The extensions of images, as "jpg;png": of a sample the first of them counts; None: the usual ones, of
            which a sample must have one.
        label: The extension of labels, as "cls", or "json:FIELD"; None: "cls", or none if samples have only images;
            False: none. Labels are whole numbers if those of most of the first samples are, else text.
        folders: See `Source.folders`.
    """

    def __init__(
        self, files: list[File], image: str | None = None, label: LabelChoice = None, folders: Sequence[Path] = ()
    ) -> None:
        self.folders = tuple(folders)
        self._files = files
        self._images = IMAGES if image is None else tuple(one.strip(". ").lower() for one in image.split(";"))
        self._first_counts = image is not None
        if not all(self._images):
            raise ConfigError(f"image must be extensions, as 'jpg;png', found {image!r}.")
        if label is not None and label is not False and not label.partition(":")[0].strip(". "):
            raise ConfigError(f"label must be an extension, as 'cls' or 'json:label', found {label!r}.")
        self._label = label
        self._reset()

    def _reset(self) -> None:
        # Of each row of the catalog; a compressed tar's offsets are those in its content.
        self._offsets, self._lengths, self._tars = Positions(), Positions(), array("i")

    @property
    def name(self) -> str:
        return name_of(self._files)

    def _list(self, progress: Progress | None) -> Catalog:
        self._reset()
        reading = self._reading()
        listed = Listed(labelled=reading.label is not None)
        done, total = 0, sum(file.size for file in self._files)
        seen: set[str] = set()
        repeated = False
        for number, file in enumerate(self._files):
            here: set[str] = set()
            for sample, at in _samples(file, reading, listed.reject):
                if (key := _regular(sample.key) or sample.key) in here:
                    listed.reject(
                        f"{file.shown}, {sample.key}",
                        "Its key was in this tar before; members of a sample must follow one another, and keys differ.",
                    )
                    continue
                here.add(key)
                self._add(listed, number, file, sample, reading)
                if progress is not None:
                    progress(done + min(at, file.size), total)
            repeated = repeated or not seen.isdisjoint(here)
            seen |= here
            done += file.size
            if progress is not None:
                progress(done, total)
        if repeated:
            names = [self._files[number].name for number in self._tars]
            listed.paths[:] = [f"{name}/{path}" for name, path in zip(names, listed.paths, strict=True)]
        return listed.catalog(self.name)

    def _add(self, listed: Listed, number: int, file: File, sample: "_Sample", reading: "_Reading") -> None:
        where = f"{file.shown}, {sample.key}"
        images = [one for one in reading.images if one in sample.images]
        if sample.damage is not None:
            return listed.reject(where, sample.damage)
        if not images:
            others = ", ".join(map(repr, sorted(sample.others))) or "nothing"
            return listed.reject(
                where,
                f"It has no image, with the extension {' or '.join(reading.images)}; found {others}; name the "
                "extension of images with image=.",
            )
        if len(images) > 1 and not self._first_counts:
            return listed.reject(where, _several(images))
        member = sample.images[images[0]]
        path = _regular(f"{sample.key}.{images[0]}")
        if path is None:
            return listed.reject(where, "Its key must be a path without '..', NUL or empty name; write another key.")
        if listed.add(path, f"{file.shown}, {member.name}", member.size, sample.label):
            self._offsets.append(member.offset)
            self._lengths.append(member.length)
            self._tars.append(number)
        return None

    def _reading(self) -> "_Reading":
        """The members to read, as the first samples have them. Raises ConfigError if they are ambiguous."""
        text = self._label if self._label is not None else _LABEL
        extension, _, field_name = (text or "").partition(":")
        extension = extension.strip(". ").lower()
        reading = _Reading(self._images, extension or None, field_name or None, numbers=False, measured=False)
        others: Counter[str] = Counter()
        labels: list[object] = []
        samples = 0
        listed = Listed(labelled=False)  # what is wrong is reported when all is listed
        for file in self._files:
            for sample, _ in _samples(file, reading, listed.reject):
                if len(sample.images) > 1 and not self._first_counts:
                    where = f"{file.shown}, {sample.key}"
                    raise ConfigError(f"{self.name}: image must be named. {where}: {_several(sorted(sample.images))}")
                others.update(sample.others)
                labels += [] if sample.label is None else [sample.label]
                samples += 1
                if samples == _FIRST:
                    break
            if samples == _FIRST:
                break
        if not samples:
            raise CatalogError(f"{self.name}: there is no sample in it. {first_reason(listed.rejected)}")
        if self._label is None and extension not in others:
            if others:
                found = ", ".join(map(repr, sorted(others)))
                raise ConfigError(
                    f"{self.name}: no member {_LABEL!r} has labels in the first samples, found {found}; name one with "
                    "label=, as label='json:label', or use label=False for no labels."
                )
            extension = ""
        if self._label and extension not in others:
            found = ", ".join(map(repr, sorted(others))) or "images alone"
            raise ConfigError(
                f"{self.name}: label must be an extension of the first samples, found {self._label!r}; they have "
                f"{found}."
            )
        numbers = sum(_number(label) is not None for label in labels) * 2 > len(labels)
        return _Reading(self._images, extension or None, field_name or None, numbers=numbers, measured=True)

    def read(self, rows: range) -> Iterator[Content]:
        check_rows(rows, len(self.catalog()))
        offsets, lengths = self._offsets.of(rows).tolist(), self._lengths.of(rows).tolist()
        tars = np.array(self._tars[rows.start : rows.stop : rows.step] if rows else (), np.int64)
        bounds = [0, *(np.flatnonzero(np.diff(tars)) + 1).tolist(), len(tars)] if rows else [0]
        for begin, end in pairwise(bounds):
            yield from _read(self._files[tars[begin]], offsets[begin:end], lengths[begin:end])


def _read(file: File, offsets: Sequence[int], lengths: Sequence[int]) -> Iterator[Content]:
    """The content of some members of a tar, in order."""
    why = file.changed()
    with ExitStack() as stack:
        if why is None:
            try:
                opened = _decompressed(stack.enter_context(file.path.open("rb")))
            except OSError as error:
                why = f"{str(file.path)!r}: cannot be read ({error}); restore it, or list the source again."
        for offset, length in zip(offsets, lengths, strict=True):
            if why is not None:
                yield DecodeError(why)
                continue
            try:
                opened.seek(offset)
                content = opened.read(length)
            except _DAMAGE as error:
                yield DecodeError(f"{str(file.path)!r}: cannot be read at byte {offset} ({error}); fetch it again.")
                continue
            if len(content) < length:
                yield DecodeError(f"{str(file.path)!r}: ends before byte {offset + length}; fetch it again.")
            else:
                yield content


# Samples --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """Which members are read."""

    images: tuple[str, ...]  # extensions
    label: str | None  # extension
    field: str | None  # of a label that is JSON
    numbers: bool  # labels are whole numbers
    measured: bool  # images' headers are read


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int  # of its content, bytes
    length: int  # bytes
    size: tuple[int, int] | str  # upright height and width, or the reason why it cannot be used


@dataclass
class _Sample:
    key: str
    images: dict[str, _Member] = field(default_factory=dict)  # by extension
    others: set[str] = field(default_factory=set)  # extensions
    label: object = None
    damage: str | None = None  # the reason why the whole sample cannot be used


def _samples(file: File, reading: _Reading, reject: Callable[[str, str], None]) -> Iterator[tuple[_Sample, int]]:
    """The samples of a tar, and the bytes of it that were read so far.

    Rejects what belongs to no sample, and the rest of a tar that is damaged or cut short.
    """
    sample: _Sample | None = None
    try:
        with _Tar(file) as tar:
            for member in tar.members():
                if _META.match(member.name):
                    continue
                where = f"{file.shown}, {member.name}"
                if not member.isreg() or member.issparse():
                    what = "sparse file" if member.issparse() else "link or a device"
                    reject(where, f"It is a {what} in the tar; write files themselves (tar --dereference).")
                    continue
                match = _KEY.fullmatch(member.name)
                if match is None:
                    reject(where, "It belongs to no sample: names must be KEY.EXTENSION; rename or remove it.")
                    continue
                key, extension = match[1], match[2].lower()
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample, tar.at
                    sample = _Sample(key)
                if extension in sample.images or extension in sample.others:
                    sample.damage = f"It has two members {extension!r}; each extension must be there once."
                elif extension in reading.images:
                    sample.images[extension] = _image(tar, member, reading)
                else:
                    sample.others.add(extension)
                    if extension == reading.label:
                        _set_label(sample, tar, member, reading)
    except _DAMAGE as error:
        why = str(error).rstrip(".") or type(error).__name__
        reject(file.shown, f"The rest of it cannot be read ({why}); the tar is damaged or cut short, fetch it again.")
    if sample is not None:
        yield sample, file.size


def _image(tar: "_Tar", member: tarfile.TarInfo, reading: _Reading) -> _Member:
    size: tuple[int, int] | str = (0, 0)
    if member.size > MOST_BYTES:
        size = f"It has {member.size} bytes, more than a GiB; make it smaller."
    elif tar.ends_before(member):
        size = "It is cut short, as its tar is; fetch the tar again."
    elif reading.measured:
        size = measure(tar.part(member))
    return _Member(member.name, member.offset_data, member.size, size)


def _set_label(sample: _Sample, tar: "_Tar", member: tarfile.TarInfo, reading: _Reading) -> None:
    """Read a sample's label; one that cannot be read damages the sample."""
    if member.size > _MOST_LABEL_BYTES:
        sample.damage = f"Its label {member.name!r} has {member.size} bytes, more than {_MOST_LABEL_BYTES}; shorten it."
        return
    content = tar.part(member).read()
    try:
        text = content.decode().strip()
        label: object = text
        if reading.field is not None:
            found = json.loads(text)
            label = found.get(reading.field) if isinstance(found, dict) else None
            if isinstance(label, bool) or not isinstance(label, int | str | None):
                raise ValueError(f"{reading.field!r} is neither a whole number nor text")
    except (ValueError, RecursionError) as error:
        what = "text" if reading.field is None else f"JSON with a label {reading.field!r}"
        sample.damage = f"Its label {member.name!r} must be {what} ({error}); correct it."
        return
    if label is None or label == "":
        return
    number = _number(label)
    if reading.measured and reading.numbers and number is None:
        sample.damage = f"Its label must be a whole number, as most of the first are, found {label!r}; correct it."
    sample.label = number if reading.numbers else str(label)


def _number(label: object) -> int | None:
    return int(str(label)) if _NUMBER.fullmatch(str(label)) else None


def _several(images: Sequence[str]) -> str:
    return f"It has several images ({', '.join(images)}); name those to take with image=, as image={images[0]!r}."


def _regular(key: str) -> str | None:
    """A path without '.' and empty parts; None if '..' or NUL is in it."""
    parts = [part for part in key.split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts or "\0" in key else "/".join(parts)


# Tars -----------------------------------------------------------------------------------------------------------------


class _Header(tarfile.TarInfo):
    """A member's header, which remembers how the tar ended: tarfile takes damage in the middle for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended_by = error  # type: ignore[attr-defined]
            raise


class _Content(io.RawIOBase):
    """Part of an open file, read without moving the file's own position."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        content = os.pread(self._descriptor, max(0, min(len(view), self._length - self._at)), self._offset + self._at)
        view[: len(content)] = content
        self._at += len(content)
        return len(content)


class _Tar:
    """An open tar, read from its beginning to its end. Of plain tars only headers are read, and what is asked for."""

    def __init__(self, file: File) -> None:
        self._file = file

    def __enter__(self) -> "_Tar":
        self._raw = self._file.path.open("rb")
        try:
            self._content = _decompressed(self._raw)
            self._tar = tarfile.open(fileobj=self._content, mode="r:", tarinfo=_Header)
        except BaseException:
            self._raw.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @property
    def at(self) -> int:
        """The bytes of the file that were read."""
        return self._raw.tell()

    def members(self) -> Iterator[tarfile.TarInfo]:
        """The members but for folders. Raises `_DAMAGE` where the tar is damaged or cut short."""
        for member in self._tar:
            if not member.isdir():
                yield member
            self._tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        ended_by = getattr(self._tar, "ended_by", None)
        if not isinstance(ended_by, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"it has no end mark: {ended_by}" if ended_by else "it has no end mark")

    def ends_before(self, member: tarfile.TarInfo) -> bool:
        """True if a plain tar ends before a member does."""
        return self._content is self._raw and member.offset_data + member.size > self._file.size

    def part(self, member: tarfile.TarInfo) -> BinaryIO:
        """A member's content, as a file at its start. Raises `_DAMAGE`."""
        if self._content is self._raw and member.size <= _HEADER_BYTES:
            return io.BytesIO(os.pread(self._raw.fileno(), member.size, member.offset_data))
        if self._content is self._raw:
            part = _Content(self._raw.fileno(), member.offset_data, member.size)
            return cast(BinaryIO, io.BufferedReader(part, _HEADER_BYTES))
        self._content.seek(member.offset_data)
        content = self._content.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError("unexpected end of data")
        return io.BytesIO(content)


def _decompressed(raw: BinaryIO) -> BinaryIO:
    """A file's content by its first bytes; itself if it is not compressed."""
    start = raw.read(2)
    raw.seek(0)
    opener = _OPENERS.get(start)
    return raw if opener is None else cast(BinaryIO, opener(raw, "rb"))
