"""The diffusers editor, on a tiny InstructPix2Pix pipeline: real classes, real files, random weights."""

import dataclasses
import io
import json
import logging
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import photograph
from numpy.typing import NDArray
from PIL import Image
from test_adapters import TWO, difference, tasks

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import PROMPTS, TEMPLATE
from dali_diffusemix.generate.editors.diffusers import SCHEDULERS, DiffusersConfig, DiffusersEditor
from dali_diffusemix.generate.editors.diffusers.adapters import InstructPix2PixAdapter
from dali_diffusemix.store import EditStore

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

Picture = NDArray[np.uint8]


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_model import build_instruct_pix2pix

    return build_instruct_pix2pix(tmp_path_factory.mktemp("sdxl"), sdxl=True)


def config(model: Path, **fields: Any) -> DiffusersConfig:
    return DiffusersConfig(**{"model": str(model), "steps": 2, "dtype": "float32", **fields})


@pytest.fixture
def editor(tiny_model: Path) -> DiffusersEditor:
    return config(tiny_model).load(TWO, device="cpu", batch_size=4)


@pytest.fixture
def images() -> list[Picture]:
    return [photograph(seed, 64, 64) for seed in range(3)]


# What is made --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_edit_is_what_the_pipeline_makes_the_released_way(
    kind: str, request: pytest.FixtureRequest, images: list[Picture]
) -> None:
    """One image and one prompt a call, nothing kept from call to call."""
    model = request.getfixturevalue("tiny_model" if kind == "sd" else "sdxl")
    made = config(model).load(TWO, device="cpu", batch_size=4).edit(images, tasks())
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    for task, edit in zip(tasks(), made, strict=True):
        size = {"height": 64, "width": 64} if kind == "sdxl" else {}
        released = pipeline(
            prompt=TEMPLATE.format(prompt=task.prompt),
            image=Image.fromarray(images[task.image]),
            num_inference_steps=2,
            guidance_scale=4.0,
            image_guidance_scale=1.5,
            generator=torch.Generator().manual_seed(task.seed),
            **size,
        ).images[0]
        assert edit.dtype == np.uint8 and edit.shape == (64, 64, 3)
        assert difference(np.asarray(released), edit) <= 1
    assert len({edit.tobytes() for edit in made}) == len(made)


def test_an_edit_does_not_depend_on_its_batch(editor: DiffusersEditor, images: list[Picture]) -> None:
    together = editor.edit(images, tasks())
    np.testing.assert_array_equal(together, editor.edit(images, tasks()))
    alone = [editor.edit([images[task.image]], [dataclasses.replace(task, image=0)])[0] for task in tasks()]
    assert max(map(difference, together, alone)) <= 1  # sums of other lengths are rounded otherwise
    mixed = editor.edit(images, tasks()[::-1])[::-1]
    assert max(map(difference, together, mixed)) <= 1


def test_shapes_may_be_mixed(editor: DiffusersEditor, images: list[Picture]) -> None:
    wide = [images[0], photograph(5, 48, 96), images[2]]
    made = editor.edit(wide, tasks())
    assert [edit.shape for edit in made] == [wide[task.image].shape for task in tasks()]
    alone = editor.edit(wide[1:2], [dataclasses.replace(tasks()[2], image=0)])[0]
    assert difference(made[2], alone) <= 1


def test_prompts_are_embedded_once_a_run_and_images_once_a_call(tiny_model: Path, images: list[Picture]) -> None:
    editor = config(tiny_model).load(TWO, device="cpu", batch_size=2)
    seen: dict[str, int] = {"text": 0, "image": 0, "denoised": 0}

    def count(name: str) -> Any:
        return lambda module, args, output: seen.__setitem__(name, seen[name] + len(args[0]))

    editor._pipeline.text_encoder.register_forward_hook(lambda *_: seen.__setitem__("text", 1))
    editor._pipeline.vae.encoder.register_forward_hook(count("image"))
    editor._pipeline.unet.register_forward_hook(count("denoised"))
    editor.edit(images, tasks())
    assert seen == {"text": 0, "image": 3, "denoised": 3 * 2 * len(tasks())}  # three guidances, two steps


@pytest.mark.parametrize("scheduler", [*InstructPix2PixAdapter.schedulers, "default"])
def test_every_scheduler(tiny_model: Path, images: list[Picture], scheduler: str) -> None:
    editor = config(tiny_model, scheduler=scheduler, steps=4).load(TWO, device="cpu", batch_size=4)
    together = editor.edit(images[:2], tasks(2))
    alone = editor.edit(images[1:2], [dataclasses.replace(tasks(2)[3], image=0)])[0]
    assert difference(together[3], alone) <= 1
    assert together[3].std() > 5
    assert SCHEDULERS.keys() - InstructPix2PixAdapter.schedulers == {"lightning"}


def test_threads_are_as_they_were(editor: DiffusersEditor, images: list[Picture]) -> None:
    """The bytes do not depend on how many there are, and the user's choice stays."""
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(editor.edit(images, tasks()))
        assert torch.get_num_threads() == threads
    np.testing.assert_array_equal(*made)


def test_numbers_that_are_not_finite_are_not_passed_off_as_black(
    editor: DiffusersEditor, images: list[Picture]
) -> None:
    def spoil(module: Any, args: Any, output: Any) -> Any:
        output[1, :, :8] = float("nan")
        return output

    editor._pipeline.vae.decoder.register_forward_hook(spoil)
    made = editor.edit(images[:1], tasks(1))
    assert made[0].dtype == np.uint8
    assert made[1].dtype == np.float32 and np.isnan(made[1][:8]).all() and np.isfinite(made[1][8:]).all()


def test_a_batch_that_is_too_large_for_the_gpu_is_halved(
    tiny_model: Path, images: list[Picture], caplog: pytest.LogCaptureFixture
) -> None:
    editor = config(tiny_model).load(TWO, device="cpu", batch_size=6)
    expected = editor.edit(images, tasks())

    def room_for(edits: int) -> Any:
        def check(module: Any, args: Any) -> None:
            if len(args[0]) > 3 * edits:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return check

    hook = editor._pipeline.unet.register_forward_pre_hook(room_for(2))
    with caplog.at_level(logging.WARNING):
        made = editor.edit(images, tasks())
    assert "halved to 3 edits" in caplog.text and "halved to 1 edits" in caplog.text
    assert max(map(difference, made, expected)) <= 1
    hook.remove()
    editor._pipeline.unet.register_forward_pre_hook(room_for(0))
    with pytest.raises(ConfigError, match="one edit fits in the GPU's memory"):
        editor.edit(images, tasks())


# What a store records ------------------------------------------------------------------------------------------------


def test_settings_say_which_model_it_was_wherever_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "elsewhere" / tiny_model.name)
    settings = config(tiny_model).settings()
    assert settings == config(tmp_path / "elsewhere" / tiny_model.name).settings()
    assert settings["pipeline"] == "StableDiffusionInstructPix2PixPipeline"
    assert settings["scheduler"] == "euler-ancestral" and settings["steps"] == 2 and settings["guidance"] == 4.0
    changed = tmp_path / "changed" / tiny_model.name
    shutil.copytree(tiny_model, changed)
    weights = changed / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert config(changed).settings()["revision"] != settings["revision"]
    assert pickle.loads(pickle.dumps(config(tiny_model))) == config(tiny_model)


def test_the_whole_way_with_small_images(tiny_model: Path, tmp_path: Path) -> None:
    """Edited at the model's size, stored at the data set's; shapes kept; a rejected edit tried again."""
    for place, size in enumerate([(32, 32), (40, 20), (20, 60)]):
        file = tmp_path / "train" / "things" / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(place, *size)).save(file)
    made = generate(
        tmp_path / "train",
        tmp_path / "store",
        GenerateConfig(
            editor=config(tiny_model), prompts=PROMPTS[:2], size=32, edit_size=64, resize="keep", retry=1, batch_size=2
        ),
    )
    rows = EditStore.open(tmp_path / "store").shard_rows(0)
    assert made.made == len(rows) == 6
    assert {(row["height"], row["width"]) for row in rows} == {(32, 32), (44, 24), (20, 56)}
    # Random weights edit nothing that could be recognized.
    assert made.verdicts["structure_lost"] > 0
    assert json.loads((tmp_path / "store" / "store.json").read_text())["settings"]["editor"] == "diffusers"


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scheduler": "magic"}, "scheduler must be one of .*'dpm-solver\\+\\+'.* found 'magic'"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, found 0"),
        ({"guidance": -1}, "guidance must be a number from 0 to 100, found -1"),
        ({"dtype": "float8"}, "dtype must be one of .* found 'float8'"),
        ({"template": "edit it"}, "template must hold {prompt}"),
    ],
)
def test_a_config_checks_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusersConfig(**fields)


def test_a_cpu_is_not_asked_for_half_precision(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="dtype must be 'float32' or 'bfloat16' on a CPU"):
        config(tiny_model, dtype="float16").load(TWO, device="cpu", batch_size=1)


@pytest.fixture
def copied(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copied"))


def test_pickled_weights_are_refused(copied: Path) -> None:
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    torch.save({}, file.with_suffix(".bin"))
    with pytest.raises(ConfigError, match=r"only pickled weights \(unet\).*safe_serialization=True"):
        config(copied).check(TWO)
    for file in copied.rglob("*.safetensors"):
        file.unlink()
    shutil.rmtree(copied / "unet")
    with pytest.raises(ConfigError, match="weights as safetensors, found none"):
        config(copied).check(TWO)


@pytest.mark.parametrize("place", ["pipeline.py", "unet/mine.py"])
def test_code_of_a_model_is_not_run(copied: Path, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "was-run"
    (copied / place).write_text(f"open({str(marker)!r}, 'w').close()\nclass Mine: pass\n")
    index = json.loads((copied / "model_index.json").read_text())
    if place == "pipeline.py":
        index["_class_name"] = ["pipeline", "Mine"]
    else:
        index["unet"] = ["mine", "Mine"]
    (copied / "model_index.json").write_text(json.dumps(index))
    for attempt in (lambda: config(copied).check(TWO), lambda: config(copied).load(TWO, device="cpu", batch_size=1)):
        with pytest.raises(ConfigError, match="brings code of its own"):
            attempt()
    assert not marker.exists()


def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder or a hub id \(owner/name\)"):
        config(tmp_path / "nothing").check(TWO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"saved pipeline with a model_index\.json"):
        config(tmp_path / "empty").check(TWO)
    # There is no network here; huggingface_hub reads its offline switch when it is imported.
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"neither a folder nor available from the hub.*hf download"):
        config(Path("nobody/nothing")).check(TWO)


def test_the_full_size_is_the_published_one() -> None:
    from tiny_model import full_size_unet

    with torch.device("meta"):
        parameters = sum(one.numel() for one in full_size_unet().parameters())
    assert 859e6 < parameters < 860e6  # Stable Diffusion 1.5, and four more input channels


def test_loading_says_nothing(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config(tiny_model).load(TWO, device="cpu", batch_size=1)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.fixture(autouse=True)
def quiet_progress() -> Iterator[None]:
    """Tests load pipelines themselves, too."""
    stream, sys.stderr = sys.stderr, io.StringIO()
    yield
    sys.stderr = stream
