"""ResNets with torchvision's parameter names, from torchvision or timm if installed, otherwise from this module.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016: resnet18, resnet34, resnet50
    He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016: preact_resnet18

Weights of torchvision's models fit these and vice versa. The small stem (one 3x3 convolution, no pooling) is for images
of 32 and 64 pixels. `width` is the number of channels of the first stage, 64 in the papers.
"""

import importlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from dali_diffusemix.errors import ConfigError, MissingDependencyError

LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "preact_resnet18": (2, 2, 2, 2)}
HEADS = ("fc.weight", "fc.bias")


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = convolution(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


class PreActBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), convolution(inputs, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), convolution(width, width, 3)
        plain = stride == 1 and inputs == width
        self.downsample = None if plain else convolution(inputs, width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(x))
        x = x if self.downsample is None else self.downsample(y)
        return x + self.conv2(functional.relu(self.bn2(self.conv1(y))))


class ResNet(nn.Module):
    """A network from (batch, 3, height, width) images to (batch, classes) logits."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck | PreActBlock],
        layers: tuple[int, ...],
        classes: int,
        *,
        small: bool,
        width: int,
    ) -> None:
        super().__init__()
        preact = block is PreActBlock
        self.conv1 = convolution(3, width, 3) if small else convolution(3, width, 7, 2)
        # A pre-activation network normalises at the start of its blocks, and once at the end.
        self.bn1 = None if preact else nn.BatchNorm2d(width)
        self.maxpool = None if small else nn.MaxPool2d(3, 2, padding=1)
        channels = width
        for stage, blocks in enumerate(layers):
            built = []
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                built.append(block(channels, width << stage, stride))
                channels = (width << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*built))
        self.bn_last = nn.BatchNorm2d(channels) if preact else None
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        if self.bn1 is not None:
            x = functional.relu(self.bn1(x))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        if self.bn_last is not None:
            x = functional.relu(self.bn_last(x))
        return self.fc(x.mean((2, 3)))


def build(name: str, classes: int, *, weights: str | None = None, small: bool = False, width: int = 64) -> nn.Module:
    """Build a classifier.

    Args:
        name: One of `LAYERS`, or any model of torchvision or timm if they are installed.
        classes: Number of outputs.
        weights: "imagenet" downloads the weights of torchvision or timm. Otherwise a file of weights (.pth or
            .safetensors); its last layer is skipped if it has another number of classes. None: random weights.
        small: Use the stem for images of 32 or 64 pixels; only for the models of this module.
        width: Channels of the first stage; values other than 64 only for the models of this module.

    Raises:
        ConfigError: there is no such model, or the weights belong to another one.
        MissingDependencyError: the model or its weights need torchvision or timm.
    """
    fetched = weights == "imagenet"
    model = None
    if not (small or width != 64 or name.startswith("preact")):
        model = _torchvision(name, classes, fetched) or _timm(name, classes, fetched)
    if model is None:
        if name not in LAYERS:
            raise ConfigError(
                f"model.name must be one of {', '.join(LAYERS)}, or a model of torchvision or timm if one of them is "
                f"installed and has it, found {name!r}."
            )
        if fetched:
            raise MissingDependencyError(
                f"model.weights = 'imagenet' needs torchvision or timm, and {name} with the usual stem and width: "
                "install one of them, or give a file of weights."
            )
        block = {"resnet50": Bottleneck, "preact_resnet18": PreActBlock}.get(name, BasicBlock)
        model = ResNet(block, LAYERS[name], classes, small=small, width=width)
    if weights is not None and not fetched:
        _load(model, Path(weights))
    return model


def _torchvision(name: str, classes: int, fetched: bool) -> nn.Module | None:
    try:
        models = importlib.import_module("torchvision.models")
        model = models.get_model(name, weights="DEFAULT" if fetched else None)
    except (ImportError, RuntimeError, ValueError):  # not installed, built for another torch, or no such model
        return None
    if not isinstance(getattr(model, "fc", None), nn.Linear):
        return None if fetched else models.get_model(name, weights=None, num_classes=classes)
    model.fc = nn.Linear(model.fc.in_features, classes)
    return model


def _timm(name: str, classes: int, fetched: bool) -> nn.Module | None:
    try:
        timm = importlib.import_module("timm")
        return timm.create_model(name, pretrained=fetched, num_classes=classes)
    except (ImportError, RuntimeError, ValueError):
        return None


def _load(model: nn.Module, file: Path) -> None:
    """Load weights from a file, except the last layer if its shape differs. Only tensors are unpickled."""
    if not file.is_file():
        raise ConfigError(f"model.weights must be 'imagenet' or a file, found {str(file)!r}.")
    if file.suffix == ".safetensors":
        found = importlib.import_module("safetensors.torch").load_file(file)
    else:
        found = torch.load(file, map_location="cpu", weights_only=True)
        found = found.get("model", found)
    ours = model.state_dict()
    for head in HEADS:
        if head in found and head in ours and found[head].shape != ours[head].shape:
            found[head] = ours[head]
    differ = sorted(found.keys() ^ ours.keys()) + [
        name for name in found.keys() & ours.keys() if found[name].shape != ours[name].shape
    ]
    if differ:
        raise ConfigError(
            f"model.weights: {str(file)!r} is of another model: {len(differ)} tensors differ, {differ[0]!r} first; "
            "give weights of this one."
        )
    model.load_state_dict(found)
