"""The sha256 of files, which say in receipts and records what something was made of."""

from __future__ import annotations

import hashlib
from pathlib import Path


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_files(folder: str | Path) -> dict[str, str]:
    """The sha256 of each weight file and of the config in a checkpoint's folder."""
    patterns = ("*.safetensors", "*.bin", "config.json")
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    return {path.name: sha256_of(path) for path in paths if path.is_file()}
