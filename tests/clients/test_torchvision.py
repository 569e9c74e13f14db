"""torchvision's reference training script, references/classification/train.py: killed in the second epoch, resumed."""

from pathlib import Path

import pytest
import torch
from material import MakeStore, write_photographs
from scripts import Measured, digest, folder_of, inserted, replaced, run, version

from dali_diffusemix.fractals import FractalBank

IMPORTS = """
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, MixSpec, TrainCrop
"""
# Instead of the datasets and samplers of load_data.
LOADERS = """
root = args.data_path
dataset = DiffuseMixDataset(
    train_dir, crop=TrainCrop(32), mix=MixSpec.paper(), edits=root + "/edits", fractals=root + "/fractals.npy", seed=3
)
dataset_test = DiffuseMixDataset(val_dir, crop=EvalCrop(32))
data_loader = DiffuseMixLoader(
    dataset,
    batch_size=args.batch_size,
    shuffle=True,
    num_workers=args.workers,
    pin_memory=True,
    collate_fn=collate_fn,
    device="cpu",
)
"""
EVALUATE = """
data_loader_test = DiffuseMixLoader(
    dataset_test, batch_size=args.batch_size, num_workers=args.workers, pin_memory=True, device="cpu"
)
"""

SAFE = "torch.serialization.add_safe_globals([__import__('argparse').Namespace])"


@pytest.fixture
def data(tmp_path: Path, make_store: MakeStore, bank: FractalBank) -> Path:
    """train/ and val/ of 6 classes, because the script measures top-5 accuracy, edits/ and fractals.npy."""
    train = write_photographs(tmp_path / "data" / "train", "abcdef", 6)
    (tmp_path / "data" / "val").symlink_to(train)
    (tmp_path / "data" / "edits").symlink_to(make_store(train))
    assert bank.path is not None
    (tmp_path / "data" / "fractals.npy").symlink_to(bank.path)
    return tmp_path / "data"


def test_killed_and_resumed(data: Path, tmp_path: Path, measured: Measured) -> None:
    sources = folder_of("DALI_DIFFUSEMIX_VISION", "the sources of torchvision")
    scripts = sources / "references" / "classification"
    source = (scripts / "train.py").read_text()
    source = inserted(source, "import presets", IMPORTS)
    source = replaced(source, "data_loader", "torch.utils.data.DataLoader", LOADERS)
    source = replaced(source, "data_loader_test", "torch.utils.data.DataLoader", EVALUATE)
    # The script tells samplers the epoch only if it is distributed, and seeds nothing.
    source = inserted(source, "train_one_epoch(model", "data_loader.set_epoch(epoch)")
    source = inserted(source, "utils.init_distributed_mode(args)", "torch.manual_seed(0)")
    # It cannot load what it saves: its checkpoints hold argparse's Namespace, and it loads weights only.
    source = inserted(source, "checkpoint = torch.load(args.resume", SAFE)
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "train.py").write_text(source)
    arguments = (
        *("--data-path", data, "--model", "resnet18", "--device", "cpu", "--batch-size", 8, "--epochs", 2),
        *("--workers", 1, "--lr", 0.05, "--print-freq", 1, "--val-resize-size", 32),
        *("--val-crop-size", 32, "--train-crop-size", 32),
    )

    def weights(name: str) -> dict[str, str]:
        found = torch.load(tmp_path / name / "model_1.pth", weights_only=False)
        return {part: digest(found[part]) for part in ("model", "optimizer", "lr_scheduler")}

    path = [scripts]
    run(folder / "train.py", *arguments, "--output-dir", tmp_path / "whole", path=path)
    killed = tmp_path / "killed"
    done = run(folder / "train.py", *arguments, "--output-dir", killed, path=path, kill_at="Epoch: [1]  [2/5]")
    assert "Epoch: [0]  [4/5]" in done.stdout
    resume = ("--resume", killed / "model_0.pth")
    run(folder / "train.py", *arguments, "--output-dir", tmp_path / "resumed", *resume, path=path)
    assert weights("resumed") == weights("whole")
    sources_version = (sources / "version.txt").read_text().strip()
    measured(script=sources_version, torchvision=version("torchvision"), weights=weights("whole")["model"][:16])
