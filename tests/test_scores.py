"""score and store.scores: columns of scores that survive kills, growth and damage, and whose makers are known."""

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from click.testing import CliRunner, Result
from material import write_photograph, write_photographs
from numpy.typing import NDArray
from PIL import Image

from dali_diffusemix.catalog import index
from dali_diffusemix.cli import main
from dali_diffusemix.errors import ConfigError, StoreError
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.editors.diffusers.files import revision_of
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.generate.run import runs_log
from dali_diffusemix.images.codec import decode
from dali_diffusemix.inspect.scoring import load_scorer, score
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.store import VERDICTS, Decisions, EditName, EditStore
from dali_diffusemix.store.pack import pack
from dali_diffusemix.store.scores import ScoredBy, Scores

CONFIG = GenerateConfig(
    prompts=("autumn", "snowy"),
    size=24,
    originals_per_shard=3,
    thresholds=Thresholds(unlike=0.6),  # strict enough that some are rejected
)
SCORERS = """
import os, signal
from pathlib import Path
import numpy as np

def brightness(originals, edits, labels):
    for original, edit, label in zip(originals, edits, labels, strict=True):
        assert original.shape == edit.shape and original.dtype == edit.dtype == np.uint8 and label in ("ants", "bees")
    return [float(edit.mean() - original.mean()) for original, edit in zip(originals, edits)]

def killed(originals, edits, labels):  # in its third shard, unless the file is there
    if len(calls := killed.calls) == 2 and not Path("live").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(0)
    return brightness(originals, edits, labels)
killed.calls = []

class Model:
    made = 0
    def __init__(self):
        Model.made += 1
        self.revision = "weights 7"
    def __call__(self, originals, edits, labels):
        return np.arange(len(edits), dtype=np.float64)

def short(originals, edits, labels): return [1.0] * (len(edits) - 1)
def words(originals, edits, labels): return ["good"] * len(edits)
def infinite(originals, edits, labels): return [float("inf")] * len(edits)
def none(originals, edits, labels): return [float("nan")] * len(edits)
def failing(originals, edits, labels): raise ZeroDivisionError("of the user's own")
number = 3
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photographs of different sizes in two classes."""
    root = tmp_path_factory.mktemp("scores") / "train"
    for place in range(10):
        file = root / ("ants" if place < 5 else "bees") / f"{place}.jpg"
        write_photograph(file, 100 + place, 40 + place, 50, quality=95)
    index(root)
    return root


@pytest.fixture(scope="module")
def made(root: Path) -> Path:
    """Four shards of edits, some of them rejected."""
    generate(root, root.with_name("edits"), CONFIG)
    return root.with_name("edits")


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    shutil.copyfile(runs_log(made), runs_log(tmp_path / "edits"))
    return Path(shutil.copytree(made, tmp_path / "edits"))


@pytest.fixture(autouse=True)
def scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with my_scorers.py."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "my_scorers.py").write_text(SCORERS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield folder
    sys.modules.pop("my_scorers", None)


def expected(root: Path, edits: EditStore) -> NDArray[np.float32]:
    """`brightness` of each accepted edit, from the files."""
    found = []
    for edit, row in enumerate(edits.index):
        pixels = decode(edits.encoded(edit))
        height, width = pixels.shape[:2]
        with Image.open(root / edits.catalog.path(int(row["original"]))) as original:
            before = np.asarray(original.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        found.append(pixels.mean() - before.mean())
    return np.array(found, np.float32)


def values(store: Path, name: str) -> NDArray[np.float32]:
    return Scores.open(store, name).values(EditStore.open(store).index)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


# Columns --------------------------------------------------------------------------------------------------------------


def test_a_column_has_the_number_of_each_accepted_edit(root: Path, store: Path) -> None:
    before = {name: data for name, data in content(store).items() if not name.startswith("scores/")}
    calls: list[tuple[int, int]] = []
    found = score(store, "my_scorers:brightness", batch_size=3, progress=lambda *done: calls.append(done))
    edits = EditStore.open(store)
    wanted = expected(root, edits)
    assert 10 < len(edits) < 20, "some edits must be rejected"
    assert calls[0] == (0, len(edits)) and calls[-1] == (len(edits), len(edits)) and calls == sorted(calls)
    assert (found.name, found.made, found.unreadable) == ("brightness", len(edits), 0)
    np.testing.assert_array_equal(found.values, np.sort(wanted))
    column = Scores.open(store, "brightness")
    np.testing.assert_allclose(column.values(edits.index), wanted, rtol=1e-6)
    shuffled = np.random.default_rng(0).permutation(len(edits))
    np.testing.assert_allclose(column.values(edits.index[shuffled]), wanted[shuffled], rtol=1e-6)
    less = Path(shutil.copytree(root, store.with_name("less")))
    (less / "ants" / "0.jpg").unlink()
    some = edits.reindexed(index(less))
    gone = edits.catalog.paths.index("ants/0.jpg")
    np.testing.assert_allclose(column.values(some.index), wanted[edits.index["original"] != gone], rtol=1e-6)
    for shard in edits.shards:
        rows = edits.shard_rows(shard)
        scores = column.column(shard, rows)
        assert scores is not None and scores.dtype == np.float32
        np.testing.assert_array_equal(np.isnan(scores), rows["verdict"] != VERDICTS.index("accepted"))
    assert {name: data for name, data in content(store).items() if not name.startswith("scores/")} == before
    assert Scores.names(store) == ("brightness",) and not verify(store).problems


def test_thresholds_keep_what_they_say(store: Path) -> None:
    found = score(store, "my_scorers:brightness")
    for share in (1.0, 0.95, 0.5, 0.01):
        kept = (found.values >= found.keeping(share)).mean()
        assert kept >= share and (found.values > found.keeping(share)).mean() < share
    assert np.isnan(score(store, "my_scorers:none").keeping(0.95))


def test_thresholds_are_of_the_edits_that_are_used(root: Path, store: Path) -> None:
    """Not of those that people rejected, nor of those that others replaced."""
    index = EditStore.open(store).index
    catalog, prompts = EditStore.open(store).catalog, CONFIG.prompts
    Decisions.of(store).add(
        "reject",
        [
            EditName(catalog.path(int(row["original"])), prompts[row["prompt"]], int(row["variant"]), int(row["shard"]))
            for row in index[::2]
        ],
    )
    for redo in ((), ("rejected",)):
        generate(root, store, CONFIG, redo=redo)
        for _ in range(2):  # scored now, scored before
            scored = score(store, "my_scorers:brightness")
            used = Scores.open(store, "brightness").values(EditStore.open(store).index)
            assert np.array_equal(scored.values, np.sort(used)) and len(used) == len(EditStore.open(store))


def test_scores_do_not_depend_on_batches_threads_or_packed_originals(root: Path, store: Path, tmp_path: Path) -> None:
    pack(root, tmp_path / "packed")
    score(store, "my_scorers:brightness", name="one", batch_size=1, workers=1)
    score(store, "my_scorers:brightness", name="two", batch_size=64, workers=3, root=tmp_path / "packed")
    np.testing.assert_array_equal(values(store, "one"), values(store, "two"))


def test_a_copy_in_another_format_keeps_its_scores(store: Path, tmp_path: Path) -> None:
    score(store, "my_scorers:brightness")
    pack(store, tmp_path / "packed")
    assert EditStore.open(tmp_path / "packed").raw and not verify(tmp_path / "packed").problems
    np.testing.assert_array_equal(values(tmp_path / "packed", "brightness"), values(store, "brightness"))


def test_nothing_is_scored_twice_and_new_shards_alone(root: Path, store: Path) -> None:
    first = score(store, "my_scorers:brightness")
    before = content(store / "scores")
    assert score(store, "my_scorers:brightness").made == 0
    old = EditStore.open(store)
    generate(root, store, dataclasses.replace(CONFIG, prompts=("autumn", "snowy", "sunset")))
    edits = EditStore.open(store)
    with pytest.raises(
        StoreError, match=r"\d of \d shards have no scores 'brightness' .*score STORE --with my_scorers:"
    ):
        values(store, "brightness")
    again = score(store, "my_scorers:brightness")
    assert again.made == len(edits) - len(old) > 0 and len(again.values) == len(edits)
    assert before.items() <= content(store / "scores").items()
    np.testing.assert_allclose(values(store, "brightness"), expected(root, edits), rtol=1e-6)
    assert first.by == again.by


# Kills, damage, other edits -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_resumes_shard_by_shard(store: Path, scorers: Path) -> None:
    command = "from dali_diffusemix.cli import main; main()"
    arguments = ("score", store, "--with", "my_scorers:killed", "--json")
    with warm.Script("-c", command, *arguments) as script:
        script.communicate(60)
    assert script.returncode == -signal.SIGKILL
    done = sorted(file.name for file in (store / "scores" / "killed").glob("*.npy"))
    assert len(done) == 2
    (store / "scores" / "killed" / ".edits-000003.npy.0123abcd.tmp").write_bytes(b"left")
    (scorers / "live").touch()
    after = json.loads(run(*arguments).stdout)
    assert 0 < after["made"] < len(EditStore.open(store)) == after["edits"]
    score(store, "my_scorers:brightness")
    np.testing.assert_array_equal(values(store, "killed"), values(store, "brightness"))
    assert not list((store / "scores").rglob("*.tmp"))


def test_a_kill_between_two_files_costs_that_shard(store: Path) -> None:
    score(store, "my_scorers:brightness")
    before, edits = content(store / "scores"), EditStore.open(store)
    (store / "scores" / "brightness" / "edits-000001.json").unlink()
    (store / "scores" / "brightness" / "edits-000001.npy").write_bytes(b"of another scorer")
    assert not verify(store).problems
    assert score(store, "my_scorers:brightness").made == (edits.index["shard"] == 1).sum()
    assert content(store / "scores") == before


@pytest.mark.parametrize(
    ("file", "spoil", "what"),
    [
        ("edits-000002.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "its SHA-256 differs"),
        ("edits-000002.npy", lambda data: data[:-3], "bytes, found"),
        ("edits-000002.npy", None, "cannot be read"),
        ("edits-000002.json", lambda data: data[:40], "is damaged"),
        ("edits-000002.json", lambda data: data.replace(b'"version": 1', b'"version": 9'), "'version' must be 1"),
        ("edits-000002.json", lambda data: data.replace(b'"edits"', b'"edit"'), "is damaged .*has no 'edits'"),
    ],
)
def test_damage_is_found_and_made_good(store: Path, file: str, spoil: Any, what: str) -> None:
    score(store, "my_scorers:brightness")
    before, damaged = content(store / "scores"), store / "scores" / "brightness" / file
    damaged.unlink() if spoil is None else damaged.write_bytes(spoil(damaged.read_bytes()))
    with pytest.raises(StoreError, match=rf"{file}.*{what}"):
        values(store, "brightness")
    (problem,) = verify(store).problems
    assert problem.file == "scores/brightness/edits-000002.npy" and problem.shard is None
    assert "score STORE --with my_scorers:brightness --name" in problem.what or "update dali_diffusemix" in problem.what
    assert "edits-000002" in run("verify", store, code=1).stdout
    score(store, "my_scorers:brightness")
    assert content(store / "scores") == before and not verify(store).problems


def test_a_damaged_column_is_begun_again_when_asked(store: Path) -> None:
    score(store, "my_scorers:brightness")
    before = content(store / "scores")
    (store / "scores" / "brightness" / "column.json").write_text("{")
    assert [problem.file for problem in verify(store).problems] == ["scores/brightness/column.json"]
    with pytest.raises(StoreError, match=r"column\.json.* is damaged .*--overwrite"):
        score(store, "my_scorers:brightness")
    score(store, "my_scorers:brightness", replace=True)
    assert content(store / "scores") == before


def test_scores_of_other_edits_are_not_used(root: Path, store: Path, tmp_path: Path) -> None:
    """Made again from another seed, the store has the same shards and rows."""
    score(store, "my_scorers:brightness")
    generate(root, tmp_path / "other", dataclasses.replace(CONFIG, seed=5))
    shutil.copytree(store / "scores", tmp_path / "other" / "scores")
    edits = EditStore.open(tmp_path / "other")
    column = Scores.open(tmp_path / "other", "brightness")
    assert all(column.column(shard, edits.shard_rows(shard)) is None for shard in edits.shards)
    assert all("other edits" in problem.what for problem in verify(tmp_path / "other").problems)
    assert score(tmp_path / "other", "my_scorers:brightness").made == len(edits)
    np.testing.assert_allclose(values(tmp_path / "other", "brightness"), expected(root, edits), rtol=1e-6)
    assert not verify(tmp_path / "other").problems


def test_what_cannot_be_read_has_no_score_until_it_can(root: Path, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    edits, damaged = EditStore.open(store), copy / "ants" / "1.jpg"
    row = next(row for row in range(10) if edits.catalog.path(row) == "ants/1.jpg")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:300])
    lost = edits.index["original"] == row
    found = score(store, "my_scorers:brightness", root=copy)
    assert found.unreadable == lost.sum() > 0 and len(found.values) == (~lost).sum()
    np.testing.assert_array_equal(np.isnan(values(store, "brightness")), lost)
    damaged.write_bytes(whole)
    shards = set(edits.index["shard"][lost].tolist())
    again = score(store, "my_scorers:brightness", root=copy)
    assert again.unreadable == 0 and again.made == np.isin(edits.index["shard"], list(shards)).sum()
    np.testing.assert_allclose(values(store, "brightness"), expected(root, edits), rtol=1e-6)


def test_the_originals_must_be_found(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none of \d tried can be read .*--root"):
        score(store, "my_scorers:brightness", root=tmp_path)
    with pytest.raises(ConfigError, match="which is not a folder"):
        score(store, "my_scorers:brightness", root=tmp_path / "nowhere")
    runs_log(store).unlink()
    with pytest.raises(ConfigError, match="no note of it beside the store; give it as --root"):
        score(store, "my_scorers:brightness")
    assert Scores.names(store) == ()


# Scorers and names ----------------------------------------------------------------------------------------------------


def test_a_column_is_of_one_scorer(store: Path, scorers: Path) -> None:
    first = score(store, "my_scorers:brightness")
    sys.modules.pop("my_scorers")
    (scorers / "my_scorers.py").write_text(SCORERS.replace("edit.mean() - original.mean()", "edit.mean()"))
    with pytest.raises(ConfigError, match=rf"were made by my_scorers:brightness \({first.by.revision}\), found my_sco"):
        score(store, "my_scorers:brightness")
    assert score(store, "my_scorers:brightness", name="other").made
    replaced = score(store, "my_scorers:brightness", replace=True)
    assert replaced.by != first.by and replaced.made == len(replaced.values)
    np.testing.assert_array_equal(values(store, "brightness"), values(store, "other"))


def test_a_killed_replacement_mixes_nothing(store: Path) -> None:
    score(store, "my_scorers:brightness")
    with Scores.adding(store, "brightness", ScoredBy("new", "1"), replace=True):
        pass  # killed before the first shard
    edits = EditStore.open(store)
    assert all(
        Scores.open(store, "brightness").column(shard, edits.shard_rows(shard)) is None for shard in edits.shards
    )
    with pytest.raises(StoreError, match="4 of 4 shards have no scores"):
        values(store, "brightness")


def test_two_runs_exclude_each_other(store: Path) -> None:
    by = load_scorer("my_scorers:brightness").by
    with (
        Scores.adding(store, "brightness", by),
        pytest.raises(StoreError, match="another `dali-diffusemix score` writes these scores"),
    ):
        score(store, "my_scorers:brightness")
    assert score(store, "my_scorers:brightness").made


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "quality", "structure", "é", "x" * 65])
def test_names_that_no_column_may_have(store: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"name must be 1 to 64 of .*, found"):
        score(store, "my_scorers:brightness", name=name)
    with pytest.raises(ConfigError, match="name must be"):
        Scores.find(store, name)


def test_a_missing_column_is_said_with_the_command(store: Path) -> None:
    assert Scores.find(store, "clip") is None
    with pytest.raises(StoreError, match=r"no scores 'clip', it has none; run `dali-diffusemix score STORE --with"):
        Scores.open(store, "clip")
    score(store, "my_scorers:brightness")
    with pytest.raises(StoreError, match=r"it has 'brightness'"):
        Scores.open(store, "clip")


def test_of_a_class_one_object_is_made(store: Path) -> None:
    found = score(store, "my_scorers:Model", batch_size=2)
    assert found.name == "model" and found.by == ScoredBy("my_scorers:Model", "weights 7")
    assert sys.modules["my_scorers"].Model.made == 1 and set(found.values.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("scorer", "what"),
    [
        ("my_scorers", "must be clip:MODEL or module:function, found 'my_scorers'"),
        ("my_scorers.py:brightness:x", "must be clip:MODEL or module:function"),
        ("absent_module:f", "must be in the current folder .* or installed, found none"),
        ("my_scorers:absent", "must name a function of my_scorers .*, found none"),
        ("my_scorers:number", "must name a function of my_scorers .*, found int"),
        ("builtins:abs", "must have `revision`, a text, since its module has no file"),
        ("my_scorers:short", r"must return \d+ numbers for \d+ pairs.*, found an array of shape"),
        ("my_scorers:words", "must return .*, found list"),
        ("my_scorers:infinite", "must return .*, found an infinite one"),
    ],
)
def test_scorers_that_are_none(store: Path, scorer: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        score(store, scorer)
    assert scorer in run("score", store, "--with", scorer, code=1).output.replace("\n", "")


def test_errors_of_the_users_own_code_are_left_as_they_are(store: Path, scorers: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        score(store, "my_scorers:failing")
    (scorers / "importing.py").write_text("import absent_module_of_the_user\n")
    with pytest.raises(ModuleNotFoundError, match="absent_module_of_the_user"):
        score(store, "importing:f")


# The command ----------------------------------------------------------------------------------------------------------


def test_the_command(root: Path, store: Path) -> None:
    edits = EditStore.open(store)
    shown = run("score", store, "--with", "my_scorers:brightness", "--root", root).stdout
    assert (
        f"{len(edits)} edits have a score 'brightness' by my_scorers:brightness; {len(edits)} were scored now" in shown
    )
    threshold = np.sort(expected(root, edits))[int(0.05 * len(edits))]
    assert f" 95%   {threshold:9.4f}" in shown
    found = json.loads(run("score", store, "--with", "my_scorers:brightness", "--json").stdout)
    assert (found["name"], found["edits"], found["made"], found["unreadable"]) == ("brightness", len(edits), 0, 0)
    assert found["keeping"]["0.95"] == pytest.approx(float(threshold), rel=1e-6)
    assert found["scorer"]["scorer"] == "my_scorers:brightness" and found["scorer"]["revision"].startswith("sha256:")
    assert "keeping" in json.loads(run("score", store, "--with", "my_scorers:none", "--json").stdout)
    with pytest.raises(ConfigError, match="store must be a folder, found 'file:"):
        score(store.as_uri(), "my_scorers:brightness")


# CLIP -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of the real classes, tiny and with random weights."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    part: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.CLIPConfig(
        text_config={**part, "vocab_size": 99, "max_position_embeddings": 16},
        vision_config={**part, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_clip_is_the_cosine_of_both_images_features(root: Path, store: Path, clip: Path) -> None:
    import torch
    from transformers import AutoImageProcessor, CLIPModel

    found = score(store, f"clip:{clip}", batch_size=5)
    assert found.name == "clip" and found.by.scorer == "clip:tiny-clip" and found.by.revision.startswith("sha256:")
    edits, network = EditStore.open(store), CLIPModel.from_pretrained(clip).eval()
    processor = AutoImageProcessor.from_pretrained(clip)

    def features(image: NDArray[np.uint8]) -> torch.Tensor:
        with torch.inference_mode():
            pixels = processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"]
            return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)[0]

    for edit, value in list(enumerate(values(store, "clip").tolist()))[::4]:
        pixels = decode(edits.encoded(edit))
        original = decode(root / edits.catalog.path(int(edits.index["original"][edit])))
        before = np.asarray(Image.fromarray(original).resize((24, 24), Image.Resampling.BICUBIC))
        wanted = torch.cosine_similarity(features(before), features(pixels), dim=0)
        assert value == pytest.approx(float(wanted), abs=1e-5)
    similarity = load_scorer(f"clip:{clip}").function
    pixels = decode(edits.encoded(0))
    assert np.asarray(similarity([pixels], [pixels.copy()], ["ants"])) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_a_clip_in_another_folder_is_the_same_and_other_weights_are_not(clip: Path, tmp_path: Path) -> None:
    import torch
    from transformers import CLIPModel

    moved = Path(shutil.copytree(clip, tmp_path / "elsewhere" / clip.name))
    assert load_scorer(f"clip:{moved}").by == load_scorer(f"clip:{clip}").by
    network = CLIPModel.from_pretrained(moved)
    with torch.no_grad():
        network.visual_projection.weight.add_(0.1)
    network.save_pretrained(moved)
    revision_of.cache_clear()  # a process looks once
    assert load_scorer(f"clip:{moved}").by != load_scorer(f"clip:{clip}").by


@pytest.mark.slow
def test_clips_that_are_refused(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def changed(name: str) -> Path:
        return Path(shutil.copytree(clip, tmp_path / name))

    folder = changed("code")
    (folder / "modeling.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match="brings code of its own"):
        load_scorer(f"clip:{folder}")
    folder = changed("pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="must have its weights as safetensors"):
        load_scorer(f"clip:{folder}")
    folder = changed("damaged")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be loaded by transformers"):
        load_scorer(f"clip:{folder}")
    folder = changed("no config")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"must be a saved model with a config\.json"):
        load_scorer(f"clip:{folder}")
    folder = tmp_path / "vit"
    part: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    transformers.ViTModel(transformers.ViTConfig(**part, image_size=32, patch_size=8)).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)
    with pytest.raises(ConfigError, match="must have image features as CLIP has, found ViTModel"):
        load_scorer(f"clip:{folder}")
    with pytest.raises(ConfigError, match=r"must be a folder or a hub id"):
        load_scorer(f"clip:{tmp_path / 'nowhere'}")
    # There is no network here; huggingface_hub reads its offline switch when it is imported.
    __import__("huggingface_hub.constants")
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"neither a folder nor available from the hub.*hf download"):
        load_scorer("clip:nobody/nothing")


# The example ----------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_example_is_trained_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells the edits of photographs that it has not seen from those of others."""
    train, test = (
        write_photographs(tmp_path / name, ("ants", "bees"), 16, 64, 80, seed=seed)
        for name, seed in (("train", 0), ("test", 500))
    )
    config = GenerateConfig(prompts=("autumn", "sunset", "rainbow"), size=64)
    for root in (train, test):
        generate(root, root.with_name(f"{root.name}-edits"), config)
    weights = tmp_path / "weights.pt"
    arguments = (train, tmp_path / "train-edits", "--out", weights, "--epochs", 8, "--batch-size", 16)
    done = subprocess.run(
        [sys.executable, EXAMPLES / "flower_scorer.py", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0 and "trained on 32 originals" in done.stdout, done.stderr
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("FLOWER_SCORER", str(weights))
    found = score(tmp_path / "test-edits", "flower_scorer:Agreement", name="agreement")
    assert found.by.revision == f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"
    edits = EditStore.open(tmp_path / "test-edits")
    assert len(found.values) == len(edits) and np.abs(found.values).max() <= 1.001
    agreement = load_scorer("flower_scorer:Agreement").function
    pixels = [decode(edits.encoded(edit)) for edit in range(len(edits))]
    others = [decode(test / edits.catalog.path(int(row))) for row in np.roll(edits.index["original"], len(edits) // 2)]
    swapped = np.array(agreement(others, pixels, ["ants"] * len(edits)))
    assert (swapped >= found.keeping(0.95)).mean() < 0.3
