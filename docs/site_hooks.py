"""What mkdocs does beside building docs/: the repository's README is the home, and links out of docs/ lead somewhere.

In the repository the pages are read as files, so their links lead to files: `../contrib/prometheus-alerts.yml`. In the
site docs/ is the root, and the files of the repository that pages link to stand beside it. A link to a file that is
not there is left alone, and fails the strict build.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Pages of the site that are files at the root of the repository.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# A link in a line of Markdown, up to its title or end.
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the repository's root, and what pages of the site link to outside of docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        for link in _links(Path(file.abs_src_path).read_text(encoding="utf-8")):
            target = _in_repository(file.src_uri, link)
            if (ROOT / target).is_file() and files.get_file_from_path(_in_site(target)) is None:
                files.append(File.generated(config, _in_site(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links lead to where their files are in the site, and what is folded away be Markdown, as it is on GitHub."""
    uri = page.file.src_uri
    markdown = markdown.replace("<details>", "<details markdown>")

    def in_site(link: re.Match[str]) -> str:
        target = _in_repository(uri, link[0])
        return relpath(_in_site(target), PurePosixPath(uri).parent) if (ROOT / target).is_file() else link[0]

    parts = _CODE.split(markdown)
    return "".join(part if number % 2 else _LINK.sub(in_site, part) for number, part in enumerate(parts))


def _links(markdown: str) -> list[str]:
    return _LINK.findall(_CODE.sub("", markdown))


def _in_repository(uri: str, link: str) -> str:
    """Where a link of a page leads in the repository."""
    source = next((name for name, page in PAGES.items() if page == uri), f"docs/{uri}")
    return normpath(str(PurePosixPath(source).parent / link))


def _in_site(path: str) -> str:
    return PAGES.get(path) or path.removeprefix("docs/")


class SingleExamples(griffe.Extension):
    """Let griffe read "Example:" in docstrings as it reads "Examples:": griffe 2.0 takes it for an admonition."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Spell the section as griffe does."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
