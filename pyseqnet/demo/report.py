"""The page: one file with its pictures inside, beside the same pictures as PNG files."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def write(folder: Path, pictures: dict[str, Path], **facts: Any) -> Path:
    """Renders report.html with `facts` and the pictures by name; returns the page's path."""
    template = resources.files("pyseqnet.demo").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    embedded = {name: _data_uri(path) for name, path in pictures.items()}
    page = folder / "index.html"
    page.write_text(environment.from_string(template).render(pictures=embedded, **facts), encoding="utf-8")
    return page
