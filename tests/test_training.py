"""The trainer: every recipe runs, a killed run goes on as if nothing had happened, and bad input is named."""

import csv
import importlib
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from dali_diffusemix import Catalog, RandAugment, RandomErasing, TimmRandAugment, TrainCrop
from dali_diffusemix.errors import CatalogError, ConfigError, DiffuseMixError
from dali_diffusemix.generate.engines.local import LocalEngine, default_devices
from dali_diffusemix.mix import IMAGENET_MEAN, IMAGENET_STD

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.toml"))

pytestmark = [
    pytest.mark.slow,
    # kornia scripts some of its functions on import.
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN"),  # which its flags have, too
]


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[SimpleNamespace]:
    """The modules of examples/, imported as the scripts import each other."""
    before = set(sys.modules)
    sys.path.insert(0, str(EXAMPLES))
    names = ("batch_transforms", "compare", "comparison_page", "data", "evaluate", "jobs", "models", "recipe")
    names += ("significance", "train", "world")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(EXAMPLES) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def no_compiling() -> Iterator[None]:
    """oneDNN compiles each shape of each layer, which is most of the time that a few updates take."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALI_DIFFUSEMIX_CACHE", str(tmp_path / "own"))


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


SMALL = (
    *("edits.editor=procedural", 'edits.prompts=["autumn", "snowy"]', "edits.size=64", "edits.edit_size=unset"),
    *("fractals.count=2", "fractals.size=32", "train.epochs=unset", "train.updates=2", "train.batch_size=4"),
    *("train.validate_every=2", "train.label_smoothing=0.1"),
)


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


# --- every recipe


@pytest.fixture(scope="module")
def resnet50_weights(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1,000 classes, saved as torchvision saves its own, but narrow."""
    file = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(scripts.models.build("resnet50", 1000, width=16).state_dict(), file)
    return file


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_trains_and_is_evaluated(
    file: Path, scripts: SimpleNamespace, tmp_path: Path, resnet50_weights: Path
) -> None:
    recipe = scripts.recipe.Recipe.read(file)
    build = miniature.single_folder if recipe.data.test_share else miniature.BUILD[recipe.data.layout]
    data = build(tmp_path / "data")
    changes = ["model.width=16"]  # seconds rather than minutes, and so are smaller crops
    changes += [f"model.weights={resnet50_weights}"] if recipe.model.weights else []
    changes += ["data.per_class=8"] if recipe.data.per_class else []  # as many as the miniature has
    if recipe.crop.size > 64:
        sizes = {"size": 96 if recipe.crop.from_size else 72, "from_size": 64, "resize": 80, "eval_resize": 80}
        changes += [f"crop.{name}={sizes[name]}" for name in sizes if getattr(recipe.crop, name) is not None]
    common = ["--data", str(data), "--workers", "1", "--device", "cpu"]
    out = tmp_path / "run"
    scripts.train.main(
        [str(file), *common, "--cache", str(tmp_path / "cache"), "--out", str(out), *sets(*SMALL, *changes)]
    )
    losses = [float(row["loss"]) for row in rows(out / "train.csv")]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    (valid,) = rows(out / "valid.csv")
    assert 0 <= float(valid["top1"]) <= float(valid["top5"]) <= 1
    run = json.loads((out / "run.json").read_text())
    assert run["finished"]
    assert run["data"]["train"]["images"] >= 4
    with Image.open(out / "curve.png") as picture:
        assert picture.width > 1000
    scripts.evaluate.main([str(out / "best.pt"), *common, "--batch-size", "8"])
    result = json.loads((out / "best.pt.evaluation.json").read_text())
    assert sum(one["images"] for one in result["classes"]) == result["images"] == run["data"]["test"]["images"]
    assert list(result["fgsm"]) == [f"{one:g}" for one in recipe.evaluate.fgsm]
    low, high = result["top1_interval"]
    assert low <= result["top1"] <= high
    spoilt = result["corruptions"]
    strengths = [str(one) for one in recipe.evaluate.corruptions]
    assert list(spoilt) == (["noise", "blur", "contrast", "jpeg"] if strengths else [])
    assert all(list(of) == strengths for of in spoilt.values())
    for scores in (result, *result["fgsm"].values(), *(one for of in spoilt.values() for one in of.values())):
        right = scripts.significance.from_text(scores["right"], result["images"])
        assert right.mean() == pytest.approx(scores["top1"], abs=1e-6)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_value_of_a_recipe_says_where_it_comes_from(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line.strip() and line[0] not in "#["]
    for line in lines:
        assert line.split("#")[-1].strip().startswith(("ours", "authors: ")), line
    assert len(lines) == sum(len(table) for table in tomllib.loads(file.read_text()).values())


def test_there_is_a_recipe_for_each_dataset_and_task() -> None:
    assert {file.stem for file in RECIPES} >= {
        *("imagenet", "tiny_imagenet", "cifar100", "flowers", "cars", "aircraft", "cub"),
        *("flowers_transfer", "cars_transfer", "aircraft_transfer", "flowers_10_per_class", "cifar100_adversarial"),
    }


# --- the recipe


def test_a_recipe_names_what_is_wrong(scripts: SimpleNamespace, tmp_path: Path) -> None:
    read = scripts.recipe.Recipe.read
    file = EXAMPLES / "recipes/cub.toml"
    for change, message in (
        ("train.lr=fast", "train.lr must be of kind float, found 'fast'"),
        (
            "train.batchsize=8",
            r"fields of train must be some of epochs, .* found 'batchsize'; did you mean 'batch_size'",
        ),
        ("training.lr=0.1", r"sections of a recipe must be some of .*, found 'training'; did you mean 'train'\?"),
        ("lr=0.1", r"--set must be section.field=value, found 'lr=0.1'; did you mean 'train.lr'\?"),
        ("train.lr", r"--set must be section.field=value, found 'train.lr'\."),
        ("train.lr", "--set must be section.field=value"),
        ("train.updates=5", "train.epochs or updates must be given, one of them"),
        ("data.layout=birds", "data.layout must be one of"),
        ("data.test=val", "data.train and data.test must be of train, test"),
        ("mix.preset=strong", "mix.preset must be"),
        ("mix.fractal_weight=2.0", "fractal_weight"),
        ("train.batch_size=true", "train.batch_size must be of kind int"),
        ("evaluate.fgsm=[0]", "evaluate.fgsm must be"),
        ("evaluate.corruptions=[6]", "evaluate.corruptions must be strengths from 1 to 5"),
        ("crop.from_size=256", "crop.from_size and ramp must be given together"),
    ):
        with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
            read(file, [change])
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ConfigError, match="data is missing"):
        read(tmp_path / "empty.toml")


def test_progressive_resizing_in_a_recipe(scripts: SimpleNamespace) -> None:
    crop = scripts.recipe.Recipe.read(EXAMPLES / "recipes/imagenet.toml").crop
    schedule = crop.training()
    # FFCV's law, as its train_imagenet.py has it.
    for epoch in range(90):
        between = np.interp([epoch], [65, 76], [128, 224])
        expected = 128 if epoch <= 65 else 224 if epoch >= 76 else int(np.round(between[0] / 32)) * 32
        assert schedule.at(epoch) == TrainCrop(expected), epoch
    assert [value.size for value in schedule.values] == [128, 160, 192, 224]
    assert (crop.evaluation().size, crop.evaluation().resize) == (224, 256)
    read = scripts.recipe.Recipe.read
    plain = read(EXAMPLES / "recipes/imagenet.toml", ["crop.from_size=unset", "crop.ramp=unset"])
    assert plain.crop.training() == TrainCrop(224)
    assert scripts.recipe.Crop(size=64, from_size=32, ramp=(0, 1)).training().epochs == (0, 1)
    for changes, message in (
        (["crop.ramp=unset"], "crop.from_size and ramp must be given together"),
        (["crop.train=RandomCrop"], "crop.from_size and ramp must be TrainCrop's alone"),
        (["crop.from_size=256"], r"crop.from_size and size must be growing, found \(256, 224\)"),
        (["crop.from_size=100"], "crop.from_size and size must be multiples of 32"),
        (["crop.ramp=[5]"], r"crop.ramp must be \[first, last epoch\], found \(5,\)"),
        (["crop.ramp=[5, 5]"], r"crop.ramp must be \[first, last epoch\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(EXAMPLES / "recipes/imagenet.toml", changes)


def test_the_learning_rate(scripts: SimpleNamespace) -> None:
    settings = scripts.recipe.Train(updates=100, lr=1.0, lr_min=0.1)
    rates = [scripts.train.learning_rate(settings, update, 100, 9) for update in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates == sorted(rates[:9]) + sorted(rates[9:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11


# --- models


def test_models_are_those_of_the_papers(scripts: SimpleNamespace) -> None:
    # Parameters as published for 1,000 classes; torchvision's models have as many.
    for name, parameters in (("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)):
        model = scripts.models.ResNet(
            {"resnet50": scripts.models.Bottleneck}.get(name, scripts.models.BasicBlock),
            scripts.models.LAYERS[name],
            1000,
            small=False,
            width=64,
        )
        assert sum(one.numel() for one in model.parameters()) == parameters
    small = scripts.models.build("preact_resnet18", 100, small=True)
    # The CIFAR-10 one that is passed around has 11,171,146, but lacks the paper's last normalisation.
    assert sum(one.numel() for one in small.parameters()) == 11_171_146 + 2 * 512 + 90 * 513
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_weights_of_another_model_are_refused(scripts: SimpleNamespace, tmp_path: Path) -> None:
    torch.save(scripts.models.build("resnet18", 10).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="is of another model"):
        scripts.models.build("resnet34", 10, weights=str(tmp_path / "w.pth"))
    with pytest.raises(ConfigError, match="must be 'imagenet' or a file"):
        scripts.models.build("resnet18", 10, weights="resnet.pth")
    with pytest.raises(ConfigError, match=r"model\.name must be one of"):
        scripts.models.build("resnet19", 10)


# --- divisions


def test_many_edits_are_made_by_all_cores_and_progress_is_shown(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = miniature.single_folder(tmp_path / "data")
    small = ["edits.size=8", "fractals.count=1", "fractals.size=16"]
    recipe = scripts.recipe.Recipe.read(EXAMPLES / "recipes/flowers5.toml", small)
    found = scripts.data.parts(recipe, root)
    used: list[tuple[str, ...]] = []

    def local_engine(devices: tuple[str, ...]) -> LocalEngine:
        used.append(devices)
        return LocalEngine(devices)

    monkeypatch.setattr(scripts.data, "LocalEngine", local_engine)
    scripts.data.prepare(recipe, found, tmp_path / "few")
    assert not used  # starting processes takes longer
    edits = 9 * len(found.all_train)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("edits ")]
    assert [lines[0], lines[-1]] == [f"edits 0 of {edits}", f"edits {edits} of {edits}"]
    assert len(lines) == 3  # at 500, too, though batches do not end there sharp
    monkeypatch.setattr(scripts.data, "FEW", 10)
    scripts.data.prepare(recipe, found, tmp_path / "many")
    assert used == [default_devices(accelerated=False)]
    few, many = (sorted((tmp_path / name / "edits/shards").glob("*.tar")) for name in ("few", "many"))
    assert [one.read_bytes() for one in few] == [one.read_bytes() for one in many]


def test_divisions_are_apart_and_copies_fall_on_one_side(scripts: SimpleNamespace, tmp_path: Path) -> None:
    root = miniature.single_folder(tmp_path / "data")
    for number in range(20):
        copy = root / f"class{number % 3}" / f"copy{number}.jpg"
        copy.write_bytes((root / f"class{(number + 1) % 3}" / f"{number}.jpg").read_bytes())
    recipe = scripts.recipe.Recipe.read(EXAMPLES / "recipes/flowers5.toml")
    found = scripts.data.parts(recipe, root)

    def contents(directory: Path, catalog: Catalog) -> set[bytes]:
        return {(directory / path).read_bytes() for path in catalog.paths}

    train, valid, test = contents(found.root, found.train), contents(*found.valid), contents(*found.test)
    assert not train & valid
    assert not train & test
    assert not valid & test
    assert len(found.train) + len(found.valid.catalog) + len(found.test.catalog) == 110
    assert 10 <= len(found.test.catalog) <= 35


def test_smaller_training_sets_are_parts_of_larger_ones(scripts: SimpleNamespace, tmp_path: Path) -> None:
    root = miniature.single_folder(tmp_path / "data")
    recipe = EXAMPLES / "recipes/flowers5.toml"
    sizes = {}
    for count in (3, 6):
        found = scripts.data.parts(scripts.recipe.Recipe.read(recipe, [f"data.per_class={count}"]), root)
        assert np.bincount(found.train.labels).tolist() == [count] * 3
        sizes[count] = set(found.train.paths)
    assert sizes[3] < sizes[6]


# --- batch transforms


@pytest.mark.parametrize("name", ["cutmix", "mixup"])
def test_soft_labels_say_what_is_in_the_image(name: str, scripts: SimpleNamespace) -> None:
    transform = scripts.batch_transforms.batch_transform(name, 2)
    images = torch.zeros(32, 3, 32, 32)
    images[16:] = 1
    labels = torch.arange(32) // 16
    torch.manual_seed(0)
    mixed, soft = transform(images, labels, torch.Generator())
    white = mixed.mean((1, 2, 3))
    assert torch.allclose(white, soft[:, 1], atol=1e-4)
    assert torch.allclose(soft.sum(1), torch.ones(32))
    assert ((soft > 0.05) & (soft < 0.95)).any()


def test_a_recipe_divides_samples_augment_and_batches_mixer(scripts: SimpleNamespace) -> None:
    train = scripts.recipe.Train(epochs=1, augment=("randaugment", "rand-m9-mstd0.5-inc1", "randomerasing", "cutmix"))
    assert train.samples_augment == (RandAugment(), TimmRandAugment.of("rand-m9-mstd0.5-inc1"), RandomErasing(0.25))
    assert train.mixer == "cutmix" and scripts.recipe.Train(epochs=1).mixer is None


def test_augmentations_that_do_not_go_together(scripts: SimpleNamespace) -> None:
    for names in (("cutmix", "mixup"), ("cutmix", "randaugment"), ("cutout",), ("rand-x9",)):
        with pytest.raises(ConfigError, match=r"augment"):
            scripts.recipe.Train(epochs=1, augment=names)


# --- evaluation


def test_intervals(scripts: SimpleNamespace) -> None:
    # Wilson's interval of 8 among 10, as in Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion".
    assert scripts.evaluate.wilson(0.8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert scripts.evaluate.wilson(1.0, 5)[1] == 1.0


def test_fgsm_raises_the_loss_and_stays_in_range(scripts: SimpleNamespace) -> None:
    torch.manual_seed(0)
    model = scripts.models.build("resnet18", 4, small=True, width=8).eval()
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (IMAGENET_MEAN, IMAGENET_STD))
    pixels, labels = torch.rand(16, 3, 32, 32), torch.arange(16) % 4
    attacked = scripts.evaluate.fgsm(model, (pixels - mean) / std, labels, strength=4) * std + mean
    assert (attacked - pixels).abs().max() <= 4 / 255 + 1e-6
    assert attacked.min() >= -1e-6
    assert attacked.max() <= 1 + 1e-6
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(model((attacked - mean) / std), labels) > loss(model((pixels - mean) / std), labels)


def test_corrupted_images_are_normalised_as_they_were(scripts: SimpleNamespace) -> None:
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float() / 255
    images = (pixels - mean) / std
    found = scripts.evaluate.corrupted(None, images, torch.zeros(4), name="contrast", strength=1) * std + mean
    middle = pixels.mean((2, 3), keepdim=True)
    assert torch.allclose(found, middle + 0.4 * (pixels - middle), atol=0.51 / 255)


# --- resuming, and what goes wrong


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """Trains a narrow network on a miniature folder."""
    data = miniature.folder(tmp_path / "data")

    def make(out: str, *changes: str, options: tuple[str, ...] = ()) -> list[str]:
        tiny = ("model.name=resnet18", "model.small=true", "model.width=4", "crop.size=32", "data.test=val")
        fixed = ("data.layout=folder", "data.test_share=0.0", "data.held_out=0.0", "crop.eval_resize=unset")
        return [
            *(str(EXAMPLES / "recipes/flowers5.toml"), "--data", str(data), "--cache", str(tmp_path / "cache")),
            *("--out", str(tmp_path / out), "--workers", "1", "--device", "cpu", *options),
            *sets(*SMALL, *tiny, *fixed, *changes),
        ]

    return make


@pytest.mark.parametrize("crop", [(), ("crop.size=96", "crop.from_size=32", "crop.ramp=[0, 2]")], ids=("", "growing"))
def test_it_goes_on_with_the_same_losses_and_weights(
    crop: tuple[str, ...],
    scripts: SimpleNamespace,
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    often = ("--checkpoint-every", "4", "--log-every", "3")
    changes = ("train.updates=11", "train.validate_every=5", 'train.augment=["trivialaugment", "mixup"]', *crop)
    scripts.train.main(command("whole", *changes, options=often))

    class Killed(Exception):
        pass

    steps = []

    def kill(optimizer: torch.optim.SGD, *arguments: Any) -> None:
        steps.append(1)
        if len(steps) == 7:
            raise Killed
        return step(optimizer, *arguments)

    step = torch.optim.SGD.step
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.SGD, "step", kill)
        with pytest.raises(Killed):
            scripts.train.main(command("killed", *changes, options=often))
    assert len(rows(tmp_path / "killed/train.csv")) == 6  # those after the checkpoint are dropped, and made again
    scripts.train.main(command("killed", *changes, options=often))
    assert float(rows(tmp_path / "whole/train.csv")[-1]["epoch"]) > 3  # all sizes were trained
    for name in ("train.csv", "valid.csv"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    whole, killed = (torch.load(tmp_path / one / "last.pt", weights_only=True) for one in ("whole", "killed"))
    assert all(torch.equal(whole["model"][name], killed["model"][name]) for name in whole["model"])
    assert json.loads((tmp_path / "killed/run.json").read_text())["starts"] == 2


def test_raw_images_in_memory_train_the_same_weights(
    scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """And a run says how fast it was, and how long it waited for images."""
    for name in ("paper", "edits"):
        changes = (f"mix.preset={name}",)
        for out, options in ((f"files-{name}", ()), (f"raw-{name}", ("--resident", "host"))):
            scripts.train.main(command(out, "train.updates=5", "train.validate_every=5", *changes, options=options))
        for file in ("train.csv", "valid.csv"):
            assert (tmp_path / f"raw-{name}" / file).read_text() == (tmp_path / f"files-{name}" / file).read_text()
        run = json.loads((tmp_path / f"raw-{name}" / "run.json").read_text())
        assert run["resident"] == "host" and 0 <= run["loader_share"] <= 1
        assert 5 * 4 / run["images_per_second"] < run["seconds"]
    assert scripts.data.seconds_for_edits(tmp_path / "cache") > 0


def test_a_resumed_run_counts_its_time_once(
    scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = command("run", "mix.preset=none", "train.updates=3")
    scripts.train.main(arguments)
    file = tmp_path / "run/last.pt"
    state = torch.load(file, weights_only=True)
    assert state["clock"]["training"] + state["clock"]["waiting"] < state["clock"]["total"]
    torch.save({**state, "step": 2, "clock": {"total": 1000.0, "training": 30.0, "waiting": 10.0}}, file)
    scripts.train.main(arguments)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert 1000 < run["seconds"] < 1100
    assert run["images_per_second"] == pytest.approx(3 * 4 / 40, rel=0.2)
    assert run["loader_share"] == pytest.approx(0.25, abs=0.05)


def test_progress_tells_the_wait_since_the_line_before(
    scripts: SimpleNamespace,
    command: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Also where an epoch is one batch."""
    forward = torch.nn.CrossEntropyLoss.forward

    def slowly(self: torch.nn.CrossEntropyLoss, *arguments: Any) -> torch.Tensor:
        time.sleep(0.5)  # so that an update takes longer than the wait for a batch on any machine
        return forward(self, *arguments)

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", slowly)
    few = ("mix.preset=none", "data.per_class=2", "train.updates=4", "train.validate_every=4")
    scripts.train.main(command("run", *few, options=("--show-every", "0", "--log-every", "1")))
    shown = re.findall(r"step (\d) of 4  epoch (\S+) .* in the loader (\d+)%", capfd.readouterr().out)
    assert [(step, epoch) for step, epoch, _ in shown] == [(str(step), f"{step}.00") for step in range(1, 5)]
    assert max(int(share) for _, _, share in shown[1:]) < 50


def test_a_checkpoint_of_another_recipe(
    scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    scripts.train.main(command("run"))
    with pytest.raises(ConfigError, match=r"is of another recipe: train\.lr is 0\.05 there and 0\.5 here"):
        scripts.train.main(command("run", "train.lr=0.5"))
    (tmp_path / "run/last.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ConfigError, match="cannot be read"):
        scripts.train.main(command("run"))


def test_a_loss_that_is_not_a_number(
    scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []

    def spoil(self: torch.nn.CrossEntropyLoss, *arguments: Any) -> torch.Tensor:
        losses.append(1)
        return forward(self, *arguments) * (float("nan") if len(losses) == 6 else 1.0)

    forward = torch.nn.CrossEntropyLoss.forward
    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", spoil)
    with pytest.raises(DiffuseMixError, match=r"the loss of step 6 is nan.*last\.pt is the last good one"):
        scripts.train.main(command("run", "train.updates=9", options=("--checkpoint-every", "4")))
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert state["step"] == 4
    assert all(torch.isfinite(one).all() for one in state["model"].values())


def test_data_that_does_not_fit(scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size is 64, but there are 12 training samples"):
        scripts.train.main(command("run", "train.batch_size=64"))
    with pytest.raises(ConfigError, match=r"data: no image is left for training"):
        scripts.train.main(command("run", "data.held_out=0.99"))
    scripts.train.main(command("run"))
    other = miniature.single_folder(tmp_path / "other")
    (other / "class0").rename(other / "other")
    with pytest.raises(ConfigError, match="was trained on 3 classes"):
        scripts.evaluate.main([str(tmp_path / "run/best.pt"), "--data", str(_with_val(other)), "--device", "cpu"])
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        scripts.evaluate.main([str(tmp_path / "none.pt"), "--data", str(other), "--device", "cpu"])


def _with_val(root: Path) -> Path:
    whole = root.parent / "divided"
    whole.mkdir()
    for split in ("train", "val"):
        (whole / split).symlink_to(root)
    return whole


# --- several processes


def torchrun(*arguments: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *launcher, str(EXAMPLES / "train.py"), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_one_process_fails_and_all_end(
    scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = command("run", "data.on_error=raise", "train.updates=200", "mix.preset=none")
    scripts.train.main([*arguments, "--prepare"])
    (tmp_path / "data/train/class1/2.jpg").write_bytes(b"\xff\xd8\xff damaged")  # in one process's batches alone
    ended = subprocess.run(torchrun(*arguments), env=environment(), timeout=120, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "DecodeError" in ended.stderr
    assert "2.jpg" in ended.stderr


def test_processes_that_cannot_share_a_batch(
    scripts: SimpleNamespace, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_: None)
    with pytest.raises(ConfigError, match="which 2 processes cannot share evenly"):
        scripts.train.main(command("run", "train.batch_size=5", "mix.preset=none"))


# --- comparisons


def test_whole_edits_are_trained_on(
    scripts: SimpleNamespace, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """What "edit only" compares with: originals and whole edits, as files, of the training images alone."""
    scripts.train.main(command("run", "mix.preset=edits", "data.per_class=2"))
    assert len(rows(tmp_path / "run/train.csv")) == 2
    recipe = scripts.recipe.Recipe.from_tables(json.loads((tmp_path / "run/run.json").read_text())["recipe"])
    found = scripts.data.parts(recipe, tmp_path / "data")
    cache = tmp_path / "cache"
    training = scripts.data.train_set(recipe, found, edits=cache / "edits", fractals=cache / "none", cache=cache)
    originals = set(found.train.paths)
    assert {path if path in originals else path.rsplit(".", 3)[0] for path in training.catalog.paths} == originals
    assert len(training) == 3 * len(originals)  # two prompts


@pytest.fixture
def comparison(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Compares on a miniature folder; returns the record."""
    data = miniature.single_folder(tmp_path / "data")
    recipe = tmp_path / "tiny.toml"
    text = (EXAMPLES / "recipes/flowers5.toml").read_text()
    for old, new in (
        *(("size = 64 ", "size = 32 "), ("width = 16", "width = 4"), ("batch_size = 32", "batch_size = 8")),
        *(("fgsm = [1, 2, 4, 8]", "fgsm = [4]"), ("corruptions = [1, 3, 5]", "corruptions = [3]")),
        ('editor = "procedural"', 'editor = "procedural"\nprompts = ["autumn"]'),
    ):
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text.replace("eval_resize = 73", "eval_resize = 36").replace("size = 128", "size = 48"))

    # What compare.py does in processes is done here, where all that it needs has been imported.
    def process(command: list[str], *, stdout: Any, **_: Any) -> Any:
        script = {"train.py": scripts.train, "evaluate.py": scripts.evaluate}[Path(command[1]).name]
        if script is scripts.train and "--prepare" not in command:
            if run.interrupt and run.interrupt in command:
                raise KeyboardInterrupt
            if run.fail and run.fail in command:
                stdout.write("first\nthe reason\n\n")
                return SimpleNamespace(poll=lambda: 1)
        script.main(command[2:])
        return SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(scripts.jobs, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": process}))

    def run(*more: str, out: str = "out", record: str = "record.json") -> dict[str, Any]:
        scripts.compare.main([str(recipe), "--data", str(data), "--out", str(tmp_path / out), *more])
        return json.loads((tmp_path / out / record).read_text())

    run.fail = ""  # a change; runs with it fail
    run.interrupt = ""  # a change; Ctrl-C in the first run with it
    return run


def test_a_comparison_is_made_in_pieces(
    comparison: Callable[..., dict[str, Any]],
    scripts: SimpleNamespace,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    some = ("--methods", "vanilla,DiffuseMix paper", "--sets", "6:4")
    first = comparison(*some, "--seeds", "0")
    assert [one["method"] for one in first["runs"]] == ["vanilla", "DiffuseMix paper"]
    assert all(one["updates"] == 4 and one["training_images"] >= 18 for one in first["runs"])
    for one in first["runs"]:
        assert one["resident"] == "host" and one["images_per_second"] > 0 and 0 <= one["loader_share"] <= 1
        assert one["machine"]["torch"] == torch.__version__ and one["version"]
        assert list(one["right"]) == ["clean", "fgsm 4", "noise 3", "blur 3", "contrast 3", "jpeg 3"]
        right = scripts.significance.from_text(one["right"]["noise 3"], one["test_images"])
        assert right.mean() == pytest.approx(one["corrupted_top1"]["noise"]["3"], abs=1e-6)
        assert one["losses"][-1][0] == 4
    assert first["runs"][0]["edits_seconds"] == 0 < first["runs"][1]["edits_seconds"]
    assert "One seed says nothing" in (tmp_path / "out/page.html").read_text()
    # The record alone says what is done.
    for folder in (tmp_path / "out").iterdir():
        if folder.is_dir() and folder.name != "cache":
            folder.rename(tmp_path / f"gone-{folder.name}")
    second = comparison("--methods", "vanilla", "--sets", "6:4", "--seeds", "0,1", "--jobs", "2")
    assert second["runs"][:2] == first["runs"]
    assert [(one["method"], one["seed"]) for one in second["runs"][2:]] == [("vanilla", 1)]
    table = (tmp_path / "out/table.md").read_text()
    assert "± " in table
    assert "(2)" in table
    assert "6 a class, noise" in table
    assert "| against vanilla | 6 images a class |" in table
    assert (tmp_path / "out/compare.png").stat().st_size > 5000
    # Runs of another machine are taken over.
    cache = ("--cache", str(tmp_path / "out/cache"))
    more = json.loads((tmp_path / "out/record.json").read_text())
    more["runs"] += [{**more["runs"][0], "seed": 7}, {**more["runs"][0], "method": "CutMix"}]  # of another comparison
    (tmp_path / "out/record.json").write_text(json.dumps(more))
    merged = comparison(*some, "--seeds", "0,1", "--merge", str(tmp_path / "out/record.json"), *cache, out="elsewhere")
    assert merged["runs"][:3] == second["runs"]
    assert [(one["method"], one["seed"]) for one in merged["runs"][3:]] == [("DiffuseMix paper", 1)]
    rows = (tmp_path / "elsewhere/table.md").read_text().splitlines()
    assert re.fullmatch(r"\| DiffuseMix paper \|( [^|]+ \([^|]+ to [^|]+\): [^|]+ \|){3}", rows[-3]), rows[-3]
    page = (tmp_path / "elsewhere/page.html").read_text()
    assert "paired t-test" in page and "exact sign-flip test" in page
    assert "FAILED" not in capfd.readouterr().out


def test_a_failed_run_is_made_again_and_the_rest_kept(comparison: Any, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--methods", "vanilla, CutMix", "--sets", "all:3", "--seeds", "0")
    comparison.fail = 'train.augment=["cutmix"]'
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed; see output\.txt in their folders\.$"):
        comparison(*arguments)
    out = capfd.readouterr().out
    assert "FAILED all a class, CutMix, seed 0: the reason\n  see " in out
    comparison.fail = "mix.preset=none"  # what is finished is not run again
    with pytest.raises(SystemExit, match="1 of 1 runs failed"):
        comparison(*arguments)
    comparison.fail = "train.seed=1"  # what fails first would fail always
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed; .* None finished, so no more were started\."):
        comparison(*arguments, "--seeds", "1,2", "--methods", "vanilla")
    comparison.fail = ""
    assert [one["method"] for one in comparison(*arguments)["runs"]] == ["vanilla", "CutMix"]
    capfd.readouterr()
    later = comparison(*arguments, "--minutes", "0", "--methods", "MixUp")
    assert len(later["runs"]) == 2
    assert "1 of 2 runs are not finished; run the same command again." in capfd.readouterr().out
    comparison(*arguments, "--table", "--methods", "MixUp")
    assert "1 of 2 runs are not finished; run the command without --table." in capfd.readouterr().out


def test_an_interrupted_comparison_says_what_it_has(
    comparison: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--methods", "CutMix", "--sets", "all:3", "--seeds", "0,1")
    comparison.interrupt = 'train.augment=["cutmix"]'
    with pytest.raises(SystemExit) as ended:
        comparison(*arguments)
    assert ended.value.code == 130
    found = capfd.readouterr()
    assert "interrupted; 3 of 4 runs are not finished; run the same command again." in found.err
    assert "| vanilla |" in found.out
    assert "vanilla" in (tmp_path / "out/page.html").read_text()
    comparison.interrupt = ""
    assert len(comparison(*arguments)["runs"]) == 4


def test_runs_of_other_settings_are_never_mixed(
    comparison: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    some = ("--methods", "vanilla", "--sets", "all:2", "--seeds", "0")
    record = tmp_path / "out/record.json"
    first = comparison(*some)
    assert first["settings"]["train"]["lr"] == 0.05 and "updates" not in first["settings"]["train"]
    recipe = tmp_path / "tiny.toml"
    text = recipe.read_text()

    def refused(message: str, *arguments: str) -> None:
        before = record.read_bytes() if record.exists() else None
        with pytest.raises(ConfigError, match=message):
            comparison(*some, *arguments)
        assert (record.read_bytes() if record.exists() else None) == before

    other = r"train\.lr is 0\.05 there and 0\.4 here"
    refused(other, "--set", "train.lr=0.4")
    refused("found 2 and 3 for all images a class", "--sets", "all:3")
    refused(r"evaluate\.fgsm is \[4\.0\] there", "--set", "evaluate.fgsm=[2]")
    recipe.write_text(re.sub(r"(?m)^lr = 0.05", "lr = 0.4", text))
    refused(other, "--seeds", "0,1")
    refused(other, "--merge", str(record), "--out", str(tmp_path / "elsewhere"))
    record.rename(tmp_path / "moved.json")  # the runs' folders tell it, too
    refused(other)
    recipe.write_text(text)
    refused("train.updates is 2 there and 3 here", "--sets", "all:3")
    refused(r"evaluate\.fgsm is \[4\.0\] there", "--set", "evaluate.fgsm=[2]")
    assert comparison(*some)["runs"] == first["runs"]
    # Records that are none, or older.
    for content, message in (
        ("{", "is no record of a comparison"),
        ("[]", "is no record of a comparison"),
        ('{"recipe": "tiny.toml", "settings": {}, "runs": [{}]}', "is no record of a comparison"),
        (json.dumps({**first, "settings": None}), "does not tell its recipe's settings"),
        (json.dumps({**first, "recipe": "cub.toml"}), r"is of the recipe cub\.toml, not of tiny\.toml"),
    ):
        (tmp_path / "bad.json").write_text(content)
        refused(message, "--merge", str(tmp_path / "bad.json"))
    moved = [{**first["runs"][0], "seed": 1, "changes": [*first["runs"][0]["changes"][:-1], "train.seed=1"]}]
    moved[0]["test_fingerprint"] = "of other images"
    (tmp_path / "bad.json").write_text(json.dumps({**first, "runs": moved}))
    refused("are of different test images", "--seeds", "0,1", "--merge", str(tmp_path / "bad.json"))
    moved[0] |= {"test_fingerprint": first["runs"][0]["test_fingerprint"], "changes": ["mix.preset=paper"]}
    (tmp_path / "bad.json").write_text(json.dumps({**first, "runs": moved}))
    capfd.readouterr()
    comparison(*some, "--merge", str(tmp_path / "bad.json"))
    assert "bad.json: 0 of its 1 runs belong to this comparison" in capfd.readouterr().out
    shown = comparison(*some, "--merge", str(record), "--table", out="elsewhere")
    assert shown["runs"] == first["runs"]
    # Against another method: the same runs.
    two = ("--methods", "vanilla,CutMix", "--sets", "all:2", "--seeds", "0")
    comparison(*two)
    comparison(*two, "--baseline", "CutMix", "--table")
    assert "| against CutMix | all images |" in (tmp_path / "out/table.md").read_text()
    assert "1 method against CutMix" in (tmp_path / "out/page.html").read_text()


def test_methods_and_sets_in_words(scripts: SimpleNamespace) -> None:
    methods, sets = scripts.compare.methods_of, scripts.compare.sets_of
    curve = list(scripts.compare.GROUPS["curve"])
    assert methods(" curve , CutMix", "vanilla") == [*curve, "CutMix"]
    assert methods("CutMix,curve", "MixUp") == ["MixUp", "CutMix", *curve]
    assert methods("CutMix", None) == ["CutMix"]
    assert sets("20:5, all", False) == [("20", 5), ("all", None)]
    assert sets("all:4,all:8", True) == [("all", 4), ("all", 8)]


def test_a_grid_is_judged_by_validation_alone(
    comparison: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--grid", "train.lr=0.02,0.000001", "--sets", "all:3,all:6", "--seeds", "0")
    found = comparison(*arguments, "--set", "train.validate_every=3", record="grid.json")
    assert len(found["runs"]) == 4
    assert not any("top1" in one or "right" in one for one in found["runs"])
    assert not list((tmp_path / "out").rglob("*.evaluation.json"))
    assert not (tmp_path / "out/record.json").exists()
    out = capfd.readouterr().out
    # A grid's value may need another change beside it.
    crop = ("--set", "crop.padding=4", "--set", "crop.resize=32", "--grid", "crop.train=RandomCrop")
    one = comparison(*crop, "--sets", "all:2", "--seeds", "0", out="crop", record="grid.json")["runs"][0]
    assert one["grid"] == {"crop.train": "RandomCrop"}
    table = (tmp_path / "out/grid.md").read_text().splitlines()
    assert len(table) == 2 + 4 and "train.lr" in table[0]
    best = {}
    for one in found["runs"]:
        top1 = max(value for _, value in one["valid_top1"])
        best.setdefault((one["updates"], one["grid"]["train.lr"]), []).append(top1)
    for updates in (3, 6):
        winner = max(("0.02", "0.000001"), key=lambda lr: sum(best[updates, lr]))
        assert f"best on validation, all a class, {updates} updates: --set train.lr={winner}" in out
    assert comparison(*arguments, "--set", "train.validate_every=3", record="grid.json") == found | {
        "machine": json.loads((tmp_path / "out/grid.json").read_text())["machine"]
    }


def test_comparisons_that_cannot_be_made(comparison: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    of_set = "--sets must be images per class .*, found "
    for arguments, message in (
        (("--methods", "vanilla,Mixup"), "--methods must be some of decide, .* found 'Mixup'; did you mean 'MixUp'?"),
        (("--methods", "vanilla,AugMix"), "found 'AugMix'; "),
        (("--baseline", "plain"), "--baseline must be one of vanilla, .* found 'plain'"),
        (("--methods", "vanilla,"), "--methods must be a list divided by commas, without empty places"),
        (("--seeds", "0,x"), "--seeds must be whole numbers from 0, such as 0,1,2, found '0,x'"),
        (("--seeds", "0,"), "--seeds must be a list divided by commas"),
        (("--seeds", "0,0"), "--seeds must be a list without repetitions such as 0"),
        (("--sets", "all:many"), f"{of_set}'all:many'"),
        (("--sets", "10:20:30"), f"{of_set}'10:20:30'"),
        (("--sets", "0:20"), f"{of_set}'0:20'"),
        (("--sets", "all:2,all:3"), "--sets must be one number of updates for all images a class"),
        (
            ("--sets", "5000:2"),
            r"data\.per_class must be at most \d+, the training images of '.*' .* found 5000",
        ),
        (("--jobs", "0"), "--jobs must be at least 1, found 0"),
        (("--threads", "0"), "--threads must be at least 1, found 0"),
        (("--minutes", "-1"), "--minutes must be at least 0, found -1"),
        (("--grid", "train.lr"), "--grid must be section.field=value,value, found 'train.lr'"),
        (("--grid", "train.lr=0.1,0.1"), "--grid train.lr must be a list without repetitions such as 0.1"),
        (("--merge", "none.json"), "there is no record 'none.json'"),
        (("--set", "train.lr=0"), "train.lr must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            comparison(*arguments)
    for resident in ("no", "auto"):
        with pytest.raises(CatalogError, match="there is no such folder"):
            comparison("--data", str(tmp_path / "nothing"), "--resident", resident)
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_counts_epochs_is_compared_at_equal_updates(scripts: SimpleNamespace, tmp_path: Path) -> None:
    arguments = [str(EXAMPLES / "recipes/cub.toml"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--sets must give updates, such as all:30000"):
        scripts.compare.plan(scripts.compare.parse(arguments))
    runs = scripts.compare.plan(scripts.compare.parse([*arguments, "--sets", "all:500", "--methods", "evidence"]))
    assert len(runs) == 3 * len(scripts.compare.GROUPS["evidence"])
    for run in runs:
        recipe = scripts.recipe.Recipe.read(EXAMPLES / "recipes/cub.toml", run.sets())
        assert recipe.train.updates == 500 and recipe.train.epochs is None
        assert recipe.data.held_out == 0.1  # so that no checkpoint is chosen on the test images


def test_every_method_is_a_recipe(scripts: SimpleNamespace) -> None:
    for name, changes in scripts.compare.KNOWN.items():
        recipe = scripts.recipe.Recipe.read(EXAMPLES / "recipes/flowers5.toml", changes)
        plain = name in ("vanilla", "TrivialAugment", "RandAugment", "CutMix", "MixUp")
        assert (recipe.mix.preset == "none") == plain
    assert all(set(names) <= set(scripts.compare.KNOWN) for names in scripts.compare.GROUPS.values())
    assert all("vanilla" in names for names in scripts.compare.GROUPS.values())
