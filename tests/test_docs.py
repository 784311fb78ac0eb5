"""Every block of Python in README and docs runs; the documentation builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, run_python

PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if page.exists()]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="an installed package has no docs")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path) -> None:
    """The blocks of a page one after the other, as a reader types them."""
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert text.count("```python") == len(blocks)
    code = "\n".join(blocks)
    if "transformers" in code and importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is missing")
    result = run_python(code)
    assert result.returncode == 0, result.stderr[-2000:]


def test_pages_that_should_have_examples_have_some() -> None:
    without = {page.name for page in PAGES if not BLOCK.search(page.read_text())}
    assert without <= {"api.md"}


def test_every_row_of_the_gallery_has_a_picture() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text()
    drawn = set(re.findall(r"^@picture\ndef (\w+)", (ROOT / "docs" / "pictures.py").read_text(), re.MULTILINE))
    assert set(re.findall(r"\(_pictures/(\w+)\.png\)", page)) == drawn
    rows = [line for line in page.splitlines() if line.startswith("| ") and "mechanism" not in line]
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.*)$", page, re.MULTILINE)}
    for row in rows:
        assert re.match(r"\| \[.*?\]\(#([\w-]+)\)", row)[1] in headings, row


@pytest.mark.slow
def test_documentation_builds(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    pytest.importorskip("matplotlib")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    page = (tmp_path / "api.html").read_text()
    for name in ("scaled_dot_product_attention", "LongformerSelfAttention", "local_attention"):
        assert name in page
