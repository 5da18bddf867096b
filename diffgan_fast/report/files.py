"""Files that are either whole or not there."""

import os
from pathlib import Path


def write(path: str | os.PathLike, content: bytes) -> Path:
    """Write `content` beside `path`, then rename it into place; missing folders are made. Returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
