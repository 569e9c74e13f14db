"""What version 0.1 wrote, before the package was divided into rooms, is read, resumed and grown by this one.

tests/data/version_0_1 holds 8 photographs with their catalog, an edit store (5 edits accepted, 11 rejected), a packed
store and a fractal bank; the state of a loader after its first batch, and the rest of that epoch as it was delivered.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_diffusemix import Catalog, DiffuseMixDataset, DiffuseMixLoader, EditStore, MixSpec, TrainCrop
from dali_diffusemix.generate import GenerateConfig, generate
from dali_diffusemix.generate.quality import Thresholds
from dali_diffusemix.inspect.verify import verify
from dali_diffusemix.store import OriginalStore

CONFIG = GenerateConfig(
    prompts=("autumn", "snowy"), size=32, thresholds=Thresholds(like=0.18, unlike=0.8), originals_per_shard=4
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parent / "data" / "version_0_1", tmp_path / "written"))


@pytest.mark.parametrize("root", ["originals", "packed"])
def test_a_state_resumes_with_the_samples_that_were_to_come(written: Path, root: str) -> None:
    dataset = DiffuseMixDataset(
        written / root,
        edits=written / "edits",
        fractals=written / "fractals.npy",
        mix=MixSpec.paper(),
        crop=TrainCrop(24),
        normalize=None,
        seed=7,
    )
    loader = DiffuseMixLoader(dataset, 3, shuffle=True, device="cpu", dtype=torch.uint8, return_index=True)
    loader.load_state_dict(json.loads((written / "state.json").read_text()))
    images, labels, indices = (torch.cat(parts).numpy() for parts in zip(*loader, strict=True))
    expected = np.load(written / "rest_of_epoch.npz")
    assert indices.tolist() == expected["indices"].tolist()
    assert labels.tolist() == expected["labels"].tolist()
    # Another version of libjpeg-turbo may round otherwise.
    assert np.abs(images.astype(int) - expected["images"]).max() <= 1


def test_stores_open_and_are_whole(written: Path) -> None:
    catalog = Catalog.open(written / "catalog")
    store = EditStore.open(written / "edits")
    packed = OriginalStore.open(written / "packed")
    assert catalog.fingerprint == store.catalog.fingerprint == packed.catalog.fingerprint
    assert (len(catalog), len(store), len(packed.catalog)) == (8, 5, 8)
    for name in ("edits", "packed"):
        assert not verify(written / name).problems


def test_a_store_with_former_names_of_verdicts_grows(written: Path) -> None:
    shard = json.loads((written / "edits" / "shards" / "edits-000000.json").read_text())
    assert "too like the original" in shard["verdicts"] or "too unlike the original" in shard["verdicts"]
    before = (written / "edits" / "index.npy").read_bytes()
    summary = generate(written / "originals", written / "edits", CONFIG)
    assert summary.made == 0 and (written / "edits" / "index.npy").read_bytes() == before
    assert (summary.verdicts["accepted"], summary.verdicts["unchanged"], summary.verdicts["structure_lost"]) == (
        5,
        3,
        8,
    )
    grown = generate(written / "originals", written / "edits", GenerateConfig(**{**vars(CONFIG), "variants": 2}))
    assert grown.made == 16 and sum(grown.verdicts.values()) == 32
    assert not verify(written / "edits").problems
