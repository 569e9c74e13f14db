"""Hooks of mkdocs: text that is made of the code or of other pages, where a page says "*Here the built site ...*".

docs/commands.md gets the help of every command and the options file of `generate`; docs/troubleshooting/index.md gets
the messages of all its pages, from A to Z, with links. In tables of three and more columns every cell gets its column's
name, which style.css shows on a narrow screen, where a row becomes a block.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from markdown.extensions.toc import slugify

from dali_diffusemix.cli import main
from dali_diffusemix.cli.generate_options import template

_PLACE = re.compile(r"^\*Here the built site[^*]*\*$", re.MULTILINE)
_TABLE = re.compile(r"<table>(.*?)</table>", re.DOTALL)
_MESSAGE = re.compile(r"\*\*(`+)(.+?)\1\*\*")  # bold code


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the page's place, if it has one."""
    made: dict[str, Callable[[], Iterator[str]]] = {
        "commands.md": _helps,
        "troubleshooting/index.md": lambda: _messages(Path(page.file.abs_src_path).parent),
    }
    lines = made.get(page.file.src_uri)
    return markdown if lines is None else _PLACE.sub(lambda _: "\n".join(lines()), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Name the cells of wide tables. Tables with aligned columns hold numbers and keep their form."""
    return _TABLE.sub(_named, html)


def _named(table: re.Match[str]) -> str:
    heads = [re.sub(r"<[^>]+>", "", head).strip() for head in re.findall(r"<th>(.*?)</th>", table[1], re.DOTALL)]
    rows = re.split(r"(?=<tr>)", table[1])
    if len(heads) < 3 or any(row.count("<td>") not in (0, len(heads)) for row in rows):
        return table[0]  # the latter: of the API reference
    for at, row in enumerate(rows):
        names = iter(heads)
        rows[at] = re.sub("<td>", lambda _, names=names: f'<td data-label="{next(names)}">', row)
    return f"<table data-stacked>{''.join(rows)}</table>"


def _helps() -> Iterator[str]:
    for name, command in main.commands.items():
        parent = click.Context(main, info_name="dali-diffusemix")
        context = click.Context(command, info_name=name, parent=parent, max_content_width=78, terminal_width=78)
        yield f"### {name}\n\n```text\n{context.get_help()}\n```\n"
    yield f"### generate --print-config\n\n```toml\n{template()}```\n"


def _messages(folder: Path) -> Iterator[str]:
    found = []
    for file in folder.glob("*.md"):
        heading = ""
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                heading = line.lstrip("# ")
            found += [(message, file.name, heading) for _, message in _MESSAGE.findall(line)]
    for message, name, heading in sorted(found, key=lambda one: re.sub(r"^\W+", "", one[0]).lower()):
        ticks = "``" if "`" in message else "`"
        title = heading.replace("`", "")
        yield f"- {ticks}{message}{ticks}  \n  [{title}]({name}#{slugify(heading, '-')})"
