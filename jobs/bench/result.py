"""Where a benchmark's result goes: a file to be committed, and the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_result(result: dict[str, Any], path: str | None) -> None:
    """Print `result` as JSON, and save the same text at `path` if one was given."""
    text = json.dumps(result, indent=2) + "\n"
    if path is not None:
        Path(path).write_text(text)
    print(text, end="")
