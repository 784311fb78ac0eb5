"""Data sets for the recipes: where they lie, and readers that give tensors.

The files lie in the folder that ``PYSEQNET_DATA`` names, by default in ``~/.cache/pyseqnet``. What is missing there is
downloaded once, where its publisher offers it in the form that is read here; otherwise the error says what belongs
there.
"""

from __future__ import annotations

import os
import urllib.error
from pathlib import Path

import torch

DATA_VARIABLE = "PYSEQNET_DATA"
DOWNLOAD_VARIABLE = "PYSEQNET_DOWNLOAD"  # 0: what is missing stays missing


class MissingData(FileNotFoundError):
    """A data set is neither in the data folder nor to be had by downloading."""


def folder() -> Path:
    """The folder of the data sets: ``$PYSEQNET_DATA``, or ``~/.cache/pyseqnet``."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "pyseqnet"


def find(name: str, url: str | None = None, origin: str = "") -> Path:
    """The path of the file ``name`` of the data folder, downloaded from ``url`` if it is not there yet.

    Args:
        name: relative to `folder`, with forward slashes.
        url: of exactly this file.
        origin: who publishes the data, for the error message.

    ``PYSEQNET_DOWNLOAD=0`` in the environment forbids downloading.

    Raises:
        MissingData: the file is not there and cannot be, or may not be, downloaded.
    """
    path = folder() / name
    if path.exists():
        return path
    if os.environ.get(DOWNLOAD_VARIABLE, "1") == "0":
        url, origin = None, origin or url or ""
    if url is None:
        raise MissingData(f"{path} is missing ({DATA_VARIABLE} names the folder of data sets); origin: {origin}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # writes beside the file and renames: a broken download leaves nothing behind
        torch.hub.download_url_to_file(url, str(path))
    except (OSError, urllib.error.URLError) as error:
        raise MissingData(f"{path} is missing and {url} could not be read: {error}") from error
    return path


__all__ = ["DATA_VARIABLE", "MissingData", "find", "folder"]
