"""What the plan draws for augmentation: streams of their own, the dataset and the loader, refusals, strings."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from dali_diffusemix import (
    AutoAugment,
    ColorJitter,
    ConfigError,
    DiffuseMixDataset,
    DiffuseMixLoader,
    EvalCrop,
    FractalBank,
    GaussianBlur,
    Grayscale,
    RandAugment,
    RandomChoice,
    RandomCrop,
    RandomErasing,
    Schedule,
    Solarize,
    TimmRandAugment,
    TrainCrop,
    TrivialAugmentWide,
)
from dali_diffusemix.base.philox import AUGMENT, NOISE
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD
from dali_diffusemix.plan import Planner
from dali_diffusemix.plan.augment import (
    CODES,
    OPERATION,
    OPERATIONS,
    Augmentation,
    Draws,
    augmentations,
    described,
    draw_operations,
    three_augment,
)

ALL: list[Augmentation | str] = [
    TrivialAugmentWide(),
    RandAugment(),
    AutoAugment(),
    "rand-m9-mstd0.5-inc1",
    "ThreeAugment",
    GaussianBlur(5, p=0.5),
    Solarize(100, p=0.3),
    Grayscale(0.2),
    RandomErasing(0.5),
    RandomErasing(0.5, value="random"),
]


def planner(augment: Any, size: int = 64) -> Planner:
    sizes = np.full((4096, 2), 90, dtype=np.int32)
    return Planner(seed=7, crop=TrainCrop(size), sizes=sizes, augment=augmentations(augment))


def columns(operations: NDArray[np.void]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(operations).view(np.uint8)


# --- streams


def test_adding_a_setting_changes_no_other_draw() -> None:
    """Wherever it is put; of the same kind, behind."""
    plain = planner(None).batch(3, np.arange(50))
    assert plain.operations.shape == (50, 0)
    several = augmentations(ALL)
    whole = planner(ALL).batch(3, np.arange(50))
    for name in ("box", "flip", "original", "view", "index"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(plain, name))
    start = 0
    kinds: set[str] = set()
    for one in several:
        here = whole.operations[:, start : start + one.slots]
        start += one.slots
        if type(one).__name__ in kinds:
            continue
        kinds.add(type(one).__name__)
        alone = planner([one]).batch(3, np.arange(50)).operations
        behind = planner([AutoAugment(), one] if not isinstance(one, AutoAugment) else [one]).batch(3, np.arange(50))
        np.testing.assert_array_equal(columns(here), columns(alone))
        np.testing.assert_array_equal(columns(behind.operations[:, -one.slots :]), columns(alone))
    assert start == whole.operations.shape[1]


def test_two_of_a_kind_draw_differently() -> None:
    two = planner([TrivialAugmentWide(), TrivialAugmentWide()]).batch(0, np.arange(500)).operations
    assert (two["code"][:, 0] == two["code"][:, 1]).mean() < 0.2


def test_a_sample_is_a_function_of_its_address() -> None:
    plan = planner(ALL)
    whole = plan.batch(2, np.arange(300))
    for some in (np.arange(17, 60), np.array([299, 3, 3, 120])):
        np.testing.assert_array_equal(columns(plan.batch(2, some).operations), columns(whole.operations[some]))
    again = plan.batch(2, np.array([5, 5, 6]), np.array([0, 1, 0])).operations
    assert not np.array_equal(columns(again[0]), columns(again[1]))
    np.testing.assert_array_equal(columns(again[0]), columns(whole.operations[5]))
    other = plan.batch(4, np.arange(300)).operations
    assert (other["code"] == whole.operations["code"]).mean() < 0.9


GOLDEN = {
    (0, 0): "rotate -67.5, solarize 178, sharpness 0.73, rotate 26.7, invert, brightness 1.74, solarize 128, "
    "brightness 0.981, color 1.1, contrast 0.749, blur 0.401, erase 20x44",
    (
        1,
        0,
    ): "shear_y -0.528, rotate -9, solarize 142, grayscale, brightness 1.24, contrast 0.92, color 0.888, blur 1.44, "
    "erase 25x22",
    (1234, 2): "sharpness 0.73, contrast 1.27, solarize 128, contrast 1.12, brightness 0.744, color 0.921, blur 1.4, "
    "solarize 100, erase 21x7",
}


def test_the_draws_are_frozen() -> None:
    """Others would mean that the same seed gives other samples."""
    plan = planner(ALL)
    for (index, view), expected in GOLDEN.items():
        (row,) = plan.batch(3, [index], [view]).operations
        assert ", ".join(filter(None, map(described, row))) == expected


def test_no_setting_reaches_another_stream() -> None:
    """Fields of all settings, many of each kind and deep in RandomChoice, lie between the crops' and the noise's."""
    fields: list[int] = []

    def draw(field: int, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
        fields.extend([field] * len(rows))
        return np.full((len(rows), 4), 2**31, dtype=np.uint32)  # in the middle: all is applied, and tried again

    choice = RandomChoice((RandomErasing(1, ratio=(1e-3, 1e-3)), RandAugment(16), "rand-n16-p1", GaussianBlur(3)))
    settings = augmentations([*ALL, choice, RandomErasing(1, scale=(1, 1), ratio=(1, 1))] * 3)
    draw_operations(settings, 1, (32, 32), draw)
    assert len(set(fields)) == len(fields)
    assert min(fields) >= AUGMENT and max(fields) < NOISE


# --- the draws


def test_probabilities() -> None:
    count = 4000
    for p in (0.0, 0.25, 1.0):
        for one in (Grayscale(p), Solarize(50, p), GaussianBlur(3, p=p), RandomErasing(p)):
            found = planner(one, 224).batch(0, np.arange(count)).operations["code"]
            assert abs((found > 0).mean() - p) < 0.03 and (p not in (0, 1) or (found > 0).mean() == p)


def test_jitter_has_every_order_and_range() -> None:
    jitter = ColorJitter(0.4, (0.5, 0.9), 2.0, 0.1)
    found = planner(jitter).batch(0, np.arange(4096)).operations
    orders, counts = np.unique(found["code"], axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 4096 / 24 * 0.7 and counts.max() < 4096 / 24 * 1.3
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.5, 0.9),
        ("color", 0.0, 3.0),
        ("hue", -0.1, 0.1),
    ):
        values = found["values"][found["code"] == CODES[name]][:, 0]
        assert len(values) == 4096 and low <= values.min() < low + 0.01 * (high - low) * 2
        assert high - 0.02 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
    assert ColorJitter().slots == 0 and ColorJitter(hue=0.2).slots == 1
    assert ColorJitter(brightness=(1, 1)).slots == 0 and ColorJitter(brightness=(0.5, 0.5)).slots == 1


def test_erased_rectangles_lie_in_the_sample() -> None:
    found = planner(RandomErasing(1, scale=(0.02, 0.33), ratio=(0.3, 3.3)), 48).batch(0, np.arange(4000)).operations
    erased = found[found["code"] > 0]["values"]
    assert len(erased) > 3990
    top, left, height, width = erased[:, :4].T
    assert top.min() == left.min() == 0 and (top + height).max() == (left + width).max() == 48
    assert height.max() < 48 and width.max() < 48
    area, ratio = height * width / 48**2, height / width
    assert area.min() > 0.015 and area.max() < 0.36 and ratio.min() > 0.25 and ratio.max() < 4
    assert abs((ratio > 1).mean() - (ratio < 1).mean()) < 0.05


def test_a_choice_takes_one_setting() -> None:
    choice = RandomChoice((Grayscale(), Solarize(), GaussianBlur(3)), p=(2, 1, 1))
    names = [OPERATIONS[code] for code in planner(choice).batch(0, np.arange(4000)).operations["code"][:, 0]]
    shares = [names.count(name) / 4000 for name in ("grayscale", "solarize", "blur")]
    assert np.abs(np.array(shares) - (0.5, 0.25, 0.25)).max() < 0.03


def test_strings_and_values() -> None:
    assert augmentations("rand-m9-mstd0.5-inc1") == (TimmRandAugment(magnitude=9, magnitude_std=0.5, increasing=True),)
    assert augmentations("rand-m7-n3-p0.7-mstd101-mmax9") == (
        TimmRandAugment(magnitude=7, num_ops=3, p=0.7, magnitude_std=101, magnitude_max=9),
    )
    assert augmentations("rand-inc0") == (TimmRandAugment(),)  # as timm 1.0.31 reads it
    assert augmentations(iter([Grayscale()])) == (Grayscale(),)
    assert augmentations("ThreeAugment") == three_augment()
    assert augmentations(["ThreeAugment", [Grayscale()]]) == (*three_augment(), Grayscale())
    assert augmentations(None) == () == augmentations([])
    for one in augmentations(ALL):
        assert pickle.loads(pickle.dumps(one)) == one and hash(one) == hash(pickle.loads(pickle.dumps(one)))
        assert isinstance(one, Augmentation)
        with pytest.raises(AttributeError):
            one.p = 1  # type: ignore[attr-defined]


def test_operations_in_words() -> None:
    rows = planner(ALL, 224).batch(0, np.arange(64)).operations
    words = {described(one) for row in rows for one in row}
    assert "" in words and "equalize" in words
    assert any(word.startswith("rotate ") for word in words) and any("erase " in word for word in words)
    assert all(len(word) < 28 for word in words)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: Grayscale(1.5), r"p must lie in \[0, 1\], a probability, found 1.5"),
    (lambda: Solarize(300), r"threshold must lie in \[0, 256\], found 300"),
    (lambda: GaussianBlur(4), r"kernel_size must be one odd number, 1 to 63 pixels, found 4"),
    (lambda: GaussianBlur(3, sigma=0.0), r"sigma must be above 0"),
    (lambda: ColorJitter(-1), r"brightness must be a number of at least 0, or \(low, high\) from 0 on, found -1"),
    (
        lambda: ColorJitter(hue=0.7),
        r"hue must be a number from 0 to 0.5, or \(low, high\) within -0.5 and 0.5, found 0.7",
    ),
    (lambda: RandomErasing(scale=(0.5, 0.1)), r"scale must be \(low, high\)"),
    (lambda: RandomErasing(value="white"), r"value must be a number, three numbers or 'random', found 'white'"),  # type: ignore[arg-type]
    (
        lambda: RandAugment(magnitude=31),
        r"magnitude must be a whole number from 0 to 30, found 31",
    ),
    (lambda: RandAugment(num_ops=-1), r"num_ops must be a whole number from 0 to 16, found -1"),
    (lambda: TrivialAugmentWide(1), r"num_magnitude_bins must be a whole number from 2 to 1000, found 1"),
    (lambda: TrivialAugmentWide(interpolation="lanczos"), r"interpolation must be one of .* found 'lanczos'"),  # type: ignore[arg-type]
    (lambda: AutoAugment(fill=(1, 2)), r"fill must be a value from 0 to 255 or three of them"),  # type: ignore[arg-type]
    (lambda: RandomChoice(()), r"transforms must hold single settings, one or more .* found \(\)"),
    (lambda: RandomChoice((RandomChoice((Grayscale(),)),)), r"transforms must hold no RandomChoice"),
    (lambda: RandomChoice((Grayscale(),), p=(0,)), r"p must hold 1 weights of at least 0, one above it"),
    (lambda: augmentations("rand-m9-x3"), r"found 'x3' in 'rand-m9-x3'"),
    (lambda: augmentations("trivial"), r"augment must be 'ThreeAugment' or of timm's form"),
    (lambda: augmentations(TrivialAugmentWide), r"found <class .*; write TrivialAugmentWide\(\)"),  # type: ignore[arg-type]
    (lambda: augmentations(torch.nn.Identity()), r"augment must be a setting \(ColorJitter, .* found Identity\(\)"),  # type: ignore[arg-type]
    (lambda: augmentations([Grayscale(), 3]), r"augment must be a setting \(ColorJitter, .* found 3"),  # type: ignore[list-item]
    (lambda: ColorJitter(float("inf")), r"brightness must be a number of at least 0"),
    (lambda: RandomErasing(value=float("nan")), r"value must be a number, three numbers or 'random', found nan"),
    (lambda: RandomErasing(1, 0.3), r"scale must be \(low, high\) with 0 ≤ low ≤ high ≤ 1, found 0.3"),  # type: ignore[arg-type]
    (lambda: GaussianBlur((5, 9)), r"kernel_size must be one odd number"),  # type: ignore[arg-type]
    (lambda: RandomChoice(([Grayscale()], Solarize())), r"transforms must hold single settings"),  # type: ignore[arg-type]
    (lambda: RandomChoice(("ThreeAugment",)), r"nor 'ThreeAugment', which is two"),  # type: ignore[arg-type]
    (lambda: TimmRandAugment("rand-m9"), r"write augment='rand-m9' or TimmRandAugment.of"),  # type: ignore[arg-type]
    (lambda: planner([Grayscale()] * 17).batch(0, [0]), r"at most 16 settings of a kind, found more of Grayscale"),
    (lambda: augmentations([Schedule({0: None})]), r"write one Schedule, whose values are"),  # type: ignore[list-item]
    (lambda: TimmRandAugment(magnitude_max=0), r"magnitude_max must be above 0 and at most 100, found 0"),
    (lambda: planner([Grayscale()] * 17), r"at most 16 settings of a kind, found more of Grayscale; leave some out"),
    *(
        (lambda text=text: augmentations(text), rf"of timm's form .* each part once, found '{part}' in")  # type: ignore[misc]
        for text, part in (
            ("rand-m9-mstd0.5-inc2", "inc2"),
            ("rand-inc9999", "inc9999"),
            ("rand-m9-m3", "m3"),
            ("rand-m1_0", "m1_0"),
            ("rand-m9 -n2", "m9 "),
            ("rand-m\u0669", "m\u0669"),
            ("rand-m9-mstdinf", "mstdinf"),
            ("rand-m9.5", "m9.5"),
            ("rand-p1e3", "p1e3"),
            ("rand-m" + "9" * 400, "m9+"),
            ("rand--m9", ""),
            ("rand-m9\n", "m9\\\\n"),
        )
    ),
    (lambda: TimmRandAugment.of("hello-m9"), r"text must be of timm's form rand-m9-.* found 'hello-m9'"),
    (lambda: TimmRandAugment.of(9), r"text must be of timm's form .* found 9"),  # type: ignore[arg-type]
    *(
        (lambda one=one: TimmRandAugment(increasing=one), "increasing must be True or False, found")  # type: ignore[misc]
        for one in ("no", 2, float("nan"), None)
    ),
    (lambda: TimmRandAugment(np.array([1, 2])), "magnitude must be a number of at least 0"),  # type: ignore[arg-type]
    (lambda: TimmRandAugment(magnitude_std=float("inf")), "magnitude_std must be a number of at least 0, found inf"),
    (lambda: augmentations({Grayscale(), Solarize()}), "found {.*; write a list, whose order counts"),
    (lambda: augmentations({Grayscale(): 1, Solarize(): 2}), "found {.*; write a list, whose order counts"),
    (lambda: augmentations({0: None, 5: Grayscale()}), r"; write Schedule\({\.\.\.}\) around the dictionary"),  # type: ignore[dict-item]
    (lambda: augmentations(torch.tensor(1.0)), r"augment must be a setting .* found tensor\(1\.\)"),  # type: ignore[arg-type]
    (lambda: augmentations(torch.ones(2)), "augment must be a setting"),  # type: ignore[arg-type]
    (lambda: augmentations(type("Less", (), {"slots": -1, "draw": print})()), "augment must be a setting"),
    (lambda: ColorJitter(np.complex64(1)), "brightness must be a number"),  # type: ignore[arg-type]
    (lambda: Grayscale(np.complex64(0.5)), r"p must lie in \[0, 1\]"),  # type: ignore[arg-type]
    (lambda: Grayscale(True), r"p must lie in \[0, 1\], a probability, found True; for example p=0\.5"),
    (lambda: ColorJitter(10**400), "brightness must be a number"),
    (lambda: Grayscale(10**400), r"p must lie in"),
    (lambda: RandomErasing(value=np.ones(2)), "value must be a number, three numbers or 'random'"),  # type: ignore[arg-type]
    (lambda: RandomErasing(p=float("nan")), r"p must lie in .* found nan; for example p=0\.5"),
    (lambda: TrivialAugmentWide(interpolation=np.array(["nearest", "x"])), "interpolation must be one of"),  # type: ignore[arg-type]
    (lambda: AutoAugment("cifar10"), r"policy must be one of \('imagenet',\), found 'cifar10'"),  # type: ignore[arg-type]
    (lambda: RandomChoice((Grayscale,)), r"transforms must be a setting .*; write Grayscale\(\)"),  # type: ignore[arg-type]
    (lambda: RandomChoice((Schedule({0: None}),)), "transforms must be a setting"),  # type: ignore[arg-type]
    (lambda: RandomChoice((Grayscale(),) * 256), "transforms must hold at most 255 settings, found 256"),
    (lambda: RandomChoice((Grayscale(),) * 2, p=(1e308, 1e308)), "p must hold 2 weights .* with a finite sum"),
    (lambda: TrainCrop(True), "size must be 1 to 16384 pixels, an int or .* found True; for example size=224"),
    *(
        (lambda one=one: TrainCrop(one), "size must be 1 to 16384 pixels, an int or")  # type: ignore[misc]
        for one in (32.5, "32", (1, 2, 3), None, (), 0, (4, 20000))
    ),
    (lambda: TrainCrop(32, flip=None), r"flip must lie in \[0, 1\], a probability, found None"),  # type: ignore[arg-type]
    (lambda: TrainCrop(32, scale=0.5), r"scale must be \(low, high\)"),  # type: ignore[arg-type]
    (lambda: RandomCrop(32, padding=1.5), "padding must be a whole number from 0 to 16384"),  # type: ignore[arg-type]
    (lambda: EvalCrop(32, resize="8"), "resize must be 1 to 16384 pixels"),  # type: ignore[arg-type]
    (lambda: Planner(seed=True, crop=TrainCrop(8), sizes=np.ones((1, 2), np.int32)), "seed must be a whole number"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_what_is_wrong_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


class Twice:
    """A setting of one's own: two operations of those that there are."""

    slots = 2

    def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
        out["code"] = np.where(
            draws(0, np.arange(len(out)))[:, :2] >> np.uint32(31), CODES["invert"], CODES["equalize"]
        )


def test_a_setting_of_ones_own() -> None:
    found = planner([Twice(), Grayscale()]).batch(0, np.arange(100)).operations
    assert found.dtype == OPERATION and set(np.unique(found["code"][:, :2])) == {CODES["invert"], CODES["equalize"]}


def test_what_a_setting_of_ones_own_draws_is_checked() -> None:
    """The kernels believe it."""

    class Draws1:
        slots = 1

        def __init__(self, name: str | int, *values: float, filter: int = 0) -> None:
            self.code = CODES[name] if isinstance(name, str) else name
            self.values, self.filter = values, filter

        def draw(self, out: NDArray[np.void], size: tuple[int, int], draws: Draws) -> None:
            out["code"], out["filter"] = self.code, self.filter
            out["values"][..., : len(self.values)] = self.values

    wrong = [
        Draws1("erase", 50, 0, 20, 5),
        Draws1("erase", -1, 0, 20, 5),
        Draws1("erase", 1.5, 0, 20, 5),
        Draws1("erase_noise", 0, 0, 5, 5, -1),
        Draws1("blur", 1.0, 4),
        Draws1("blur", 1.0, 101),
        Draws1("blur", 0.0, 3),
        Draws1("posterize", 9),
        Draws1("hue", 0.7),
        Draws1("rotate", np.nan),
        Draws1("translate_x", 1e9),
        Draws1("shear_x", 0.1, filter=3),
        Draws1("shear_x", 511.0),
        Draws1("shear_y", -511.5),
        Draws1(200, 0),
    ]
    for one in wrong:
        with pytest.raises(ConfigError, match=r"draw of Draws1 must give operations as plan\.augment\.OPERATION"):
            planner([Grayscale(), one]).batch(0, np.arange(3))
        with pytest.raises(ConfigError, match=r"draw of Draws1 must give operations"):
            planner(RandomChoice((Grayscale(), one))).batch(0, np.arange(30))
    with pytest.raises(ConfigError, match=r"found shear_x with .*; a shear must read within 2\*\*15 pixels"):
        planner([Draws1("shear_x", 600.0)]).batch(0, [0])
    right = [
        Draws1("shear_x", 510.0),
        Draws1("erase", 44, 0, 20, 5),
        Draws1("blur", 1.0, 63),
        Draws1("rotate", 400.0, filter=2),
        Draws1("invert"),
    ]
    assert planner(right).batch(0, np.arange(3)).operations.shape == (3, 5)
    with pytest.raises(ConfigError, match="augment must be a setting"):
        planner(type("Method", (), {"slots": lambda self: 1, "draw": None})())


def test_names_keep_settings_of_ones_own_apart() -> None:
    class Other(Twice):
        pass

    both = planner([Twice(), Other()]).batch(0, np.arange(200)).operations["code"]
    alone = planner([Other()]).batch(0, np.arange(200)).operations["code"]
    np.testing.assert_array_equal(both[:, 2:], alone)
    assert not np.array_equal(both[:, :2], both[:, 2:])


def test_numbers_of_numpy_and_lists_are_taken() -> None:
    assert GaussianBlur(5, [0.1, 2.0]) == GaussianBlur(5, (0.1, 2.0))  # type: ignore[arg-type]
    assert ColorJitter(None, np.float32(0.5)).slots == 1  # type: ignore[arg-type]
    assert TrainCrop(np.int64(32)) == TrainCrop(32) == TrainCrop((32, 32))  # type: ignore[arg-type]
    assert RandomErasing(value=np.array([1.0, 2, 3])) == RandomErasing(value=(1, 2, 3))  # type: ignore[arg-type]
    assert RandomChoice((Grayscale(),), p=np.array([1.0])) == RandomChoice((Grayscale(),), p=(1,))  # type: ignore[arg-type]
    assert AutoAugment("imagenet") == AutoAugment()
    whole = RandomChoice((Grayscale(),) * 255)
    assert planner([whole, whole]).batch(0, np.arange(9)).operations["code"].all()
    assert RandAugment(fill=None) == RandAugment(fill=0) == RandAugment(fill=np.int64(0)) == RandAugment(fill=(0, 0, 0))  # type: ignore[arg-type]


# --- the dataset and the loader


@pytest.fixture
def make(photos: Path, edits: Path, bank: FractalBank) -> Callable[..., DiffuseMixDataset]:
    def dataset(**changes: Any) -> DiffuseMixDataset:
        arguments: dict[str, Any] = {"edits": edits, "fractals": bank, "crop": TrainCrop(40), "augment": ALL, "seed": 3}
        return DiffuseMixDataset(photos, **{**arguments, **changes})

    return dataset


def loader_of(dataset: Any, **options: Any) -> DiffuseMixLoader:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed on this machine")
    return DiffuseMixLoader(dataset, 7, **{"device": "cpu", "num_workers": 2, "shuffle": True, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_dataloader_gives_the_same(make: Callable[..., DiffuseMixDataset], workers: int) -> None:
    dataset = make()
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected = list(DataLoader(dataset, 7, num_workers=workers))
        loader = loader_of(make(), shuffle=False)
        loader.set_epoch(epoch)
        for (images, labels), (others, other_labels) in zip(loader, expected, strict=True):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_it_resumes_where_it_was(make: Callable[..., DiffuseMixDataset]) -> None:
    whole = [images for images, _ in loader_of(make())]
    first = loader_of(make())
    batches = iter(first)
    for _ in range(2):
        next(batches)
    again = loader_of(make())
    again.load_state_dict(first.state_dict())
    rest = [images for images, _ in again]
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[2:], strict=True))


def test_a_substitute_has_its_own_operations(
    make: Callable[..., DiffuseMixDataset], photos: Path, tmp_path: Path
) -> None:
    """A damaged original is replaced by the next sample, with what the plan draws for that one."""
    import shutil

    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    damaged = sorted(root.glob("*/*"))[4]
    damaged.write_bytes(damaged.read_bytes()[:200])
    dataset = DiffuseMixDataset(root, catalog=make().catalog, crop=TrainCrop(40), augment=ALL, seed=3)
    with pytest.warns(UserWarning):
        images = torch.cat([images for images, _ in loader_of(dataset, shuffle=False)])
    assert torch.equal(images[4], images[5])
    with pytest.warns(UserWarning):
        assert torch.equal(images[4], dataset[4][0])


def test_without_augment_nothing_is_rounded(make: Callable[..., DiffuseMixDataset]) -> None:
    plain, rounded = make(augment=None, normalize=None), make(augment=RandomErasing(0), normalize=None)
    one, other = (torch.stack([dataset[i][0] for i in range(33)]) * 255 for dataset in (plain, rounded))
    assert (one - one.round()).abs().max() > 0.4
    assert (other - other.round()).abs().max() < 1e-4
    assert (one - other).abs().max() <= 0.5 + 1e-4


def test_an_erasure_of_0_is_the_mean_colour(make: Callable[..., DiffuseMixDataset]) -> None:
    dataset = make(augment=RandomErasing(1, value=0))
    mean, deviation = np.array(IMAGENET_MEAN) * 255, np.array(IMAGENET_STD) * 255
    exact = (np.floor(mean + 0.5) - mean) / deviation  # rounded to 8 bits
    for index in range(5):
        (operation,) = dataset.planner.batch(0, [index]).operations[0]
        top, left, height, width = operation["values"][:4].astype(int)
        part = dataset[index][0][:, top : top + height, left : left + width].reshape(3, -1).numpy()
        np.testing.assert_allclose(part, np.broadcast_to(exact[:, None], part.shape), atol=1e-5)


def test_normalisation_may_be_lists_or_arrays(make: Callable[..., DiffuseMixDataset]) -> None:
    noise = RandomErasing(1, value="random")
    expected = make(augment=noise)[3][0]
    for kind in (list, np.array, torch.tensor):
        normalize: Any = (kind(IMAGENET_MEAN), kind(IMAGENET_STD))
        assert (make(augment=noise, normalize=normalize)[3][0] - expected).abs().max() < 1e-5


def test_noise_is_normal_in_the_tensor(make: Callable[..., DiffuseMixDataset]) -> None:
    dataset = make(crop=TrainCrop(160), augment=RandomErasing(1, scale=(0.3, 0.4), value="random"))
    parts = []
    for index in range(8):
        (operation,) = dataset.planner.batch(0, [index]).operations[0]
        top, left, height, width = operation["values"][:4].astype(int)
        parts.append(dataset[index][0][:, top : top + height, left : left + width].reshape(3, -1).numpy())
    noise = np.concatenate(parts, axis=1)
    # Pixels end at 0 and 255: about two deviations from the mean, where values pile up.
    low, high = (0 - np.array(IMAGENET_MEAN)) / IMAGENET_STD, (1 - np.array(IMAGENET_MEAN)) / IMAGENET_STD
    inside = (noise > low[:, None] + 0.02) & (noise < high[:, None] - 0.02)
    assert 0.94 < inside.mean() < 0.97
    assert np.abs(noise.mean(axis=1)).max() < 0.03 and np.abs(noise.std(axis=1) - 0.96).max() < 0.04
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.03  # channels are independent
    shorter = min(parts[0].shape[1], parts[1].shape[1])
    assert abs(np.corrcoef(parts[0][0, :shorter], parts[1][0, :shorter])[0, 1]) < 0.05  # so are samples
