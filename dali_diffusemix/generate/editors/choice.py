"""The choice of an editor: from its name, and the options that were given, to its config."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
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
    if _is_url(name):
        of_a_server = {field.name for field in fields(ServerConfig)} - {"url"}
        _refuse(options, of_a_server, "for a server as editor", "set what the server takes in fields")
        return ServerConfig(url=name, **{"model": "", **options})
    if re.match(r"[\w.-]+:\d+(/|$)", name):
        raise ConfigError(f"editor must begin with http:// or https:// if it is a server, found {name!r}.")
    if ":" in name and "://" not in name and not Path(name).is_dir():
        _refuse(options, {"editor_options"}, f"for the editor {name!r}", "write its own under [editor_options]")
        return UserConfig(name=name, options=options.get("editor_options", {}))
    of_a_model = {field.name for field in fields(DiffusersConfig)} - {"model"}
    _refuse(options, of_a_model, f"for the model {name!r}", "name a class of your own, module:Class, as editor")
    return DiffusersConfig(model=name, **options)


def editor_of_store(
    settings: Mapping[str, Any], name: str | None = None, options: Mapping[str, Any] = _NONE
) -> EditorConfig:
    """Return the config of the editor that a store was made with, except for what is given.

    Args:
        settings: The store's.
        name: As for `choose_editor`; None: the store's. Another kind of editor takes no option from the store.
        options: As for `choose_editor`.

    Raises:
        ConfigError: As `choose_editor`; or no name is given where the store does not know it: of a model in a folder or
            with a LoRA, and of a server; and of the user's own, since a store must not choose what is imported.
    """
    kind = str(settings.get("editor"))
    known, stored = _stored(kind, settings)
    if name is None and known is None:
        what = {"server": "by a server", "diffusers": "with a model in a folder, or with a LoRA"}
        how = what.get(kind, "by an editor of your own")
        raise ConfigError(
            f"editor must be given again: the edits of this store were made {how}, {settings.get('model', kind)!r}."
        )
    name = name or str(known)
    own = {"procedural"} if name == "procedural" else {"server"} if _is_url(name) else {"diffusers", name}
    if kind not in own:
        return choose_editor(name, options)
    merged = {**stored, **options}
    if "editor_options" in options:
        merged["editor_options"] = {**stored.get("editor_options", {}), **options["editor_options"]}
    return choose_editor(name, merged)


def _stored(kind: str, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The name, if it is known, and the options of the editor of a store."""
    if kind == "server":
        of_form = _after("field ", settings)
        return None, _of(ServerConfig, settings) | ({"fields": of_form} if of_form else {})
    if kind == "diffusers":
        options = _of(DiffusersConfig, settings)
        model, revision = options.pop("model", None), str(options.get("revision"))
        if revision.startswith("sha256:") or "lora" in options:
            options.pop("revision", None)
            options.pop("lora", None)
            return None, options
        return model, options
    own = _after("option ", settings)
    for name, value in own.items():
        if isinstance(value, str) and value[:1] in ("[", "{"):  # as `UserConfig.settings` writes lists and tables
            with suppress(ValueError):
                own[name] = json.loads(value)
    return None if ":" in kind else kind, {"editor_options": own} if own else {}


def _of(config: type[DiffusersConfig | ServerConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    return {one.name: settings[one.name] for one in fields(config) if settings.get(one.name) is not None}


def _after(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _refuse(options: Mapping[str, Any], taken: set[str], where: str, remedy: str) -> None:
    """Raise ConfigError if an option is given that an editor does not take."""
    for name, value in options.items():
        if name not in taken:
            raise ConfigError(f"{name} must be left out {where}, found {value!r}; {remedy}, or remove it.")
