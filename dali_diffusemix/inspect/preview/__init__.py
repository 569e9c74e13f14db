"""Pictures of samples, as the plan makes them.

    contact_sheet    caption | original  edit  mask | hybrid  fractal  augmented     as in the paper's Figure 3
    epochs_sheet     original | augmented, in several epochs
    presets_sheet    original | mask  augmented | mask  augmented                    a pair for each mix
    parts_sheet      caption | original  edit | augmented                            the parts that the loader decodes
    batch_sheet      the contact sheet of a batch that a loader delivered, and what a batch transform made of it
    animation        augmented, one frame per epoch

Every cell is computed by the specification in `mix.pixel` from a row of the dataset's plan; a cell that shows a sample
is the output grid, pixel for pixel. `encoded` returns the content of a file.

    sheets, animation -> made (tensors), samples (a row of a plan with its images), canvas (layout) -> lettering (text)
"""

from dali_diffusemix.inspect.preview.animation import ANIMATION_ENDINGS, SHEET_ENDINGS, animation, encoded
from dali_diffusemix.inspect.preview.samples import decoded_shares, matching_indices, spread_indices
from dali_diffusemix.inspect.preview.sheets import (
    COLUMNS,
    batch_sheet,
    contact_sheet,
    epochs_sheet,
    parts_sheet,
    presets_sheet,
    write_batch,
)

__all__ = [
    "ANIMATION_ENDINGS",
    "COLUMNS",
    "SHEET_ENDINGS",
    "animation",
    "batch_sheet",
    "contact_sheet",
    "decoded_shares",
    "encoded",
    "epochs_sheet",
    "matching_indices",
    "parts_sheet",
    "presets_sheet",
    "spread_indices",
    "write_batch",
]
