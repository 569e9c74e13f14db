"""The result of `examine`, as JSON and as text."""

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import dali_diffusemix
from dali_diffusemix.doctor.advice import Feature
from dali_diffusemix.doctor.lanes import Answer

__all__ = ["Examination"]

_LEAST: Final = 50  # columns of the text, which has as many as the terminal, up to
_COLUMNS: Final = 80
_LONGEST: Final = 700  # characters of an entry; longer errors are cut here, but not in the JSON


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of `examine`. No path in it names the user's home folder."""

    answers: Mapping[str, Answer]  # by probe
    works: Mapping[str, Feature]
    notes: Sequence[str]  # traps that belong to no probe
    seconds: float

    @property
    def ok(self) -> bool:
        """True if the loader works on some device."""
        return any(self.works[name].works for name in ("load_cpu", "load_cuda"))

    def json(self) -> dict[str, Any]:
        """Return one JSON object with the same keys on every machine; a probe without an answer has an `error`."""
        return {
            "version": dali_diffusemix.__version__,
            "ok": self.ok,
            "works": {
                name: {"title": one.title, "works": one.works, "detail": one.detail, "remedy": one.remedy}
                for name, one in self.works.items()
            },
            "notes": list(self.notes),
            "found": {name: {"error": one.error, **one.found} for name, one in self.answers.items()},
            "seconds": round(self.seconds, 1),
        }

    def lines(self) -> Iterator[str]:
        """Yield a text of at most 80 columns: what was found, then what works."""
        yield f"dali-diffusemix {dali_diffusemix.__version__}"
        yield ""
        for label, text in _facts(self.answers):
            yield from _wrapped(f"{label:12}", text, 12)
        for note in self.notes:
            yield from _wrapped("Note        ", note, 12)
        yield ""
        yield "What works here"
        for feature in self.works.values():
            yield from _wrapped(f"  {'yes' if feature.works else 'no':5}{feature.title:27}", feature.detail, 34)
            if feature.remedy is not None:
                yield from _wrapped(" " * 7 + "-> ", feature.remedy, 10)
        yield ""
        devices = [name for key, name in (("load_cpu", "the CPU"), ("load_cuda", "the GPU")) if self.works[key].works]
        yield f"Loading works on {' and '.join(devices)}." if devices else "Loading works on no device."


# The text -------------------------------------------------------------------------------------------------------------

_Found = Mapping[str, Any]


def _wrapped(first: str, text: str, indent: int) -> list[str]:
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    # Do not break `pip install`.
    whole = f"{first}{short}".replace("pip install ", "pip\xa0install\xa0")
    columns = max(_LEAST, min(_COLUMNS, shutil.get_terminal_size().columns))
    lines = textwrap.wrap(whole, columns, subsequent_indent=" " * indent, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _facts(answers: Mapping[str, Answer]) -> Iterator[tuple[str, str]]:
    """Yield labels and texts."""
    failed = set()
    for label, name, text in _TEXTS:
        answer = answers[name]
        if answer.error is None:
            if shown := text(answer.found):
                yield label, shown
        elif name not in failed:
            failed.add(name)
            yield label, answer.error


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _package_text(found: _Found) -> str:
    return f"{found['version']} in {found['folder']}" + (", a checkout" if found["checkout"] else "")


def _processor_text(found: _Found) -> str:
    quota = "no container quota" if found["quota"] is None else f"container quota {found['quota']:g}"
    return f"{found['processor']}; {found['cores']} cores usable (affinity {found['affinity']}, {quota})"


def _memory_text(found: _Found) -> str:
    limit = "" if found["memory_limit"] is None else f", container limit {_gib(found['memory_limit'])}"
    return (
        f"{_gib(found['memory'])}, {_gib(found['memory_available'])} available{limit}; /dev/shm "
        f"{_gib(found['shared_memory'])}"
    )


def _gpus_text(found: _Found) -> str:
    return f"driver {found['driver']}, CUDA up to {found['cuda']}; {_devices_text(found['devices'])}"


def _devices_text(devices: Sequence[_Found]) -> str:
    return ", ".join(f"{one['name']} ({_gib(one['memory'])}, compute {one['capability']})" for one in devices)


def _torch_text(found: _Found) -> str:
    built = "built without CUDA" if found["cuda"] is None else f"built for CUDA {found['cuda']}"
    sees = f"no GPU: {found['why_no_gpu']}" if found["why_no_gpu"] else _devices_text(found["devices"])
    return f"{found['version']}, {built}" + ("" if found["cuda"] is None else f", sees {sees}")


def _versions_text(found: _Found) -> str:
    return ", ".join(f"{package} {version}" for package, version in found.items() if version)


def _missing_text(found: _Found) -> str:
    return ", ".join(package for package, version in found.items() if not version)


def _pillow_text(found: _Found) -> str:
    turbo = f"libjpeg-turbo {found['libjpeg_turbo']}" if found["libjpeg_turbo"] else "no libjpeg-turbo"
    zlib = f"zlib-ng {found['zlib_ng']}" if found["zlib_ng"] else f"zlib {found['zlib'] or 'missing'}"
    webp = f"libwebp {found['webp']}" if found["webp"] else "no libwebp"
    return f"{found['version']}, {turbo}, {zlib}, {webp}; decodes {_formats_text(found)}"


def _formats_text(found: _Found) -> str:
    good = ", ".join(format for format, error in found["formats"].items() if error is None)
    return "; ".join((good, *(f"not {format} ({error})" for format, error in found["formats"].items() if error)))


def _dali_gpu_text(found: _Found) -> str:
    engine = {True: "yes", False: "no", None: "cannot be told"}[found["hardware_jpeg"]]
    return f"decodes {_formats_text(found)}; an engine of its own for JPEGs: {engine}"


def _cache_text(found: _Found) -> str:
    made = "" if found["exists"] else ", made when it is needed"
    return f"{found['folder']}{made}; can be written, {_gib(found['free'])} free ({found['file_system']})"


def _data_text(found: _Found) -> str:
    if found["path"] is None:
        return ""
    some = "" if found["all_listed"] else " or more"
    unreadable = f", not all can be read ({found['unreadable']})" if found["unreadable"] else ""
    return (
        f"{found['path']}, a {found['kind']} of {found['files']}{some} files{unreadable}; {found['file_system']}, "
        f"{_gib(found['free'])} free"
    )


def _reading_text(key: str, found: _Found) -> str:
    read = found[key]
    if read is None:
        return ""
    threads = "1 thread" if read["threads"] == 1 else f"{read['threads']} threads"
    errors = f"; {read['unreadable']} cannot be read ({read['error']})" if read["unreadable"] else ""
    if read["from_storage"] is None:
        source = "the system does not say from where"
    elif read["from_storage"] < 0.05:
        source = "from memory or over a network: the system counts no bytes from a disk"
    else:
        source = f"{read['from_storage']:.0%} of it from disk, not from the page cache"
    return (
        f"{threads}: {read['mb_per_second']:.0f} MB/s, {read['files_per_second']:.0f} files/s "
        f"({read['files']} files, {read['bytes'] / 1e6:.1f} MB, {source}){errors}"
    )


_TEXTS: Final[tuple[tuple[str, str, Callable[[_Found], str]], ...]] = (
    ("Package", "package", _package_text),
    ("Python", "package", lambda found: f"{found['python']}, {found['executable']}"),
    (
        "System",
        "machine",
        lambda found: ", ".join(filter(None, (found["distribution"], found["system"], found["libc"]))),
    ),
    ("Processor", "machine", _processor_text),
    ("Memory", "machine", _memory_text),
    ("GPU", "gpus", _gpus_text),
    ("PyTorch", "torch", _torch_text),
    ("Packages", "versions", _versions_text),
    ("Absent", "versions", _missing_text),
    (
        "Variables",
        "package",
        lambda found: ", ".join(f"{name}={value}" for name, value in found["environment"].items()),
    ),
    ("CPU kernel", "kernel", lambda found: f"{found['library']} loads"),
    ("Compiler", "compiler", lambda found: f"{found['command']}: {found['version']}"),
    ("GPU kernel", "gpu_kernel", lambda found: f"CuPy {found['cupy']}, NVRTC {found['nvrtc']}"),
    ("Pillow", "pillow", _pillow_text),
    ("DALI, CPU", "dali_cpu", lambda found: f"decodes {_formats_text(found)}; Pillow decodes the rest"),
    ("DALI, GPU", "dali_gpu", _dali_gpu_text),
    ("GPU decodes", "decoding", lambda found: f"with {found['threads']} threads, {found['choice']}"),
    ("Cache", "cache", _cache_text),
    ("Data", "data", _data_text),
    ("  reading", "data", partial(_reading_text, "one_thread")),
    ("", "data", partial(_reading_text, "many_threads")),
)
