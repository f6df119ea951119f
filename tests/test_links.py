"""Links in the documentation lead to files that there are, and to headings in them; the index names every page."""

import re

import pytest
from pages import FENCED, PAGES, ROOT

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def headings(text: str) -> set[str]:
    """Return the anchors of a page's headings: those that GitHub makes."""
    found = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in found}


def broken(text: str, folder) -> list[str]:
    """Return the links of a page that lead nowhere.

    Args:
        text: of the page.
        folder: that it lies in.
    """
    missing = []
    for link in LINK.findall(FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        if link.startswith("https://"):
            continue
        target = folder / path
        there = headings(target.read_text(encoding="utf-8") if path else text) if anchor else set()
        if not (target.exists() if path else True) or anchor and anchor not in there:
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    assert broken(page.read_text(encoding="utf-8"), page.parent) == []


def test_the_index_names_every_page():
    index = LINK.findall((ROOT / "docs/README.md").read_text(encoding="utf-8"))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")} - {"README.md"}
    assert pages - set(index) == set()


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "a.md").write_text("# One `b`, two\n\n```\n# no heading\n```\n")
    links = "[x](a.md) [x](a.md#one-b-two) [x](#here) [x](b.md) [x](a.md#no-heading) [x](#there) [x](https://a)"
    assert broken(f"## Here\n{links}\n", tmp_path) == ["b.md", "a.md#no-heading", "#there"]
