"""timm's own train.py, of its last release and of its main branch: killed in the second epoch and resumed."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from scripts import Measured, digest, folder_of, inserted, replaced, run, version

VARIABLE = "DALI_DIFFUSEMIX_TIMM"

TRAIN = """
dataset_train = DiffuseMixDataset(
    args.data_dir + "/train",
    crop=TrainCrop(32),
    edits=args.data_dir + "/edits",
    fractals=args.data_dir + "/fractals.npy",
    mix=MixSpec.paper(),
    seed=args.seed,
)
loader_train = prepare(
    DiffuseMixLoader(dataset_train, args.batch_size, shuffle=True, drop_last=True, device="cpu"), collate_fn
)
"""
EVALUATE = """
loader_eval = prepare(DiffuseMixLoader(DiffuseMixDataset(args.data_dir + "/val", crop=EvalCrop(32)), 8, device="cpu"))
"""
IMPORTS = """
from dali_diffusemix import DiffuseMixDataset, DiffuseMixLoader, EvalCrop, MixSpec, TrainCrop
from dali_diffusemix.integrations.timm import prepare
"""
MIXUP = ("--mixup", 0.8, "--cutmix", 1.0)
RUNS = [
    ("release", (*MIXUP, "--mixup-off-epoch", 1)),
    ("main", MIXUP),
    ("main", ()),
    ("main's script, installed package", ()),
]


def script_of(which: str, tmp_path: Path, measured: Measured) -> Path:
    """train.py with our loaders; beside it the package of the same commit, unless the installed one is asked for."""
    clone = folder_of(VARIABLE, "a clone of huggingface/pytorch-image-models")
    git = ["git", "-C", str(clone)]
    tags = subprocess.check_output([*git, "tag", "--list", "v*"], text=True).split()
    newest = max(
        (tag for tag in tags if re.fullmatch(r"v[\d.]+", tag)), key=lambda tag: [*map(int, tag[1:].split("."))]
    )
    ref = newest if which == "release" else "HEAD"
    folder = tmp_path / "timm"
    folder.mkdir()
    packed = subprocess.check_output([*git, "archive", ref, "train.py", "timm"])
    subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
    commit = subprocess.check_output([*git, "log", "-1", "--format=%H %cs", ref], text=True).strip()
    said = (folder / "timm" / "version.py").read_text().split("'")[1]
    if which.endswith("installed package"):
        pytest.importorskip("timm")
        (folder / "timm").rename(folder / "unused")
        said = version("timm")
    measured(script=f"{ref} {commit}", timm=said)
    source = (folder / "train.py").read_text()
    source = inserted(source, "from timm import utils", IMPORTS)
    source = replaced(source, "loader_train", "create_loader", TRAIN)
    source = replaced(source, "loader_eval", "create_loader", EVALUATE)
    (folder / "train.py").write_text(source)
    return folder / "train.py"


@pytest.mark.parametrize(("which", "mixup"), RUNS)
def test_killed_and_resumed(
    data: Path, tmp_path: Path, which: str, mixup: tuple[object, ...], measured: Measured
) -> None:
    script = script_of(which, tmp_path, measured)
    arguments = (
        *("--data-dir", data, "--model", "test_resnet", "--num-classes", 3, "--img-size", 32, "--batch-size", 8),
        *("--epochs", 2, "--workers", 0, "--device", "cpu", "--output", tmp_path / "out", "--log-interval", 1),
        *("--opt", "sgd", "--lr", 0.05, "--warmup-epochs", 0, "--sched", "cosine", "--seed", 7, *mixup),
    )

    def weights(name: str) -> dict[str, str]:
        found = torch.load(tmp_path / "out" / name / "last.pth.tar", map_location="cpu", weights_only=False)
        assert found["epoch"] == 1
        return {part: digest(found[part]) for part in ("state_dict", "optimizer")}

    run(script, *arguments, "--experiment", "whole")
    done = run(script, *arguments, "--experiment", "killed", kill_at="Train: 1 [   1/")
    assert "Train: 0 [   3/4 (100%)]" in done.stdout
    checkpoint = tmp_path / "out" / "killed" / "checkpoint-0.pth.tar"
    run(script, *arguments, "--experiment", "resumed", "--resume", checkpoint)
    assert weights("resumed") == weights("whole")
    rows = [(tmp_path / "out" / name / "summary.csv").read_text().splitlines() for name in ("whole", "resumed")]
    assert rows[0][2] == rows[1][1]  # the losses of epoch 1
    measured(weights=weights("whole")["state_dict"][:16], epoch_1=rows[0][2], mixup=" ".join(map(str, mixup)))
