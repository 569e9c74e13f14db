"""The mix as an operator inside your own DALI pipeline.

    from dali_diffusemix import fn as dmx

    @pipeline_def(batch_size=64, num_threads=4, device_id=None)
    def training():
        jpegs, index = ...  # an original's file and its number
        p = dmx.plan(index, fn.peek_image_shape(jpegs), crop=TrainCrop(224), mix=MixSpec.paper(), fractals=bank)
        edits = ...  # the file of this original's edit p.edit
        original, edit = fn.decoders.image([jpegs, edits], device="cpu", output_type=types.RGB)
        return dmx.mix(original, edit, p, fractals=bank, output_size=(224, 224))

`plan` draws what `DiffuseMixDataset` draws, `mix` makes its pixels. Both are Python functions that DALI calls once
per batch; docs/dali.md says what that costs. An error that they raise while the pipeline runs ends it: DALI raises a
RuntimeError with the message and the line of the pipeline.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from dali_diffusemix.base import gpu
from dali_diffusemix.errors import ConfigError
from dali_diffusemix.fractals.bank import FractalBank
from dali_diffusemix.loading.dali import dali
from dali_diffusemix.mix import call
from dali_diffusemix.mix.tensor import IMAGENET, DtypeName, Normalize, TensorFormat
from dali_diffusemix.plan.augment import no_operations
from dali_diffusemix.plan.batch import BatchPlan, Planner
from dali_diffusemix.plan.crops import Crop
from dali_diffusemix.plan.schedule import Schedule
from dali_diffusemix.plan.spec import MASKS, MixSpec

DataNode: TypeAlias = Any
"""nvidia.dali.data_node.DataNode: importing this module does not import DALI."""

Column: TypeAlias = Sequence[NDArray[Any]]
"""An array for each sample of the batch, as DALI passes them to a Python function for one node."""


class Plan(NamedTuple):
    """The parameters of `mix` for each sample. Every field is a node on the CPU, or a constant for all samples.

    `plan` returns one. Replace fields with `_replace`, or build one yourself: the defaults are a plain sample of the
    whole image. Boxes are (top, left, height, width), relative to the image they lie in.
    """

    box: DataNode = (0.0, 0.0, 1.0, 1.0)
    """(4,) The crop of both original and edit; may leave [0, 1], where the sample is 0 before normalisation."""
    span: DataNode = None
    """(4,) The output within what mask and fractal span: the crop within the image, or (0, 0, 1, 1) if they span the
    crop. None: as `box`."""
    mask: DataNode = -1
    """The side that shows the edit, its index in `plan.MASKS`: left, right, top, bottom; -1: not mixed."""
    seam_width: DataNode = 0.0
    """Width of the ramp between the sides, as a fraction of what the mask spans."""
    flip: DataNode = 0
    """1: left to right, last of all."""
    fractal: DataNode = -1
    """Row of the bank; -1: none."""
    fractal_flip: DataNode = (0, 0)
    """(2,) The fractal's own: upside down, left to right."""
    fractal_weight: DataNode = 0.0
    """λ."""
    edit: DataNode = -1
    """The original's edit to read, from 0; -1: none. For your reader; `mix` does not use it."""


def plan(
    index: DataNode,
    sizes: DataNode,
    *,
    crop: Crop,
    mix: MixSpec | None = None,
    fractals: FractalBank | None = None,
    edits_per_original: DataNode = 1,
    seed: int = 0,
    epoch: DataNode = 0,
) -> Plan:
    """Draw a batch's plan: the rows of `Planner.batch(epoch, index)` over originals of these sizes and edits.

    A row depends on (seed, epoch, index), its size and its number of edits alone.

    Args:
        index: Number of each original, not its class label: scalars, any whole-number type.
        sizes: (2,) or more numbers per sample, first the original's upright height and width in pixels:
            `fn.peek_image_shape(jpegs)`, or `original.shape(device="cpu")` of a decoded one.
        crop: How to crop.
        mix: How to mix, in a fixed epoch; None gives plain samples.
        fractals: Bank to choose from. Needed where `mix` blends fractals.
        edits_per_original: K, how many edits each original has: a number, or scalars.
        seed: 0 ≤ seed < 2³².
        epoch: 0 ≤ epoch < 2³²: a number, or scalars that are equal within a batch.

    Returns:
        A plan of nodes on the CPU: box, span (4,) float64; mask, flip int32, fractal, edit int64, fractal_weight
        float32 scalars; fractal_flip (2,) int32. `seam_width` is `mix.seam_width`.

    Raises:
        ConfigError: an argument breaks a rule; inside a RuntimeError from DALI, a node's value does.
        MissingDependencyError: DALI is not installed.
    """
    for name, setting in (("crop", crop), ("mix", mix)):
        if isinstance(setting, Schedule):
            raise ConfigError(
                f"{name} must be one value in your own pipeline, found {setting!r}; build a pipeline for each of its "
                f"values, with {name}=schedule.at(epoch)."
            )
    if mix is not None and mix.epoch != "fixed":
        raise ConfigError(
            f"mix.epoch must be 'fixed' in your own pipeline, whose reader decides what an epoch holds, found "
            f"{mix.epoch!r}; take dataclasses.replace(mix, epoch='fixed')."
        )
    given = {"index": index, "sizes": sizes[:2], "edits_per_original": edits_per_original, "epoch": epoch}
    draw = _Draw(
        fields=_Fields(_DRAWN, given), seed=seed, crop=crop, mix=mix, fractals=0 if fractals is None else len(fractals)
    )
    box, span, mask, flip, fractal, fractal_flip, fractal_weight, edit = _python_function(
        _nodes(given), draw, num_outputs=len(_Draw.OUTPUTS)
    )
    return Plan(
        box=box,
        span=span,
        mask=mask,
        seam_width=0.0 if mix is None else mix.seam_width,
        flip=flip,
        fractal=fractal,
        fractal_flip=fractal_flip,
        fractal_weight=fractal_weight,
        edit=edit,
    )


def mix(
    original: DataNode,
    edit: DataNode,
    plan: Plan,
    *,
    output_size: tuple[int, int],
    fractals: FractalBank | None = None,
    normalize: Normalize | None = IMAGENET,
    dtype: Any = None,
    layout: Literal["CHW", "HWC"] = "CHW",
    device: Literal["cpu", "gpu"] | None = None,
    threads: int = 1,
) -> DataNode:
    """Mix originals and edits: A = (1-λ) (M ⊙ Î + (1-M) ⊙ I) + λ F of every sample, as `mix.pixel` defines it.

    Args:
        original: (height, width, 3) uint8 RGB images, whole, of any sizes.
        edit: The same, of their own sizes. The edit of a sample that is not mixed is not used: give any image.
        plan: One row per sample.
        output_size: (height, width) of the samples, pixels; that of the plan's crop.
        fractals: Bank that `plan.fractal` indexes. Required if the plan has fractals.
        normalize: (mean, std) for values in [0, 1]; None leaves [0, 1], and is the only choice for UINT8.
        dtype: nvidia.dali.types.FLOAT (None is the same), FLOAT16 or UINT8.
        layout: Layout of the samples.
        device: Device of the mix; None is that of the originals. "gpu" copies images that are on the CPU.
        threads: Threads of the mix on the CPU, beside DALI's own. The result does not depend on it.

    Returns:
        (3, height, width) or (height, width, 3) samples on the device.

    Raises:
        ConfigError: an argument breaks a rule; inside a RuntimeError from DALI, a node's value does.
        MissingDependencyError: DALI is not installed, or for "gpu" CuPy.
    """
    fn, _, types = dali()
    names: dict[Any, DtypeName] = {types.FLOAT: "float32", types.FLOAT16: "float16", types.UINT8: "uint8"}
    dtype = types.FLOAT if dtype is None else dtype
    if dtype not in names:
        raise ConfigError(f"dtype must be types.FLOAT, types.FLOAT16 or types.UINT8 of nvidia.dali, found {dtype}.")
    if layout not in ("CHW", "HWC"):
        raise ConfigError(f"layout must be 'CHW' or 'HWC', found {layout!r}.")
    if np.shape(output_size) != (2,) or not all(1 <= side <= 16384 for side in output_size):
        raise ConfigError(f"output_size must be (height, width), 1 to 16384 pixels each, found {output_size}.")
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, found {threads}.")
    device = device or original.device
    if device not in ("cpu", "gpu") or (device == "cpu" and "gpu" in (original.device, edit.device)):
        raise ConfigError(
            f"device must be 'gpu', or 'cpu' where both images are on the CPU, found {device!r} with the original on "
            f"the {original.device} and the edit on the {edit.device}; decode to the CPU, or leave device out."
        )
    given = plan._replace(span=plan.box if plan.span is None else plan.span)._asdict()
    del given["edit"]
    nodes = _nodes(given, "plan.")
    work = _Mix(
        fields=_Fields(_ROW, given, prefix="plan."),
        bank=fractals,
        size=output_size,
        format=TensorFormat(dtype=names[dtype], channels_last=layout == "HWC", normalize=normalize),
        threads=threads,
    )
    # Only the layout, which an array does not have, comes as a node of its own.
    layouts = [fn.get_property(image, key="layout", device="cpu") for image in (original, edit)]
    if device == "cpu":
        return _python_function([original, edit, *layouts, *nodes], work.on_cpu, output_layouts=layout)
    gpu.check_installed()
    # An operator of the GPU takes inputs there only, so the rows go there and back, in one piece.
    packed = _python_function([*layouts, *nodes], work.pack)
    inputs = [node if node.device == "gpu" else node.gpu() for node in (original, edit, packed)]
    return fn.dl_tensor_python_function(
        *inputs, function=work.on_gpu, device="gpu", batch_processing=True, output_layouts=layout
    )


def _python_function(nodes: Sequence[DataNode], function: Callable[..., Any], **options: Any) -> Any:
    fn, _, _ = dali()
    return fn.python_function(*nodes, function=function, device="cpu", batch_processing=True, **options)


# --------------------------------------------------------------------------------------------------------------
# From nodes to tables
# --------------------------------------------------------------------------------------------------------------

# Kept out of DALI, whose own constants turn float64 into float32.
_CONSTANTS: Final = (bool, int, float, list, tuple, np.ndarray, np.generic)

_DRAWN: Final = np.dtype([("index", "i8"), ("sizes", "i4", 2), ("edits_per_original", "i8"), ("epoch", "i8")])
_ROW: Final = np.dtype(
    [
        ("box", "f8", 4),
        ("span", "f8", 4),
        ("mask", "i4"),
        ("seam_width", "f8"),
        ("flip", "i4"),
        ("fractal", "i8"),
        ("fractal_flip", "i4", 2),
        ("fractal_weight", "f4"),
    ]
)


def _nodes(values: Mapping[str, Any], prefix: str = "") -> list[DataNode]:
    nodes = {name: value for name, value in values.items() if not isinstance(value, _CONSTANTS)}
    for name, node in nodes.items():
        if getattr(node, "device", "cpu") != "cpu":
            raise ConfigError(
                f"{prefix}{name} must lie on the CPU, found a node on the {node.device}; make it with device='cpu'."
            )
    return list(nodes.values())


class _Fields:
    """Gathers the values of nodes and constants for a batch in a table, one row per sample."""

    def __init__(self, dtype: np.dtype[np.void], values: Mapping[str, Any], *, prefix: str = "") -> None:
        self._dtype = dtype
        self._prefix = prefix
        self._constants = {name: value for name, value in values.items() if isinstance(value, _CONSTANTS)}
        self._names = [name for name in values if name not in self._constants]

    def example(self, values: Mapping[str, Any]) -> NDArray[np.void]:
        """A batch of one, with these values instead of nodes, to check the constants before the pipeline runs."""
        return self.gather([[np.array(values[name])] for name in self._names], count=1)

    def gather(self, columns: Sequence[Column], *, count: int) -> NDArray[np.void]:
        """(count,) of the dtype, from the columns of the nodes in their order."""
        table = np.zeros(count, dtype=self._dtype)
        for name, column in zip(self._names, columns, strict=True):
            table[name] = self._checked(name, column)
        for name, value in self._constants.items():
            table[name] = self._checked(name, [value])
        return table

    def _checked(self, name: str, samples: Sequence[Any]) -> NDArray[Any]:
        base, shape = self._dtype[name].base, self._dtype[name].shape
        try:
            values = np.array(samples).reshape(len(samples), *shape)
        except ValueError as error:
            raise ConfigError(
                f"{self._prefix}{name} must be {shape[0] if shape else 1} number(s) for each sample, found shapes "
                f"{sorted({np.shape(sample) for sample in samples})}."
            ) from error
        good = np.isfinite(values) if base.kind == "f" else values == np.rint(values)
        if not good.all():
            rule = "finite" if base.kind == "f" else "whole"
            raise ConfigError(f"{self._prefix}{name} must be {rule}, found {values[~good][0]}.")
        return values.astype(base)


def _refuse_outside(name: str, values: NDArray[Any], low: float, high: float, rule: str) -> None:
    outside = ((values < low) | (values > high)).reshape(len(values), -1).any(axis=1)
    if outside.any():
        sample = int(outside.argmax())
        raise ConfigError(f"{name} must {rule}, found {values[sample].tolist()} in sample {sample} of the batch.")


# --------------------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lookup:
    """An endless column that holds a batch's rows for `Planner`: row r is values[number of keys below r]."""

    keys: NDArray[np.int64]  # sorted
    values: NDArray[Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        return np.asarray(self.values[np.searchsorted(self.keys, rows)])


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """The Python function of `plan`."""

    fields: _Fields
    seed: int
    crop: Crop
    mix: MixSpec | None
    fractals: int

    OUTPUTS = ("box", "span", "mask", "flip", "fractal", "fractal_flip", "fractal_weight", "edit")

    def __post_init__(self) -> None:
        self.batch(self.fields.example({"index": 0, "sizes": (1, 1), "edits_per_original": 1, "epoch": 0}))

    def __call__(self, *columns: Column) -> tuple[list[NDArray[Any]], ...]:
        drawn = self.batch(self.fields.gather(columns, count=len(columns[0])))
        # [i, ...] and not [i]: DALI takes arrays without dimensions, but not NumPy's scalars.
        return tuple([drawn[name][i, ...] for i in range(len(drawn[name]))] for name in self.OUTPUTS)

    def batch(self, given: NDArray[np.void]) -> dict[str, NDArray[Any]]:
        """The columns of `OUTPUTS`."""
        index, sizes, count, epoch = (given[name] for name in _DRAWN.names or ())
        _refuse_outside("sizes", sizes, 1, np.inf, "hold a height and a width of at least 1 pixel")
        _refuse_outside("edits_per_original", count, 0, np.inf, "be at least 0")
        if (epoch != epoch[0]).any():
            raise ConfigError(f"epoch must be equal within a batch, found {epoch.min()} to {epoch.max()}.")
        originals, first, where = np.unique(index, return_index=True, return_inverse=True)
        if (sizes != sizes[first][where]).any() or (count != count[first][where]).any():
            raise ConfigError(
                "index must be the number of an original, found one number for originals of different sizes or edits; "
                "a class label is no such number: give fn.readers.file(files=files, labels=list(range(len(files))))."
            )
        # As if only the originals of this batch had edits: rows starts[index] to starts[index + 1].
        starts = _Lookup(originals, np.concatenate([[0], np.cumsum(count[first])]), length=2**62 + 1)
        every: Any = _Lookup(originals, sizes[first], length=2**62)
        edits: Any = SimpleNamespace(starts=starts)
        planner = Planner(
            seed=self.seed, crop=self.crop, sizes=every, mix=self.mix, edits=edits, fractals=self.fractals
        )
        batch = planner.batch(int(epoch[0]), index)
        return {
            "box": batch.box,
            "span": batch.span,
            "mask": batch.mask.astype(np.int32),
            "flip": batch.flip.astype(np.int32),
            "fractal": batch.fractal.astype(np.int64),
            "fractal_flip": batch.fractal_flip.astype(np.int32),
            "fractal_weight": batch.fractal_weight,
            "edit": np.where(batch.mixed, batch.edit - starts[index], -1),
        }


# --------------------------------------------------------------------------------------------------------------
# The mix
# --------------------------------------------------------------------------------------------------------------


class _Mix:
    """The Python functions of `mix`."""

    def __init__(
        self, *, fields: _Fields, bank: FractalBank | None, size: tuple[int, int], format: TensorFormat, threads: int
    ) -> None:
        self._fields = fields
        self._bank = bank
        self._size = size
        self._format = format
        self._threads = threads
        self._stream: torch.cuda.Stream | None = None
        self._device_bank: gpu.DeviceBank | None = None
        self._check(fields.example(Plan(span=Plan().box)._asdict()))

    def on_cpu(self, originals: Column, edits: Column, *rest: Column) -> list[NDArray[Any]]:
        """NumPy images, layouts and fields to samples."""
        rows = self._rows(*rest)
        samples: list[NDArray[Any]] = [np.empty(0)] * len(rows)
        for where, batch, pieces in self._parts(rows, originals, edits, lambda image: image.ctypes.data):
            out = np.empty(self._format.shape(len(where), self._size), dtype=self._format.storage)
            bank = None if self._bank is None else self._bank.images
            call.mix(batch, pieces, bank, out=out, format=self._format, threads=self._threads)
            for i, sample in zip(where, out, strict=True):
                samples[i] = sample
        return samples

    def pack(self, *rest: Column) -> list[NDArray[np.uint8]]:
        """Layouts and fields to the bytes of the rows."""
        rows = self._rows(*rest)
        return list(rows.view(np.uint8).reshape(len(rows), -1))

    def on_gpu(self, originals: list[Any], edits: list[Any], packed: list[Any]) -> list[Any]:
        """DLPack capsules of images and packed rows to those of samples. DALI's work on them is done."""
        images, others, rows = ([from_dlpack(capsule) for capsule in column] for column in (originals, edits, packed))
        device = rows[0].device
        with torch.cuda.device(device):
            # Not torch's default stream, where training is queued. Always the same one: DALI copies the samples after
            # this returns, and their memory is not used again before the next call, which DALI holds back.
            self._stream = self._stream or torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._stream):
                samples = self.on_tensors(images, others, rows)
            self._stream.synchronize()
            return [sample.__dlpack__() for sample in samples]

    def on_tensors(
        self, originals: list[torch.Tensor], edits: list[torch.Tensor], packed: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Images and packed rows on a GPU to samples there, launched on torch's current stream."""
        device = packed[0].device
        rows = torch.stack(packed).cpu().numpy().view(_ROW)[:, 0]
        if self._bank is not None and self._device_bank is None:
            self._device_bank = gpu.device_bank(self._bank.path or self._bank, self._bank.images, device)
        memory_format = torch.channels_last if self._format.channels_last else torch.contiguous_format
        samples = [packed[0]] * len(rows)
        for where, batch, pieces in self._parts(rows, originals, edits, lambda image: image.data_ptr()):
            out = torch.empty(
                (len(where), 3, *self._size),
                dtype=getattr(torch, self._format.dtype),
                device=device,
                memory_format=memory_format,
            )
            call.mix_on_device(batch, pieces, self._device_bank, out=out, format=self._format)
            for i, sample in zip(where, out, strict=True):
                samples[i] = sample.permute(1, 2, 0) if self._format.channels_last else sample
        return samples

    def _rows(self, original_layout: Column, edit_layout: Column, *columns: Column) -> NDArray[np.void]:
        """(n,) of `_ROW`, checked."""
        for name, layouts in (("original", original_layout), ("edit", edit_layout)):
            layout = bytes(layouts[0]).decode()
            if layout not in ("HWC", ""):
                raise ConfigError(f"{name} must have layout 'HWC', found {layout!r}; {_IMAGE_REMEDY}.")
        rows = self._fields.gather(columns, count=len(original_layout))
        self._check(rows)
        return rows

    def _check(self, rows: NDArray[np.void]) -> None:
        for box in ("box", "span"):
            least = np.finfo(np.float64).tiny
            rule = "be (top, left, height, width) with height and width above 0"
            _refuse_outside(f"plan.{box}", rows[box][:, 2:], least, np.inf, rule)
        masks = f"be -1, not mixed, or the index of the edit's side in {MASKS}"
        _refuse_outside("plan.mask", rows["mask"], -1, len(MASKS) - 1, masks)
        for name in ("seam_width", "fractal_weight", "flip", "fractal_flip"):
            _refuse_outside(f"plan.{name}", rows[name], 0, 1, "lie in [0, 1]")
        rule = (
            "be -1, no fractal, where mix has no bank: give it fractals="
            if self._bank is None
            else f"be -1, no fractal, or a row of mix's bank of {len(self._bank)}: give plan and mix the same bank"
        )
        _refuse_outside("plan.fractal", rows["fractal"], -1, len(self._bank or ()) - 1, rule)

    def _parts(
        self, rows: NDArray[np.void], originals: Sequence[Any], edits: Sequence[Any], address: Callable[[Any], int]
    ) -> Iterator[tuple[NDArray[np.int64], BatchPlan, NDArray[np.void]]]:
        """The batch in parts of one seam width each, nearly always one: its samples, plan and piece table."""
        mixed = rows["mask"] >= 0
        sources = (("original", originals, np.ones_like(mixed)), ("edit", edits, mixed))
        pieces = np.stack([_pieces(name, images, seen, address) for name, images, seen in sources])
        for width in np.unique(rows["seam_width"]):
            where = np.flatnonzero(rows["seam_width"] == width)
            part = rows[where]
            batch = BatchPlan(
                epoch=0,
                index=where,
                view=np.zeros_like(where),
                original=where,
                edit=np.where(mixed, 0, -1)[where],
                mask=part["mask"].astype(np.int8),
                box=part["box"],
                span=part["span"],
                seam_width=float(width),
                flip=part["flip"].astype(np.bool_),
                fractal=part["fractal"],
                fractal_flip=part["fractal_flip"].astype(np.bool_),
                fractal_weight=part["fractal_weight"],
                operations=no_operations(len(where)),
                output_size=self._size,
            )
            yield where, batch, pieces[:, where]


_IMAGE_REMEDY: Final = "decode with output_type=types.RGB and leave resizing, transposing and normalising to mix"


def _pieces(
    name: str,
    images: Sequence[Any],
    seen: NDArray[np.bool_],
    address: Callable[[Any], int],
) -> NDArray[np.void]:
    """(n,) pieces of whole images; images that are not seen are not used."""
    data = np.zeros(len(images), dtype=np.uint64)
    shapes = np.zeros((len(images), 2), dtype=np.int32)
    for i in np.flatnonzero(seen).tolist():
        image = images[i]
        shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
        if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != "uint8":
            raise ConfigError(
                f"{name} must be (height, width, 3) uint8 RGB images, found shape {shape} of {dtype} in sample {i} of "
                f"the batch; {_IMAGE_REMEDY}."
            )
        data[i], shapes[i] = address(image), shape[:2]
    return call.piece_table(data, shapes)
