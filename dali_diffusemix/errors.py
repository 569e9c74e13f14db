"""Every error that this package raises on purpose.

    DiffuseMixError
    ├── ConfigError             an argument or setting breaks a rule (also a ValueError)
    ├── DataError               the images themselves
    │   ├── CatalogError        a folder of originals, or the catalog of one, cannot be used
    │   └── DecodeError         one image cannot be decoded
    ├── StoreError              an edit store or fractal bank on disk cannot be used
    ├── LoaderTimeoutError      a batch was not read within the loader's timeout (also a RuntimeError)
    ├── WorkerError             processes or a server that generate died, or none can be had
    └── MissingDependencyError  an optional package, driver or compiler is not there (also an ImportError)

A message names the field, the rule, the value found and the remedy.
"""

from collections.abc import Mapping
from types import MappingProxyType


class DiffuseMixError(Exception):
    """Base of every error raised on purpose by dali_diffusemix."""

    instead: Mapping[str, str] = MappingProxyType({})
    """Paths that were given, and those that were probably meant: the command line prints the command to type."""


class ConfigError(DiffuseMixError, ValueError):
    """An argument or setting breaks a rule."""


class DataError(DiffuseMixError):
    """Something is wrong with the images given."""


class CatalogError(DataError):
    """A folder of originals, or its catalog, cannot be used."""


class DecodeError(DataError):
    """One image cannot be decoded."""


class StoreError(DiffuseMixError):
    """An edit store or a fractal bank on disk cannot be used."""


class LoaderTimeoutError(DiffuseMixError, RuntimeError):
    """A batch was not read within the loader's timeout."""


class WorkerError(DiffuseMixError):
    """Processes or a server that do the work of `generate` died, or none can be had."""


class MissingDependencyError(DiffuseMixError, ImportError):
    """An optional package, driver or compiler is missing."""
