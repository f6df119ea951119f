"""mkdocs.yml: the site builds without a warning, by itself: `make site`."""

import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_each_page_of_the_repository_is_one_of_the_site(site):
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    there = {page.relative_to(site) for page in site.rglob("*.html")}
    assert {str(page) for page in pages - there} == {"README.html"} and (site / "index.html").exists()
    assert (site / "CONTRIBUTING.html").exists() and (site / "diffumask_fast/mini/index.html").exists()


@pytest.mark.slow
def test_it_asks_no_other_server(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=\"?https?:", text), page
        assert not re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect)[^>]* href=\"?https?:", text), page


@pytest.mark.slow
def test_examples_of_docstrings_are_code_and_defaults_are_values(site):
    text = (site / "api.html").read_text(encoding="utf-8")
    assert (
        text.count('gp">&gt;&gt;&gt;') >= 3
        and "<blockquote>" not in text
        and "option(" not in re.sub("<[^>]+>", "", text)
    )


@pytest.mark.slow
def test_a_broken_link_ends_the_build(site, tmp_path):
    for name in ("mkdocs.yml", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("docs", "tools", "diffumask_fast", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    page = tmp_path / "docs/faq.md"
    page.write_text(page.read_text() + "\n[lost](masks.md#nowhere)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert built.returncode != 0 and "nowhere" in built.stderr
