"""Bring the documents of the repository's root into the site, and unlink what the site does not hold."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig  # pyright: ignore[reportMissingImports]  # the extra [docs]
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]  # the extra [docs]
from mkdocs.structure.pages import Page  # pyright: ignore[reportMissingImports]  # the extra [docs]


ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": None, "SECURITY.md": None, "CHANGELOG.md": None}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?!https?://|mailto:|#)[^)#\s]+)(#[^)\s]*)?\)")
_IMAGE = re.compile(r"(!\[[^\]]*\]\()docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's documents as pages."""
    for name, page in ROOT_PAGES.items():
        files.append(File.generated(config, page or name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Turn links between files of the repository into links between pages; keep the text of the others."""
    source = {new or old: old for old, new in ROOT_PAGES.items()}.get(page.file.src_uri)
    folder = "" if source else posixpath.dirname(f"docs/{page.file.src_uri}")

    def resolve(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = (ROOT_PAGES[path] or path) if path in ROOT_PAGES else path.removeprefix("docs/")
        if path not in ROOT_PAGES and not path.startswith("docs/"):
            return text
        return f"[{text}]({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    markdown = _LINK.sub(resolve, markdown)
    return _IMAGE.sub(r"\1", markdown) if source else markdown
