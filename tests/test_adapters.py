"""Adapters of the diffusers editor, on tiny pipelines of each class: real components and files, random weights.

Qwen-Image-Edit, FLUX.2 and DreamLite have components of transformers that need torchvision, and skip without it.
"""

import dataclasses
import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from material import photograph
from numpy.typing import NDArray
from PIL import Image
from tiny_models import build, build_lora

from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors import INSTRUCTION, EditTask
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig, DiffusersEditor
from dali_diffusemix.generate.editors.diffusers.adapters import ADAPTERS, DESCRIPTION, PipelineOptions
from dali_diffusemix.generate.editors.diffusers.loading import QUANTIZATIONS, quantization
from dali_diffusemix.store import EditStore

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

Picture = NDArray[np.uint8]
TWO = ("autumn", "watercolor art")
HEAVY = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")  # they see a megapixel, whatever they are given

# The call of each class that edits one image, as diffusers' documentation has it, for 4 steps and (height, width).
CALLS: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "Flux2KleinPipeline": lambda h, w: {"height": h, "width": w, "guidance_scale": 4.0},
    "Flux2KleinKVPipeline": lambda h, w: {"height": h, "width": w},
    "Flux2Pipeline": lambda h, w: {"height": h, "width": w, "guidance_scale": 4.0},
    "FluxKontextPipeline": lambda h, w: {
        "height": h,
        "width": w,
        "guidance_scale": 2.5,
        "max_area": h * w,
        "_auto_resize": False,
    },
    "QwenImageEditPipeline": lambda h, w: {"height": h, "width": w, "true_cfg_scale": 4.0, "negative_prompt": " "},
    "QwenImageEditPlusPipeline": lambda h, w: {"height": h, "width": w, "true_cfg_scale": 4.0, "negative_prompt": " "},
    "DreamLitePipeline": lambda h, w: {"height": h, "width": w, "guidance_scale": 3.5, "image_guidance_scale": 1.5},
    "DreamLiteMobilePipeline": lambda h, w: {"height": h, "width": w},
    "ZImageImg2ImgPipeline": lambda h, w: {"height": h, "width": w, "guidance_scale": 0.0, "strength": 0.6},
    "SanaSprintImg2ImgPipeline": lambda h, w: {
        "height": h,
        "width": w,
        "guidance_scale": 4.5,
        "strength": 0.5,
        "intermediate_timesteps": None,
        "use_resolution_binning": False,
    },
    "StableDiffusionImg2ImgPipeline": lambda h, w: {"guidance_scale": 7.5, "strength": 0.6},
    "StableDiffusionXLImg2ImgPipeline": lambda h, w: {"guidance_scale": 5.0, "strength": 0.6},
}
KONTEXT, SD, QWEN = "FluxKontextPipeline", "StableDiffusionImg2ImgPipeline", "QwenImageEditPlusPipeline"


def every(names: Iterator[str] | tuple[str, ...] = tuple(CALLS)) -> list[Any]:
    """Names as parameters; those that cannot be loaded here skip."""
    without = importlib.util.find_spec("torchvision") is None
    skip = pytest.mark.skipif(without, reason="transformers needs torchvision for it: `make editors` has it")
    return [pytest.param(name, marks=skip if "torchvision" in ADAPTERS[name].packages else ()) for name in names]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Name of a class, and fields of its model_index.json, to a saved pipeline."""
    made: dict[tuple[str, str], Path] = {}

    def find(name: str, **fields: Any) -> Path:
        key = name, json.dumps(fields)
        if key not in made:
            made[key] = build(name, tmp_path_factory.mktemp(name), **fields)
        return made[key]

    return find


Models = Callable[..., Path]


def config(model: Path, **fields: Any) -> DiffusersConfig:
    return DiffusersConfig(**{"model": str(model), "steps": 4, "dtype": "float32", **fields})


def load(model: Path, batch_size: int = 4, **fields: Any) -> DiffusersEditor:
    return config(model, **fields).load(TWO, device="cpu", batch_size=batch_size)


def photographs() -> list[Picture]:
    return [photograph(0, 64, 64), photograph(1, 64, 96), photograph(2, 64, 64)]


def tasks(images: int = 3) -> list[EditTask]:
    return [
        EditTask(image=image, prompt=prompt, seed=2**63 + 10 * image + place)
        for image in range(images)
        for place, prompt in enumerate(TWO)
    ]


def difference(one: NDArray[Any], other: NDArray[Any]) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# The law -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every())
def test_an_edit_is_what_its_pipeline_makes_of_one_image(name: str, models: Models) -> None:
    images = photographs()
    chosen = tasks()[2:4] if name in HEAVY else tasks()
    made = load(models(name)).edit(images, chosen)
    pipeline = getattr(diffusers, name).from_pretrained(models(name))
    pipeline.set_progress_bar_config(disable=True)
    template = ADAPTERS[name].defaults.template
    for task, edit in zip(chosen, made, strict=True):
        image = images[task.image]
        by_hand = pipeline(
            prompt=template.replace("{prompt}", task.prompt),
            image=Image.fromarray(image),
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(task.seed),
            **CALLS[name](*image.shape[:2]),
        ).images[0]
        assert edit.dtype == np.uint8 and edit.shape == image.shape
        assert difference(np.asarray(by_hand), edit) <= 1
        assert edit.std() > 5


@pytest.mark.parametrize("name", every())
def test_an_edit_depends_on_its_own_image_only(name: str, models: Models) -> None:
    """To the bit where each is a call of its own; sums of other lengths are rounded otherwise."""
    fields = {"guidance": 1.0, "steps": 2} if name in HEAVY else {}
    most = 1 if ADAPTERS[name].in_batches else 0
    editor, images = load(models(name), **fields), photographs()
    all_of_them = tasks()[::2] if name in HEAVY else tasks()
    together = editor.edit(images, all_of_them)
    assert len({edit.tobytes() for edit in together}) == len(all_of_them)
    backwards = editor.edit(images, all_of_them[::-1])[::-1]
    assert max(map(difference, together, backwards)) <= most
    others = [images[0], photograph(7, 64, 96), photograph(8, 64, 64)]
    changed = editor.edit(others, all_of_them)
    for task, before, after in zip(all_of_them, together, changed, strict=True):
        assert difference(before, after) <= most if task.image == 0 else difference(before, after) > 1
    for index in (0, len(all_of_them) - 1):
        task = all_of_them[index]
        (alone,) = load(models(name), 1, **fields).edit([images[task.image]], [dataclasses.replace(task, image=0)])
        assert difference(alone, together[index]) <= most


def test_flux2_itself_shows_every_edit_all_images(models: Models) -> None:
    """The leak that its adapter prevents."""
    pipeline = diffusers.Flux2KleinPipeline.from_pretrained(models("Flux2KleinPipeline"))
    pipeline.set_progress_bar_config(disable=True)
    firsts = []
    for other in (photograph(2, 64, 64), photograph(3, 64, 64)):
        made = pipeline(
            prompt=list(TWO),
            image=[Image.fromarray(photograph(0, 64, 64)), Image.fromarray(other)],
            generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
            num_inference_steps=4,
            **CALLS["Flux2KleinPipeline"](64, 64),
        )
        firsts.append(np.asarray(made.images[0]))
    assert difference(*firsts) > 1


@pytest.mark.parametrize("name", every(("FluxKontextPipeline", *HEAVY)))
def test_a_cache_is_emptied_between_edits(name: str, models: Models) -> None:
    """Also after an edit that failed half way."""
    fields: dict[str, Any] = {"steps": 4, "cache": 0.9, **({"guidance": 1.0} if name in HEAVY else {})}
    editor, images = load(models(name), **fields), photographs()
    transformer = editor._pipeline.transformer
    ran: list[int] = []
    hook = transformer.transformer_blocks[-1].attn.register_forward_hook(lambda *_: ran.append(1))
    first = editor.edit(images[:1], tasks(1)[:1])[0]
    assert 0 < len(ran) < 4  # blocks were skipped
    hook.remove()
    without = load(models(name), **{**fields, "cache": None}).edit(images[:1], tasks(1)[:1])[0]
    assert difference(first, without) > 0

    def fail(module: Any, args: Any, output: Any) -> None:
        ran.append(1)
        if len(ran) == 2:
            raise RuntimeError("half way")

    ran.clear()
    hook = transformer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        editor.edit(images[2:], [dataclasses.replace(tasks(1)[0], seed=5)])
    hook.remove()
    np.testing.assert_array_equal(first, editor.edit(images[:1], tasks(1)[:1])[0])


@pytest.mark.parametrize("name", every())
def test_the_default_precision_of_the_class(name: str, models: Models) -> None:
    """Half the bits: a CPU can do bfloat16, not float16."""
    fields = {"guidance": 1.0, "steps": 2} if name in HEAVY else {}
    images, chosen = photographs()[:1], tasks(1)[:1]
    (whole,) = load(models(name), **fields).edit(images, chosen)
    (half,) = load(models(name), **fields, dtype="bfloat16").edit(images, chosen)
    assert half.dtype == np.uint8 and half.shape == whole.shape
    assert difference(half, whole) > 0 and np.corrcoef(half.ravel(), whole.ravel())[0, 1] > 0.8


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", KONTEXT, "ZImageImg2ImgPipeline", "SanaSprintImg2ImgPipeline"])
def test_sizes_are_kept(name: str, models: Models) -> None:
    adapter = ADAPTERS[name]
    assert config(models(name)).multiple == adapter.multiple
    editor = load(models(name), steps=4)
    for height, width in ((2, 4), (5, 3), (1, 1), (1, 12)):
        image = photograph(0, height * adapter.multiple, width * adapter.multiple)
        assert editor.edit([image], tasks(1)[:1])[0].shape == image.shape
    odd = photograph(0, 64, adapter.multiple * 2 + 8)
    with pytest.raises(ConfigError, match=f"edit_size must be divisible by {adapter.multiple} for {name}, found 64 x"):
        editor.edit([odd], tasks(1)[:1])


def test_flux2_edits_panoramas_and_small_images_in_a_size_that_it_takes(models: Models) -> None:
    size = ADAPTERS["Flux2KleinPipeline"].working_size
    assert size(512, 512) == (512, 512) and size(2048, 2048) == (2048, 2048)
    assert size(16, 512) == (64, 512) and size(1024, 32) == (1024, 128)
    assert size(32, 64) == (64, 128) and size(16, 16) == (64, 64) and size(16, 64) == (64, 256)
    for height in range(16, 200, 16):
        for width in range(16, 3000, 16):
            large = size(height, width)
            assert min(large) >= 64 and max(large) <= 8 * min(large) and large[0] % 16 == large[1] % 16 == 0
    editor = load(models("Flux2KleinPipeline"))
    seen: list[Any] = []
    editor._pipeline.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    panorama = photograph(3, 16, 256)
    (edit,) = editor.edit([panorama], tasks(1)[:1])
    assert edit.shape == panorama.shape and seen == [(1, 3, 64, 512)]


def test_a_large_reference_of_flux2_loses_no_edge(models: Models) -> None:
    adapter = load(models("Flux2KleinPipeline"))._adapter
    for shape in ((2048, 512), (1040, 1040), (1024, 1024), (4096, 4096), (64, 32 * 16)):
        (image,) = adapter.encode([np.zeros((*shape, 3), np.uint8)])
        assert image.width % 16 == image.height % 16 == 0 and image.width * image.height <= 2**20
        assert abs(image.height / image.width / (shape[0] / shape[1]) - 1) < 0.04


def test_the_whole_way_with_shapes_kept(models: Models, tmp_path: Path) -> None:
    for place, size in enumerate([(64, 64), (80, 40), (40, 120)]):
        file = tmp_path / "train" / "things" / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(place, *size)).save(file)
    made = generate(
        tmp_path / "train",
        tmp_path / "store",
        GenerateConfig(editor=config(models(KONTEXT)), prompts=TWO, size=64, resize="keep"),
    )
    rows = EditStore.open(tmp_path / "store").shard_rows(0)
    assert made.made == len(rows) == 6
    assert {(row["height"], row["width"]) for row in rows} == {(64, 64), (96, 48), (32, 112)}
    with pytest.raises(ConfigError, match="edit_size must be divisible by 16 for this editor, found 72"):
        GenerateConfig(editor=config(models(KONTEXT)), size=72)


# Prompts -------------------------------------------------------------------------------------------------------------


def test_the_class_of_an_image_is_filled_in(models: Models) -> None:
    images = photographs()[::2]
    edits = []
    for fields in ({"template": "a {class} in {prompt}"}, {"template": "a bird in {prompt}"}):
        named = [EditTask(image=0, prompt="autumn", seed=3, class_name="bird")]
        edits += load(models(SD), **fields).edit(images, named)
    np.testing.assert_array_equal(*edits)
    editor = load(models(SD), template="a {class} in {prompt}")
    seen: list[Any] = []
    editor._pipeline.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    birds = [EditTask(image=0, prompt=prompt, seed=3, class_name="bird") for prompt in TWO]
    editor.edit(images, [*birds, EditTask(image=1, prompt=TWO[0], seed=3, class_name="plane")])
    once = len(seen)
    assert once == 3 * 2  # a text and the negative one
    editor.edit(images, birds)
    assert len(seen) == once


@pytest.mark.parametrize(
    "name", ["Flux2KleinPipeline", KONTEXT, "ZImageImg2ImgPipeline", "SanaSprintImg2ImgPipeline", SD]
)
def test_prompts_without_a_class_are_embedded_once_a_run(name: str, models: Models) -> None:
    editor = load(models(name))
    seen: list[Any] = []
    editor._pipeline.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    editor.edit(photographs(), tasks())
    assert not seen


def test_embeddings_that_are_kept_have_a_limit(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from dali_diffusemix.generate.editors.diffusers import adapters

    editor = load(models(SD), template="a {class} in {prompt}")
    one = 2 * 77 * 32 * 4  # bytes: positive and negative, tokens, size, float32
    monkeypatch.setattr(adapters, "_EMBEDDINGS", 3 * one)
    images = photographs()[:1]
    classes = [EditTask(image=0, prompt=TWO[0], seed=3, class_name=f"bird {kind}") for kind in range(6)]
    made = editor.edit(images, classes)
    assert list(editor._adapter._embedded) == [f"a bird {kind} in autumn" for kind in (3, 4, 5)]
    again = editor.edit(images, classes[::-1])[::-1]
    assert max(map(difference, made, again)) <= 1


def test_a_negative_prompt_changes_an_edit(models: Models, tiny_model: Path) -> None:
    for model in (models(SD), models("StableDiffusionXLImg2ImgPipeline"), tiny_model, models("ZImageImg2ImgPipeline")):
        fields = {"guidance": 5.0}
        plain = load(model, **fields).edit(photographs()[:1], tasks(1)[:1])[0]
        negative = load(model, **fields, negative_prompt="blurry").edit(photographs()[:1], tasks(1)[:1])[0]
        assert difference(plain, negative) > 0


# Memory --------------------------------------------------------------------------------------------------------------


def room_for(edits: int) -> Any:
    def check(module: Any, args: Any, kwargs: Any) -> None:
        if len(args[0] if args else kwargs["hidden_states"]) > edits:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return check


def test_a_batch_that_is_too_large_is_halved(models: Models, caplog: pytest.LogCaptureFixture) -> None:
    editor = load(models(SD), batch_size=4)
    images = [photographs()[0], photographs()[2]]
    expected = editor.edit(images, tasks(2))
    hook = editor._pipeline.unet.register_forward_pre_hook(room_for(2 * 2), with_kwargs=True)  # guided: two an edit
    with caplog.at_level(logging.WARNING):
        made = editor.edit(images, tasks(2))
    assert [record.getMessage().split("halved to ")[1] for record in caplog.records] == ["2 edits."]
    assert max(map(difference, made, expected)) <= 1
    hook.remove()


@pytest.mark.parametrize("name", [KONTEXT, "Flux2KleinPipeline", "ZImageImg2ImgPipeline"])
def test_one_edit_that_does_not_fit_is_an_error(name: str, models: Models) -> None:
    editor = load(models(name), batch_size=16)
    hook = editor._pipeline.transformer.register_forward_pre_hook(room_for(0), with_kwargs=True)
    with pytest.raises(ConfigError, match=r"edit_size must be such that one edit fits in the GPU's memory.*quantize"):
        editor.edit(photographs(), tasks())
    hook.remove()
    assert len(editor.edit(photographs(), tasks())) == 6


def test_memory_that_runs_out_in_the_vae_of_sana_is_the_same_error(models: Models) -> None:
    """The pipeline makes a warning of it, and fails later."""
    editor = load(models("SanaSprintImg2ImgPipeline"))

    def full(module: Any, args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    editor._pipeline.vae.decoder.register_forward_pre_hook(full)
    with pytest.raises(ConfigError, match="one edit fits in the GPU's memory"):
        editor.edit(photographs(), tasks())


# LoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every((SD, KONTEXT, "Flux2KleinPipeline", "ZImageImg2ImgPipeline", QWEN)))
def test_a_lora_changes_edits_and_settings(name: str, models: Models, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = build_lora(name, models(name), tmp_path / "style")
    fields = {"guidance": 1.0, "steps": 2} if name in HEAVY else {}
    images, chosen = photographs()[:1], tasks(1)[:1]
    plain = load(models(name), **fields).edit(images, chosen)[0]
    full, half, none = (
        load(models(name), **fields, lora=f"{file}@{scale}").edit(images, chosen)[0] for scale in (1.0, 0.5, 1e-9)
    )
    assert difference(full, plain) > 1 and difference(half, plain) > 0 and difference(full, half) > 0
    assert difference(none, plain) <= 1
    np.testing.assert_array_equal(
        full, load(models(name), **fields, lora=str(tmp_path / "style")).edit(images, chosen)[0]
    )


def test_a_lora_is_recorded_by_its_content(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = build_lora(SD, models(SD), tmp_path / "style")
    plain, with_it = config(models(SD)).settings(), config(models(SD), lora=str(file)).settings()
    assert {name: with_it[name] for name in with_it.keys() - plain.keys()} == {
        "lora": file.name,
        "lora_revision": with_it["lora_revision"],
        "lora_scale": 1.0,
    }
    assert {name: with_it[name] for name in plain} == plain
    shutil.copytree(tmp_path / "style", tmp_path / "elsewhere")
    assert config(models(SD), lora=str(tmp_path / "elsewhere")).settings() == with_it
    assert config(models(SD), lora=f"{tmp_path / 'elsewhere'}:{file.name}@1").settings() == with_it
    assert config(models(SD), lora=f"{file}@0.5").settings()["lora_scale"] == 0.5
    other = build_lora(SD, models(SD), tmp_path / "other", seed=2)
    assert config(models(SD), lora=str(other)).settings()["lora_revision"] != with_it["lora_revision"]


def test_loras_that_are_refused(models: Models, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = build_lora(SD, models(SD), tmp_path / "style")
    shutil.copy(file, tmp_path / "style" / "another.safetensors")
    (tmp_path / "pickled.bin").touch()
    for lora, message in (
        (f"{file}@0", "its scale must be a number other than 0, found '0'"),
        ("", "lora must be a file, folder or hub id, as NAME"),
        (str(tmp_path / "style"), "must hold one file of safetensors, found 2; name one as .*style:FILE"),
        (
            str(tmp_path / "nothing.safetensors"),
            r"lora must be a file of safetensors.*nothing.safetensors', which is no",
        ),
        (str(tmp_path / "pickled.bin"), r"lora must be a file of safetensors.*pickled.bin'\."),
    ):
        with pytest.raises(ConfigError, match=message):
            config(models(SD), lora=lora).check(TWO)
    for model in (models(KONTEXT), models("ZImageImg2ImgPipeline")):
        with pytest.raises(
            ConfigError, match=r"lora: .* cannot be added to a .*Pipeline .*that was made for this model"
        ):
            load(model, lora=str(file))
    with pytest.raises(ConfigError, match="lora must be left out for DreamLiteMobilePipeline"):
        ADAPTERS["DreamLiteMobilePipeline"].takes({})
        _with_class(tmp_path, models(SD), "DreamLiteMobilePipeline", lora=str(file)).settings()


def test_lightning_is_a_schedule_with_a_constant_shift(models: Models) -> None:
    """As Qwen-Image-Lightning publishes it, on the scheduler's class: other sizes of images change nothing."""
    from dali_diffusemix.generate.editors.diffusers.loading import SCHEDULERS

    name, chosen = SCHEDULERS["lightning"]
    own = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    scheduler = getattr(diffusers, name).from_config(own.config, **chosen)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=scheduler.config.base_shift)
    shifted = [3 * sigma / (1 + 2 * sigma) for sigma in (1.0, 0.75, 0.5, 0.25, 0.0)]
    np.testing.assert_allclose(scheduler.sigmas.numpy(), shifted, rtol=1e-6)
    assert scheduler.config.max_shift == scheduler.config.base_shift


@pytest.mark.parametrize("name", every(HEAVY))
def test_qwen_with_a_lightning_lora(name: str, models: Models, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    file = build_lora(name, models(name), tmp_path / "lightning")
    fields = {"lora": str(file), "scheduler": "lightning", "guidance": 1.0}
    editor = load(models(name), **fields)
    seen: list[Any] = []
    editor._pipeline.transformer.register_forward_hook(lambda *_: seen.append(1))
    editor.edit(photographs()[:1], tasks(1)[:1])
    assert len(seen) == 4  # one a step: not guided
    assert editor._pipeline.scheduler.config.shift_terminal is None
    assert "negative_prompt" not in config(models(name), **fields).settings()


# Quantization --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-float8"])
@pytest.mark.parametrize("name", every((SD, KONTEXT, "Flux2KleinPipeline", QWEN)))
def test_quantized_weights(name: str, kind: str, models: Models) -> None:
    pytest.importorskip("torchao")
    fields = {"guidance": 1.0, "steps": 2} if name in HEAVY else {}
    images, chosen = photographs()[:1], tasks(1)
    plain = load(models(name), **fields).edit(images, chosen)
    editor = load(models(name), **fields, quantize=kind)
    for part in ADAPTERS[name].large:
        weights = [type(one).__name__ for one in getattr(editor._pipeline, part).parameters()]
        assert any("Int8" in one or "Float8" in one for one in weights), part
    made = editor.edit(images, chosen)
    assert 0 < np.abs(made[0].astype(float) - plain[0]).mean() < 8
    alone = editor.edit(images, chosen[1:])[0]
    assert difference(alone, made[1]) <= (1 if ADAPTERS[name].in_batches else 0)
    assert config(models(name), quantize=kind).settings()["quantize"] == kind


@pytest.mark.parametrize("kind", ["bnb-8bit", "bnb-4bit"])
def test_bitsandbytes_is_asked_for_the_large_components(kind: str, models: Models) -> None:
    """It needs a GPU to run: here its configs are made, and a CPU is refused."""
    pytest.importorskip("bitsandbytes")
    made = quantization(ADAPTERS[KONTEXT], ADAPTERS[KONTEXT].defaults, kind)
    assert isinstance(made, diffusers.PipelineQuantizationConfig)
    assert set(made.quant_mapping) == {"transformer", "text_encoder_2"}
    for part, one in made.quant_mapping.items():
        assert type(one).__module__.split(".")[0] == ("diffusers" if part == "transformer" else "transformers")
        assert one.load_in_4bit == (kind == "bnb-4bit") and one.load_in_8bit == (kind == "bnb-8bit")
    assert kind == "bnb-8bit" or made.quant_mapping["transformer"].bnb_4bit_compute_dtype == torch.bfloat16
    with pytest.raises(ConfigError, match=f"quantize must be one of torchao's on a CPU, found '{kind}'"):
        load(models(KONTEXT), quantize=kind)


@pytest.mark.parametrize(
    ("package", "fields"),
    [
        ("torchao", {"quantize": "torchao-int8"}),
        ("bitsandbytes", {"quantize": "bnb-4bit"}),
        ("peft", {"lora": "style.safetensors"}),
    ],
)
def test_a_missing_package_is_named(
    package: str, fields: dict[str, Any], models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    with pytest.raises(MissingDependencyError, match=f"{package} is not installed, and .* `pip install {package}`"):
        config(models(SD), **fields).check(TWO)


# What a store records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Flux2KleinPipeline", {"steps": 50, "guidance": 4.0}),
        ("Flux2KleinKVPipeline", {"steps": 4}),
        ("FluxKontextPipeline", {"steps": 28, "guidance": 2.5}),
        ("QwenImageEditPipeline", {"steps": 50, "guidance": 4.0, "negative_prompt": " "}),
        ("QwenImageEditPlusPipeline", {"steps": 40, "guidance": 4.0, "negative_prompt": " "}),
        ("DreamLitePipeline", {"steps": 30, "guidance": 3.5, "image_guidance": 1.5}),
        ("ZImageImg2ImgPipeline", {"steps": 8, "guidance": 0.0, "strength": 0.6, "template": DESCRIPTION}),
        ("SanaSprintImg2ImgPipeline", {"steps": 4, "guidance": 4.5, "strength": 0.5, "template": DESCRIPTION}),
        (
            "StableDiffusionImg2ImgPipeline",
            {"steps": 50, "guidance": 7.5, "strength": 0.6, "template": DESCRIPTION, "dtype": "float16"},
        ),
    ],
)
def test_settings_are_those_that_the_class_takes(
    name: str, expected: dict[str, Any], models: Models, tmp_path: Path
) -> None:
    found = _with_class(tmp_path, models(SD), name).settings()
    assert str(found.pop("revision")).startswith("sha256:")
    assert found == {
        "editor": "diffusers",
        "model": "copied",
        "pipeline": name,
        "scheduler": "default",
        "template": INSTRUCTION,
        "dtype": "bfloat16",
        **expected,
    }


def test_instruct_pix2pix_has_the_settings_that_it_always_had(tiny_model: Path) -> None:
    """Stores that exist are compared with them."""
    assert DiffusersConfig(model=str(tiny_model)).settings() == {
        "editor": "diffusers",
        "model": tiny_model.name,
        "revision": config(tiny_model).settings()["revision"],
        "pipeline": "StableDiffusionInstructPix2PixPipeline",
        "scheduler": "euler-ancestral",
        "steps": 100,
        "guidance": 4.0,
        "image_guidance": 1.5,
        "template": "A transformed version of image into {prompt}",
        "dtype": "float16",
    }


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (SD, {"negative_prompt": "blurry"}),
        (SD, {"strength": 0.3}),
        (SD, {"quantize": "torchao-int8"}),
        (KONTEXT, {"cache": 0.1}),
        (KONTEXT, {"quantize": "bnb-4bit"}),
        (QWEN, {"negative_prompt": "blurry"}),
        ("StableDiffusionInstructPix2PixPipeline", {"negative_prompt": "blurry"}),
        ("StableDiffusionInstructPix2PixPipeline", {"quantize": "torchao-float8"}),
    ],
)
def test_each_new_field_is_in_the_settings(name: str, fields: dict[str, Any], models: Models, tmp_path: Path) -> None:
    model = _with_class(tmp_path, models(SD), name)
    plain, changed = model.settings(), dataclasses.replace(model, **fields).settings()
    assert changed == {**plain, **fields} != plain


@pytest.mark.parametrize("text", ["ZImage", "SanaSprint", "StableDiffusion", "StableDiffusionXL"])
def test_a_text_to_image_model_is_run_from_image_to_image(text: str, models: Models, tmp_path: Path) -> None:
    copied = _with_class(tmp_path, models(f"{text}Img2ImgPipeline"), f"{text}Pipeline")
    assert copied.settings()["pipeline"] == f"{text}Img2ImgPipeline"
    copied = dataclasses.replace(copied, steps=4, dtype="float32")
    expected = load(models(f"{text}Img2ImgPipeline")).edit(photographs(), tasks())
    made = copied.load(TWO, device="cpu", batch_size=4).edit(photographs(), tasks())
    np.testing.assert_array_equal(np.concatenate([edit.ravel() for edit in made]), _flat(expected))


def _flat(edits: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([edit.ravel() for edit in edits])


def test_distilled_klein_takes_no_guidance(models: Models) -> None:
    model = models("Flux2KleinPipeline", is_distilled=True)
    settings = DiffusersConfig(model=str(model)).settings()
    assert settings["steps"] == 4 and "guidance" not in settings
    with pytest.raises(ConfigError, match=r"guidance must be left out for Flux2KleinPipeline.*found 4\.0"):
        config(model, guidance=4.0).check(TWO)
    assert len(load(model).edit(photographs(), tasks())) == 6


# Refusals ------------------------------------------------------------------------------------------------------------


def _with_class(folder: Path, model: Path, name: str, **fields: Any) -> DiffusersConfig:
    """A config of a copy of a model whose index names another class."""
    copied = Path(shutil.copytree(model, folder / "copied"))
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    return DiffusersConfig(model=str(copied), **fields)


@pytest.mark.parametrize("name", ["StableDiffusionUpscalePipeline", "Mine"])
def test_a_class_that_is_not_known_is_refused_with_the_list(name: str, models: Models, tmp_path: Path) -> None:
    unknown = _with_class(tmp_path, models(SD), name)
    for attempt in (
        lambda: unknown.check(TWO),
        unknown.settings,
        lambda: unknown.load(TWO, device="cpu", batch_size=1),
    ):
        with pytest.raises(ConfigError, match=f"found {name}; these are ") as caught:
            attempt()
        assert all(known in str(caught.value) for known in ADAPTERS)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("StableDiffusionInstructPix2PixPipeline", {"strength": 0.5}, "strength must be left out for StableDiffusionI"),
        (
            "StableDiffusionInstructPix2PixPipeline",
            {"cache": 0.1},
            "cache must be left out .* found 0.1; it takes guid",
        ),
        (KONTEXT, {"image_guidance": 1.5}, "image_guidance must be left out for FluxKontextPipeline, which does not"),
        (KONTEXT, {"negative_prompt": "blurry"}, "negative_prompt must be left out for FluxKontextPipeline"),
        (KONTEXT, {"strength": 0.5}, "strength must be left out for FluxKontextPipeline"),
        ("Flux2Pipeline", {"cache": 0.1}, "cache must be left out for Flux2Pipeline"),
        ("DreamLiteMobilePipeline", {"guidance": 3.0}, "guidance must be left out .* it takes none of its like"),
        ("DreamLitePipeline", {"lora": "a/b:c.safetensors"}, "lora must be left out for DreamLitePipeline"),
        (SD, {"image_guidance": 1.5}, "image_guidance must be left out for StableDiffusionImg2ImgPipeline"),
        (SD, {"strength": 0.01}, "strength must be such that of 50 steps at least one is made.*found 0.01"),
        (SD, {"strength": 0.99, "steps": 20}, "strength must be such that of 20 steps .* one is left out"),
        ("SanaSprintImg2ImgPipeline", {"steps": 2, "strength": 0.6}, "strength must be such that of 2 steps"),
        (SD, {"guidance": 1.0, "negative_prompt": "x"}, "negative_prompt must be left out where there is no guidance"),
        ("ZImagePipeline", {"negative_prompt": "x"}, r"no guidance, found 'x' beside guidance = 0\.0"),
        (QWEN, {"guidance": 1.0, "negative_prompt": "x"}, "negative_prompt must be left out where there is no guidan"),
        *(
            (
                name,
                {"scheduler": "euler-ancestral"},
                rf"scheduler must be one of \['default'.* for {name}, found 'euler-a",
            )
            for name in ("Flux2KleinPipeline", "Flux2Pipeline", KONTEXT, QWEN, "DreamLitePipeline")
        ),
        (SD, {"scheduler": "lightning"}, "scheduler must be one of .*'lcm'.* found 'lightning'"),
    ],
)
def test_what_a_class_does_not_take_is_refused(
    name: str, fields: dict[str, Any], message: str, models: Models, tmp_path: Path
) -> None:
    model = _with_class(tmp_path, models(SD), name, **fields)
    for attempt in (lambda: model.check(TWO), model.settings):
        with pytest.raises(ConfigError, match=message):
            attempt()


@pytest.mark.parametrize("name", every())
def test_a_scheduler_of_another_kind_would_be_rejected_by_the_class_itself(name: str, models: Models) -> None:
    """The reason for the refusal; the tiny models' own schedulers are those of the published ones."""
    pipeline = getattr(diffusers, name).from_pretrained(models(name))
    pipeline.set_progress_bar_config(disable=True)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline.scheduler = diffusers.EulerAncestralDiscreteScheduler(**betas)
    call = {
        **CALLS[name](64, 64),
        "prompt": "autumn",
        "image": Image.fromarray(photographs()[0]),
        "num_inference_steps": 4,
    }
    if "euler-ancestral" in ADAPTERS[name].schedulers:
        assert len(pipeline(**call).images) == 1
    else:
        with pytest.raises((ValueError, TypeError, AttributeError)):
            pipeline(**call)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 1.5}, "strength must be a number from 0 to 1, found 1.5"),
        ({"cache": -1}, "cache must be a number from 0 to 1, found -1"),
        ({"quantize": "int3"}, "quantize must be one of .*'torchao-int8'.* found 'int3'"),
        ({"lora": "a/b@nan"}, "its scale must be a number other than 0, found 'nan'"),
    ],
)
def test_a_config_checks_itself(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusersConfig(**fields)


def test_every_class_that_is_known_exists() -> None:
    for name, adapter in ADAPTERS.items():
        call = set(
            importlib.import_module("inspect").signature(getattr(diffusers, adapter.pipeline).__call__).parameters
        )
        assert getattr(diffusers, name) is not None and {"prompt", "image", "generator"} <= call
        assert isinstance(adapter.defaults, PipelineOptions)
        lora = hasattr(getattr(diffusers, adapter.pipeline), "load_lora_weights")
        assert ("lora" in adapter.optional) == lora
    assert {adapter.pipeline for adapter in ADAPTERS.values()} - CALLS.keys() == {
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    }
    assert set(QUANTIZATIONS.values()) == {"torchao", "bitsandbytes"}


# The hub's cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of nobody/kontext in a cache of the hub, where there is no network."""
    constants = sys.modules["huggingface_hub.constants"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--nobody--kontext"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee" * 6 + "c0de")
    return Path(shutil.copytree(models(KONTEXT), folder / "snapshots" / ("c0ffee" * 6 + "c0de")))


def test_a_model_in_the_hubs_cache_needs_no_network(cached: Path) -> None:
    (cached / "model.safetensors").touch()  # repositories often hold the model a second time
    model = DiffusersConfig(model="nobody/kontext")
    assert model.multiple == 16
    model.check(TWO)
    settings = model.settings()
    assert settings["model"] == "nobody/kontext" and settings["revision"] == cached.name
    assert settings["pipeline"] == KONTEXT
    assert DiffusersConfig(model="nobody/else").multiple == 8  # the least, until it is there


@pytest.mark.parametrize("missing", ["vae", "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"])
def test_a_download_that_was_interrupted_is_not_taken_for_whole(cached: Path, missing: str) -> None:
    if missing == "vae":
        shutil.rmtree(cached / "vae")
    else:
        listing = {"weight_map": {"a": Path(missing).name}}
        (cached / f"{missing.split('-0')[0]}.safetensors.index.json").write_text(json.dumps(listing))
    with pytest.raises(ConfigError, match="neither a folder nor available from the hub"):
        DiffusersConfig(model="nobody/kontext").check(TWO)


def test_a_lora_in_the_hubs_cache(cached: Path, models: Models, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    build_lora(KONTEXT, models(KONTEXT), cached / "styles")
    lora = "nobody/kontext:styles/pytorch_lora_weights.safetensors@0.5"
    settings = config(models(KONTEXT), lora=lora).settings()
    assert settings["lora"] == lora.split("@")[0] and settings["lora_scale"] == 0.5
    assert len(load(models(KONTEXT), lora=lora).edit(photographs()[:1], tasks(1))) == 2
    with pytest.raises(ConfigError, match=r"lora: other.safetensors of 'nobody/kontext' is not available from the hub"):
        config(models(KONTEXT), lora="nobody/kontext:other.safetensors").check(TWO)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Look up models anew, since tests change what lies under one name; one thread for all that is computed."""
    from dali_diffusemix.generate.editors.diffusers import files

    for cached in (files.folder_of, files.revision_of, files._lora_file, files._hash):
        cached.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
