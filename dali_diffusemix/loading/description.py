"""Datasets and loaders as text: a few aligned lines, for people.

Everything is taken from memory: no file is read, no pipeline built, no rank asked. Nothing raises, however broken or
half made the object is, because debuggers and tracebacks ask for it too.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from torch.utils.data import ConcatDataset, Subset

from dali_diffusemix.plan.schedule import Schedule, values_of
from dali_diffusemix.plan.spec import MixSpec
from dali_diffusemix.plan.written import written

if TYPE_CHECKING:
    from dali_diffusemix.loading.dataset import DiffuseMixDataset

_UNKNOWN: Final = "?"
_LISTED: Final = 90  # characters of a list of names
_NAME: Final = 40  # of a name
_NESTED: Final = 4  # parts of parts of a dataset
_LINE: Final = 240


def table(title: str, rows: Mapping[str, Callable[[], str | None]]) -> str:
    """A title, and an aligned line for each row; rows that are None are left out, and "?" is what cannot be told."""
    told = {name: _told(tell) for name, tell in rows.items()}
    told = {name: text for name, text in told.items() if text is not None}
    width = max(map(len, told), default=0) + 2
    return "\n".join([title, *(f"    {name:<{width}}{text}" for name, text in told.items())])


def in_a_line(dataset: Any, depth: int = 0) -> str:
    """One line about a dataset, a Subset or a ConcatDataset, nested in any way."""
    return _cut(_told(lambda: _in_a_line(dataset, depth)) or _UNKNOWN, _LINE)


def _in_a_line(dataset: Any, depth: int) -> str:
    kind = type(dataset).__name__
    if depth > _NESTED:
        return kind
    if isinstance(dataset, Subset):
        return f"{kind}, {counted(len(dataset), 'sample')} of {in_a_line(dataset.dataset, depth + 1)}"
    if isinstance(dataset, ConcatDataset):
        parts = dataset.datasets
        shown = [in_a_line(one, depth + 1) for one in parts[:2]]
        return f"{kind} of {len(parts)}: {' + '.join([*shown, *['...'] * (len(parts) > 2)])}"
    edits = 0 if dataset.store is None else len(dataset.store)
    samples, classes = counted(len(dataset), "sample"), counted(len(dataset.catalog.classes), "class", "classes")
    return f"{kind} of {dataset.root} ({samples}, {classes}, {counted(edits, 'edit') if edits else 'no edits'})"


def part(dataset: Any) -> str:
    """Several lines about a Subset: what it is a part of is described in full."""
    return f"{type(dataset).__name__}, {_told(lambda: counted(len(dataset), 'sample'))} of\n" + str(
        _told(lambda: repr(dataset.dataset))
    )


def dataset_rows(dataset: "DiffuseMixDataset", edits: Mapping[str, int]) -> dict[str, Callable[[], str | None]]:
    """The rows of a dataset.

    Args:
        dataset: The dataset.
        edits: Number of its edits by prompt; empty if they were not counted.
    """
    return {
        "samples": lambda: f"{len(dataset):,}" + ("" if len(dataset) == len(dataset.catalog) else " in an epoch"),
        "classes": lambda: f"{len(dataset.catalog.classes):,}: {few(dataset.catalog.classes)}",
        "originals": lambda: _originals(dataset),
        "targets": lambda: _targets(dataset),
        "edits": lambda: _edits(dataset, edits),
        "mix": lambda: _mix(dataset),
        "crop": lambda: written(dataset.crop),
        "augment": lambda: _augment(dataset),
        "fractals": lambda: _fractals(dataset),
        "seed": lambda: f"{dataset.seed}" + ("" if dataset.seed_given else ", from torch"),
    }


def few(names: Iterable[str], most: int = _LISTED) -> str:
    """As many of the names as fit in a line, and the last one."""
    listed = list(names)
    texts = [_cut(name if name.isprintable() else repr(name), _NAME) for name in listed[:_LISTED]]
    shown, length = 0, 0
    while shown < len(texts) and length + len(texts[shown]) <= most:
        length += len(texts[shown]) + 2
        shown += 1
    if shown == len(listed):
        return ", ".join(texts)
    last = listed[-1]
    return ", ".join([*texts[: max(1, shown - 1)], "...", _cut(last if last.isprintable() else repr(last), _NAME)])


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function; of another object that can be called, its repr or class."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else written(function)


def counted(number: int, one: str, more: str = "") -> str:
    """A number with its noun."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def _told(tell: Callable[[], str | None]) -> str | None:
    try:
        return tell()
    except Exception:
        return _UNKNOWN


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _originals(dataset: "DiffuseMixDataset") -> str:
    packed = dataset.original_store
    how = "files" if packed is None else "packed as raw images" if packed.raw else "packed"
    return f"{len(dataset.catalog):,} {how}"


def _targets(dataset: "DiffuseMixDataset") -> str | None:
    given = dataset._targets
    return None if given is None else f"{given.dtype} of shape {given.shape}"


def _edits(dataset: "DiffuseMixDataset", by_prompt: Mapping[str, int]) -> str:
    store = dataset.store
    if store is None:
        return "none"
    names = [f"{_cut(prompt, _NAME - 12)} {number:,}" for prompt, number in by_prompt.items() if number]
    under = f"{len(names)} prompts: " if len(names) > 8 else ""
    if not by_prompt:  # too many to count them
        names, under = list(store.prompts), f"{len(store.prompts)} prompts: "
    where = store.path if store.mirror is None else store.mirror.url
    return f"{len(store):,} in {where}" + (f": {under}{few(names)}" if names else "")


def _mix(dataset: "DiffuseMixDataset") -> str:
    mix = dataset.mix
    if mix is None:
        return "none"
    if not isinstance(mix, MixSpec) or mix.epoch != "fixed" or dataset.store is None:
        return written(mix)
    edits = len(dataset.store) / len(dataset.catalog)
    share = edits / (1 + edits) if mix.probability is None else mix.probability
    return f"{written(mix)}, about {100 * share:.0f} % of the samples are mixed"


def _augment(dataset: "DiffuseMixDataset") -> str:
    setting = dataset.augment
    if isinstance(setting, Schedule):
        return written(setting)
    (settings,) = values_of(setting)
    return _cut(", ".join(map(written, settings)), _LINE) or "none"


def _fractals(dataset: "DiffuseMixDataset") -> str:
    if dataset.bank is None:
        return "none"
    count, height, width, _ = dataset.bank.shape
    return f"{count:,} of {height} x {width} pixels"
