"""A store as the file system that PyArrow's datasets read from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
from pyarrow import fs

if TYPE_CHECKING:
    from millijoule.workers.storage.protocol import Store


def arrow_filesystem(store: Store) -> fs.FileSystem:
    """`store` for a PyArrow dataset; paths are keys. Only what reading a dataset of known files takes is there.

    A dataset that is given open files instead hands each of them to every scan, in threads of its own. PyArrow locks
    such a file while it seeks and reads, but not while it asks for its size (a seek to the end and back), so of two
    scans at a time one may read in the wrong place. Here every scan opens its own.
    """
    return fs.PyFileSystem(_Handler(store))


class _Handler(fs.FileSystemHandler):
    def __init__(self, store: Store) -> None:
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Handler) and other._store is self._store

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "millijoule-store"

    def normalize_path(self, path: str) -> str:
        return path

    def open_input_file(self, path: str) -> pa.NativeFile:
        source = self._store.open_input(path)
        return source if isinstance(source, pa.NativeFile) else pa.PythonFile(source, mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def _unsupported(self, *args: object) -> None:
        raise NotImplementedError("a dataset of known files needs no more than to open them")

    get_file_info = get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _unsupported
    delete_root_dir_contents = delete_file = move = copy_file = _unsupported
    open_output_stream = open_append_stream = _unsupported
