"""Hooks of MkDocs: experiments as pages, folders in the navigation, and links to files of the repository.

Pages link to pages and to other files of the repository by relative paths, which work on GitHub too. On the site a link
to `experiments/NAME` leads to the page of its README, and a link to any other file leads to the file under `repo_url`.
While `mkdocs.yml` has no `repo_url`, such a link is plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MEDIA = (".png", ".svg")
CODE = r"^ *(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence) *$|(?P<ticks>`+)[^\n]*?(?P=ticks)"
LINK = r"\[(?P<text>[^\[\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)"
CODE_OR_LINK = re.compile(f"{CODE}|{LINK}", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the experiments, and replaces folders in the navigation by their pages."""
    index = ["# Experiments", "Each page holds a question, the command, the recorded result and what it shows."]
    for readme in sorted((ROOT / "experiments").glob("*/README.md")):
        title = readme.read_text().partition("\n")[0].removeprefix("# ")
        index.append(f"- [{title}](../../experiments/{readme.parent.name})")
        for path in sorted(readme.parent.iterdir()):
            if path == readme or path.suffix in MEDIA:
                files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "experiments/index.md", content="\n\n".join(index) + "\n"))
    config.nav = _expand(config.nav, files)
    return files


def _expand(entry: Any, files: Files) -> Any:
    if isinstance(entry, dict):
        return {title: _expand(value, files) for title, value in entry.items()}
    if isinstance(entry, str):
        return _list_pages(entry, files) if entry.endswith("/") else entry
    expanded = [_expand(item, files) for item in entry]
    return [item for value in expanded for item in (value if isinstance(value, list) else [value])]


def _list_pages(folder: str, files: Files) -> list[str]:
    """Returns the pages of a folder: the index, the pages in the order of its links to them, and the other pages."""
    pages = [file.src_uri for file in files.documentation_pages()]
    pages = [
        uri for uri in pages if uri.startswith(folder) and "/" not in uri[len(folder) :].removesuffix("/README.md")
    ]
    index = files.get_file_from_path(f"{folder}index.md")
    content = index.content_string if index else ""
    order = [folder + match["path"] for match in re.finditer(LINK, content)]
    rank = {uri: number for number, uri in reversed(list(enumerate(order)))}
    return sorted(pages, key=lambda uri: (uri != f"{folder}index.md", rank.get(uri, len(rank)), uri))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Maps links to files of the repository."""
    source = page.file.src_uri
    in_repository = source if source.endswith("/README.md") else f"docs/{source}"

    def map_link(match: re.Match[str]) -> str:
        text, path, anchor = match["text"], match["path"], match["anchor"] or ""
        if path is None or path.startswith("/"):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path))
        uri = _find_page(target, files)
        if uri is not None:
            return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(source))}{anchor})"
        if target.startswith("..") or not (ROOT / target).exists():
            return match[0]  # of which MkDocs warns
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{target}{anchor})" if config.repo_url else text

    return CODE_OR_LINK.sub(map_link, markdown)


def _find_page(target: str, files: Files) -> str | None:
    """Returns the file of the site that shows a file or folder of the repository."""
    uri = "index.md" if target == "README.md" else target.removeprefix("docs/")
    return next((name for name in (uri, f"{uri}/README.md", f"{uri}/index.md") if name in files.src_uris), None)
