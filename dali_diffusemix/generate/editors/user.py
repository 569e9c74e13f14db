"""An editor of the user's own, by its name, "module:Class".

    class Negative:
        def edit(self, images, tasks):
            return [255 - images[task.image] for task in tasks]

The class is imported where it is used: here, in spawned processes, on the nodes of a cluster. A store records a version
of its code, so that edits of two versions never mix in it.
"""

import hashlib
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dali_diffusemix.base.words import did_you_mean
from dali_diffusemix.errors import ConfigError, DiffuseMixError
from dali_diffusemix.generate.editors import Editor, EditTask


@dataclass(frozen=True, kw_only=True)
class UserConfig:
    """An editor of the user's own: a class with the method `edit` of `Editor`.

    Its constructor is called once in each process, with the options as keyword arguments. If it takes `device`, it is
    given "cpu", "cuda" or "cuda:N", and the work goes to GPUs if there are any; otherwise to the CPU.

    The class may state, as attributes:

        version   str or int, to be changed whenever edits change; without it, a hash of the file that has the class
        prompts   the prompts that it knows; without it, any
        multiple  int, the divisor of both sides of the images that it takes; without it, 1

    Raises ConfigError if there is no such class, or it does not take the options.
    """

    name: str  # "module:Class"; the module may lie in the current directory, as for `python -m`
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments: what JSON can express
    version: str = field(init=False)
    prompts: tuple[str, ...] | None = field(init=False)  # that it knows; None: any
    multiple: int = field(init=False)
    accelerated: bool = field(init=False)  # its constructor takes a device
    _folder: str = field(init=False, repr=False, compare=False)  # where the module was found, for other processes
    _taken: Mapping[str, Any] = field(init=False, repr=False, compare=False)  # options and defaults

    def __post_init__(self) -> None:
        editor = _imported(self.name, str(Path.cwd()))
        takes_device, taken = _arguments(self.name, editor, self.options)
        for name, value in (
            ("options", dict(self.options)),
            ("version", _version(editor, self.name)),
            ("prompts", _prompts_of(editor, self.name)),
            ("multiple", getattr(editor, "multiple", 1)),
            ("accelerated", takes_device),
            ("_folder", _folder_of(self.name)),
            ("_taken", taken),
        ):
            object.__setattr__(self, name, value)
        if isinstance(self.multiple, bool) or not isinstance(self.multiple, int) or self.multiple < 1:
            raise ConfigError(
                f"editor: {self.name!r}: multiple must be a whole number from 1, found {self.multiple!r}."
            )

    def settings(self) -> dict[str, str | int | float | bool | None]:
        """The settings that an edit store records: name, version and every option, also where it is a default."""
        return {"editor": self.name, "version": self.version} | {
            f"option {name}": value if value is None or isinstance(value, str | int | float) else json.dumps(value)
            for name, value in self._taken.items()
        }

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ConfigError if the class states its prompts and one of these is not among them."""
        for prompt in prompts:
            if self.prompts is not None and prompt not in self.prompts:
                raise ConfigError(
                    f"prompts: {prompt!r} is not a prompt that {self.name!r} knows; these are "
                    f"{', '.join(map(repr, self.prompts))}{did_you_mean(prompt, self.prompts)}"
                )

    def load(self, prompts: Sequence[str], *, device: str, batch_size: int) -> Editor:
        """Make the editor.

        Raises:
            ConfigError: The class does not know a prompt, is another version of it than when the run began, or its
                constructor raised.
        """
        self.check(prompts)
        editor = _imported(self.name, self._folder)
        if (version := _version(editor, self.name)) != self.version:
            raise ConfigError(
                f"editor: {self.name!r} must be the same wherever it works, found version {version} in this process, "
                f"{self.version} in the one that began the run; give all nodes the same file, and run again."
            )
        given = dict(self.options) | ({"device": device} if self.accelerated else {})
        try:
            made = editor(**given)
        except DiffuseMixError:
            raise
        except Exception as error:
            raise ConfigError(
                f"editor: {self.name!r} must be made by its constructor with {given}, found {_told(error)}."
            ) from error
        return _CheckedEditor(made, self.name)


class _CheckedEditor:
    """The user's editor; what it returns is checked."""

    def __init__(self, editor: Any, name: str) -> None:
        self._editor = editor
        self._name = name

    def edit(self, images: Sequence[NDArray[np.uint8]], tasks: Sequence[EditTask]) -> list[NDArray[Any]]:
        """Return one edit per task; see `Editor.edit`. Raises ConfigError if the user's editor does not."""
        edits = self._editor.edit(images, tasks)
        try:
            made = list(edits)
        except TypeError:
            raise self._wrong("a sequence of edits", type(edits).__name__) from None
        if len(made) != len(tasks):
            raise self._wrong("one edit per task", f"{len(made)} for {len(tasks)} tasks")
        for edit, task in zip(made, tasks, strict=True):
            if not isinstance(edit, np.ndarray):
                raise self._wrong("NumPy arrays", f"{type(edit).__module__}.{type(edit).__qualname__}")
            if edit.dtype not in (np.uint8, np.float32) or edit.shape != images[task.image].shape:
                raise self._wrong(
                    f"(height, width, 3) uint8 RGB of the image's size, here {images[task.image].shape}",
                    f"{edit.shape} {edit.dtype} under {task.prompt!r}",
                )
            if edit.dtype == np.float32 and np.isfinite(edit).all():
                raise self._wrong(
                    "uint8 (float32 is only for numbers that are not finite, so that they are noticed)",
                    f"float32 from {edit.min():g} to {edit.max():g} under {task.prompt!r}",
                )
        return made

    def _wrong(self, rule: str, found: str) -> ConfigError:
        return ConfigError(f"editor: {self._name!r}: edit must return {rule}, found {found}; correct the class.")


def _imported(name: str, folder: str) -> type:
    """The class of a name, imported with a folder on the path."""
    module, _, found = name.partition(":")
    if module.endswith(".py") or not all(part.isidentifier() for part in (*module.split("."), found)):
        raise ConfigError(
            f"editor must be 'module:Class' in Python's names, found {name!r}; for the class Negative in "
            "styles/negative.py write 'styles.negative:Negative'."
        )
    if module not in sys.modules and folder not in sys.path:
        sys.path.insert(0, folder)  # for good, as `python -m`: the module may import others from there later
    importlib.invalidate_caches()  # the file may be a moment old
    try:
        editor = getattr(importlib.import_module(module), found, "no such name")
    except DiffuseMixError:
        raise
    except Exception as error:
        raise ConfigError(
            f"editor: the module of {name!r} must be importable, found {_told(error)}; it is looked for in {folder!r} "
            "and among the installed packages."
        ) from error
    if not isinstance(editor, type) or not callable(getattr(editor, "edit", None)):
        raise ConfigError(
            f"editor: {name!r} must be a class with a method edit(images, tasks), found {editor!r} in "
            f"{getattr(sys.modules[module], '__file__', module)!r}."
        )
    return editor


def _told(error: Exception) -> str:
    """An error of the user's code in one line, with its place there."""
    ours = (__file__, importlib.__file__)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename not in ours]
    place = next((one for one in reversed(frames) if not one.filename.startswith("<")), None)
    said = f"{type(error).__name__}: {error}"
    return said if place is None else f"{said} ({place.filename}, line {place.lineno})"


def _folder_of(name: str) -> str:
    """The folder on the path from which the module of a name was imported."""
    module = sys.modules[name.partition(":")[0]]
    if getattr(module, "__file__", None) is None:  # a notebook's own
        return str(Path.cwd())
    file = Path(str(module.__file__)).absolute()
    return str(file.parents[module.__name__.count(".") + hasattr(module, "__path__")])


def _prompts_of(editor: type, name: str) -> tuple[str, ...] | None:
    prompts = getattr(editor, "prompts", None)
    if prompts is None:
        return None
    if not isinstance(prompts, tuple | list) or not all(isinstance(one, str) for one in prompts):
        raise ConfigError(f"editor: {name!r}: prompts must be a tuple of strings, found {prompts!r}.")
    return tuple(prompts)


@cache  # of the class, so that a file that is changed later does not pass for the code that was imported
def _version(editor: type, name: str) -> str:
    version = getattr(editor, "version", None)
    if isinstance(version, str | int) and not isinstance(version, bool):
        return str(version)
    if version is not None:
        raise ConfigError(f"editor: {name!r}: version must be a string or a whole number, found {version!r}.")
    try:
        file = inspect.getsourcefile(editor)
        content = None if file is None else Path(file).read_bytes()
    except (TypeError, OSError):
        content = None
    if content is None:
        raise ConfigError(
            f"editor: {name!r} must state a version, since its source file is not here; add `version = 1`."
        )
    return f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"


def _arguments(name: str, editor: type, options: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """True if a class's constructor takes a device; and the other arguments that it is given, with the defaults."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"editor_options must be a table, found {options!r}; write them under [editor_options].")
    if "device" in options:
        raise ConfigError(f"editor_options: device must be left out, found {options['device']!r}; use --device.")
    for option, value in options.items():
        if not _is_plain(value):
            raise ConfigError(
                f"editor_options: {option} must be a string, number or boolean, or a list or table of such, found "
                f"{value!r}."
            )
    signature = inspect.signature(editor)
    takes_device = "device" in signature.parameters
    try:
        signature.bind(**options, **({"device": "cpu"} if takes_device else {}))
    except TypeError as error:
        taken = [str(one) for one in signature.parameters.values() if one.name != "device"]
        raise ConfigError(f"editor_options: {name!r} takes {', '.join(taken) or 'none'}; found: {error}.") from error
    defaults = {one.name: one.default for one in signature.parameters.values() if one.default is not one.empty}
    plain = {option: value for option, value in defaults.items() if option != "device" and _is_plain(value)}
    return takes_device, plain | dict(options)


def _is_plain(value: object) -> bool:
    """True if JSON can express a value."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
