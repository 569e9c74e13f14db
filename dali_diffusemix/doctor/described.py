"""Errors as one line of text, for the answers of probes."""

from dali_diffusemix.errors import DiffuseMixError

__all__ = ["described"]


def described(error: BaseException) -> str:
    """Return an error in one line, with its type unless it is one of this package."""
    text = " ".join(str(error).split())
    return text if isinstance(error, DiffuseMixError) else f"{type(error).__name__}: {text}".removesuffix(": ")
