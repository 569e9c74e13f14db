"""The choice of an editor: from its name, and the options that were given, to its config."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dali_diffusemix.errors import ConfigError
from dali_diffusemix.generate.editors import EditorConfig
from dali_diffusemix.generate.editors.diffusers import DiffusersConfig
from dali_diffusemix.generate.editors.procedural import ProceduralConfig
from dali_diffusemix.generate.editors.server import ServerConfig
from dali_diffusemix.generate.editors.user import UserConfig

_NONE: Mapping[str, Any] = MappingProxyType({})


def choose_editor(name: str, options: Mapping[str, Any] = _NONE) -> EditorConfig:
    """Return the config of an editor.

    Args:
        name: "procedural"; the URL of a server; "module:Class", an editor of the user's own; otherwise a model for
            `DiffusersConfig`, a hub id or a local folder.
        options: The options that were given, by the names that they have in the options file: fields of
            `DiffusersConfig` or of `ServerConfig`, or `editor_options`, the table for the user's own editor.

    Raises:
        ConfigError: The editor does not take an option, or refuses its value, or there is no such class.
    """
    if name == "procedural":
        # The template is left aside: one file of prompts may serve both kinds of editors.
        _refuse(options, {"template"}, "for the procedural editor", "name a model as editor")
        return ProceduralConfig()
    if name.startswith(("http://", "https://")):
        of_a_server = {field.name for field in fields(ServerConfig)} - {"url"}
        _refuse(options, of_a_server, f"for the server {name!r}", "set what the server takes in fields")
        return ServerConfig(url=name, **{"model": "", **options})
    if ":" in name and "://" not in name and not Path(name).is_dir():
        _refuse(options, {"editor_options"}, f"for the editor {name!r}", "write its own under [editor_options]")
        return UserConfig(name=name, options=options.get("editor_options", {}))
    of_a_model = {field.name for field in fields(DiffusersConfig)} - {"model"}
    _refuse(options, of_a_model, f"for the model {name!r}", "name a class of your own, module:Class, as editor")
    return DiffusersConfig(model=name, **options)


def _refuse(options: Mapping[str, Any], taken: set[str], where: str, remedy: str) -> None:
    """Raise ConfigError if an option is given that an editor does not take."""
    for name, value in options.items():
        if name not in taken:
            raise ConfigError(f"{name} must be left out {where}, found {value!r}; {remedy}, or remove it.")
