"""One sample over several epochs, one frame each; and the encoding of pictures as files."""

import io
from collections.abc import Sequence
from typing import Final

from PIL import Image, ImageDraw

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.inspect.preview.canvas import ACCENT, INK, MUTED, PAPER, RULE, zoom_of, zoomed
from dali_diffusemix.inspect.preview.lettering import fitted, width, write
from dali_diffusemix.inspect.preview.samples import Progress, Sample, check_epochs, counted
from dali_diffusemix.loading.dataset import DiffuseMixDataset
from dali_diffusemix.plan.spec import MASKS

SHEET_ENDINGS: Final = (".png", ".jpg")
"""Endings of a file with a sheet."""
ANIMATION_ENDINGS: Final = (".webp", ".gif")
"""Endings of a file with an animation."""

_FRAME_MILLISECONDS: Final = 1000
_WEBP_QUALITY: Final = 80
_JPEG_QUALITY: Final = 90

_LEAST, _MOST = 224, 512  # longest side of a frame in pixels
_STRIP = 54  # height of the caption


def animation(
    dataset: DiffuseMixDataset, *, index: int, epochs: Sequence[int], progress: Progress | None = None
) -> list[Image.Image]:
    """Draw one sample in several epochs, as the network sees it, with a caption below.

    Args:
        dataset: The dataset; its seed, mix and crop decide the samples.
        index: The sample.
        epochs: 1 to 100 epochs, one per frame; `dataset.epoch` does not change.
        progress: Called with the number of frames drawn, and of all frames.

    Returns:
        RGB frames of one size: the output grid pixel for pixel, enlarged by a whole number below 224 pixels and shrunk
        above 512; below it the class, the epoch, the prompt and the mask.

    Raises:
        ConfigError: The sample is not in the dataset, or there are none or too many epochs.
        DecodeError: The original or an edit cannot be decoded, and the dataset has on_error="raise".
    """
    check_epochs(epochs)
    plans = [dataset.planner.batch(epoch, [index]) for epoch in epochs]
    heights, widths = zip(*(plan.output_size for plan in plans), strict=True)  # a Schedule of crops may change them
    largest = max(heights), max(widths)
    zoom = zoom_of(largest, _LEAST, _MOST)
    size = max(1, round(largest[1] * zoom)), max(1, round(largest[0] * zoom))
    frames = []
    for number in counted(len(plans), progress):
        sample = Sample.of(dataset, plans[number], 0)
        frames.append(_frame(sample, zoomed(sample.augmented(), zoom), size, (number + 1) / len(epochs)))
    return frames


def _frame(sample: Sample, picture: Image.Image, size: tuple[int, int], progress: float) -> Image.Image:
    """A frame of a sample; its picture is at most as large as `size`, (width, height)."""
    epoch = sample.plan.epoch
    frame = Image.new("RGB", (size[0], size[1] + _STRIP), PAPER)
    frame.paste(picture)
    draw, top = ImageDraw.Draw(frame), size[1]
    draw.rectangle([0, top, frame.width - 1, top + 2], fill=RULE)
    draw.rectangle([0, top, round(progress * frame.width) - 1, top + 2], fill=ACCENT)
    mask = int(sample.plan.mask[sample.row])
    prompt = ("not mixed", MUTED) if sample.prompt is None else (f"“{sample.prompt}”", ACCENT)
    side = "" if mask < 0 else f"mask {MASKS[mask]}"
    for baseline, (left, colour), right in (
        (top + 23, (sample.class_name, INK), f"epoch {epoch}"),
        (top + 44, prompt, side),
    ):
        beside = width(right, 13)
        write(frame, (8, baseline), *fitted(left, 15, frame.width - beside - 24), colour)
        write(frame, (frame.width - beside - 8, baseline), right, 13, MUTED)
    return frame


def encoded(pictures: Sequence[Image.Image], ending: str) -> bytes:
    """Return the content of a file: a sheet, or an endless animation with one frame per second.

    Args:
        pictures: One sheet, or the frames of an animation, all of one size.
        ending: One of `SHEET_ENDINGS` for a sheet, or of `ANIMATION_ENDINGS` for an animation. PNG keeps every pixel.

    Raises:
        ConfigError: The ending is unknown, or is that of a sheet and there are several pictures.
    """
    if ending not in SHEET_ENDINGS + ANIMATION_ENDINGS:
        raise ConfigError(f"ending must be one of {SHEET_ENDINGS + ANIMATION_ENDINGS}, found {ending!r}.")
    stream = io.BytesIO()
    first, *others = pictures
    if ending in SHEET_ENDINGS:
        if others:
            raise ConfigError(
                f"{ending} must have one picture, found {len(pictures)}; an animation ends in {ANIMATION_ENDINGS}."
            )
        if ending == ".png":
            first.save(stream, "PNG")
        else:
            first.save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling="4:2:0", optimize=True)
    elif ending == ".webp":
        first.save(
            stream,
            "WEBP",
            save_all=True,
            append_images=others,
            duration=_FRAME_MILLISECONDS,
            loop=0,
            quality=_WEBP_QUALITY,
            method=6,
        )
    else:
        palettes = [frame.quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in pictures]
        palettes[0].save(
            stream,
            "GIF",
            save_all=True,
            append_images=palettes[1:],
            duration=_FRAME_MILLISECONDS,
            loop=0,
            optimize=False,
        )
    return stream.getvalue()
