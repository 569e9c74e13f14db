"""Lightning Fabric: the loader by itself is right, and `setup_dataloaders` refuses it."""

import warnings
from pathlib import Path

import pytest
import torch
from samples import described, training_set
from scripts import Measured, version

from dali_diffusemix import DiffuseMixLoader

lightning = pytest.importorskip("lightning", reason="Lightning is not installed: make clients")


def test_setup_dataloaders_refuses_and_the_loader_resumes(data: Path, tmp_path: Path, measured: Measured) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        fabric.launch()

    def make() -> DiffuseMixLoader:
        return DiffuseMixLoader(training_set(data), 7, shuffle=True, num_workers=1, device="cpu")

    with pytest.raises(TypeError, match="Only PyTorch DataLoader are currently supported") as caught:
        fabric.setup_dataloaders(make())
    whole = make()
    epochs = [[described(*batch) for batch in whole] for _ in range(2)]
    model, optimizer = fabric.setup(*_parts())
    loader, seen = make(), []
    for images, labels in loader:
        seen.append(described(images, labels))
        fabric.backward(torch.nn.functional.cross_entropy(model(images.flatten(1)), labels))
        optimizer.step()
        if len(seen) == 3:
            fabric.save(
                tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer, "loader": loader.state_dict()}
            )
    resumed = make()
    resumed.load_state_dict(fabric.load(tmp_path / "state.ckpt")["loader"])
    assert seen == epochs[0]
    assert [[described(*batch) for batch in resumed] for _ in range(2)] == [epochs[0][3:], epochs[1]]
    measured(lightning=version("lightning"), setup_dataloaders=str(caught.value))


def _parts() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(3 * 24 * 24, 3)
    return model, torch.optim.SGD(model.parameters(), 0.01)
