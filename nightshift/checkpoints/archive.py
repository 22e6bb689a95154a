"""What `torch.save` has written, read without believing a byte of it.

`torch.load(weights_only=True)` runs no code of others. Yet a few bytes can make it take any amount of memory or time:
entries that are deflated, `bytearray(2**40)`, a tuple of tuples of tuples as a key. Here a pickle can only say what a
payload consists of: dicts, lists, tuples, text, numbers, and tensors that lie in entries of the archive.
"""

import io
import math
import pickletools
import sys
import zipfile
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_DIRECTORY_BYTES = 8 * 1024 * 1024
"""A tensor takes about 70 bytes of the directory, and 1000 of memory while that is read."""
_MAX_PICKLE_BYTES = 64 * 1024 * 1024
_MAX_OPERATIONS = 1_000_000
"""A tensor takes about 40 of a pickle's operations. So many take some seconds, and 200 MB of memory at most."""
_MAX_PARTS = 1_000_000
_MAX_DEPTH = 20
_MAX_DIMENSIONS = 16
_ALIGNMENT = 16
"""In bytes. `torch.save` gives every tensor 64."""
_DTYPES = {
    "torch BFloat16Storage": torch.bfloat16,
    "torch BoolStorage": torch.bool,
    "torch ByteStorage": torch.uint8,
    "torch CharStorage": torch.int8,
    "torch ComplexDoubleStorage": torch.complex128,
    "torch ComplexFloatStorage": torch.complex64,
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch IntStorage": torch.int32,
    "torch LongStorage": torch.int64,
    "torch ShortStorage": torch.int16,
}
_LITERALS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}


class _Global(str):
    """A module and a name in it, with a space between: a pickle can name it, and get nothing of it but this."""

    __slots__ = ()


def read_archive(body: bytes | mmap) -> Any:
    """What was given to `torch.save`, of plain values and of tensors on the CPU. An OrderedDict becomes a dict.

    It takes at most 500 MB, and the memory of the tensors. If `body` can be written to, they lie in `body` itself.

    Raises:
        ValueError: it says something else, or more than any payload does.
        Exception: of any other kind, if it is not what `torch.save` writes.
    """
    entries = _entries(body)
    if entries["byteorder"] != sys.byteorder.encode():
        raise ValueError(f"it does not say that its byte order is {sys.byteorder}, this machine's")
    if len(entries["data.pkl"]) > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has more than {_MAX_PICKLE_BYTES:,} bytes")
    found = _Reader(entries).read(bytes(entries["data.pkl"]))
    _check_tree(found)
    return found


class _SmallReads(io.RawIOBase):
    """A file from which an archive's directory is read, unless that is too large."""

    def __init__(self, body: bytes | mmap) -> None:
        self._body = body
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._body)}[whence])
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        most = _MAX_DIRECTORY_BYTES + 1
        content = self._body[self._at : self._at + (most if size is None or size < 0 else min(size, most))]
        if len(content) == most:
            raise ValueError(f"its directory has more than {_MAX_DIRECTORY_BYTES:,} bytes")
        self._at += len(content)
        return content


def _entries(body: bytes | mmap) -> dict[str, memoryview]:
    """The content of each entry, by its name without the folder that all are in."""
    with zipfile.ZipFile(_SmallReads(body)) as archive:
        listed = archive.infolist()
    entries: dict[str, memoryview] = {}
    end = 0
    for entry in sorted(listed, key=lambda entry: entry.header_offset):
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{entry.filename} is compressed")
        # Before the content come 30 bytes, of which the last four say how long the name and what else follows are. The
        # archive's own checksums are left out: what is read here has been compared with a sha256.
        lengths = entry.header_offset + 26
        name, more = (int.from_bytes(body[at : at + 2], "little") for at in (lengths, lengths + 2))
        first = lengths + 4 + name + more
        if entry.header_offset < end:
            raise ValueError("its entries overlap")
        end = first + entry.file_size
        entries[entry.filename.partition("/")[2]] = memoryview(body)[first : first + entry.file_size]
    if len(entries) < len(listed):
        raise ValueError("two of its entries have the same name")
    if end > len(body):
        raise ValueError("its entries are cut off")
    return entries


class _Reader:
    """Does what the operations of a pickle say, as far as `torch.save` uses them; none of them calls anything."""

    def __init__(self, entries: dict[str, memoryview]) -> None:
        self._entries = entries
        self._storages: dict[str, Tensor] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[Any, Any] = {}

    def read(self, pickled: bytes) -> Any:
        stack = self._stack
        for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
            if number == _MAX_OPERATIONS:
                raise ValueError(f"its pickle has more than {number:,} operations")
            match operation.name:
                case "PROTO" | "STOP":
                    pass
                case "BINPUT" | "LONG_BINPUT":
                    self._memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(self._memo[argument])
                case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" as name:
                    stack.append(_LITERALS[name]())
                case "GLOBAL":
                    stack.append(_Global(argument))
                case "MARK":
                    self._marks.append(len(stack))
                case "TUPLE":
                    stack.append(tuple(self._taken(self._marks.pop())))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack.append(tuple(self._taken(len(stack) - int(name[-1]))))
                case "APPEND":
                    self._append(self._taken(len(stack) - 1))
                case "APPENDS":
                    self._append(self._taken(self._marks.pop()))
                case "SETITEM":
                    self._set_items(self._taken(len(stack) - 2))
                case "SETITEMS":
                    self._set_items(self._taken(self._marks.pop()))
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE":
                    stack.append(self._made(*self._taken(len(stack) - 2)))
                case "BUILD" if type(stack[-2]) is dict:
                    stack.pop()  # the versions that a state_dict notes of its modules, which nothing here needs
                case name:
                    raise ValueError(f"{name} is no operation of a payload's")
        (found,) = stack
        return found

    def _taken(self, first: int) -> list[Any]:
        if first < 0:
            raise ValueError("an operation has too little to work on")
        taken = self._stack[first:]
        del self._stack[first:]
        return taken

    def _append(self, items: list[Any]) -> None:
        into = self._stack[-1]
        if type(into) is not list:
            raise ValueError("only a list can be appended to")
        into.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        into, keys, values = self._stack[-1], items[::2], items[1::2]
        if type(into) is not dict or any(type(key) not in (str, int) for key in keys):
            raise ValueError("only a dict can have items, and only text and whole numbers can be their keys")
        into.update(zip(keys, values, strict=True))

    def _storage(self, said: tuple[Any, ...]) -> Tensor:
        """The whole content of an entry, in one dimension."""
        _, kind, key, _, length = said
        if type(kind) is not _Global or kind not in _DTYPES or type(key) is not str or type(length) is not int:
            raise ValueError(f"{key!r:.40} is no storage of a payload's")
        if key not in self._storages:
            dtype = _DTYPES[kind]
            content = self._entries[f"data/{key}"]
            if len(content) != length * dtype.itemsize:
                raise ValueError(f"data/{key} has {len(content):,} bytes, and not {length:,} times {dtype.itemsize}")
            self._storages[key] = _in_place(content, dtype)
        return self._storages[key]

    def _made(self, what: Any, said: tuple[Any, ...]) -> Any:
        if what == "torch._utils _rebuild_tensor_v2" and type(what) is _Global:
            return _tensor(*said[:4])
        if what == "collections OrderedDict" and type(what) is _Global and not said:
            return {}
        raise ValueError(f"{what!s:.80} is called, which no payload does")


def _in_place(content: memoryview, dtype: torch.dtype) -> Tensor:
    """The content as a tensor: the same memory, if that may be written to and lies as a tensor's has to."""
    held = np.frombuffer(content, np.uint8)
    if content and not content.readonly and held.ctypes.data % _ALIGNMENT == 0:
        return torch.from_numpy(held).view(dtype)
    storage = torch.empty(len(content) // dtype.itemsize, dtype=dtype)
    storage.view(torch.uint8).numpy()[:] = held
    return storage


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """A part of a storage, in a shape, with no more elements than it: a stride of 0 could repeat one endlessly."""
    numbers = (offset, *size, *stride)
    if len(numbers) > 2 * _MAX_DIMENSIONS or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("the shape of a tensor is none")
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} has more elements than its storage, {storage.numel():,}")
    return torch.as_strided(storage, size, stride, offset)


def _check_tree(found: Any) -> None:
    """Raise ValueError unless this is a tree of reasonable size; a list inside itself, for example, has no end."""
    parts, depth = [found], 0
    count = 1
    while parts:
        depth += 1
        inside: list[Any] = []
        for part in parts:
            if isinstance(part, dict):
                inside.extend(part.values())
            elif isinstance(part, list | tuple):
                inside.extend(part)
            elif not isinstance(part, Tensor | str | int | float | None) or isinstance(part, _Global):
                raise ValueError(f"it contains {part!s:.80}")
            if count + len(inside) > _MAX_PARTS:
                raise ValueError(f"it says more than {_MAX_PARTS:,} things")
        count, parts = count + len(inside), inside
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deep")
