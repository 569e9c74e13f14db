"""Files and locks: written whole or not at all, locked by the system alone."""

import json
import os
from pathlib import Path

from dali_diffusemix.errors import ConfigError


def cache_folder() -> Path:
    """The user's folder for what can be made again: $DALI_DIFFUSEMIX_CACHE, else dali-diffusemix in $XDG_CACHE_HOME or
    ~/.cache. Raises ConfigError where there is no home folder either.
    """
    if own := os.environ.get("DALI_DIFFUSEMIX_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "dali-diffusemix"
    try:
        return Path.home() / ".cache" / "dali-diffusemix"
    except RuntimeError as error:
        raise ConfigError("There is no home folder to cache in; set DALI_DIFFUSEMIX_CACHE to a folder.") from error


def why_damaged(error: Exception) -> str:
    """What is wrong with a JSON file that could not be understood."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it is no JSON: {error}"
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return f"a value is of the wrong kind: {error}"
