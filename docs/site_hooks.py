"""What the site needs beside the pages: mkdocs calls these functions (`mkdocs.yml`, `make site`).

Pages are written so that a repository shows them well. A site differs in three points:

- its first page is README.md, and its changelog CHANGELOG.md, which lie above docs/;
- links to files outside docs/ lead to the repository, if its address is known, and are plain text otherwise;
- its Markdown starts a list or a table only after an empty line.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES_ABOVE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository's root, and their names in the site."""

_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
_FENCE = re.compile(r"\s*(```|~~~)")
_ITEM = re.compile(r"\s*([-*+]|\d+\.) ")
_BLOCK_START = re.compile(r"(\s*([-*+]|\d+\.) |\|)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File

    for source, name in PAGES_ABOVE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return with_blank_lines(with_links(markdown, page.file.src_uri, config.repo_url or ""))


def with_links(markdown: str, page: str, repository: str) -> str:
    """The links of a page (its path in the site) so that each leads to a page of the site or to the repository."""
    written_in = {name: source for source, name in PAGES_ABOVE.items()}.get(page, f"docs/{page}")

    def mended(link: re.Match[str]) -> str:
        text, target, anchor = link["text"], link["target"], link["anchor"] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(written_in), target))
        in_site = PAGES_ABOVE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if in_site is not None:
            return f"[{text}]({posixpath.relpath(in_site, posixpath.dirname(page) or '.')}{anchor})"
        if repository:
            return f"[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor})"
        return text if text.strip("`") in path else f"{text} (`{path}`)"

    parts = []
    for in_code, lines in itertools.groupby(_lines_with_code(markdown.split("\n")), key=lambda line: line[1]):
        text = "\n".join(line for line, _ in lines)  # a link's words may go on in the next line
        parts.append(text if in_code else _LINK.sub(mended, text))
    return "\n".join(parts)


def with_blank_lines(markdown: str) -> str:
    """The same text with an empty line before each list and table that follows a paragraph at once."""
    lines: list[str] = []
    for line, in_code in _lines_with_code(markdown.split("\n")):
        before = lines[-1] if lines else ""
        starts = _BLOCK_START.match(line)
        goes_on = before.startswith("|") if line.startswith("|") else _ITEM.match(before) or before.startswith(" ")
        if starts and not in_code and before.strip() and not goes_on:
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _lines_with_code(lines: list[str]) -> list[tuple[str, bool]]:
    """Each line, and whether it is in a fenced block (its fences included)."""
    marked, in_code = [], False
    for line in lines:
        fence = _FENCE.match(line)
        marked.append((line, in_code or bool(fence)))
        in_code ^= bool(fence)
    return marked
