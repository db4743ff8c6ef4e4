"""The lead's guidelines, a Markdown file, as HTML for the page."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.files import read_text
from pipeline.labeling.settings import GUIDELINES

from markdown_it import MarkdownIt

_MARKDOWN = MarkdownIt("js-default", {"html": False}).disable("image")  # tags in it are text


def guidelines_html(folder: Path) -> str:
    """HTML of `guidelines.md`, or "" where there is none."""
    path = folder / GUIDELINES
    return str(_MARKDOWN.render(read_text(path))) if path.is_file() else ""
