"""Files of every kind, damaged at random, through the loader's path: read, screened, decoded by several threads.

File i is a function of (seed, i): the first are the kinds of `odd.every_kind` as they are, the rest those changed. Each
batch is decoded twice over, the whole of each file and a window of it, and compared with `pixels.decode`: the same
pixels, or both refuse. That happens in a process of its own (`python fuzzing.py`), because a decoder may end it; what
ended it is then looked for among the files and kept.
"""

import argparse
import ctypes
import io
import json
import os
import re
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from odd import chunk, chunks, every_kind, exif, join_jpeg, join_png, split_jpeg
from PIL import Image

BATCH: Final = 48  # files; each is decoded twice
_ODD_BYTES: Final = (
    0x00,
    0xFF,
    0x01,
    0x02,
    0x03,
    0x10,
    0x3F,
    0x40,
    0x7F,
    0x80,
    0xC0,
    0xC4,
    0xD0,
    0xD8,
    0xD9,
    0xDA,
    0xE1,
)

_ORDINARY: Final = re.compile(
    r"jpeg, (plain|grey|progressive|progressive grey|(progressive |restart \w+ )?4\d\d|size|optimised|best|worst"
    r"|profile|Photoshop|MPF|XMP|comment|extended|sampling \(1, 2\)|trailing|4\d\d turned \d|EXIF none|zeros before)"
    r"|png, ([0246] of 8|0 of|before: (sRGB|gAMA|tEXt|iTXt|pHYs|tIME|bKGD)|after: t|all filters|many|small"
    r"|3 of|palette)"
)

Draw = np.random.Generator


# --- damage ---------------------------------------------------------------------------------------------------------


def file(seed: int, i: int, kinds: dict[str, bytes]) -> tuple[str, bytes]:
    """What file i is, and its content."""
    names = list(kinds)
    if i < len(names):
        return names[i], kinds[names[i]]
    draw = np.random.default_rng((seed, i))
    ways, done = _WAYS, []
    if draw.integers(2):  # what DALI is given, and most likely still is when it is damaged
        names, ways = [name for name in names if _ORDINARY.match(name)], _DEEP_WAYS
    name = names[draw.integers(len(names))]
    content = kinds[name]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        done.append(ways[draw.integers(len(ways))])
        content = done[-1](content, draw, kinds)
    return f"{name}: {', '.join(way.__name__ for way in done)}", content


def _body(content: bytes) -> int:
    """Where the codes of the pixels begin, about."""
    for mark in (b"\xff\xda", b"IDAT"):
        if (at := content.find(mark)) > 0:
            return min(at + 14, len(content))
    return min(len(content), 64)


def _changed(content: bytes, draw: Draw, begin: int, end: int) -> bytes:
    if begin >= end:
        return content
    changed = bytearray(content)
    for at in draw.integers(begin, end, draw.integers(1, 5)):
        kind = draw.integers(3)
        if kind == 0:
            changed[at] = draw.choice(_ODD_BYTES)
        elif kind == 1:
            changed[at] ^= 1 << draw.integers(8)
        else:
            changed[at] = draw.integers(256)
    return bytes(changed)


def header_bytes(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    return _changed(content, draw, 0, _body(content))


def body_bytes(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    return _changed(content, draw, _body(content), len(content))


def cut_short(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    return content[: draw.integers(len(content) + 1)]


def bytes_removed(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    at = int(draw.integers(len(content) + 1))
    return content[:at] + content[at + int(draw.integers(1, 40)) :]


def bytes_inserted(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    at = int(draw.integers(len(content) + 1))
    return content[:at] + draw.bytes(int(draw.integers(1, 40))) + content[at:]


def bytes_behind(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    return content + draw.bytes(int(draw.integers(1, 400)))


def spliced(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    """One file's header with another's codes."""
    other = list(kinds.values())[draw.integers(len(kinds))]
    return content[: _body(content)] + other[_body(other) :]


def parts(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    """Segments or chunks, their sums made good: one changed, removed, repeated, moved, cut, or another file's added."""
    try:
        if content[:2] == b"\xff\xd8":
            segments, rest = split_jpeg(content)
            return join_jpeg(_rearranged(segments, draw, _segments(kinds, draw)), rest)
        if content[:4] == b"\x89PNG":
            return join_png(_rearranged(chunks(content), draw, _chunks(kinds, draw)))
    except (IndexError, ValueError):
        pass
    return header_bytes(content, draw, kinds)


def _segments(kinds: dict[str, bytes], draw: Draw) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = [(int(draw.integers(0xC0, 0x100)), draw.bytes(int(draw.integers(20))))]
    turn = int(draw.integers(1, 9))
    tags = draw.choice([0x10E, 0x110, 0x112, 0x11A, 0x131, 0x13E, 0x211, 0x8769], 2)
    entries = [(0x112, 3, 1, turn), *((int(t), int(draw.integers(1, 14)), int(draw.integers(4)), 10) for t in tags)]
    order = draw.permutation(len(entries))
    found.append((0xE1, exif([entries[k] for k in order], little=bool(draw.integers(2)))))
    names = [name for name in kinds if name.startswith("jpeg")]
    content = kinds[names[draw.integers(len(names))]]
    with suppress(IndexError, ValueError):
        found += split_jpeg(content)[0]
    return found


def _chunks(kinds: dict[str, bytes], draw: Draw) -> list[tuple[bytes, bytes]]:
    names = [name for name in kinds if name.startswith("png")]
    return chunks(kinds[names[draw.integers(len(names))]])


def _rearranged(parts: list, draw: Draw, others: list) -> list:  # type: ignore[type-arg]
    parts, way = list(parts), draw.integers(7)
    at, to = (int(draw.integers(len(parts))) for _ in range(2))
    kind, body = parts[at]
    if way == 0:
        parts[at] = (kind, _changed(body, draw, 0, len(body)))
    elif way == 1:
        del parts[at]
    elif way == 2:
        parts.insert(to, parts[at])
    elif way == 3:
        parts[at], parts[to] = parts[to], parts[at]
    elif way == 4:
        parts[at] = (kind, body[: draw.integers(len(body) + 1)])
    elif way == 5:
        parts[at] = (kind, body + draw.bytes(int(draw.integers(1, 30))))
    else:
        parts.insert(at, others[draw.integers(len(others))])
    return parts


def deflated(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    """A PNG with other bytes in its deflated pixels, all sums right; of other files, the body."""
    try:
        found = chunks(content)
        data = b"".join(body for kind, body in found if kind == b"IDAT")
        way = draw.integers(3)
        if way == 0:
            data = _changed(data, draw, 0, len(data))
        else:
            plain = zlib.decompress(data)
            plain = _changed(plain, draw, 0, len(plain))
            if way == 1:
                plain = plain[: draw.integers(len(plain) + 1)] + draw.bytes(int(draw.integers(3)))
            data = zlib.compress(plain, int(draw.integers(10)))
        head = next(k for k, part in enumerate(found) if part[0] == b"IDAT")
        return join_png([*found[:head], (b"IDAT", data), *(part for part in found[head:] if part[0] != b"IDAT")])
    except (IndexError, ValueError, StopIteration, zlib.error):
        return body_bytes(content, draw, kinds)


def length_wrong(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    """A segment's or chunk's length off by a little."""
    mark = b"\xff" if content[:2] == b"\xff\xd8" else b"\0\0"
    places = [at for at in range(2, _body(content)) if content.startswith(mark, at)]
    if not places:
        return content
    at = places[draw.integers(len(places))] + 3
    return (
        content[:at] + bytes([(content[at] + int(draw.integers(-3, 4))) % 256]) + content[at + 1 :]
        if at < len(content)
        else content
    )


def marker_inserted(content: bytes, draw: Draw, kinds: dict[str, bytes]) -> bytes:
    """Two to four bytes that begin like a marker, anywhere, in a header before a marker; or a small chunk."""
    if content[:4] == b"\x89PNG":
        return content[:33] + chunk(draw.bytes(4), draw.bytes(int(draw.integers(30)))) + content[33:]
    places = [at for at in range(2, _body(content)) if content[at] == 0xFF] or [0]
    at = places[draw.integers(len(places))] if draw.integers(3) else int(draw.integers(len(content) + 1))
    return (
        content[:at] + b"\xff" + bytes([draw.integers(256)]) + (b"", b"\0\2", b"\0\0")[draw.integers(3)] + content[at:]
    )


_WAYS: Final = (
    header_bytes,
    header_bytes,
    body_bytes,
    body_bytes,
    cut_short,
    bytes_removed,
    bytes_inserted,
    bytes_behind,
    spliced,
    parts,
    parts,
    parts,
    deflated,
    length_wrong,
    marker_inserted,
)
_DEEP_WAYS: Final = (body_bytes, body_bytes, body_bytes, deflated, parts, bytes_behind, marker_inserted)


# --- in a process of its own ----------------------------------------------------------------------------------------


def _window(draw: Draw, height: int, width: int) -> tuple[int, int, int, int]:
    top, left = int(draw.integers(height)), int(draw.integers(width))
    rows = int(draw.choice([1, 2, 3, 8, 20, height]))
    columns = int(draw.choice([1, 2, 3, 8, 20, width]))
    return top, left, min(top + rows, height), min(left + columns, width)


def _decode_batch(folder: Path, contents: list[bytes], decoder: object, draw: Draw) -> list[tuple[str, bool]]:
    """(verdict, whether DALI was given it) of each file: "shown", "refused" or what is unequal."""
    from dali_diffusemix.errors import DecodeError
    from dali_diffusemix.images.codec import decode
    from dali_diffusemix.images.reading import read
    from dali_diffusemix.loading.pieces import Pieces

    count = len(contents)
    expected: list[NDArray[np.uint8] | None] = []
    sizes = np.ones((count, 2), dtype=np.int32)
    for i, content in enumerate(contents):
        (folder / str(i)).write_bytes(content)
        try:
            expected.append(decode(content))
            sizes[i] = expected[-1].shape[:2]  # type: ignore[union-attr]
        except DecodeError:
            expected.append(None)
            sizes[i] = _guessed(content)
    locations = [os.fsencode(folder / str(i)) for i in range(count)]
    whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    windows = np.array([_window(draw, *size) for size in sizes.tolist()], dtype=np.int32)
    safe = read(locations, whole, sizes).safe
    pieces = Pieces.of(locations * 2, np.stack([whole, windows]), np.stack([sizes, sizes]))
    decoder.submit(lambda: pieces)  # type: ignore[attr-defined]
    decoded = decoder.fetch()  # type: ignore[attr-defined]
    verdicts = ["" for _ in range(count)]
    for row, (name, seen) in enumerate((("whole", whole), ("window", windows))):
        for i, (top, left, bottom, right) in enumerate(seen.tolist()):
            pixels, error = expected[i], decoded.errors.get((row, i))
            if error is not None or pixels is None:
                verdict = "refused" if error is not None and pixels is None else "shown by one"
                if verdict != "refused":
                    verdict += f" ({error})" if error is not None else " (the loader)"
            else:
                found = pixels_at(int(decoded.table["data"][row, i]), (bottom - top, right - left, 3))
                same = np.array_equal(found, pixels[top:bottom, left:right])
                verdict = "shown" if same else f"unequal in {name} {(top, left, bottom, right)} of {pixels.shape[:2]}"
            if verdicts[i] in ("", "shown", "refused"):
                verdicts[i] = verdict
    return list(zip(verdicts, safe.tolist(), strict=True))


def _guessed(content: bytes) -> tuple[int, int]:
    """The size that a catalog may have of a file that has been damaged since."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            try:
                turned = image.getexif().get(0x112, 1) in (5, 6, 7, 8)
            except Exception:  # of a PNG it decodes the pixels, which may be damaged
                turned = False
    except Exception:
        return 43, 61
    size = (width, height) if turned else (height, width)
    return size if 0 < width * height < 1 << 24 else (43, 61)


def pixels_at(address: int, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    memory = (ctypes.c_uint8 * int(np.prod(shape))).from_address(address)
    return np.frombuffer(memory, dtype=np.uint8).reshape(shape)


def main() -> None:
    from dali_diffusemix.loading.decoder import PieceDecoder

    parser = argparse.ArgumentParser()
    for name in ("seed", "first", "count"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", type=json.loads)
    given = parser.parse_args()
    warnings.simplefilter("always")
    kinds = every_kind()
    harmless = kinds["jpeg, plain"]
    decoder = PieceDecoder(BATCH, threads=4)
    for first in range(given.first, given.first + given.count, BATCH):
        rows = range(first, min(first + BATCH, given.first + given.count))
        named = [file(given.seed, i, kinds) for i in rows]
        if given.only is not None:
            named = [one if i in given.only else ("", harmless) for i, one in zip(rows, named, strict=True)]
        sys.stdout.write(json.dumps({"begin": first}) + "\n")
        sys.stdout.flush()
        draw = np.random.default_rng((given.seed, first, 1))
        verdicts = _decode_batch(given.folder, [content for _, content in named], decoder, draw)
        for i, (name, _), (verdict, by_dali) in zip(rows, named, verdicts, strict=True):
            sys.stdout.write(json.dumps({"file": i, "name": name, "verdict": verdict, "dali": by_dali}) + "\n")
        sys.stdout.flush()
    decoder.close()


# --- looking at it from outside ---------------------------------------------------------------------------------------


@dataclass
class Found:
    """What came of the files that were tried."""

    shown: int = 0  # equal
    refused: int = 0  # by both
    by_dali: int = 0  # of all, those that DALI was given
    unequal: dict[int, str] = field(default_factory=dict)  # name and verdict, by number
    crashes: dict[int, str] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)  # lines on stderr

    @property
    def tried(self) -> int:
        return self.shown + self.refused + len(self.unequal) + len(self.crashes)

    def add(self, lines: list[dict[str, Any]], printed: list[str]) -> None:
        self.printed += printed
        for line in lines:
            self.by_dali += line["dali"]
            self.shown += line["verdict"] == "shown"
            self.refused += line["verdict"] == "refused"
            if line["verdict"] not in ("shown", "refused"):
                self.unequal[line["file"]] = f"{line['name']}: {line['verdict']}"

    def numbers(self) -> dict[str, int]:
        return {
            "files_tried": self.tried,
            "refused_by_both": self.refused,
            "shown_by_both": self.shown,
            "given_to_dali": self.by_dali,
            "unequal": len(self.unequal),
            "crashes": len(self.crashes),
            "lines_on_stderr": len(self.printed),
        }

    def faults(self) -> str:
        """What is wrong, for a test's message; empty if nothing is."""
        lines = [f"{kind} {i}: {name}" for kind in ("unequal", "crashes") for i, name in getattr(self, kind).items()]
        return "\n".join(lines[:60] + [f"{n} times: {line}" for line, n in Counter(self.printed).most_common(20)])


def fuzz(seed: int, first: int, count: int, folder: Path, *, limit: float = 900.0) -> Found:
    """Try files [first, first + count). Files that are at fault are kept in `folder`."""
    found, kinds, at = Found(), every_kind(), first
    while at < first + count:
        output, errors, ended = _run(seed, at, first + count - at, folder, limit)
        begun = [line["begin"] for line in output if "begin" in line] or [at]
        found.add([line for line in output if "file" in line], errors)
        at = first + count
        if ended:  # in the batch that was begun last
            batch, at = begun[-1], min(begun[-1] + BATCH, first + count)
            guilty = _guilty(seed, batch, at - batch, folder, limit)
            found.crashes |= {i: f"{file(seed, i, kinds)[0]}: {ended}" for i in guilty}
            others = [i for i in range(batch, at) if i not in guilty]
            output, errors, _ = _run(seed, batch, at - batch, folder, limit, others)
            found.add([line for line in output if line.get("file") in others], errors)
    for kind, names in (("unequal", found.unequal), ("crash", found.crashes)):
        for i in names:
            (folder / f"{kind} {i}").write_bytes(file(seed, i, kinds)[1])
    return found


def _run(
    seed: int, first: int, count: int, folder: Path, limit: float, only: list[int] | None = None
) -> tuple[list[dict[str, Any]], list[str], str]:
    """What a process says of files, what it prints to stderr, and how it ended, if not well."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--seed", str(seed), "--first", str(first), "--count", str(count)]
    command += ["--folder", str(work), *(("--only", json.dumps(only)) if only is not None else ())]
    with (folder / "stdout").open("w+b") as output, (folder / "stderr").open("w+b") as errors:
        ended = ""
        try:
            code = subprocess.run(command, stdout=output, stderr=errors, timeout=limit).returncode
            ended = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            ended = f"not done after {limit:.0f} s"
        output.seek(0)
        errors.seek(0)
        lines = [json.loads(line) for line in output.read().splitlines() if line.endswith(b"}")]
        return lines, errors.read().decode(errors="replace").splitlines(), ended


def _guilty(seed: int, first: int, count: int, folder: Path, limit: float) -> list[int]:
    """Which files of a batch end the process, by trying halves of them among harmless ones; all if none does alone."""
    suspects = list(range(first, first + count))
    while len(suspects) > 1:
        for half in (suspects[: len(suspects) // 2], suspects[len(suspects) // 2 :]):
            if any(_run(seed, first, count, folder, min(limit, 120.0), half)[2] for _ in range(3)):
                suspects = half
                break
        else:
            break
    return suspects


if __name__ == "__main__":
    main()
