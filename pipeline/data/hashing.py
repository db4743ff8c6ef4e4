"""Hashes of files and of plain data, as lineage names them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

write_json = json.JSONEncoder(ensure_ascii=False).encode  # `json.dumps` makes an encoder at each call


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
