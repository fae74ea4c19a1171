"""What the names of prompt files say: format, marker or data, and the columns that folders add.

In go names, out come formats, columns and refusals; nothing here lists a folder or opens a file, so that local folders
and S3 prefixes are judged alike.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

from millijoule.workers.errors import InputError
from millijoule.workers.layout import JOB_KEY

FORMATS = ("txt", "csv", "tsv", "jsonl", "ndjson", "json", "parquet", "pq")

#: One format under two names.
_SAME_FORMAT = {"ndjson": "jsonl", "pq": "parquet"}

#: Formats of spreadsheets, which one saves under another name rather than converts.
_SPREADSHEETS = ("xlsx", "xls", "xlsm", "ods", "numbers")

#: Folders of tables whose own log says which of the files in them count.
_TABLE_LOGS = {"_delta_log": "Delta", ".hoodie": "Hudi"}

#: How Hive and Spark write a null in the name of a folder.
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"

#: Names that a message repeats at most.
_SHOWN_NAMES = 5


def file_format(url: str) -> tuple[str, bool]:
    """The format and whether the file is gzip-compressed, from its name; raises InputError where that tells nothing."""
    name = url.rsplit("/", 1)[-1].lower()
    compressed = name.endswith(".gz")
    extension = name.removesuffix(".gz").rpartition(".")[2]
    if extension in _SPREADSHEETS:
        raise InputError(f"{url}: spreadsheets are not read; save the sheet as 'CSV UTF-8' (*.csv)")
    if extension not in FORMATS or "." not in name.removesuffix(".gz"):
        raise InputError(
            f"{url}: unknown prompt format; name the file *.txt, *.csv, *.tsv, *.jsonl, *.ndjson, *.json (each also "
            ".gz) or *.parquet"
        )
    extension = _SAME_FORMAT.get(extension, extension)
    if extension == "parquet" and compressed:
        raise InputError(
            f"{url}: gzip around Parquet cannot be read; decompress it (Parquet compresses itself)"
        )
    return extension, compressed


def is_marker(path: str) -> bool:
    """Whether a relative path names no data: a hidden file, `_SUCCESS` and its like, a checksum, a folder on S3.

    What begins with an underscore and has an equals sign is a folder of a partition.
    """
    names = path.split("/")
    hidden = any(n.startswith(".") or (n.startswith("_") and "=" not in n) for n in names)
    return hidden or names[-1] == "" or names[-1].endswith((".crc", "_$folder$"))


def partition_columns(path: str) -> tuple[tuple[str, str | None], ...]:
    """The columns in the folders of a relative path as Hive writes them: "lang=de/p.csv" gives (("lang", "de"),)."""
    pairs = (folder.partition("=") for folder in path.split("/")[:-1] if "=" in folder)
    return tuple(
        (unquote(name), None if value == _HIVE_NULL else unquote(value)) for name, _, value in pairs if name
    )


def data_files(folder: str, sizes: Mapping[str, int]) -> list[str]:
    """Which of a folder's files are to be read. Markers are passed over, files without a byte (an empty partition), and
    outputs of jobs within.

    Args:
        folder: for messages.
        sizes: bytes of every file below the folder, by path relative to it.

    Raises:
        InputError: no file is left, one of them is of no known format, their formats differ, or the folder is a table
            with a log of its own.
    """
    for path in sizes:
        for part in path.split("/")[:-1]:
            if part in _TABLE_LOGS:
                raise InputError(
                    f"{folder!r} is a {_TABLE_LOGS[part]} table, whose log says which of its files count; write the "
                    "prompts out as plain Parquet"
                )
    # a job's output may lie among its prompts
    outputs = tuple(p.removesuffix(JOB_KEY) for p in sizes if p.endswith(f"/{JOB_KEY}"))
    names = sorted(p for p, size in sizes.items() if size and not is_marker(p) and not p.startswith(outputs))
    if not names:
        rest = f"; it has {_some(sizes)}, which hold no rows" if sizes else ""
        raise InputError(f"{folder!r} is a folder without prompt files{rest}")
    kinds: dict[str, list[str]] = defaultdict(list)
    unknown = []
    for name in names:
        try:
            kinds[file_format(name)[0]].append(name)
        except InputError:
            unknown.append(name)
    pattern = "**/*" if any("/" in name for name in names) else "*"
    example = f"{folder.rstrip('/')}/{pattern}.{next(iter(kinds), 'parquet')}"
    if unknown and not kinds:
        raise InputError(
            f"{folder!r} is a folder without prompt files ({', '.join(f'*.{f}' for f in FORMATS)}); it has {_some(unknown)}"
        )
    if unknown:
        raise InputError(
            f"{folder!r} has files of unknown format besides prompt files: {_some(unknown)}; name those to read, for "
            f"example {example!r}"
        )
    if len(kinds) > 1:
        found = "; ".join(f"{kind}: {_some(files)}" for kind, files in sorted(kinds.items()))
        raise InputError(
            f"{folder!r} has prompt files of several formats ({found}); name those to read, for example {example!r}"
        )
    return names


def literal_folder(pattern: str) -> str:
    """The folder with trailing slash before the first wildcard of a pattern, "" where there is none."""
    return re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] + "/" if "/" in pattern else ""


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    rest = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + rest
