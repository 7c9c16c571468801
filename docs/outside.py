"""Bring what the pages link to outside docs/ (recipes, scripts, results) into the site.

The pages' links are relative to the repository, so that they work where the repository is read. mkdocs knows docs/
alone: this hook copies each linked file to `repository/` in the site, with the pictures beside a report, and turns the
link there.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PLACE = "repository"
LINK = re.compile(r"\]\(([^)#:]+)\)")


def outside(page: str, target: str) -> str | None:
    """Return the path in the repository of a file outside docs/ that a page links to, else None."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the linked files."""
    linked = set()
    for page in files.documentation_pages():
        linked |= {outside(page.src_uri, target) for target in LINK.findall(page.content_string)}
    found = [ROOT / path for path in sorted(linked - {None}) if (ROOT / path).is_file()]
    pictures = [picture for path in found if path.suffix == ".md" for picture in path.parent.glob("*.png")]
    for path in dict.fromkeys([*found, *pictures]):
        place = f"{PLACE}/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, place, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links to them."""
    here = page.file.src_uri

    def turned(match: re.Match[str]) -> str:
        path = None if here.startswith(PLACE) else outside(here, match[1])
        return f"]({posixpath.relpath(f'{PLACE}/{path}', posixpath.dirname(here) or '.')})" if path else match[0]

    return LINK.sub(turned, markdown)
