"""dali_diffusemix.fn on a GPU against the same on the CPU: the pixels given are the same, so only sums may differ."""

from typing import Any

import numpy as np
import pytest
from material import photograph

from dali_diffusemix import FractalBank, MixSpec, TrainCrop
from dali_diffusemix import fn as dmx


@pytest.mark.parametrize("layout", ["CHW", "HWC"])
def test_the_operator_gives_what_it_gives_on_the_cpu(bank: FractalBank, layout: str) -> None:
    from nvidia.dali import fn, pipeline_def, types

    originals = [photograph(i, 70 + i, 90 - i) for i in range(4)]
    edits = [photograph(50 + i, 48, 48) for i in range(4)]

    def run(device: str) -> list[Any]:
        @pipeline_def(batch_size=4, num_threads=1, device_id=0 if device == "gpu" else None, prefetch_queue_depth=1)
        def pipeline() -> Any:
            original, edit = (
                fn.external_source(name=name, dtype=types.UINT8, ndim=3, layout="HWC") for name in ("original", "edit")
            )
            index = fn.external_source(name="index", dtype=types.INT64, ndim=0)
            mix = MixSpec(probability=1)
            plan = dmx.plan(index, original.shape(), crop=TrainCrop(40), mix=mix, fractals=bank)
            if device == "gpu":
                original, edit = original.gpu(), edit.gpu()
            return dmx.mix(original, edit, plan, fractals=bank, output_size=(40, 40), layout=layout)

        built = pipeline()
        built.build()
        built.feed_input("original", originals)
        built.feed_input("edit", edits)
        built.feed_input("index", np.arange(4))
        (output,) = built.run()
        return [np.asarray(output.as_cpu().at(i) if device == "gpu" else output.at(i)) for i in range(4)]

    for there, here in zip(run("gpu"), run("cpu"), strict=True):
        np.testing.assert_allclose(there, here, atol=2e-5)
