"""Words that were probably meant."""

from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean 'autumn'?" if a known word is like the given one, otherwise a full stop.

    Upper and lower case do not count.
    """
    import difflib  # only for errors

    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.7)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else "."
