"""The page: one file with its pictures inside, beside the same pictures as PNG files."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from pyseqnet.demo.jobs import Result


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def write(folder: Path, results: list[Result], speed_picture: Path, **facts: Any) -> Path:
    """Renders report.html with the results and `facts`; returns the page's path."""
    template = resources.files("pyseqnet.demo").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    jobs = [
        {"result": result, **result.facts, "pictures": {n: _data_uri(p) for n, p in result.pictures.items()}}
        for result in results
    ]
    page = folder / "index.html"
    rendered = environment.from_string(template).render(jobs=jobs, speed_picture=_data_uri(speed_picture), **facts)
    page.write_text(rendered, encoding="utf-8")
    return page
