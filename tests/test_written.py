"""Settings as one would write them: short, and again the same setting when run."""

import re
from dataclasses import dataclass
from typing import Any

import pytest

import dali_diffusemix
from dali_diffusemix import (
    AutoAugment,
    ColorJitter,
    EvalCrop,
    GaussianBlur,
    MixSpec,
    PackConfig,
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
from dali_diffusemix.plan.augment import settings_of
from dali_diffusemix.plan.written import written


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (None, "None"),
        (MixSpec.paper(), "MixSpec.paper()"),
        (MixSpec.release(), "MixSpec.release()"),
        (MixSpec(probability=0.7), "MixSpec(probability=0.7)"),
        (TrainCrop(224), "TrainCrop(224)"),
        (TrainCrop((64, 48), scale=(0.25, 1)), "TrainCrop((64, 48), scale=(0.25, 1))"),
        (RandomCrop(32, padding=4), "RandomCrop(32, padding=4)"),
        (EvalCrop(224, resize=256), "EvalCrop(224, resize=256)"),
        (RandAugment(), "RandAugment()"),
        (RandAugment(magnitude=5), "RandAugment(magnitude=5)"),
        (ColorJitter(0.4, hue=0.1), "ColorJitter(brightness=(0.6, 1.4), hue=(-0.1, 0.1))"),
        (GaussianBlur(13), "GaussianBlur(13)"),
        (RandomErasing(0.25), "RandomErasing(p=0.25)"),
        (Schedule({0: None, 5: MixSpec.paper()}), "Schedule({0: None, 5: MixSpec.paper()})"),
        (
            Schedule({0: TrainCrop(32), 9: TrainCrop(64, flip=0)}),
            "Schedule({0: TrainCrop(32), 9: TrainCrop(64, flip=0)})",
        ),
        ((TrivialAugmentWide(),), "(TrivialAugmentWide(),)"),
        ((AutoAugment(), Solarize(99)), "(AutoAugment(), Solarize(threshold=99))"),
        (RandomChoice((Solarize(), GaussianBlur(3))), "RandomChoice((Solarize(), GaussianBlur(3)))"),
        (PackConfig(format="raw", max_side=256), "PackConfig(format='raw', max_side=256)"),
        (1 / 3, "0.3333"),
    ],
)
def test_a_setting_is_written_as_the_code_that_makes_it(setting: Any, text: str) -> None:
    assert written(setting) == text
    if not isinstance(setting, float):
        assert (
            eval(text, vars(dali_diffusemix) | {name: getattr(dali_diffusemix, name) for name in _names(text)})
            == setting
        )


def _names(text: str) -> list[str]:
    return re.findall(r"\b[A-Z]\w+(?=[.(])", text)


@pytest.mark.parametrize("setting", ["rand-m9-mstd0.5-inc1", "ThreeAugment"])
def test_timms_settings(setting: str) -> None:
    (*_, last) = settings_of(setting)  # type: ignore[misc]  # no Schedule
    assert isinstance(last, TimmRandAugment | ColorJitter)
    assert written(last).startswith(f"{type(last).__name__}(") and "interpolation='random'" not in written(last)


class Plain:
    def __init__(self) -> None:
        self.output_size = (8, 8)


@dataclass(frozen=True)
class Own:
    size: int
    names: tuple[str, ...] = ("a",)


class Long:
    def __repr__(self) -> str:
        return "Long(\n" + "x" * 300 + ")"


def test_what_a_user_wrote() -> None:
    assert written(Plain()) == "Plain"
    assert written(Own(3)) == "Own(3)" and written(Own(3, names=("b", "c"))) == "Own(3, names=('b', 'c'))"
    assert written(Long()).startswith("Long( xxx") and len(written(Long())) == 200 and written(Long()).endswith(" ...")
