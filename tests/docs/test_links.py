"""The links and the paths of the pages are there, in the repository as on the site."""

import os
import re
from pathlib import Path

import pytest
from site_pages import DOCS, FRONT, GENERATED, PAGES, ROOT, anchors, name_of, prose

OTHERS = [ROOT / "LOG.md", ROOT / "benchmarks/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FOLDERS = "qkvjax|tests|docs|configs|launch|benchmarks|notebooks"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")


def target_of(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link.partition("#")[0]))


def local_links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if "://" not in link]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_links_lead_somewhere(page):
    """To a file, or to a page that the site makes; an anchor is one of its headings."""
    for link in local_links(page):
        path, _, anchor = link.partition("#")
        target = target_of(page, link) if path else page
        if target in GENERATED:
            continue
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_that_are_named_are_there(page):
    missing = [path for path in PATH.findall(prose(page)) if not (ROOT / path).exists()]
    assert [path for path in missing if not stands_for_many(path)] == []


def stands_for_many(path: str) -> bool:
    """Whether a path has a part for the reader to fill in, such as NAME."""
    return bool(re.search(r"[A-Z]{3,}", Path(path).name)) or "/NAME" in path


@pytest.mark.parametrize("page", FRONT, ids=name_of)
def test_front_pages_link_no_raw_html(page):
    """GitHub shows an HTML file as its source."""
    assert [link for link in local_links(page) if link.endswith(".html")] == []


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in [*DOCS, *GENERATED]]
    assert [page for page in pages if page not in navigation] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    assert [line for line in lines if len(line) > 120] == []
