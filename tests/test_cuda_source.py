"""kernels/mix.cu without a GPU: compiled for every architecture, and run on the CPU, block after block, by a shim."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mixing_cases import (
    NOTHING,
    Case,
    compare,
    pixels,
    plan_of,
    random_case,
    rational_cases,
    two_thirds,
    visible_pieces,
)
from numpy.typing import NDArray

from dali_diffusemix.base import gpu
from dali_diffusemix.mix import IMAGENET, TensorFormat
from dali_diffusemix.mix.call import mix, piece_table, row_table
from dali_diffusemix.mix.pixel import encode, mixed_image
from dali_diffusemix.mix.tensor import DTYPES, DtypeName
from dali_diffusemix.plan import MASKS, BatchPlan

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "kernels"
SHIM = Path(__file__).parent / "cuda_shim"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FILES = ("mix.cu", "augment.cu")
THREADS = 256
# What the sources ask the compiler for: four blocks share a multiprocessor; one has it.
REGISTERS = {"mix.cu": 65_536 // (4 * THREADS), "augment.cu": 65_536 // 512}


def all_names(file: str) -> list[str]:
    kernel = file.removesuffix(".cu")
    return [f"{kernel}_{dtype}_{layout}" for dtype in DTYPES for layout in ("nchw", "channels_last")]


# --- compiled -------------------------------------------------------------------------------------------------------


def nvrtc_library() -> Path | None:
    """libnvrtc of the nvidia-cuda-nvrtc wheel, which compiles without a driver."""
    spec = find_spec("nvidia")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return next((file for place in folders for file in sorted(place.glob("*/lib/libnvrtc.so.*"))), None)


def compile_with_nvrtc(library: Path, text: str, options: Sequence[str], architecture: int) -> tuple[int, str]:
    nvrtc = ctypes.CDLL(str(library))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"mix.cu", 0, None, None) == 0
    # As CuPy's RawModule calls it, which adds the first three.
    options = [f"-arch=sm_{architecture}", "-ftz=true", "--device-as-default-execution-space", *options]
    options.append("--ptxas-options=-v")
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
    assert nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)) == 0
    log = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetProgramLog(program, log) == 0
    assert nvrtc.nvrtcDestroyProgram(ctypes.byref(program)) == 0
    return failed, log.value.decode()


def compile_with_nvcc(nvcc: str, text: str, options: Sequence[str], architecture: int, folder: Path) -> tuple[int, str]:
    (folder / "mix.cu").write_text(text)
    command = [nvcc, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings", *options]
    run = subprocess.run([*command, "-o", folder / "out.cubin", folder / "mix.cu"], capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(
    "architecture", [pytest.param(one, marks=() if one == 90 else pytest.mark.slow) for one in ARCHITECTURES]
)
def test_every_kernel_compiles_without_a_warning_or_a_spill(architecture: int, tmp_path: Path) -> None:
    """All kernels for sm_90; for the others two, one by one, as the loader compiles the one it needs."""
    library, nvcc = nvrtc_library(), shutil.which("nvcc")
    if architecture == 90:
        compilations = [(file, all_names(file), gpu.options(file=file)) for file in FILES]
    else:
        some = ("float32_nchw", "uint8_channels_last")
        names = [(file, f"{file.removesuffix('.cu')}_{form}") for file in FILES for form in some]
        compilations = [(file, [name], gpu.options(name, file=file)) for file, name in names]
    for file, expected, options in compilations:
        text = gpu.source(file)
        if library is not None:
            failed, log = compile_with_nvrtc(library, text, options, architecture)
        elif nvcc is not None:
            failed, log = compile_with_nvcc(nvcc, text, options, architecture, tmp_path)
        else:
            pytest.skip("neither the wheel nvidia-cuda-nvrtc-cu12 nor nvcc is here")
        assert not failed and "warning" not in log, log
        # ptxas: "... Compiling entry function 'mix_uint8_nchw' for 'sm_90'", "... 0 bytes stack frame, 0 bytes spill
        # stores, 0 bytes spill loads", "... Used 62 registers, ...".
        names = re.findall(r"entry function '(\w+)'", log)
        memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        registers = [int(used) for used in re.findall(r"Used (\d+) registers", log)]
        report = dict(zip(names, zip(registers, memory, strict=True), strict=True))
        assert sorted(names) == sorted(expected), report
        assert all(bytes == ("0", "0", "0") for bytes in memory), report
        assert max(registers) <= REGISTERS[file], report


# --- run on the CPU -------------------------------------------------------------------------------------------------

Dim3 = ctypes.c_uint32 * 3


class Shim:
    """A .cu file compiled by g++ against cuda_shim.h."""

    def __init__(self, source: Path, folder: Path, *, contract: str = "fast") -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("the shim needs g++")
        # Contraction as nvcc's default has it, where this machine has fused multiply-adds.
        flags = f"-std=c++17 -O2 -march=native -ffp-contract={contract} -fno-strict-aliasing -fPIC -fvisibility=hidden"
        checks = "-fsanitize=alignment -Wall -Wextra -Werror -Wno-unknown-pragmas"
        compiled, library = folder / "shim.o", folder / "shim.so"
        command = [compiler, *flags.split(), *checks.split(), f"-I{SHIM}", f"-I{KERNELS}", "-c", source]
        subprocess.run([*command, "-o", compiled], check=True)
        subprocess.run([compiler, "-shared", compiled, "-o", library], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.cuda_shim_forbidden_reads.restype = ctypes.c_int64

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[np.generic],
        *,
        readable: Sequence[NDArray[np.uint8]] = (),
        descending: bool = False,
    ) -> int:
        """Run the grid; return how many reads through __ldg left `readable`."""
        begins = np.array([array.ctypes.data for array in readable], dtype=np.uint64)
        sizes = np.array([array.nbytes for array in readable], dtype=np.uint64)
        self._library.cuda_shim_readable(
            ctypes.c_void_p(begins.ctypes.data), ctypes.c_void_p(sizes.ctypes.data), len(readable)
        )
        values = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        failed = self._library.cuda_shim_launch(
            getattr(self._library, kernel), Dim3(*grid), Dim3(*block), int(descending), pointers
        )
        assert failed != 1, "a thread ended while another waited at a barrier"
        assert failed != 2, "an access was misaligned"
        return int(self._library.cuda_shim_forbidden_reads())


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    return Shim(SHIM / "mix.cpp", tmp_path_factory.mktemp("shim"))


def run(
    shim: Shim,
    plan: BatchPlan,
    pieces: NDArray[np.void],
    bank: NDArray[np.uint8] | None,
    format: TensorFormat,
    readable: Sequence[NDArray[np.uint8]],
    *,
    offset: int = 0,
    descending: bool = False,
) -> NDArray[np.generic]:
    """Launch the kernel as the GPU's launcher does; `offset` moves the output off its alignment, in elements."""
    height, width = plan.output_size
    shape = format.shape(len(plan), plan.output_size)
    # Guards on both sides, and NaNs (float) or 255 (uint8) inside, so that an element never written shows.
    guarded = np.full(int(np.prod(shape)) + 2 * 64, 0xFF, dtype=np.uint8).repeat(format.storage.itemsize)
    guarded = guarded.view(format.storage)
    begin = 32 + offset
    out = guarded[begin : begin + int(np.prod(shape))].reshape(shape)
    rows = row_table(plan)
    bank_shape = (0, 0) if bank is None else bank.shape[1:3]
    scale, shift = format.scale_and_offset()
    forbidden = shim.launch(
        f"mix_{format.dtype}_{'channels_last' if format.channels_last else 'nchw'}",
        (-(-width // 32), -(-height // 32), len(plan)),
        (THREADS, 1, 1),
        [
            *(np.uint64(table.ctypes.data) for table in (pieces, rows)),
            np.uint64(0 if bank is None else bank.ctypes.data),
            *(np.int32(side) for side in bank_shape),
            np.uint64(out.ctypes.data),
            *(np.int32(side) for side in (height, width)),
            *scale,
            *shift,
        ],
        readable=[*readable, *([] if bank is None else [bank])],
        descending=descending,
    )
    assert forbidden == 0, f"{forbidden} reads outside of the pieces"
    around = np.concatenate([guarded[:begin], guarded[begin + out.size :]])
    assert (around.view(np.uint8) == 0xFF).all(), "written outside of the output"
    return out


class Pieces:
    """Rectangles of images as DALI leaves them: anywhere in memory, at any alignment, in the middle of other bytes."""

    def __init__(
        self,
        generator: np.random.Generator,
        images: list[NDArray[np.uint8]],
        *,
        cut: bool,
    ) -> None:
        self.readable: list[NDArray[np.uint8]] = []
        self.seen: list[NDArray[np.uint8]] = []  # the images, 0 where the piece does not lie
        count = len(images)
        data, shapes = np.zeros(count, dtype=np.uint64), np.zeros((count, 2), dtype=np.int32)
        origins, sizes = np.zeros((count, 2), dtype=np.int32), np.ones((count, 2), dtype=np.int32)
        for row, image in enumerate(images):
            if image is NOTHING:
                self.seen.append(NOTHING)
                continue
            sizes[row] = image.shape[:2]
            low, high = np.zeros(2, dtype=int), np.array(image.shape[:2])
            if cut:
                low = generator.integers(0, high)
                high = generator.integers(low + 1, high + 1)
            piece = image[low[0] : high[0], low[1] : high[1]]
            seen = np.zeros_like(image)
            seen[low[0] : high[0], low[1] : high[1]] = piece
            self.seen.append(seen)
            wild = generator.integers(0, 256, piece.size + 32, dtype=np.uint8)
            begin = int(generator.integers(0, 16))
            self.readable.append(wild[begin : begin + piece.size])
            self.readable[-1][:] = piece.reshape(-1)
            data[row], shapes[row], origins[row] = self.readable[-1].ctypes.data, piece.shape[:2], low
        self.table = piece_table(data, shapes, origins=origins, image_sizes=sizes)  # (images,)


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 3),
    out=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    largest=st.sampled_from([1, 3, 40, 300]),
    seam_width=st.sampled_from([0.0, 20 / 256, 0.5, 1.0]),
    own_span=st.booleans(),
    cut=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    channels_last=st.booleans(),
    offset=st.integers(0, 7),
    descending=st.booleans(),
)
def test_the_grid_is_the_specification_and_the_cpu_kernel(
    shim: Shim,
    seed: int,
    count: int,
    out: tuple[int, int],
    largest: int,
    seam_width: float,
    own_span: bool,
    cut: bool,
    dtype: DtypeName,
    channels_last: bool,
    offset: int,
    descending: bool,
) -> None:
    generator = np.random.default_rng(seed)
    case = random_case(generator, count, out, largest, seam_width=seam_width, own_span=own_span)
    plan, bank = case.plan, case.bank
    originals = Pieces(generator, case.originals, cut=cut)
    edits = Pieces(generator, case.edits, cut=cut)
    pieces = np.stack([originals.table, edits.table])
    format = TensorFormat(
        dtype=dtype, channels_last=channels_last, normalize=None if dtype == "uint8" or seed % 3 == 0 else IMAGENET
    )
    readable = originals.readable + edits.readable
    result = run(shim, plan, pieces, bank, format, readable, offset=offset, descending=descending)
    cut_case = replace(case, originals=originals.seen, edits=edits.seen)
    for row in range(count):
        compare(result[row], cut_case.expected(row, format), dtype)
    on_the_cpu = np.zeros_like(result)
    mix(plan, pieces, bank, out=on_the_cpu, format=format)
    compare(result, on_the_cpu, dtype)


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(case=rational_cases())
@example(case=two_thirds())
@example(case=two_thirds(fractal_weight=0.2))
def test_the_geometry_is_the_specifications(shim: Shim, case: Case) -> None:
    """From pieces cut to the windows: what is not in them is not read, and nothing of the sample is missing."""
    format = TensorFormat(normalize=None)
    pieces, kept = visible_pieces(case)
    result = run(shim, case.plan, pieces, case.bank, format, kept)
    compare(result[0], case.expected(0, format), "float32")


def formats() -> list[TensorFormat]:
    return [
        TensorFormat(dtype=dtype, channels_last=channels_last, normalize=None if dtype == "uint8" else IMAGENET)
        for dtype in DTYPES
        for channels_last in (False, True)
    ]


def name_of(format: TensorFormat) -> str:
    return f"{format.dtype}-{'channels_last' if format.channels_last else 'nchw'}"


@pytest.mark.parametrize("format", formats(), ids=name_of)
def test_every_kernel_writes_every_element_at_any_width_and_alignment(shim: Shim, format: TensorFormat) -> None:
    generator = np.random.default_rng(0)
    box = np.tile([0.0, 0, 1, 1], (2, 1))
    images = [pixels(generator, 9, 11) for _ in range(2)]
    sources = Pieces(generator, [*images], cut=False)
    pieces = np.stack([sources.table, np.zeros_like(sources.table)])
    for height, width in [(1, 1), (2, 2), (1, 3), (3, 4), (2, 5), (33, 31), (32, 32), (1, 33), (31, 34), (2, 67)]:
        for flip in (False, True):
            plan = plan_of(2, (height, width), box=box, flip=np.full(2, flip))
            result = run(shim, plan, pieces, None, format, sources.readable, offset=width % 4)
            for row, image in enumerate(images):
                compare(result[row], encode(mixed_image(plan, row, image), format), format.dtype)


@pytest.mark.parametrize("format", formats(), ids=name_of)
def test_a_training_batch(shim: Shim, format: TensorFormat) -> None:
    """Sizes as in training: crops of photographs of 400 x 350 to 224 x 224, smaller edits, a bank of 256 x 256."""
    generator = np.random.default_rng(5)
    box = np.array([[0.02, 0.05, 0.9, 0.93], [0.3, 0.2, 0.31, 0.4]])
    mask = np.array([MASKS.index("right"), MASKS.index("top")], dtype=np.int8)
    originals = Pieces(generator, [pixels(generator, 400, 350) for _ in mask], cut=False)
    edits = Pieces(generator, [pixels(generator, 256, 256) for _ in mask], cut=False)
    bank = pixels(generator, 256, 256)[None]
    plan = plan_of(
        2,
        (224, 224),
        box=box,
        mask=mask,
        flip=np.array([False, True]),
        fractal=np.zeros(2, dtype=np.int64),
        fractal_flip=np.array([[False, True], [True, False]]),
        fractal_weight=np.full(2, 0.2, dtype=np.float32),
        seam_width=20 / 256,
    )
    pieces = np.stack([originals.table, edits.table])
    result = run(shim, plan, pieces, bank, format, originals.readable + edits.readable)
    for row in range(2):
        expected = encode(mixed_image(plan, row, originals.seen[row], edits.seen[row], bank[0]), format)
        compare(result[row], expected, format.dtype)


@pytest.mark.parametrize("size", [(9, 700), (700, 9), (300, 300)])
def test_any_ratio(shim: Shim, size: tuple[int, int]) -> None:
    """Tiles that read many more source columns or rows than they have pixels, or the same few."""
    generator = np.random.default_rng(11)
    box = np.array([[0.0, 0, 1, 1], [0.1, 0.05, 0.85, 0.9], [0.4, 0.4, 0.01, 0.01], [-0.2, -0.1, 1.4, 1.3]])
    mask = np.array([-1, MASKS.index("right"), MASKS.index("top"), MASKS.index("left")], dtype=np.int8)
    originals = Pieces(generator, [pixels(generator, *size) for _ in mask], cut=False)
    edits = Pieces(generator, [pixels(generator, *size[::-1]) for _ in mask], cut=False)
    bank = pixels(generator, 200, 90)[None]
    for out in ((35, 36), (3, 2)):
        plan = plan_of(
            4,
            out,
            box=box,
            mask=mask,
            flip=np.array([False, True, True, False]),
            fractal=np.array([-1, 0, 0, 0]),
            fractal_flip=np.array([[False, False], [True, False], [False, True], [True, True]]),
            fractal_weight=np.array([0, 0.3, 0.3, 0.3], dtype=np.float32),
            seam_width=0.3,
        )
        readable = originals.readable + edits.readable
        result = run(shim, plan, np.stack([originals.table, edits.table]), bank, TensorFormat(), readable)
        for row in range(4):
            edit, fractal = (edits.seen[row], bank[0]) if row else (None, None)
            expected = encode(mixed_image(plan, row, originals.seen[row], edit, fractal), TensorFormat())
            compare(result[row], expected, "float32")


def test_a_pixel_falls_on_the_specifications_side_of_seam_and_edge(shim: Shim) -> None:
    """Where the product's last bit decides: a fused multiply-add would decide otherwise."""
    generator = np.random.default_rng(0)
    black, white = np.zeros((64, 64, 3), dtype=np.uint8), np.full((64, 64, 3), 255, dtype=np.uint8)
    format = TensorFormat(dtype="uint8", normalize=None)
    cases = []
    while len(cases) < 40:
        output, extent = int(generator.integers(3, 60)), generator.uniform(0.1, 1.5)
        # Pixel i's centre lies at the seam or at the image's edge, up to rounding.
        relative, at = (generator.integers(output) + 0.5) / output, float(generator.integers(2)) / 2
        start = at - extent * relative
        fused = float(Fraction(start) + Fraction(extent) * Fraction(relative))
        if (start + extent * relative >= at) != (fused >= at):
            cases.append((start, extent, output))
    for start, extent, output in cases:
        box = np.tile([start, start, extent, extent], (4, 1))
        plan = plan_of(4, (output, output), box=box, mask=np.arange(4, dtype=np.int8))
        originals, edits = (Pieces(generator, [image] * 4, cut=False) for image in (black, white))
        pieces = np.stack([originals.table, edits.table])
        result = run(shim, plan, pieces, None, format, originals.readable + edits.readable)
        for row in range(4):
            np.testing.assert_array_equal(result[row], encode(mixed_image(plan, row, black, white), format))


@pytest.mark.parametrize("seam_width", [0.0, 0.1])
@pytest.mark.parametrize("mask", range(4))
def test_a_source_that_is_not_seen_is_never_read(shim: Shim, mask: int, seam_width: float) -> None:
    """Its pointer may lead anywhere: a crop on one side of the seam needs only that side's piece."""
    generator = np.random.default_rng(mask)
    image = pixels(generator, 60, 50)
    nowhere = np.array([0x10], dtype=np.uint64)
    for side in MASKS:
        if (side in ("left", "right")) != (MASKS[mask] in ("left", "right")):
            continue
        begin = 0.02 if side in ("left", "top") else 0.6
        box = np.array([[begin, begin, 0.3, 0.3]])
        plan = plan_of(1, (40, 37), box=box, mask=np.array([mask], dtype=np.int8), seam_width=seam_width)
        seen = Pieces(generator, [image], cut=False)
        unseen = piece_table(nowhere, np.array([image.shape[:2]], dtype=np.int32))
        pieces = np.stack([unseen, seen.table] if side == MASKS[mask] else [seen.table, unseen])
        result = run(shim, plan, pieces, None, TensorFormat(), seen.readable)
        expected = encode(mixed_image(plan, 0, image, image), TensorFormat())
        compare(result[0], expected, "float32")


def test_the_pieces_are_read_to_their_last_byte(shim: Shim) -> None:
    """What the other tests rely on: a read outside of what may be read does not pass unnoticed."""
    generator = np.random.default_rng(9)
    box = np.array([[0.0, 0, 1, 1]])
    plan = plan_of(1, (32, 32), box=box)
    whole = Pieces(generator, [pixels(generator, 20, 30)], cut=False)
    pieces = np.stack([whole.table, np.zeros_like(whole.table)])
    for part in (whole.readable[0][1:], whole.readable[0][:-1]):
        with pytest.raises(AssertionError, match="reads outside of the pieces"):
            run(shim, plan, pieces, None, TensorFormat(), [part])


FAULTY = """
#include "cuda_shim.h"
extern "C" __global__ void faulty(int* out, int fault) {
    __shared__ int shared[64];
    const int t = threadIdx.x;
    if (fault == 1 && t % 2) return;
    if (fault != 2) shared[t] = t;
    if (fault != 3) __syncthreads();
    out[t] = shared[63 - t];
    if (fault == 4) *reinterpret_cast<double*>(out + 1) = 0;
}
CUDA_SHIM_LIBRARY(decltype(faulty))
"""


def test_the_shim_shows_broken_barriers_unwritten_memory_races_and_misalignment(tmp_path: Path) -> None:
    (tmp_path / "faulty.cpp").write_text(FAULTY)
    shim = Shim(tmp_path / "faulty.cpp", tmp_path)

    def results(fault: int) -> list[list[int]]:
        both = []
        for descending in (False, True):
            out = np.zeros(64, dtype=np.int32)
            arguments = [np.uint64(out.ctypes.data), np.int32(fault)]
            shim.launch("faulty", (1, 1, 1), (64, 1, 1), arguments, descending=descending)
            both.append(out.tolist())
        return both

    right = list(range(63, -1, -1))
    assert results(0) == [right, right]
    with pytest.raises(AssertionError, match="a thread ended while another waited"):
        results(1)
    with pytest.raises(AssertionError, match="an access was misaligned"):
        results(4)
    assert set(results(2)[0]) == {int(np.array(0xC5C5C5C5, dtype=np.uint32).view(np.int32))}
    ascending, descending = results(3)
    assert ascending != descending and right not in (ascending, descending)
