"""Draw the figures of the documents, from the folder that `make demo` leaves.

    python docs/figures.py demo docs/figures

Everything in them is computed: samples by the specification, windows by the plan. Needs matplotlib.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dali_diffusemix import Catalog, DiffuseMixDataset, MixSpec, TrainCrop
from dali_diffusemix.images.codec import decode
from dali_diffusemix.mix.pixel import edit_weight, mixed_image
from dali_diffusemix.plan import MASKS, BatchPlan, EpochOrder, visible_parts

INK, MUTED, RULE, PAPER = "#1b1f24", "#6a7078", "#d8d8d2", "#ffffff"
ORIGINAL, EDIT, FRACTAL = "#1f5fa8", "#be4310", "#6b4ba1"
pyplot.rcParams |= {"font.family": "DejaVu Sans", "text.color": INK, "figure.facecolor": PAPER, "savefig.dpi": 160}


class Canvas:
    """A figure whose places are given in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure: Figure = pyplot.figure(figsize=(width, height))
        self.back, self.front = (self.figure.add_axes((0, 0, 1, 1), zorder=zorder) for zorder in (-1, 1))
        for axes in (self.back, self.front):
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.axis("off")

    def band(self, top: float, bottom: float, colour: str) -> None:
        box = FancyBboxPatch(
            (0.16, top + 0.02),
            self.width - 0.32,
            bottom - top - 0.04,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour,
            edgecolor="none",
        )
        self.back.add_patch(box)

    def text(self, x: float, y: float, text: str, size: float = 10, colour: str = INK, **options: object) -> None:
        self.back.text(x, y, text, fontsize=size, color=colour, **{"ha": "center", "va": "center", **options})

    def arrow(self, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED) -> None:
        options = {"arrowstyle": "-|>", "color": colour, "lw": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 15}
        self.front.annotate("", end, start, arrowprops=options)

    def picture(
        self, left: float, top: float, width: float, height: float, image: np.ndarray, edge: str = RULE
    ) -> Axes:
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.imshow(image, interpolation="lanczos" if image.shape[0] > 60 else "nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=edge, linewidth=1.2)
        return axes

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(file, pil_kwargs={"quality": 92, "subsampling": 0, "optimize": True})
        pyplot.close(self.figure)


def sample(dataset: DiffuseMixDataset, plan: BatchPlan, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Original, edit and fractal of a mixed row, as they are stored."""
    assert dataset.store is not None
    assert dataset.bank is not None
    edit = decode(dataset.store.encoded(int(plan.edit[row])))
    return dataset.decode_original(int(plan.original[row])), edit, dataset.bank.images[int(plan.fractal[row])]


def shown(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def with_side(plan: BatchPlan, row: int, image: np.ndarray, *, edit: bool) -> np.ndarray:
    """(height, width, 4): what an image gives to the sample, and nothing on the other side of the seam."""
    whole = mixed_image(plan.unmixed(), row, image, None)
    weight = edit_weight(int(plan.mask[row]), plan.seam_width, plan.span[row], plan.output_size)
    weight = np.broadcast_to(weight, plan.output_size)
    if plan.flip[row]:
        weight = weight[:, ::-1]
    return np.dstack([shown(whole), shown(255 * (weight if edit else 1 - weight))])


def hatch(axes: Axes) -> None:
    """What is transparent in a picture is hatched."""
    axes.set_facecolor("#f1f1ee")
    axes.add_patch(
        Rectangle(
            (0, 0), 1, 1, transform=axes.transAxes, hatch="////", facecolor="#f1f1ee", edgecolor="#dcdcd6", zorder=0
        )
    )
    axes.images[0].set_zorder(1)


def diffusemix(dataset: DiffuseMixDataset, original: int, epochs: Sequence[int], file: Path) -> None:
    """The method: what happens once, and what happens in every epoch."""
    store = dataset.store
    assert store is not None
    canvas = Canvas(9.4, 8.5)
    label = dataset.classes[int(dataset.catalog.labels[original])]
    photograph = dataset.decode_original(original)
    ratio = photograph.shape[0] / photograph.shape[1]

    canvas.band(0.14, 2.42, "#f3f6fa")
    canvas.text(0.42, 0.40, "ONCE, OFFLINE", 12, ORIGINAL, ha="left", weight="bold")
    canvas.text(2.05, 0.40, "a model edits each photograph under a prompt", 10.5, MUTED, ha="left")
    side, top = 1.22, 0.68
    canvas.picture(0.42, top, side / ratio, side, photograph, ORIGINAL)
    canvas.text(0.42 + side / ratio / 2, top + side + 0.18, "photograph", 10)
    begin = 0.42 + side / ratio
    canvas.arrow((begin + 0.14, top + side / 2), (begin + 0.72, top + side / 2))
    first, last = int(store.starts[original]), int(store.starts[original + 1])
    left = begin + 0.86
    for edit in list(range(first, last))[:4]:
        canvas.picture(left, top, side, side, decode(store.encoded(edit)), EDIT)
        canvas.text(left + side / 2, top + side + 0.18, f"“{store.prompt_of(edit)}”", 10)
        left += side + 0.13
    canvas.text(left + 0.14, top + side / 2, "…", 16, MUTED)
    if store.settings["editor"] == "procedural":
        note = "(edits in this picture: procedural, not diffusion)"
        canvas.text(canvas.width - 0.42, 0.40, note, 8, MUTED, ha="right")

    canvas.band(2.56, 8.36, "#faf5f1")
    canvas.text(0.42, 2.84, "EVERY EPOCH, WHILE LOADING", 12, EDIT, ha="left", weight="bold")
    canvas.text(3.56, 2.84, "cut, mixed and cropped afresh; the label stays", 10.5, MUTED, ha="left")
    side, step = 1.40, 1.71
    lefts = [1.06, 2.82, 4.58, 6.86]
    heads = ("part of the\nphotograph", "part of\nan edit", "20 % of\na fractal", "what the\nnetwork sees")
    colours = (ORIGINAL, EDIT, FRACTAL, INK)
    for left, head, colour in zip(lefts, heads, colours, strict=True):
        canvas.text(left + side / 2, 3.24, head, 9.5, colour)
    for number, epoch in enumerate(epochs):
        top = 3.48 + step * number * 0.94
        plan = dataset.planner.batch(epoch, [original])
        _, edit_image, fractal = sample(dataset, plan, 0)
        pure = replace(plan, fractal_weight=np.ones_like(plan.fractal_weight))
        cells = [
            with_side(plan, 0, photograph, edit=False),
            with_side(plan, 0, edit_image, edit=True),
            shown(mixed_image(pure, 0, photograph, None, fractal)),
            shown(mixed_image(plan, 0, photograph, edit_image, fractal)),
        ]
        canvas.text(0.62, top + side / 2, f"epoch\n{number + 1}", 10.5, INK, weight="bold")
        for left, cell, colour in zip(lefts, cells, colours, strict=True):
            axes = canvas.picture(left, top, side, side, cell, colour)
            if cell.shape[2] == 4:
                hatch(axes)
        for left in lefts[1:3]:
            canvas.text(left - 0.18, top + side / 2, "+", 17, MUTED)
        canvas.arrow((lefts[2] + side + 0.16, top + side / 2), (lefts[3] - 0.16, top + side / 2))
        canvas.text(lefts[3] + side + 0.42, top + side / 2, f"“{label}”", 11, INK, weight="bold")
    canvas.save(file)


def parts(dataset: DiffuseMixDataset, index: int, epoch: int, file: Path) -> None:
    """Visible parts: of each image only what its sample shows is decoded."""
    plan = dataset.planner.batch(epoch, [index])
    original, edit, fractal = sample(dataset, plan, 0)
    sizes = np.array([[original.shape[:2]], [edit.shape[:2]]], np.int32)
    windows = visible_parts(plan, sizes)[:, 0]
    canvas = Canvas(9.4, 7.9)
    seen_side, seen_left, seen_top = 3.5, 9.4 - 3.5 - 0.42, 1.30
    seen = canvas.picture(
        seen_left, seen_top, seen_side, seen_side, shown(mixed_image(plan, 0, original, edit, fractal)), INK
    )
    canvas.text(seen_left + seen_side / 2, seen_top - 0.24, "the training sample", 12, INK, weight="bold")
    weight = edit_weight(int(plan.mask[0]), 0.0, plan.span[0], plan.output_size)
    weight = np.broadcast_to(weight, plan.output_size)[:, :: -1 if plan.flip[0] else 1]
    sources = (("photograph", ORIGINAL, original, 0.56), ("its edit", EDIT, edit, 3.44))
    for is_edit, (name, colour, image, top) in enumerate(sources):
        height = 2.15
        width = height * image.shape[1] / image.shape[0]
        y, x, bottom, right = windows[is_edit]
        grey = shown(0.28 * image.mean(2, keepdims=True).repeat(3, 2) + 0.72 * 238)
        grey[y:bottom, x:right] = image[y:bottom, x:right]
        axes = canvas.picture(0.42, top, width, height, grey)
        crop = plan.box[0] * np.tile(image.shape[:2], 2)
        dashes = {"fill": False, "edgecolor": INK, "linestyle": (0, (3, 2)), "lw": 1.3}
        axes.add_patch(Rectangle((crop[1], crop[0]), crop[3], crop[2], **dashes))
        axes.add_patch(Rectangle((x, y), right - x, bottom - y, fill=False, edgecolor=colour, lw=3))
        canvas.text(
            0.42, top - 0.22, f"{name}, {image.shape[1]} × {image.shape[0]}", 12, colour, ha="left", weight="bold"
        )
        share = (bottom - y) * (right - x) / image.shape[0] / image.shape[1]
        canvas.text(0.42, top + height + 0.20, f"{100 * share:.0f} % of it is decoded", 10.5, colour, ha="left")
        away = (crop[0] + y) / 2 if is_edit else (bottom + crop[0] + crop[2]) / 2
        axes.text((x + right) / 2, away, "never decoded", fontsize=9.5, color="#45494f", ha="center", va="center")
        axes.text(
            crop[1] - 4,
            crop[0] + crop[2] / 2,
            "crop",
            fontsize=9.5,
            color="#45494f",
            ha="right",
            va="center",
            rotation=90,
        )
        rows, columns = np.nonzero((weight > 0.5) == bool(is_edit))
        corner, extent = (columns.min() + 2, rows.min() + 2), (np.ptp(columns) - 4, np.ptp(rows) - 4)
        seen.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=colour, lw=3))
        start = (0.42 + right / image.shape[1] * width + 0.04, top + (y + bottom) / 2 / image.shape[0] * height)
        end = (seen_left - 0.08, seen_top + (rows.mean() + 0.5) / plan.output_size[0] * seen_side)
        canvas.arrow(start, end, colour)
    means = decoded(dataset, epochs=20)
    canvas.back.plot([0.42, canvas.width - 0.42], [6.08, 6.08], color=RULE, lw=1)
    canvas.text(0.42, 6.36, "pixels decoded for a sample, on average", 12, INK, ha="left", weight="bold")
    scale = 4.4 / max(means.values())
    for number, (name, count) in enumerate(means.items()):
        y = 6.74 + 0.36 * number
        ours = name == "mixed: visible parts"
        canvas.text(3.22, y, name, 10.5, INK if ours else MUTED, ha="right", weight="bold" if ours else "normal")
        bar = Rectangle((3.34, y - 0.13), count * scale, 0.26, facecolor=EDIT if ours else "#c9c9c3", edgecolor="none")
        canvas.back.add_patch(bar)
        canvas.text(3.44 + count * scale, y, f"{count:,.0f}", 10.5, INK if ours else MUTED, ha="left")
    canvas.save(file)


def decoded(dataset: DiffuseMixDataset, *, epochs: int) -> dict[str, float]:
    """Mean pixels for a sample over some epochs of a dataset that mixes all of them."""
    assert dataset.store is not None
    sizes = np.asarray(dataset.catalog.sizes)
    sums, count = np.zeros(3), 0
    for epoch in range(epochs):
        plan = dataset.planner.batch(epoch, np.arange(len(dataset)))
        both = np.stack([np.asarray(sizes[plan.original], np.int32), dataset.store.sizes(plan.edit)])
        whole = both.prod(2).sum(0)
        windows = visible_parts(plan, both)
        plain = visible_parts(plan.unmixed(), both)[0]

        def area(window: np.ndarray) -> np.ndarray:
            return (window[:, 2] - window[:, 0]) * (window[:, 3] - window[:, 1])

        sums += [one.sum() for one in (whole, area(plain), area(windows[0]) + area(windows[1]))]
        count += len(plan)
    names = ("mixed: both images whole", "not mixed: the crop", "mixed: visible parts")
    return dict(zip(names, sums / count, strict=True))


def masks(dataset: DiffuseMixDataset, original: int, file: Path) -> None:
    """The four masks, and a hard and a soft seam."""
    canvas = Canvas(9.4, 4.7)
    photograph = dataset.decode_original(original)
    assert dataset.store is not None
    edit = decode(dataset.store.encoded(int(dataset.store.starts[original]) + 1))
    size = 256
    plan = DiffuseMixDataset(
        dataset.root,
        catalog=dataset.catalog,
        edits=dataset.store,
        fractals=dataset.bank,
        crop=TrainCrop(size),
        mix=MixSpec(),
    ).planner.batch(0, [original])
    whole = replace(plan, box=np.array([[0.0, 0, 1, 1]]), span=np.array([[0.0, 0, 1, 1]]), flip=np.array([False]))
    for line, (width, name) in enumerate(
        ((0.0, "hard seam\nMixSpec.paper()"), (20 / 256, "20/256 ramp\nMixSpec.release()"))
    ):
        top = 0.62 + 2.16 * line
        canvas.text(0.98, top + 0.9, name, 10, INK)
        for column, mask in enumerate(MASKS):
            left = 1.88 + 1.86 * column
            row = replace(whole, mask=np.array([column], np.int8), seam_width=width)
            hybrid = shown(mixed_image(row, 0, photograph, edit))
            released = line == 0 or mask in MixSpec.release().masks
            canvas.picture(left, top, 1.7, 1.7, hybrid if released else shown(0.25 * hybrid + 0.75 * 245))
            if not released:
                canvas.figure.text(
                    (left + 0.85) / canvas.width, 1 - (top + 0.85) / canvas.height, "not in the\nreleased code",
                    ha="center", va="center", fontsize=9, color=MUTED,
                )  # fmt: skip
            if line == 0:
                canvas.text(left + 0.85, 0.36, f"“{mask}”", 11, EDIT, weight="bold")
    canvas.save(file)


def plan(dataset: DiffuseMixDataset, epoch: int, file: Path) -> None:
    """The plan: rows of arrays, and an order that does not depend on who takes it."""
    canvas = Canvas(9.4, 5.95)
    assert dataset.store is not None
    canvas.text(0.42, 0.36, "A ROW FOR EACH SAMPLE", 12, EDIT, ha="left", weight="bold")
    canvas.text(
        3.22,
        0.36,
        f"computed from (seed {dataset.seed}, epoch {epoch}, index), and from nothing else",
        10.5,
        MUTED,
        ha="left",
    )
    indices = [5, 9, 20, 28, 41]
    batch = dataset.planner.batch(epoch, indices)
    heads = ("index", "edit", "mask", "crop: top, left, height, width", "flip", "fractal", "λ")
    places = (0.72, 2.02, 3.42, 5.42, 7.22, 8.00, 8.72)
    for place, head in zip(places, heads, strict=True):
        canvas.text(place, 0.84, head, 9.5, MUTED)
    for row, index in enumerate(indices):
        y = 1.20 + 0.36 * row
        mixed = bool(batch.mixed[row])
        cells = (
            str(index),
            f"“{dataset.store.prompt_of(int(batch.edit[row]))}”" if mixed else "–",
            MASKS[int(batch.mask[row])] if mixed else "–",
            "   ".join(f"{one:.2f}" for one in batch.box[row]),
            "yes" if batch.flip[row] else "no",
            str(batch.fractal[row]) if mixed else "–",
            f"{batch.fractal_weight[row]:.1f}" if mixed else "–",
        )
        if row % 2 == 0:
            canvas.back.add_patch(Rectangle((0.32, y - 0.18), 8.76, 0.36, facecolor="#f5f5f2", edgecolor="none"))
        for place, cell in zip(places, cells, strict=True):
            canvas.text(place, y, cell, 10.5, INK, weight="bold" if place == places[0] else "normal")

    canvas.text(0.42, 3.38, "AN ORDER THAT NOBODY HOLDS", 12, ORIGINAL, ha="left", weight="bold")
    canvas.text(3.92, 3.38, "any number of processes, the same global batches", 10.5, MUTED, ha="left")
    colours = ("#1f5fa8", "#be4310", "#6b4ba1", "#3f7d4e")
    width, size = 0.308, 8
    for line, world in enumerate((1, 2, 4)):
        top = 3.98 + 0.64 * line
        canvas.text(1.24, top + 0.2, f"{world} process{'es' if world > 1 else ''}", 10.5, INK, ha="right")
        for step in range(3):
            left = 1.42 + step * (size * width + 0.14)
            if line == 0:
                canvas.text(left + size * width / 2, top - 0.2, f"step {step}", 9.5, MUTED)
            for rank in range(world):
                order = EpochOrder(
                    length=len(dataset), batch_size=size // world, shuffle=True, rank=rank, world_size=world
                )
                taken = order.indices(epoch, order.positions(step))
                for place, index in enumerate(taken):
                    x = left + (rank * len(taken) + place) * width
                    box = Rectangle((x, top), width - 0.03, 0.4, facecolor=colours[rank], edgecolor="none")
                    canvas.back.add_patch(box)
                    canvas.text(x + width / 2 - 0.015, top + 0.2, str(index), 8.5, "white")
    canvas.save(file)


# The boxes in the picture of the house: (left, top, width), room, modules in it, what they do.
OFFLINE = (
    ((0.42, 1.00, 2.0), "your photographs", (), "class folders"),
    (
        (3.22, 1.00, 2.6),
        "generate/",
        ("generate.run", "generate.worker", "generate.editors", "generate.engines", "generate.quality"),
        "an engine runs an editor;\nverdicts",
    ),
    (
        (6.62, 1.00, 2.36),
        "store/",
        ("store.layout", "store.writer", "store.readers", "store.mirror"),
        "edits in tar shards\nand their index",
    ),
    ((0.42, 2.42, 2.0), "catalog/", ("catalog.listing", "catalog.table"), "rows, labels, sizes"),
    ((3.22, 2.42, 2.6), "store/pack", ("store.pack", "images.codec"), "originals in tar shards;\noptional"),
    ((6.62, 2.42, 2.36), "fractals/", ("fractals.flame", "fractals.bank"), "a bank of flames"),
)
ONLINE = (
    (
        (0.42, 4.86, 2.0),
        "plan/",
        ("plan.batch", "plan.windows", "base.philox"),
        "(seed, epoch, index) to\nrows and windows",
    ),
    (
        (3.22, 4.86, 2.6),
        "loading/decoder",
        ("loading.decoder", "loading.dali", "images.reading"),
        "reads and decodes the\nwindows, ahead",
    ),
    (
        (6.62, 4.86, 2.36),
        "mix/",
        ("mix.call", "mix.pixel", "base.native", "base.gpu"),
        "one call from pieces to\nthe tensor: CPU or GPU",
    ),
    (
        (0.42, 6.34, 2.0),
        "loading/dataset",
        ("loading.dataset", "loading.quarantine"),
        "everything that decides\na sample",
    ),
    (
        (3.22, 6.34, 2.6),
        "loading/loader",
        ("loading.loader", "loading.batches", "loading.cursor", "loading.samplers"),
        "order, ranks, resuming,\nprefetching",
    ),
    ((6.62, 6.34, 2.36), "your training loop", (), "images, labels"),
)


def house(file: Path) -> None:
    """Which module does what, and what flows between them."""
    canvas = Canvas(9.4, 7.7)
    canvas.band(0.14, 3.86, "#f3f6fa")
    canvas.band(4.0, 7.56, "#faf5f1")
    canvas.text(0.42, 0.46, "ONCE, OFFLINE", 12, ORIGINAL, ha="left", weight="bold")
    canvas.text(1.62, 4.42, "EVERY EPOCH", 12, EDIT, ha="left", weight="bold")
    for boxes, colour in ((OFFLINE, ORIGINAL), (ONLINE, EDIT)):
        for (left, top, width), title, modules, what in boxes:
            box = FancyBboxPatch(
                (left, top), width, 1.02, boxstyle="round,pad=0,rounding_size=0.08", facecolor="white", edgecolor=colour
            )
            canvas.back.add_patch(box)
            canvas.text(left + width / 2, top + 0.22, title, 11, INK, weight="bold")
            others = ", ".join(
                name.split(".")[1] if title.startswith(name.split(".")[0]) else name.replace(".", "/")
                for name in modules
                if name.replace(".", "/") != title
            )
            canvas.text(left + width / 2, top + 0.62, what, 8.6, MUTED)
            if others:
                canvas.text(left + width / 2, top + 0.92, others, 7.6, colour, style="italic")
    for start, end in (
        ((2.46, 1.50), (3.18, 1.50)),  # photographs to generate
        ((5.86, 1.50), (6.58, 1.50)),  # generate to edits
        ((1.42, 2.06), (1.42, 2.38)),  # photographs to catalog
        ((2.46, 2.92), (3.18, 2.92)),  # catalog to pack
        ((1.42, 3.48), (1.42, 4.82)),  # catalog to plan
        ((2.46, 5.36), (3.18, 5.36)),  # plan to reading
        ((5.86, 5.36), (6.58, 5.36)),  # reading to mixing
        ((4.52, 3.48), (4.52, 4.82)),  # packed originals to reading
        ((6.70, 2.06), (5.70, 4.82)),  # edits to reading
        ((7.80, 3.48), (7.80, 4.82)),  # fractals to mixing
        ((1.42, 6.30), (1.42, 5.92)),  # dataset to plan
        ((2.46, 6.86), (3.18, 6.86)),  # dataset to loader
        ((4.52, 6.30), (4.52, 5.92)),  # loader to reading
        ((7.80, 5.92), (7.80, 6.30)),  # mixing to the loop
    ):
        canvas.arrow(start, end)
    canvas.text(1.52, 3.98, "sizes", 8.6, MUTED, ha="left")
    canvas.text(4.42, 4.05, "originals", 8.6, MUTED, ha="right")
    canvas.text(6.30, 4.05, "edits", 8.6, MUTED, ha="left")
    canvas.text(7.90, 4.05, "bank", 8.6, MUTED, ha="left")
    canvas.text(7.90, 6.11, "tensor", 8.6, MUTED, ha="left")
    canvas.save(file)


def main() -> None:
    demo, out = Path(sys.argv[1]), Path(sys.argv[2])
    catalog = Catalog.open(demo / "catalog")
    dataset = DiffuseMixDataset(
        demo / "photographs",
        catalog=catalog,
        edits=demo / "edits",
        fractals=demo / "fractals.npy",
        mix=MixSpec(probability=1.0),
        crop=TrainCrop(224),
        seed=0,
    )
    diffusemix(dataset, 9, (0, 1, 2), out / "diffusemix.jpg")
    parts(dataset, 28, 18, out / "visible-parts.jpg")
    masks(dataset, 9, out / "masks.jpg")
    plan(dataset, 3, out / "plan.jpg")
    house(out / "architecture.jpg")


if __name__ == "__main__":
    main()
