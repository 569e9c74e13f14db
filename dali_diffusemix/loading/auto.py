"""decode="auto": measures the ways to decode for a GPU on this machine, once, and remembers the fastest.

    way ──> a process of its own, with a time limit ──> images/s, or why it does not work
                 (a vendor's library may crash it, or report success with wrong pixels)

"cpu" is the CPU loader's decoder, whose pixels are Pillow's, plus one copy of the visible parts to the GPU per batch.
The other ways are settings of DALI's mixed decoders (`GpuDecoding`).
"""

import contextlib
import ctypes
import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.base.cpus import cpus
from dali_diffusemix.base.files import cache_folder, locked, write
from dali_diffusemix.errors import ConfigError, DataError
from dali_diffusemix.images import codec
from dali_diffusemix.loading.dali import GpuDecoding
from dali_diffusemix.loading.decoder import PieceDecoder
from dali_diffusemix.loading.pieces import Pieces
from dali_diffusemix.loading.upload import PieceUpload

_log = logging.getLogger(__name__)

Decode: TypeAlias = Literal["auto", "cpu", "gpu"] | GpuDecoding
"""A loader's `decode` argument; "gpu" is `GpuDecoding()`."""

WAYS: Final[Mapping[str, GpuDecoding | None]] = {
    "cpu": None,
    "gpu": GpuDecoding(),
    "gpu, regions": GpuDecoding(regions=True),
    "gpu, edits on the cpu": GpuDecoding(hardware_load=0.9, edits_on_cpu=True),
}
"""The ways that "auto" measures; None is the CPU."""

_SECONDS: Final = 60.0  # for one trial
_TIMED: Final = 1.0  # seconds of decoding that are timed
_GAIN: Final = 1.1  # over the CPU, whose pixels are exact, for a GPU's decoder to be chosen
_PACKAGES: Final = (
    *("nvidia-dali-cuda120", "nvidia-dali-cuda130", "nvidia-nvimgcodec-cu12", "nvidia-nvimgcodec-cu13"),
    *("nvidia-nvjpeg-cu12", "nvidia-nvjpeg", "torch", "dali-diffusemix"),
)
_CHILD: Final = (
    "import sys; sys.path[:] = sys.argv[2:]; from dali_diffusemix.loading.auto import serve; serve(sys.argv[1])"
)

# The photographs: ImageNet's usual size, half of them in tiles, as edit stores hold them.
_HEIGHT, _WIDTH, _BATCH = 375, 500, 64
# Of 255, on average over a piece: nvJPEG's inverse transform and chroma upsampling differ from libjpeg-turbo's.
_LARGEST_MEAN_DIFFERENCE: Final = 8.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The measurements on a machine, and the way that was chosen."""

    way: str  # of WAYS
    images_per_second: Mapping[str, float]  # by way; an original and an edit count as one
    errors: Mapping[str, str]  # by way: why it does not work

    def __str__(self) -> str:
        found = [f"{way} {rate:.0f} images/s" for way, rate in self.images_per_second.items()]
        failed = [f"{way} does not work ({error})" for way, error in self.errors.items()]
        return f"decode={self.way}: {', '.join(found + failed)}"


def check(decode: Decode, device: torch.device) -> None:
    """Raise ConfigError unless a loader on this device can decode so."""
    if not isinstance(decode, GpuDecoding) and decode not in ("auto", "cpu", "gpu"):
        raise ConfigError(
            f"decode must be 'auto', 'cpu', 'gpu' or a GpuDecoding, found {decode!r}; leave it out for 'auto'."
        )
    if device.type == "cpu" and decode not in ("auto", "cpu"):
        raise ConfigError(f"decode must be 'auto' or 'cpu' for device='cpu', found {decode!r}; leave it out.")


def resolve(decode: Decode, device: torch.device, threads: int) -> GpuDecoding | None:
    """The way to decode for a device; None is on the CPU. "auto" may measure first."""
    if isinstance(decode, GpuDecoding):
        return decode
    if decode == "gpu":
        return GpuDecoding()
    if decode == "cpu" or device.type == "cpu":
        return None
    choice = choose(device.index, threads)
    _log.info("%s on %s", choice, torch.cuda.get_device_name(device))
    return WAYS[choice.way]


def choose(device: int, threads: int) -> Choice:
    """The fastest way to decode for a GPU, from the user's cache or measured; processes wait for each other."""
    facts = _facts(device, threads)
    with _locked():
        known = remembered(facts)
        if known is None:
            name = torch.cuda.get_device_name(device)
            _log.warning("Measuring the ways to decode for %s: once per machine, about a minute.", name)
            known = _tried(device, threads)
            if known.images_per_second:  # otherwise something on the machine is broken, and may be repaired
                _remember(facts, known)
    return known


def _tried(device: int, threads: int) -> Choice:
    rates, errors = dict[str, float](), dict[str, str]()
    for name in WAYS:
        answer = _trial(name, device, threads)
        if "error" in answer:
            errors[name] = answer["error"]
        else:
            rates[name] = answer["images_per_second"]
    # If nothing works, loading on the CPU will report why.
    best = max(rates, key=rates.__getitem__, default="cpu")
    way = best if rates.get(best, 0) >= _GAIN * rates.get("cpu", 0) else "cpu"
    return Choice(way=way, images_per_second=rates, errors=errors)


def _trial(way: str, device: int, threads: int) -> dict[str, Any]:
    """Measure a way in a process of its own."""
    request = json.dumps({"way": way, "device": device, "threads": threads})
    with (
        tempfile.TemporaryDirectory(prefix="dali-diffusemix-") as folder,
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, request, *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,
        ) as process,
    ):
        try:
            output, _ = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            return {"error": f"no answer within {_SECONDS:g} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ValueError):
        answer: dict[str, Any] = json.loads(output)
        return answer
    code = process.returncode
    names = {number.value: number.name for number in signal.Signals}
    how = f"was ended by {names.get(-code, f'signal {-code}')}" if code < 0 else f"ended with exit code {code}"
    return {"error": f"the process that tried it {how}"}


def serve(request: str) -> None:
    """Measure a way, requested in JSON, and print the result as JSON; what libraries print goes to stderr."""
    signal.alarm(math.ceil(_SECONDS) + 5)  # in case the parent is gone
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        asked = json.loads(request)
        try:
            device = torch.device("cuda", asked["device"])
            answer: dict[str, Any] = {
                "images_per_second": round(rate(WAYS[asked["way"]], device, asked["threads"], _TIMED), 1)
            }
        except Exception as error:  # of any kind: it is the result
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer))
    # Without tearing down the libraries, which may fail too.
    os._exit(0)


def rate(way: GpuDecoding | None, device: torch.device, threads: int, seconds: float) -> float:
    """Decode photographs for a device until `seconds` have passed.

    Returns:
        Samples per second, each a part of an original and a part of an edit.

    Raises:
        DataError: the pixels are not Pillow's.
    """
    cuda = device.type == "cuda"
    decoder = PieceDecoder(_BATCH, threads=threads, ahead=3, device=device.index if way else None, gpu=way)
    upload = PieceUpload(device, threads)

    def fetch() -> tuple[NDArray[np.void], object]:
        decoder.submit(shown.pieces)
        pieces = decoder.fetch(upload.stream)
        for error in pieces.errors.values():
            raise error
        table, copied = upload(pieces.table, pieces.on_host)
        return table, (copied, pieces)

    with tempfile.TemporaryDirectory() as folder, torch.cuda.device(device) if cuda else contextlib.nullcontext():
        shown = _Photographs(Path(folder))
        for _ in range(4):
            decoder.submit(shown.pieces)
        table, owner = fetch()
        shown.compare(table, device)
        del owner
        for _ in range(3):
            fetch()
        batches, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            fetch()
            batches += 1
        if cuda:
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - begin
        decoder.drain()
        decoder.close()
    return batches * _BATCH / elapsed


class _Photographs:
    """The files of a batch in a folder, and a window of each: about a third of it."""

    def __init__(self, folder: Path) -> None:
        draw = np.random.default_rng(0)
        self._files = list[bytes]()
        self._windows = np.zeros((2, _BATCH, 4), dtype=np.int32)
        for row, sample in np.ndindex(2, _BATCH):
            coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
            photograph = Image.fromarray(np.clip(smooth + draw.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8))
            file = folder / f"{row}-{sample}.jpg"
            if row == 0:
                photograph.save(file, quality=90)
            else:
                file.write_bytes(codec.encode(photograph, 90))
            self._files.append(os.fsencode(file))
            top, left = draw.integers(0, _HEIGHT // 3), draw.integers(0, _WIDTH // 2)
            self._windows[row, sample] = (top, left, top + 2 * _HEIGHT // 3, left + _WIDTH // 2)

    def pieces(self) -> Pieces:
        """The windows, to be decoded."""
        sizes = np.broadcast_to(np.array([_HEIGHT, _WIDTH], dtype=np.int32), (2, _BATCH, 2))
        return Pieces.of(self._files, self._windows, sizes)

    def compare(self, table: NDArray[np.void], device: torch.device) -> None:
        """Raise DataError unless the pieces show what Pillow makes of the files, within what decoders differ."""
        batch = list(zip(self._files, self._windows.reshape(-1, 4).tolist(), table.ravel(), strict=True))
        for file, (top, left, bottom, right), piece in batch[:: len(batch) // 16]:
            expected = codec.decode(os.fsdecode(file))[top:bottom, left:right].astype(np.int16)
            above, beside = top - int(piece["top"]), left - int(piece["left"])
            whole = _pixels_of(piece, device)
            found = whole[above : above + bottom - top, beside : beside + right - left]
            difference = float(np.abs(found - expected).mean()) if found.shape == expected.shape else float("inf")
            if difference > _LARGEST_MEAN_DIFFERENCE:
                raise DataError(
                    f"the pixels must be Pillow's within {_LARGEST_MEAN_DIFFERENCE:g} of 255 on average, found a "
                    f"difference of {difference:.1f}; they are from {found.min(initial=255)} to {found.max(initial=0)}."
                )


def _pixels_of(piece: np.void, device: torch.device) -> NDArray[np.uint8]:
    """A piece, (height, width, 3) uint8, copied to the host."""
    shape = (int(piece["height"]), int(piece["width"]), 3)
    if device.type == "cpu":
        return np.ctypeslib.as_array((ctypes.c_uint8 * math.prod(shape)).from_address(int(piece["data"]))).reshape(
            shape
        )

    class Memory:
        __cuda_array_interface__: ClassVar = {
            "shape": shape,
            "typestr": "|u1",
            "data": (int(piece["data"]), False),
            "version": 3,
        }

    copied: NDArray[np.uint8] = torch.as_tensor(Memory(), device=device).cpu().numpy()
    return copied


# What is remembered ---------------------------------------------------------------------------------------------------


def remembered(facts: Mapping[str, Any]) -> Choice | None:
    """The remembered measurements on such a machine; None if there are none."""
    try:
        known = json.loads(_file().read_text()).get(_key(facts))
        return None if known is None else Choice(**known["choice"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ConfigError):
        return None


def _remember(facts: Mapping[str, Any], choice: Choice) -> None:
    file = _file()
    try:
        content = json.loads(file.read_text())
        assert isinstance(content, dict)
    except (OSError, ValueError, AssertionError):
        content = {}
    content[_key(facts)] = {"choice": asdict(choice), "machine": dict(facts)}
    try:
        write(file, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        _log.info("The way to decode is not remembered: %s", error)


def _facts(device: int, threads: int) -> dict[str, Any]:
    """The facts that the measurements depend on."""
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cores": cpus(),
        "threads": threads,
    }
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _driver() -> str:
    """The driver's version, by NVML, which comes with it."""
    text = ctypes.create_string_buffer(96)
    with contextlib.suppress(OSError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if not nvml.nvmlInit_v2() and not nvml.nvmlSystemGetDriverVersion(text, len(text)):
            return text.value.decode()
    return "unknown"


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _file() -> Path:
    return cache_folder() / "decoding.json"


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """One process at a time: of several ranks one tries, and the others wait for its answer."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ConfigError):  # nothing can be remembered or locked: each tries for itself
            file = _file()
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(file.with_suffix(".lock")))
        yield
