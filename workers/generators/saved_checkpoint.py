"""Files of `torch.save`, read as data.

In goes a file, out come its dictionaries, lists and plain values, with a `StoredTensor` in place of each tensor, whose
numbers are read when asked for. The pickle in it is walked through instruction by instruction, and nothing is ever
imported, called or built by the names in it: the few that such files use stand for plain data, any other refuses the
file. The walk copies, compares and hashes nothing larger than a word, so its work is bounded by the pickle's length
whatever the pickle says. What it yields is as the file has it, which may be shared, deep or circular: whoever goes
through it must bound that.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import refuse_lfs_pointer

#: The pickled part of a checkpoint holds names and settings; the numbers stand beside it.
MAX_PICKLE_BYTES = 64 * 2**20

#: A checkpoint of some hundred tensors has some ten thousand instructions; these take a few seconds.
MAX_INSTRUCTIONS = 2_000_000

#: Keys beyond these are no one's: long integers can be chosen to share a hash value, and long words take long to compare.
MAX_INTEGER_KEY, MAX_WORD_KEY = 2**63, 1000

#: Nothing that such a file holds is made of more arguments, and no tensor has more dimensions.
MAX_ARGUMENTS, MAX_DIMENSIONS = 16, 16

#: What the first two pickles of a file from before torch 1.6 say.
LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

_ZIP_START = b"PK\x03\x04"

_STORAGE_TYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip

_TENSORS = {f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")}
_PARAMETER, _TENSOR = "torch.nn.parameter.Parameter", "torch.Tensor"
_PARAMETERS = {_PARAMETER, *(f"torch._utils._rebuild_parameter{end}" for end in ("", "_with_state"))}
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_DICTIONARIES = {"collections.OrderedDict", "collections.Counter"}
_DTYPES = {f"torch.{n}": value for n, value in vars(torch).items() if isinstance(value, torch.dtype)}

#: The names a checkpoint may hold. All but dictionaries and tensors stay just that: a name, which no model and no config
#: can contain.
_KNOWN = {
    *(*_DICTIONARIES, *_TENSORS, *_PARAMETERS, _FROM_TYPE, _TENSOR, *_DTYPES),
    *(f"torch.{name}" for name in (*_STORAGE_TYPES, "storage.UntypedStorage", "storage.TypedStorage")),
    *(f"torch._utils._rebuild_{name}" for name in ("qtensor", "sparse_tensor", "nested_tensor")),
    *("torch._utils._rebuild_meta_tensor_no_storage", "torch.serialization._get_layout"),
    *("torch.Size", "torch.device", "_codecs.encode"),
    *(f"builtins.{name}" for name in ("bytearray", "set", "complex")),
}


class _Damaged(ValueError):
    """The file contradicts itself."""


@dataclass(frozen=True, eq=False)
class Unread:
    """In place of something that is neither a tensor of numbers nor a plain value, by its name in Python."""

    name: str

    @property
    def kind(self) -> str:
        """A word for it."""
        return "dtype" if self.name in _DTYPES else self.name.rpartition(".")[2].removeprefix("_rebuild_")


@dataclass(frozen=True, eq=False)
class _Storage:
    key: str
    dtype: torch.dtype
    start: int  # elements


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where a tensor's numbers stand: `offset` and `strides` count elements of the array `storage` of the file.

    `negative`: the numbers in the file are minus the tensor's (torch's lazy negation).
    """

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool = False

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))

    @property
    def repeats(self) -> bool:
        """Whether several of its elements may be one number of the file, as `expand` makes them."""
        reach = 0
        for stride, n in sorted((s, n) for s, n in zip(self.strides, self.shape, strict=True) if n > 1):
            if stride <= reach:
                return True
            reach += (n - 1) * stride
        return False


@dataclass(frozen=True)
class SavedCheckpoint:
    """What a file holds. `content` is not checked further than that: see the module."""

    path: Path
    content: Any
    _arrays: dict[str, range]  # bytes of the file by storage key

    def place(self, stored: StoredTensor) -> range:
        """The bytes of the file from the tensor's first number to its last; ValueError where it has not got them."""
        array, size = self._arrays.get(stored.storage), stored.dtype.itemsize
        if array is None:
            raise ValueError("its numbers are not in the file")
        start = array.start + stored.offset * size
        end = start + stored.span * size
        if end > array.stop:
            raise ValueError(f"it needs {end - array.start} bytes, its array in the file has {len(array)}")
        return range(start, end)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor itself, contiguous and in memory of its own; raises like `place`."""
        place = self.place(stored)
        if not place:
            return torch.empty(stored.shape, dtype=stored.dtype)
        with self.path.open("rb") as file:
            file.seek(place.start)
            data = bytearray(file.read(len(place)))
        if len(data) < len(place):
            raise ValueError("the file ends within its numbers")
        numbers = torch.frombuffer(data, dtype=stored.dtype)
        tensor = numbers.as_strided(stored.shape, stored.strides).contiguous()
        return -tensor if stored.negative else tensor


def read_saved(path: Path) -> SavedCheckpoint:
    """Read what `torch.save` wrote, in its present format or that from before torch 1.6.

    Raises:
        InputError: the file is not such a file, is damaged, or holds objects other than tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(64)
            refuse_lfs_pointer(path, start)
            return (_read_archive if start.startswith(_ZIP_START) else _read_legacy)(path, file)
    except (OSError, ValueError, EOFError, NotImplementedError, struct.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a checkpoint as torch.save writes it: {error}") from error


def _read_archive(path: Path, file: BinaryIO) -> SavedCheckpoint:
    entries: dict[str, range] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise InputError(f"{path}: {entry.filename!r} is compressed, which torch.save never does")
            if entry.filename in entries:
                raise InputError(f"{path}: holds {entry.filename!r} twice")
            entries[entry.filename] = _entry_bytes(file, entry)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _Damaged(f"a zip archive with {len(pickles)} data.pkl")
    folder, pickled = pickles[0].removesuffix("data.pkl"), entries[pickles[0]]
    if f"{folder}constants.pkl" in entries:
        raise _Damaged("a TorchScript program; save the model's state_dict instead")
    if f"{folder}byteorder" in entries and _bytes(file, entries[f"{folder}byteorder"], 16) != b"little":
        raise _Damaged("its numbers are not little-endian")
    if len(pickled) > MAX_PICKLE_BYTES:
        raise InputError(f"{path}: {pickles[0]!r} is {len(pickled)} bytes: not a checkpoint")
    content = _Walk(path).load(io.BytesIO(_bytes(file, pickled, MAX_PICKLE_BYTES)))
    data = f"{folder}data/"
    arrays = {name.removeprefix(data): place for name, place in entries.items() if name.startswith(data)}
    return SavedCheckpoint(path, content, arrays)


def _entry_bytes(file: BinaryIO, entry: zipfile.ZipInfo) -> range:
    file.seek(entry.header_offset)
    local = file.read(30)
    if len(local) < 30 or not local.startswith(_ZIP_START):
        raise _Damaged(f"{entry.filename!r} is not where the archive says")
    lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    start = entry.header_offset + 30 + lengths
    if start + entry.file_size > file.seek(0, io.SEEK_END):
        raise _Damaged(f"{entry.filename!r} ends after the file")
    return range(start, start + entry.file_size)


def _bytes(file: BinaryIO, place: range, most: int) -> bytes:
    file.seek(place.start)
    return file.read(min(len(place), most))


def _read_legacy(path: Path, file: BinaryIO) -> SavedCheckpoint:
    """Five pickles one after another (number, version, machine, content, keys), then each array after its length."""
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    walk = _Walk(path)
    if walk.load(pickles) != LEGACY_MAGIC or walk.load(pickles) != LEGACY_VERSION:
        raise _Damaged("it does not begin like one")
    machine, content, keys = (walk.load(pickles) for _ in range(3))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _Damaged("its numbers are not little-endian")
    if not isinstance(keys, list) or not set(map(_key, keys)) <= walk.storages.keys():
        raise _Damaged("its list of arrays is not that of its tensors")
    arrays, end = {}, file.seek(0, io.SEEK_END)
    start = pickles.tell()
    for key in keys:
        file.seek(start)
        count = int.from_bytes(file.read(8), "little")
        arrays[key] = range(start + 8, start + 8 + count * walk.storages[key].itemsize)
        start = arrays[key].stop
        if start > end:
            raise _Damaged("it ends within its numbers")
    return SavedCheckpoint(path, content, arrays)


class _Walk:
    """Walks through the pickles of one file. `storages` are the arrays they name, with the type of their numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storages: dict[str, torch.dtype] = {}
        self._instructions = 0

    def load(self, file: BinaryIO) -> Any:
        """The object of the pickle that starts here; raises ValueError where it is none, InputError for names in it."""
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self._instructions += 1
                if self._instructions > MAX_INSTRUCTIONS:
                    raise InputError(
                        f"{self.path}: its pickle has more than {MAX_INSTRUCTIONS} instructions: not a checkpoint. Save a "
                        "file with only its model and config and convert that"
                    )
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._do(opcode.name, argument)
        except (IndexError, KeyError, TypeError, OverflowError, ValueError) as error:
            raise _Damaged(f"damaged pickle ({type(error).__name__})") from error
        raise _Damaged("its pickle does not end")

    def _do(self, instruction: str, argument: Any) -> None:
        stack = self._stack
        if instruction in _PUSH_ARGUMENT:
            stack.append(argument)
        elif make := _PUSH.get(instruction):
            stack.append(make())
        elif instruction in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif instruction in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif instruction == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif instruction == "MARK":
            self._marked.append(stack)
            self._stack = []
        elif instruction in _TUPLES:
            count = _TUPLES[instruction]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
        elif instruction == "TUPLE":
            items = self._pop_mark()
            self._stack.append(tuple(items))
        elif instruction in ("APPEND", "APPENDS"):
            items = self._pop_mark() if instruction == "APPENDS" else [stack.pop()]
            self._top(list).extend(items)
        elif instruction in ("SETITEM", "SETITEMS"):
            items = self._pop_mark() if instruction == "SETITEMS" else [stack.pop(-2), stack.pop()]
            target = self._top(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[_key(key)] = value
        elif instruction == "GLOBAL":
            stack.append(self._named(argument.replace(" ", ".", 1)))
        elif instruction == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if not isinstance(name, str) or not isinstance(module, str):
                raise TypeError
            stack.append(self._named(f"{module}.{name}"))
        elif instruction in ("REDUCE", "NEWOBJ"):
            arguments, named = stack.pop(), stack.pop()
            if not isinstance(named, Unread) or not isinstance(arguments, tuple):
                raise TypeError
            if len(arguments) > MAX_ARGUMENTS:
                raise ValueError
            stack.append(_built(named, arguments))
        elif instruction == "BUILD":  # attributes of an object: of an OrderedDict, say. None of them is data
            stack.pop()
            if not isinstance(stack[-1], dict | Unread):
                raise TypeError
        elif instruction == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif instruction not in ("PROTO", "FRAME"):
            raise InputError(
                f"{self.path}: its pickle has an instruction ({instruction}) that torch.save does not write, so it is not "
                "loaded. Save a file with only its model and config and convert that"
            )

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise TypeError
        return self._stack[-1]

    def _named(self, name: str) -> Unread:
        name = name.replace("__builtin__.", "builtins.", 1)
        if name not in _KNOWN:
            raise InputError(
                f"{self.path}: holds {name[:100]!r} besides tensors and plain values, so it is not loaded: that could "
                "run any code. Save a file with only its model and config and convert that"
            )
        return Unread(name)

    def _storage(self, persistent: Any) -> _Storage:
        if not isinstance(persistent, tuple) or len(persistent) not in (5, 6):
            raise TypeError
        word, named, key, _, _ = persistent[:5]
        if word != "storage" or not isinstance(named, Unread) or type(_key(key)) is not str:
            raise TypeError
        dtype = _STORAGE_TYPES[named.name.rpartition(".")[2]]
        if self.storages.setdefault(key, dtype) != dtype:
            raise ValueError
        view = persistent[5] if len(persistent) == 6 else None
        return _Storage(key, dtype, view[1] if view else 0)


#: No integer longer than LONG1's 255 bytes: Python itself refuses to write those out.
_PUSH_ARGUMENT = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    )
)
_PUSH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _key(key: Any) -> Any:
    """`key` if it is one word or number. Others, whose hash can take any time, become a key that nobody looks for."""
    if key is None or type(key) in (bool, float):
        return key
    if type(key) in (str, bytes) and len(key) <= MAX_WORD_KEY:
        return key
    if type(key) is int and abs(key) < MAX_INTEGER_KEY:
        return key
    return Unread(type(key).__name__)


def _built(named: Unread, arguments: tuple[Any, ...]) -> Any:
    """What calling `named` stands for."""
    name = named.name
    if name in _DICTIONARIES:
        if not arguments:
            return {}
        return arguments[0] if len(arguments) == 1 and type(arguments[0]) is dict else named
    if name == "torch.Size" and len(arguments) == 1 and type(arguments[0]) is tuple:
        return arguments[0]
    if name == _FROM_TYPE:
        function, kind, inner, _ = arguments
        known = isinstance(kind, Unread) and kind.name in (_TENSOR, _PARAMETER)
        if not known or not isinstance(function, Unread) or function.name not in _TENSORS:
            return named
        return _built(function, inner) if isinstance(inner, tuple) else named
    if name in _PARAMETERS:
        return arguments[0] if arguments and isinstance(arguments[0], StoredTensor) else named
    if name in _TENSORS:
        return _tensor(name, arguments)
    return named


def _tensor(name: str, arguments: tuple[Any, ...]) -> StoredTensor | Unread:
    storage, offset, shape, strides = arguments[:4]
    more = arguments[6:]  # between them: whether it learns, and its hooks
    if not isinstance(storage, _Storage) or type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError
    dtype = storage.dtype
    if name.endswith("_v3"):
        dtype, more = _DTYPES[more[0].name], more[1:]
    marks = more[0] if more and more[0] is not None else {}
    sizes = (storage.start, offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 2**63 for n in sizes):
        raise ValueError
    if type(marks) is not dict or len(marks) > 2 or not set(marks) <= {"neg", "conj"}:
        raise ValueError
    if marks.get("conj"):
        return Unread("conjugate tensor")
    return StoredTensor(
        storage.key, dtype, storage.start + offset, tuple(shape), tuple(strides), marks.get("neg") is True
    )
