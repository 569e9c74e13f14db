"""Prints the notes of a release, out of CHANGELOG.md: python .ci/release.py v1.2.3

Refuses a tag that is not the version of the package, and a version without a dated section.
"""

import re
import sys
import tomllib
from pathlib import Path


def notes(root: Path, tag: str) -> str:
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"the tag must be v{version}, as pyproject.toml has it, found {tag}; change one of them")
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    section = rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)"
    found = re.search(section, changes, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        sys.exit(
            f'CHANGELOG.md must have a section "## {version} - YYYY-MM-DD" with text, found none; CONTRIBUTING.md has '
            "the steps of a release"
        )
    return found[1].strip()


if __name__ == "__main__":
    print(notes(Path(__file__).parents[1], sys.argv[1]))
