"""A hook of mkdocs.yml: pages of the repository that lie outside docs/ are pages of the site too."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "diffumask_fast/mini/README.md", "diffumask_fast/mini/LICENSE-TAESD")


def on_files(files: Files, config: Any) -> Files:
    """Add them, by their paths in the repository."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links out of docs/, such as ../CONTRIBUTING.md, lead to where those files are on the site."""
    up = "../" * (page.file.src_uri.count("/") + 1)
    return markdown.replace(f"]({up}", f"]({up.removesuffix('../')}") if page.file.generated_by is None else markdown
