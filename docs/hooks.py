"""Hooks of mkdocs: the help of every command, and the options file of `generate`, on docs/commands.md."""

import re
from typing import Any

import click

from dali_diffusemix.cli import main
from dali_diffusemix.cli.generate_options import template

_PLACE = re.compile(r"^\*Here the built site.*\*$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert the help of the commands."""
    return _PLACE.sub(lambda _: "\n".join(_sections()), markdown)


def _sections() -> list[str]:
    sections = []
    for name, command in main.commands.items():
        parent = click.Context(main, info_name="dali-diffusemix")
        context = click.Context(command, info_name=name, parent=parent, max_content_width=78, terminal_width=78)
        sections.append(f"### {name}\n\n```text\n{context.get_help()}\n```\n")
    sections.append(f"### generate --print-config\n\n```toml\n{template()}```\n")
    return sections
