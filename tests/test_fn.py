"""The operator: the loader's samples, bit for bit, inside a DALI pipeline of one's own."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")

from nvidia.dali import fn, pipeline_def, types

from dali_diffusemix import (
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    MissingDependencyError,
    MixSpec,
    RandomCrop,
    TrainCrop,
)
from dali_diffusemix import fn as dmx
from dali_diffusemix.base import gpu
from dali_diffusemix.mix import IMAGENET, TensorFormat, call
from dali_diffusemix.plan import Crop, Planner

Node = Any
Change = Callable[[dmx.Plan], dmx.Plan]

RELEASE = replace(MixSpec.release(), epoch="fixed")
# A 1 x 1 picture: what a sample without an edit decodes.
PLACEHOLDER = np.frombuffer(b"P6\n1 1\n255\n\0\0\0", dtype=np.uint8)
SIZE = (40, 48)


def make(root: Path, edits: Path, bank: FractalBank, **options: Any) -> DiffuseMixDataset:
    return DiffuseMixDataset(
        root, **{"crop": TrainCrop(SIZE), "mix": MixSpec.paper(), "edits": edits, "fractals": bank, **options}
    )


@pytest.fixture
def dataset(photos: Path, edits: Path, bank: FractalBank) -> DiffuseMixDataset:
    """Mixed in three of four samples, with a fractal each."""
    return make(photos, edits, bank, mix=MixSpec(probability=0.75), seed=5)


def constant(value: Any, dtype: Any) -> Node:
    """A node that gives the same for every sample."""
    return fn.python_function(
        function=lambda: np.array(value, dtype=dtype), batch_processing=False, num_outputs=1, device="cpu"
    )


def batches(dataset: DiffuseMixDataset, batch_size: int, epochs: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """(files, index, edits of each, epoch) of whole epochs, in order; the last batch of each is not full."""
    assert dataset.store is not None
    counts = np.diff(dataset.store.starts)
    for epoch, start in itertools.product(epochs, range(0, len(dataset), batch_size)):
        index = np.arange(start, min(start + batch_size, len(dataset)))
        files = [np.fromfile(dataset.path_of(i), dtype=np.uint8) for i in index]
        yield files, index, counts[index], np.full(len(index), epoch)


def edit_reader(dataset: DiffuseMixDataset) -> Callable[..., list[NDArray[np.uint8]]]:
    store = dataset.store
    assert store is not None

    def read(index: list[Any], edit: list[Any]) -> list[NDArray[np.uint8]]:
        rows = [(i.item(), e.item()) for i, e in zip(index, edit, strict=True)]
        return [PLACEHOLDER if e < 0 else store.encoded(store.starts[i] + e) for i, e in rows]

    return read


def run(
    dataset: DiffuseMixDataset,
    *,
    change: Change = lambda plan: plan,
    images: Callable[[Node, Node], tuple[Node, Node]] = lambda original, edit: (original, edit),
    batch_size: int = 8,
    epochs: Sequence[int] = (0,),
    conditionals: bool = False,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> list[NDArray[Any]]:
    """The batches of a user's own pipeline over a dataset's files."""
    source, read_edits = batches(dataset, batch_size, epochs), edit_reader(dataset)
    mixing_options = {"fractals": dataset.bank, "output_size": SIZE, "normalize": dataset.normalize, **options}

    @pipeline_def(batch_size=batch_size, num_threads=2, device_id=None, enable_conditionals=conditionals)
    def own() -> Node:
        files, index, count, epoch = fn.external_source(source=source, num_outputs=4)
        plan_options = {"crop": dataset.crop, "mix": dataset.mix, "fractals": dataset.bank, "seed": dataset.seed}
        plan_options |= {"edits_per_original": count, "epoch": epoch, **(given or {})}
        plan = dmx.plan(index, fn.peek_image_shape(files), **plan_options)
        edits = fn.python_function(index, plan.edit, function=read_edits, batch_processing=True)
        original, edit = fn.decoders.image([files, edits], output_type=types.RGB)
        return dmx.mix(*images(original, edit), change(plan), **mixing_options)

    pipeline = own()
    results = []
    for _ in range(len(epochs) * -(-len(dataset) // batch_size)):
        (samples,) = pipeline.run()
        assert samples.layout() == options.get("layout", "CHW")
        results.append(np.array(samples.as_array()))
    with pytest.raises(StopIteration):
        pipeline.run()
    return results


def one(dataset: DiffuseMixDataset, **options: Any) -> NDArray[Any]:
    """All samples of an epoch."""
    return np.concatenate(run(dataset, **options))


def loaded(dataset: DiffuseMixDataset, epoch: int = 0, **options: Any) -> list[NDArray[Any]]:
    with DiffuseMixLoader(dataset, batch_size=8, device="cpu", **options) as loader:
        loader.set_epoch(epoch)
        return [images.numpy() for images, _ in loader]


# --- the same samples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [MixSpec.paper(), RELEASE], ids=["paper", "release"])
@pytest.mark.parametrize("layout", ["CHW", "HWC"])
@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [(types.FLOAT, torch.float32), (types.FLOAT16, torch.float16), (types.UINT8, torch.uint8)],
    ids=["float32", "float16", "uint8"],
)
def test_it_gives_the_loaders_samples(
    photos: Path, edits: Path, bank: FractalBank, mix: MixSpec, layout: str, dtype: Any, torch_dtype: torch.dtype
) -> None:
    normalize = None if dtype == types.UINT8 else IMAGENET
    dataset = make(photos, edits, bank, mix=mix, normalize=normalize, seed=3)
    results = run(dataset, epochs=(2, 7), layout=layout, dtype=dtype)
    expected = [*loaded(dataset, 2, dtype=torch_dtype), *loaded(dataset, 7, dtype=torch_dtype)]
    assert [len(batch) for batch in results] == [8, 8, 8, 8, 1] * 2
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours if layout == "CHW" else ours.transpose(0, 3, 1, 2), theirs)


CROPS: list[Crop] = [TrainCrop(SIZE), RandomCrop(SIZE, resize=60, padding=9), EvalCrop(SIZE)]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: type(crop).__name__)
@pytest.mark.parametrize("order", ["mix_then_crop", "crop_then_mix"])
def test_the_plan_is_the_planners(crop: Crop, order: Any) -> None:
    """Over originals that have no, one or many edits, in an order with gaps and repetitions."""
    generator = np.random.default_rng(0)
    mix = MixSpec(order=order, seam_width=0.1, fractal_weight=(0.0, 0.5), masks=("left", "bottom"))
    sizes = generator.integers(1, 400, (500, 2), dtype=np.int32)
    counts = generator.integers(0, 9, 500)
    starts = np.concatenate([[0], np.cumsum(counts)])
    planner = Planner(seed=9, crop=crop, sizes=sizes, mix=mix, edits=SimpleNamespace(starts=starts), fractals=7)  # type: ignore[arg-type]
    bank = FractalBank(np.zeros((7, 1, 1, 3), dtype=np.uint8))
    index = generator.integers(0, 500, 300)

    @pipeline_def(batch_size=300, num_threads=1, device_id=None)
    def own() -> Node:
        place, size, count = fn.external_source(
            source=lambda: (index, sizes[index].astype(np.int64), counts[index].astype(np.int32)), num_outputs=3
        )
        plan = dmx.plan(place, size, crop=crop, mix=mix, fractals=bank, edits_per_original=count, seed=9, epoch=4)
        assert plan.seam_width == 0.1
        return tuple(plan._replace(seam_width=count))

    drawn = dmx.Plan(*(output.as_array() for output in own().run()))
    expected = planner.batch(4, index)
    assert 0 < expected.mixed.sum() < 300
    for name in ("box", "span", "mask", "flip", "fractal", "fractal_flip", "fractal_weight"):
        assert np.array_equal(getattr(drawn, name), getattr(expected, name)), name
    assert np.array_equal(drawn.edit, np.where(expected.mixed, expected.edit - starts[index], -1))
    assert [drawn.box.dtype, drawn.mask.dtype, drawn.fractal.dtype, drawn.fractal_weight.dtype] == [
        np.float64,
        np.int32,
        np.int64,
        np.float32,
    ]


def test_with_dalis_own_reader(dataset: DiffuseMixDataset) -> None:
    """The index is the reader's label; every original has two edits; sizes come from the decoded image."""

    @pipeline_def(batch_size=33, num_threads=2, device_id=None)
    def own() -> Node:
        files = [path for path, _ in dataset.samples]
        content, index = fn.readers.file(files=files, labels=list(range(len(files))))
        original = fn.decoders.image(content, output_type=types.RGB)
        plan = dmx.plan(
            index,
            original.shape(),
            crop=dataset.crop,
            mix=dataset.mix,
            fractals=dataset.bank,
            edits_per_original=2,
            seed=dataset.seed,
        )
        edits = fn.python_function(index, plan.edit, function=edit_reader(dataset), batch_processing=True)
        edit = fn.decoders.image(edits, output_type=types.RGB)
        return dmx.mix(original, edit, plan, fractals=dataset.bank, output_size=SIZE, threads=2)

    (samples,) = own().run()
    assert np.array_equal(samples.as_array(), np.concatenate(loaded(dataset)))


def test_plain_samples(photos: Path, edits: Path, bank: FractalBank) -> None:
    dataset = make(photos, edits, bank, mix=None, crop=EvalCrop(SIZE))
    results = run(dataset, fractals=None, given={"fractals": None})
    assert all(map(np.array_equal, results, loaded(dataset)))


def test_with_conditional_execution(dataset: DiffuseMixDataset) -> None:
    """DALI then rewrites the pipeline's functions, and must leave ours alone."""
    assert np.array_equal(one(dataset, conditionals=True), np.concatenate(loaded(dataset)))


# --- fields of the user's own -------------------------------------------------------------------------------------


def test_a_flip_of_ones_own(dataset: DiffuseMixDataset) -> None:
    never = one(dataset, change=lambda plan: plan._replace(flip=0))
    always = one(dataset, change=lambda plan: plan._replace(flip=fn.random.coin_flip(probability=1.0)))
    drawn = one(dataset, change=lambda plan: plan._replace(flip=fn.random.coin_flip(seed=1)))
    assert np.array_equal(always, never[..., ::-1])
    flipped = (drawn == always).all(axis=(1, 2, 3))
    assert (flipped ^ (drawn == never).all(axis=(1, 2, 3))).all() and 0 < flipped.sum() < len(drawn)


def test_masks_and_fractals_of_ones_own(dataset: DiffuseMixDataset) -> None:
    def plain(plan: dmx.Plan) -> dmx.Plan:
        return plan._replace(mask=-1, fractal=-1)

    def by_nodes(plan: dmx.Plan) -> dmx.Plan:
        # A uniform choice is float32, which does as long as it is whole.
        return plan._replace(mask=fn.random.uniform(values=[-1.0]), fractal=constant([-1], np.int16))

    samples = one(dataset, change=plain)
    unmixed = make(dataset.root, dataset.store, dataset.bank, mix=None, seed=5)  # type: ignore[arg-type]
    assert np.array_equal(samples, np.concatenate(loaded(unmixed)))
    assert np.array_equal(samples, one(dataset, change=by_nodes))
    weightless = one(dataset, change=lambda plan: plan._replace(mask=-1, fractal_weight=0.0))
    assert np.array_equal(samples, weightless)


def test_a_seam_width_for_each_sample(photos: Path, edits: Path, bank: FractalBank) -> None:
    widths = np.resize([0.0, 0.3, 1.0], 33)

    def per_sample(plan: dmx.Plan) -> dmx.Plan:
        place = itertools.count()
        return plan._replace(seam_width=fn.python_function(function=lambda: np.array(widths[next(place)])))

    dataset = make(photos, edits, bank, mix=MixSpec(probability=1))
    samples = one(dataset, change=per_sample)
    for width in (0.0, 0.3, 1.0):
        same = np.concatenate(loaded(make(photos, edits, bank, mix=MixSpec(probability=1, seam_width=width))))
        assert np.array_equal(samples[widths == width], same[widths == width])


def test_a_plan_of_ones_own(dataset: DiffuseMixDataset) -> None:
    """A left half of the original, a right half of the edit, one fractal over all."""
    assert dataset.bank is not None
    original = np.full((20, 20, 3), 100, dtype=np.uint8)
    edit = np.full((30, 50, 3), 200, dtype=np.uint8)
    whites = FractalBank(np.full((2, 8, 8, 3), 255, dtype=np.uint8))

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def own() -> Node:
        first, second = fn.external_source(source=lambda: ([original] * 3, [edit] * 3), num_outputs=2)
        options = {"output_size": (10, 10), "normalize": None, "dtype": types.UINT8, "layout": "HWC"}
        hybrid = dmx.mix(first, second, dmx.Plan(mask=1), **options)
        blended = dmx.mix(
            first,
            second,
            dmx.Plan(mask=1, fractal=constant(1, np.int64), fractal_weight=0.2),
            fractals=whites,
            **options,
        )
        return hybrid, blended, dmx.mix(first, second, dmx.Plan(), **options)

    hybrid, blended, plain = (output.as_array() for output in own().run())
    assert (plain == 100).all()
    assert (hybrid[:, :, :5] == 100).all() and (hybrid[:, :, 5:] == 200).all()
    assert (blended[:, :, :5] == 131).all() and (blended[:, :, 5:] == 211).all()


# --- errors ---------------------------------------------------------------------------------------------------------

IMAGES = r"must be \(height, width, 3\) uint8 RGB images, found shape"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": {"edits_per_original": -1}}, "edits_per_original must be at least 0, found -1"),
        ({"given": {"seed": -1}}, "seed"),
        ({"given": {"epoch": -1}}, "epoch"),
        ({"given": {"epoch": 0.5}}, r"epoch must be whole, found 0.5"),
        ({"given": {"fractals": None}}, "fractal_weight 0.2 needs a fractal bank"),
        ({"given": {"mix": MixSpec.release()}}, "mix.epoch must be 'fixed'.*dataclasses.replace"),
        ({"dtype": types.INT32}, "dtype must be types.FLOAT, types.FLOAT16 or types.UINT8.*INT32"),
        ({"dtype": types.UINT8}, "uint8 holds plain pixels: give normalize=None"),
        ({"layout": "NCHW"}, "layout must be 'CHW' or 'HWC', found 'NCHW'"),
        ({"output_size": (0, 5)}, r"output_size must be .*found \(0, 5\)"),
        ({"output_size": 224}, r"output_size must be \(height, width\).*found 224"),
        ({"threads": 0}, "threads must be at least 1, found 0"),
        ({"device": "cuda"}, "device must be 'gpu', or 'cpu'.*found 'cuda'"),
        (
            {"change": lambda p: p._replace(box=(0, 1))},
            r"plan.box must be 4 number\(s\) for each sample, found shapes \[\(2,\)",
        ),
        ({"change": lambda p: p._replace(mask=4)}, r"plan.mask must be -1, .*'bottom'\), found 4 in sample 0"),
        ({"change": lambda p: p._replace(fractal=9)}, "plan.fractal must be -1.*bank of 4.*found 9"),
        ({"change": lambda p: p._replace(mask=0.5)}, r"plan.mask must be whole, found 0.5"),
        ({"change": lambda p: p._replace(seam_width=float("nan"))}, r"plan.seam_width must be finite, found nan"),
    ],
)
def test_wrong_arguments_are_found_before_the_pipeline_runs(
    photos: Path, edits: Path, bank: FractalBank, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(make(photos, edits, bank), **options)


def normalised(original: Node, edit: Node) -> tuple[Node, Node]:
    return fn.crop_mirror_normalize(original, dtype=types.FLOAT), edit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": normalised}, "original must have layout 'HWC', found 'CHW'; decode with output_type"),
        ({"images": lambda o, e: (fn.cast(o, dtype=types.FLOAT), e)}, rf"original {IMAGES} \(60, 95, 3\) of float32"),
        ({"images": lambda o, e: (o, e[:, :, :1])}, rf"edit {IMAGES} \(48, .*, 1\) of uint8 in sample"),
        ({"images": lambda o, e: (o, fn.reshape(e, layout="XYC"))}, "edit must have layout 'HWC', found 'XYC'"),
        (
            {"change": lambda p: p._replace(mask=constant(4, np.int32))},
            r"plan.mask must be -1, .*'bottom'\), found 4 in sample 0",
        ),
        (
            {"change": lambda p: p._replace(fractal=constant(9, np.int64))},
            "plan.fractal must be -1.*bank of 4.*found 9 in sample 0",
        ),
        ({"fractals": None}, "plan.fractal must be -1, no fractal, where mix has no bank: give it fractals=, found"),
        ({"change": lambda p: p._replace(box=constant((0, 0, 0, 1), np.float32))}, "plan.box must be .*above 0, found"),
        (
            {"change": lambda p: p._replace(fractal_weight=constant(1.5, np.float32))},
            r"plan.fractal_weight must lie in \[0, 1\], found 1.5",
        ),
        (
            {"change": lambda p: p._replace(flip=fn.random.uniform(range=(0.2, 0.3)))},
            "plan.flip must be whole, found 0.2",
        ),
        (
            {"change": lambda p: p._replace(span=fn.random.uniform(shape=3))},
            r"plan.span must be 4 number\(s\) for each sample, found shapes",
        ),
    ],
)
def test_what_goes_wrong_as_it_runs_reaches_the_user(
    photos: Path, edits: Path, bank: FractalBank, options: dict[str, Any], message: str
) -> None:
    """In DALI's own error, which also shows the line of the pipeline."""
    dataset = make(photos, edits, bank, mix=MixSpec(probability=1))
    # Not `as caught`, which makes a cycle with the pipeline: DALI's threads must not be those that collect it.
    with pytest.raises(RuntimeError, match=rf"(?s)return dmx\.mix\(.*ConfigError: {message}"):
        run(dataset, **options)


@pytest.mark.parametrize(
    ("index", "size", "epoch", "message"),
    [
        ([3, 3], [[5, 6], [6, 5]], [0, 0], "index must be the number of an original.*a class label is no such number"),
        ([-1, 0], [[5, 6], [6, 5]], [0, 0], r"index must lie in \[0, .*found -1"),
        ([0, 1], [[5, 6], [0, 5]], [0, 0], r"sizes must hold a height and a width.*found \[0, 5\] in sample 1"),
        ([0, 1], [[5, 6], [6, 5]], [1, 2], "epoch must be equal within a batch, found 1 to 2"),
    ],
)
def test_wrong_inputs_of_the_plan(index: list[int], size: list[list[int]], epoch: list[int], message: str) -> None:
    @pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def own() -> Node:
        inputs = tuple(np.array(values) for values in (index, size, epoch))
        place, sizes, when = fn.external_source(source=lambda: inputs, num_outputs=3)
        return dmx.plan(place, sizes, crop=TrainCrop(8), epoch=when).box

    with pytest.raises(RuntimeError, match=message):
        own().run()


# --- the GPU's branch, as far as it goes without one ----------------------------------------------------------------


def on_device(build: Callable[[Node, Node], Node]) -> None:
    """Define a pipeline over images on a GPU; it is not built, which would need one."""

    @pipeline_def(batch_size=2, num_threads=1, device_id=0)
    def own() -> Node:
        files = fn.external_source(source=lambda: [PLACEHOLDER] * 2)
        return build(fn.decoders.image(files, device="mixed"), fn.decoders.image(files, device="cpu"))

    own()


def test_the_device_is_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check_installed", lambda: None)
    outputs: list[Node] = []

    def mixed(there: Node, here: Node) -> Node:
        for original, options in ((there, {}), (here, {}), (here, {"device": "gpu"})):
            outputs.append(dmx.mix(original, here, dmx.Plan(), output_size=SIZE, **options))
        return outputs[0]

    on_device(mixed)
    assert [node.device for node in outputs] == ["gpu", "cpu", "gpu"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built for CUDA")
def test_a_gpu_needs_what_is_not_installed_here() -> None:
    with pytest.raises(MissingDependencyError, match=r"PyTorch .* is built without CUDA"):
        on_device(lambda there, here: dmx.mix(there, there, dmx.Plan(), output_size=SIZE))


def test_devices_that_do_not_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"device must be .*found 'cpu' with the original on the cpu and the edit on the"
    ):
        on_device(lambda there, here: dmx.mix(here, there, dmx.Plan(), output_size=SIZE))
    with pytest.raises(ConfigError, match=r"plan.flip must lie on the CPU, found a node on the gpu"):
        flip = {"probability": 0.5, "device": "gpu"}
        on_device(lambda there, here: dmx.mix(here, here, dmx.Plan(flip=fn.random.coin_flip(**flip)), output_size=SIZE))


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_the_gpus_tensors_are_mixed_as_the_cpus_arrays(
    dataset: DiffuseMixDataset, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """All of the branch but streams and DLPack, over tensors on the CPU, with the CPU's kernel in the GPU's place."""

    def mix_on_cpu(plan: Any, pieces: Any, bank: Any, *, out: torch.Tensor, format: Any) -> None:
        view = out.permute(0, 2, 3, 1) if format.channels_last else out
        call.mix(plan, pieces, bank and bank.images.numpy(), out=view.numpy(), format=format)

    monkeypatch.setattr(call, "mix_on_device", mix_on_cpu)
    generator = np.random.default_rng(0)
    originals = [generator.integers(0, 256, (30 + i, 50, 3), dtype=np.uint8) for i in range(6)]
    edits = [generator.integers(0, 256, (40, 30 + i, 3), dtype=np.uint8) for i in range(6)]
    given = {"span": (0.1, 0, 0.8, 1), "mask": 2, "fractal": 3, "fractal_flip": (1, 0), "fractal_weight": 0.25}
    values = dmx.Plan(**given)._asdict()
    del values["edit"], values["seam_width"]
    fields = dmx._Fields(dmx._ROW, {**values, "seam_width": SimpleNamespace()})
    format = TensorFormat(channels_last=layout == "HWC")
    work = dmx._Mix(fields=fields, bank=dataset.bank, size=SIZE, format=format, threads=1)
    rest = [[np.frombuffer(b"HWC", dtype=np.uint8)] * 6] * 2 + [[np.array(width) for width in (0, 0.1, 0.1, 1, 0, 0.1)]]
    packed = [torch.from_numpy(row) for row in work.pack(*rest)]
    tensors = work.on_tensors(list(map(torch.from_numpy, originals)), list(map(torch.from_numpy, edits)), packed)
    arrays = work.on_cpu(originals, edits, *rest)
    for tensor, array in zip(tensors, arrays, strict=True):
        assert tensor.is_contiguous() and np.array_equal(tensor.numpy(), array)
    assert arrays[0].shape == ((*SIZE, 3) if layout == "HWC" else (3, *SIZE))
