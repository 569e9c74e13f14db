"""Pictures of what the plan does to some samples.

    contact_sheet    caption | original  edit  mask | hybrid  fractal  augmented     as in the paper's Figure 3
    epochs_sheet     original | augmented, in one epoch after another
    presets_sheet    original | mask  augmented | mask  augmented                    each pair under a mix of its own
    parts_sheet      caption | original  edit | augmented                            what of each the loader decodes
    animation        augmented, a frame an epoch

Every cell is computed by the specification in `mixing` from a row of the dataset's own plan, and is the output grid
pixel for pixel where it shows a sample. `encoded` gives the content of a file.

    sheets, animation -> samples (a row of a plan with its images), canvas (where things lie) -> lettering (type)
"""

from dali_diffusemix.inspect.preview.animation import ANIMATION_ENDINGS, SHEET_ENDINGS, animation, encoded
from dali_diffusemix.inspect.preview.samples import decoded_shares, matching_indices, spread_indices
from dali_diffusemix.inspect.preview.sheets import COLUMNS, contact_sheet, epochs_sheet, parts_sheet, presets_sheet

__all__ = [
    "ANIMATION_ENDINGS",
    "COLUMNS",
    "SHEET_ENDINGS",
    "animation",
    "contact_sheet",
    "decoded_shares",
    "encoded",
    "epochs_sheet",
    "matching_indices",
    "parts_sheet",
    "presets_sheet",
    "spread_indices",
]
