"""Ways to decode for a GPU with DALI's operators alone: which ones work on this host, and how fast.

    decode_probe.py PHOTOGRAPHS --out FOLDER

The probe does not use this package's decoder. Each way runs in a process of its own, because it may crash: it decodes
small batches of each kind of image, prints a line of JSON before and after each, and compares the pixels with Pillow's.
A process that dies or hangs is restarted after the kind that ended it. First all ways decode in parallel; then each is
timed alone: batches of 128, whole files and JPEGs cut along their restart markers, encoded bytes in memory.

    cpu_whole, cpu_region          decoded on the CPU, then copied to the GPU
    gpu_whole, _0, _100            DALI's mixed decoder, with the default share of the hardware decoder, 0 and 1
    gpu_whole_fancy                with libjpeg-turbo's upsampling of colours (jpeg_fancy_upsampling)
    gpu_region, gpu_region_0       the same of windows alone (image_slice)
    kernels                        DALI's own kernels: resize and crop_mirror_normalize, against the same on the CPU

FOLDER gets decode-probe.jsonl with every line, and choice.json: the ways that work, what is wrong with the others, the
fastest one. A way works if it decodes the kinds in `NEEDED` like Pillow, within the tolerance of decoders. The probe
also finds black or constant pictures where Pillow has others, and decoders that deliver an image for a damaged file.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WAYS: dict[str, dict[str, Any]] = {
    "cpu_whole": {"device": "cpu"},
    "cpu_region": {"device": "cpu", "region": True},
    "gpu_whole": {"device": "mixed"},
    "gpu_whole_0": {"device": "mixed", "load": 0.0},
    "gpu_whole_100": {"device": "mixed", "load": 1.0},
    "gpu_whole_fancy": {"device": "mixed", "fancy": True},
    "gpu_region": {"device": "mixed", "region": True},
    "gpu_region_0": {"device": "mixed", "region": True, "load": 0.0},
    "kernels": {},
}
NEEDED = ("one", "photographs", "cut", "progressive", "together")
MEAN = 6.0  # of 255: maximum mean difference of two JPEG decoders' pixels
BATCH, TIMED_BATCH = 64, 128
SILENCE = 20.0  # seconds without a line after which a process counts as hanging
RESTARTS = 3
# Messages of a driver that cannot use a library's device code.
REFUSALS = (
    "no kernel image",
    "invalid image",
    "invalid device function",
    "named symbol not found",
    "kernel image is invalid",
)


@dataclass(frozen=True)
class Item:
    """An encoded image, a window of it, and the window's pixels."""

    encoded: NDArray[np.uint8]
    window: NDArray[np.int32]  # top, left, bottom, right
    expected: NDArray[np.uint8] | None  # (height, width, 3); None: nothing may be delivered


# Images ---------------------------------------------------------------------------------------------------------------


def item(content: bytes) -> Item:
    """An image with a window in its middle."""
    from dali_diffusemix.images.codec import decode

    pixels = decode(content)
    height, width = pixels.shape[:2]
    window = np.array([height // 5, width // 5, height - height // 5, width - width // 5], dtype=np.int32)
    top, left, bottom, right = window
    return Item(np.frombuffer(content, dtype=np.uint8), window, pixels[top:bottom, left:right])


def cut(files: Sequence[Path], folder: Path) -> list[Item]:
    """Return windows of photographs with restart markers, cut as in the loader."""
    from PIL import Image

    from dali_diffusemix.images.codec import decode, encode
    from dali_diffusemix.images.reading import read

    folder.mkdir(parents=True, exist_ok=True)
    locations, windows, expected = [], [], []
    for number, file in enumerate(files):
        with Image.open(file) as image:
            content = encode(image.convert("RGB"), 90)
        target = folder / f"{number}-{os.getpid()}.jpg"
        target.write_bytes(content)
        found = item(content)
        locations.append(os.fsencode(target))
        windows.append(found.window)
        top, left, bottom, right = found.window
        expected.append(decode(content)[top:bottom, left:right])
    batch = read(locations, np.array(windows, dtype=np.int32))
    for location in locations:
        Path(os.fsdecode(location)).unlink()
    return [
        Item(np.array(image), window.astype(np.int32), pixels)
        for image, window, pixels in zip(batch.images, batch.windows, expected, strict=True)
        if image is not None
    ]


def kinds(files: Sequence[Path], folder: Path) -> dict[str, list[Item]]:
    """Return batches by kind, the required ones first."""
    import io

    from PIL import Image

    def encoded(image: Image.Image, format: str = "JPEG", **more: Any) -> Item:
        stream = io.BytesIO()
        image.save(stream, format, **more)
        return item(stream.getvalue())

    photographs = [item(file.read_bytes()) for file in files[:BATCH]]
    some = [Image.open(file).convert("RGB") for file in files[:8]]
    turned = []
    for number, image in enumerate(some[:8]):
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        turned.append(encoded(image, quality=90, exif=exif))
    deep = (np.asarray(some[0].convert("L"), dtype=np.uint16) * 257).astype(np.uint16)
    found = {
        "one": photographs[:1],
        "photographs": photographs,
        "cut": cut(files[:BATCH], folder),
        "progressive": [encoded(image, quality=90, progressive=True) for image in some[:4]],
    }
    mixed = [encoded(image, "PNG") for image in some[:2]] + [
        encoded(image.convert("L"), quality=90) for image in some[2:4]
    ]
    found["together"] = [*photographs[:24], *found["cut"][:24], *found["progressive"], *mixed, *photographs[24:36]]
    found |= {
        "full_colour": [encoded(image, quality=90, subsampling="4:4:4") for image in some[:4]],
        "grey": [encoded(image.convert("L"), quality=90) for image in some[:4]],
        "png": [encoded(image, "PNG") for image in some[:4]],
        "small": [encoded(some[0].resize((side, side + 3)), quality=90) for side in (1, 5, 17, 33, 63)],
        "large": [encoded(some[0].resize((4000, 3000)), quality=85)],
        "turned": turned,
        "cmyk": [encoded(image.convert("CMYK"), quality=90) for image in some[:4]],
        "png16": [encoded(Image.fromarray(deep), "PNG")],
    }
    content = bytes(photographs[0].encoded)
    broken = np.frombuffer(content[: len(content) * 6 // 10], dtype=np.uint8)
    found["damaged"] = [Item(broken, photographs[0].window, None)]
    return found


# A way, in its own process --------------------------------------------------------------------------------------------


def say(**content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


class Decoder:
    """One way to decode: batches of up to so many images."""

    def __init__(
        self, way: dict[str, Any], batch_size: int, threads: int, device: int | None, source: Any = None
    ) -> None:
        from nvidia.dali import fn, pipeline_def, types

        self.region = way.get("region", False)
        options: dict[str, Any] = {"device": way["device"], "output_type": types.RGB}
        if "load" in way:
            options["hw_decoder_load"] = way["load"]
        if "fancy" in way:
            options["jpeg_fancy_upsampling"] = way["fancy"]
        copied = way["device"] == "cpu" and device is not None
        names = ("encoded", "start", "end") if self.region else ("encoded",)

        @pipeline_def(
            batch_size=batch_size, num_threads=threads, device_id=device, prefetch_queue_depth=2 if source else 1
        )
        def pipeline() -> Any:
            kinds = {"encoded": types.UINT8, "start": types.INT32, "end": types.INT32}
            if source is None:
                inputs = [fn.external_source(name=name, dtype=kinds[name], ndim=1) for name in names]
            else:
                inputs = fn.external_source(
                    source=source, num_outputs=len(names), dtype=[kinds[name] for name in names], ndim=1, batch=True
                )
            if self.region:
                encoded, start, end = inputs
                pixels = fn.decoders.image_slice(encoded, start=start, end=end, axes=[0, 1], **options)
            else:
                pixels = fn.decoders.image(inputs[0], **options)
            return pixels.gpu() if copied else pixels

        self.pipeline = pipeline()
        self.pipeline.build()

    def feed(self, items: Sequence[Item]) -> dict[str, list[NDArray[Any]]]:
        found: dict[str, list[NDArray[Any]]] = {"encoded": [one.encoded for one in items]}
        if self.region:
            found |= {"start": [one.window[:2] for one in items], "end": [one.window[2:] for one in items]}
        return found

    def __call__(self, items: Sequence[Item]) -> list[NDArray[np.uint8]]:
        """Return the pixels of the windows."""
        for name, values in self.feed(items).items():
            self.pipeline.feed_input(name, values)
        (outputs,) = self.pipeline.run()
        if hasattr(outputs, "as_cpu"):
            outputs = outputs.as_cpu()
        pixels = [np.array(outputs.at(i)) for i in range(len(items))]
        if self.region:
            return pixels
        return [one[w[0] : w[2], w[1] : w[3]] for one, w in zip(pixels, (i.window for i in items), strict=True)]


def compared(found: Sequence[NDArray[np.uint8]], items: Sequence[Item]) -> dict[str, Any]:
    """Return the differences of pixels from the expected ones."""
    means, largest, black, shapes = [], 0, 0, 0
    for pixels, one in zip(found, items, strict=True):
        assert one.expected is not None
        if pixels.shape != one.expected.shape:
            shapes += 1
            continue
        difference = np.abs(pixels.astype(np.int16) - one.expected)
        means.append(float(difference.mean()))
        largest = max(largest, int(difference.max()))
        black += int(np.ptp(pixels) == 0 < np.ptp(one.expected))
    mean, worst = (float(np.mean(means)), max(means)) if means else (255.0, 255.0)
    content = {"mean": round(mean, 3), "worst_mean": round(worst, 3), "largest": largest}
    return {"ok": worst <= MEAN and not black and not shapes, **content, "black": black, "wrong_shapes": shapes}


def kernels(items: Sequence[Item], device: int | None) -> dict[str, Any]:
    """Compare DALI's resize and crop_mirror_normalize on the GPU with those on the CPU."""
    from nvidia.dali import fn, pipeline_def, types

    def run(gpu: bool) -> list[NDArray[np.float32]]:
        @pipeline_def(batch_size=len(items), num_threads=2, device_id=device if gpu else None, prefetch_queue_depth=1)
        def pipeline() -> Any:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pixels = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
            pixels = fn.resize(pixels.gpu() if gpu else pixels, size=[96, 96], interp_type=types.INTERP_LINEAR)
            return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", mean=[0.0], std=[1.0])

        built = pipeline()
        built.build()
        built.feed_input("encoded", [one.encoded for one in items])
        (outputs,) = built.run()
        outputs = outputs.as_cpu() if gpu else outputs
        return [np.array(outputs.at(i)) for i in range(len(items))]

    difference = max(float(np.abs(a - b).max()) for a, b in zip(run(device is not None), run(False), strict=True))
    return {"ok": difference <= 2, "largest": round(difference, 3)}


def speed(way: dict[str, Any], items: Sequence[Item], threads: int, device: int | None, seconds: float) -> float:
    """Return images per second."""
    batch = [items[i % len(items)] for i in range(TIMED_BATCH)]
    fed: list[Any] = []
    decoder = Decoder(way, TIMED_BATCH, threads, device, source=lambda: tuple(fed))
    fed.extend(decoder.feed(batch).values())
    for _ in range(4):
        decoder.pipeline.run()
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        decoder.pipeline.run()
        done += TIMED_BATCH
    return done / (time.perf_counter() - begin)


def work(options: argparse.Namespace) -> None:
    """Run a way over all kinds, and then, on request, time it."""
    device = None if options.device == "cpu" else 0
    files = sorted(options.photographs.rglob("*.jpg")) + sorted(options.photographs.rglob("*.JPEG"))
    way, threads = WAYS[options.way], len(os.sched_getaffinity(0))
    say(kind="start", state="begin")
    material = kinds(files, options.out / "cache" / "probe")
    say(kind="start", state="done", ok=True)
    if options.way == "kernels":
        one_kind("kernels", lambda: kernels(material["photographs"][:8], device))
    else:
        decoder: Decoder | None = None
        for kind, items in material.items():
            if kind in options.skip.split(","):
                continue
            begin = time.perf_counter()
            if decoder is None:  # a new one after a failure, which ends a pipeline
                decoder = Decoder(way, max(map(len, material.values())), 4, device)
            built = round(time.perf_counter() - begin, 2)
            found = one_kind(kind, partial(decoded, kind, items, decoder), build_seconds=built)
            if "error" in found:
                decoder = None
    say(kind="ready", state="done")
    if options.way != "kernels" and sys.stdin.readline().strip():
        for kind in ("photographs", "cut"):
            say(kind=f"speed of {kind}", state="begin")
            try:
                rate = speed(way, material[kind], threads, device, options.seconds)
                say(kind=f"speed of {kind}", state="done", ok=True, images_per_second=round(rate, 1))
            except Exception as error:
                say(kind=f"speed of {kind}", state="done", ok=False, error=f"{type(error).__name__}: {error}"[:1500])
    say(kind="end", state="done")
    sys.stdout.flush()
    os._exit(0)  # without the libraries' own shutdown


def decoded(kind: str, items: Sequence[Item], decoder: "Decoder") -> dict[str, Any]:
    if kind != "damaged":
        return compared(decoder(items), items)
    try:
        (pixels,) = decoder(items)
    except RuntimeError as error:
        return {"ok": True, "outcome": "raised", "error": str(error).strip().splitlines()[-1][:200]}
    return {"ok": False, "outcome": "delivered", "black": int(np.ptp(pixels) == 0), "grey_rows": flat_rows(pixels)}


def flat_rows(pixels: NDArray[np.uint8]) -> int:
    return int((np.ptp(pixels.reshape(len(pixels), -1), axis=1) == 0).sum())


def one_kind(kind: str, attempt: Callable[[], dict[str, Any]], **more: Any) -> dict[str, Any]:
    say(kind=kind, state="begin")
    begin = time.perf_counter()
    try:
        found = attempt()
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}
    say(kind=kind, state="done", seconds=round(time.perf_counter() - begin, 2), **more, **found)
    return found


# All ways -------------------------------------------------------------------------------------------------------------


class Process:
    """The process of a way: its lines, and its end."""

    def __init__(self, command: Sequence[str], log: Any) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self, seconds: float) -> dict[str, Any] | str:
        """Return the next line, or the way in which the process ended."""
        try:
            text = self._lines.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            self.end()
            return f"no answer for {seconds:.0f} s"
        if text is None:
            try:
                status = self.process.wait(5)
            except subprocess.TimeoutExpired:
                return "closed its output and hangs"
            return signal.Signals(-status).name if status < 0 else f"exit status {status}"
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:  # a line of a library
            return self.line(seconds)
        return found

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # leave it if a driver holds it
            self.process.wait(3)
            self._reader.join(1)
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # unsent data is not needed
                    assert pipe is not None
                    pipe.close()


class Probe:
    """All ways, and the results so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._end = time.monotonic() + options.limit
        self.found: dict[str, dict[str, Any]] = {}  # way to kind to result
        self._processes: dict[str, Process] = {}  # ready to be timed
        self._lock = threading.Lock()
        self._record = (options.out / "decode-probe.jsonl").open("w")
        self._log = (options.out / "decode-probe-processes.log").open("w")

    def close(self) -> None:
        """End waiting processes, and close the files."""
        for process in self._processes.values():
            process.end()
        self._record.close()
        self._log.close()

    def _note(self, way: str, kind: str, content: dict[str, Any]) -> None:
        with self._lock:
            self.found.setdefault(way, {})[kind] = content
            self._record.write(json.dumps({"way": way, "kind": kind, **content}) + "\n")
            self._record.flush()

    def command(self, way: str, skip: Sequence[str]) -> list[str]:
        """Return the command of a way's process."""
        options = self._options
        command = [sys.executable, __file__, str(options.photographs), "--way", way, "--skip", ",".join(skip)]
        return [*command, "--device", options.device, "--out", str(options.out), "--seconds", str(options.seconds)]

    def decode(self, way: str) -> None:
        """Run a way over all kinds, with a new process after each crash."""
        skip: list[str] = []
        for _ in range(1 + RESTARTS):
            process, under_way = Process(self.command(way, skip), self._log), "start"
            while True:
                line = process.line(min(SILENCE, self._end - time.monotonic()))
                if isinstance(line, str):
                    self._note(way, under_way, {"ok": False, "error": f"the process ended: {line}", "crashed": True})
                    break
                kind = line.pop("kind")
                if kind == "ready":
                    with self._lock:
                        self._processes[way] = process
                    return
                if line.pop("state") == "done":
                    skip.append(kind)
                    self._note(way, kind, line)
                under_way = kind
            process.end()
            if under_way == "start" or way == "kernels" or time.monotonic() > self._end:
                return
            skip.append(under_way)

    def time(self, way: str) -> None:
        """Time a way with a waiting process."""
        process, under_way = self._processes.pop(way), "speed of photographs"
        try:
            process.go()
            while True:
                line = process.line(min(SILENCE, self._end - time.monotonic()))
                if isinstance(line, str):
                    self._note(way, under_way, {"ok": False, "error": f"the process ended: {line}", "crashed": True})
                    return
                under_way = line.pop("kind")
                if under_way == "end":
                    return
                if line.pop("state") == "done":
                    self._note(way, under_way, line)
        except OSError as error:
            self._note(way, under_way, {"ok": False, "error": f"the process has ended: {error}", "crashed": True})
        finally:
            process.end()

    def run(self) -> dict[str, Any]:
        ways = list(WAYS) if self._options.device != "cpu" else ["cpu_whole", "cpu_region", "gpu_whole"]
        at_once = max(1, len(os.sched_getaffinity(0)) // 2)
        for start in range(0, len(ways), at_once):
            threads = [threading.Thread(target=self.decode, args=(way,)) for way in ways[start : start + at_once]]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.write()
        for way in ways:
            if way in self._processes and way != "kernels":
                self.time(way)
                self.write()
        return self.write()

    def write(self) -> dict[str, Any]:
        """Write choice.json from the results so far."""
        content = choice(self.found)
        unfinished = self._options.out / ".choice.json.tmp"
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(self._options.out / "choice.json")
        return content


def choice(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the content of choice.json: the ways that work, what is wrong, the fastest one."""
    ways: dict[str, Any] = {}
    for way, results in found.items():
        if way == "kernels":
            continue
        wrong = {
            kind: row.get("error")
            or (
                f"{row['outcome']} something"
                if "outcome" in row
                else f"mean {row.get('worst_mean')}, black {row.get('black')}"
            )
            for kind, row in results.items()
            if not row.get("ok")
        }
        works = all(results.get(kind, {}).get("ok", False) for kind in NEEDED)
        speeds = {kind: results.get(f"speed of {kind}", {}).get("images_per_second") for kind in ("photographs", "cut")}
        ways[way] = {"works": works, "images_per_second": speeds, "wrong": wrong}
    rated = {way: row["images_per_second"]["photographs"] or 0.0 for way, row in ways.items() if row["works"]}
    fastest = max(rated, key=lambda way: rated[way], default=None)
    forms = {
        form: max((rate for way, rate in rated.items() if way.startswith(start)), default=0.0)
        for form, start in (("region", "gpu_region"), ("whole", "gpu_whole"), ("cpu", "cpu_"))
    }
    kernels = found.get("kernels", {}).get("kernels")
    errors = [str(row.get("error", "")) for results in found.values() for row in results.values()]
    refusals = sorted({error for error in errors if any(words in error.lower() for words in REFUSALS)})
    return {
        "ways": ways,
        "fastest": fastest,
        # For later steps: this package's way to decode (its "gpu" decodes whole images) and plain DALI's form.
        "loader": None if fastest is None else "gpu" if fastest[:3] == "gpu" and ways["gpu_whole"]["works"] else "cpu",
        "plain_dali": max(forms, key=lambda form: forms[form]) if any(forms.values()) else None,
        "kernels": kernels,
        "driver_refuses": refusals[:5] or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a way is timed")
    parser.add_argument("--limit", type=float, default=70, help="seconds for all of it")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--skip", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.way:
        work(options)
    with contextlib.closing(Probe(options)) as taken:
        content = taken.run()
    for way, row in content["ways"].items():
        rates = "/".join(f"{rate or 0:.0f}" for rate in row["images_per_second"].values())
        wrong = "; ".join(f"{kind}: {why[:60]}" for kind, why in row["wrong"].items())
        print(f"{way:14}{'works' if row['works'] else 'FAILS':6} {rates:>12} images/s (files/cut)  {wrong[:110]}")
    print(f"kernels: {content['kernels']}; fastest: {content['fastest']}; plain DALI: {content['plain_dali']}")
    if content["driver_refuses"]:
        print(f"THE DRIVER REFUSES the libraries' device code: {content['driver_refuses'][0][:200]}")
        print("take the untouched bundle: bundle.py make without --only-arch")
    sys.exit(0 if content["fastest"] else 1)


if __name__ == "__main__":
    main()
