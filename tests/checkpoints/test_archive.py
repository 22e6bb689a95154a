"""What torch.save writes of a payload comes back; nothing else does, and nothing that is read can cost much."""

import io
import os
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from mmap import ACCESS_COPY, mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nightshift.checkpoints.archive import read_archive

Held = Callable[[bytes], bytes | mmap]
DTYPES = [
    *(torch.bfloat16, torch.bool, torch.complex64, torch.complex128, torch.float16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
]


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def mapped(body: bytes) -> mmap:
    """The body as a checkpoint's payload is read: a file of which every process has its own version in memory."""
    with tempfile.TemporaryFile() as file:
        file.write(body)
        file.flush()
        return mmap(file.fileno(), 0, access=ACCESS_COPY)


@pytest.fixture(params=[bytes, mapped], ids=["bytes", "file"])
def held(request: pytest.FixtureRequest) -> Held:
    held: Held = request.param
    return held


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, and laid out alike in memory."""
    if isinstance(one, Tensor):
        layouts = [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in (one, other)]
        return layouts[0] == layouts[1] and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(dtype: torch.dtype, held: Held) -> None:
    whole = torch.arange(24).reshape(2, 3, 4).to(dtype)
    given = {"whole": whole, "none": whole[:0], "one": whole[1, 2, 3].clone(), "part": whole[:, 1:], "turned": whole.mT}
    assert same(read_archive(held(saved(given))), given)


def test_plain_values_come_back(held: Held) -> None:
    scalars = [
        None,
        True,
        False,
        0,
        -1,
        2**31,
        -(2**63),
        2**200,
        0.1,
        float("inf"),
        "",
        "ü\n",
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
    ]
    given = {
        "scalars": scalars,
        "deep": {"a": [{1: [(4, 5, 6, 7)]}]},
        **{f"key {number}": number for number in range(300)},
    }
    assert same(read_archive(held(saved(given))), given)


def test_memory_formats_and_shared_storages_come_back(held: Held) -> None:
    picture = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = read_archive(held(saved([picture, picture[0], picture])))
    assert same(found, [picture, picture[0], picture])
    assert found[0].data_ptr() == found[1].data_ptr() == found[2].data_ptr()


def test_an_ordered_dict_comes_back_as_a_dict(held: Held) -> None:
    assert same(read_archive(held(saved({"hooks": OrderedDict()}))), {"hooks": {}})


def test_tensors_lie_in_the_file_that_they_are_read_from() -> None:
    body = mapped(saved([torch.arange(1000)]))
    whole = np.frombuffer(body, np.uint8)
    (found,) = read_archive(body)
    assert 0 <= found.data_ptr() - whole.ctypes.data < len(whole)


# What nobody has written


def archive(pickled: bytes, *storages: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as into:
        into.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        into.writestr("archive/byteorder", "little")
        for key, content in enumerate(storages):
            into.writestr(f"archive/data/{key}", content)
    return file.getvalue()


def text(said: str) -> bytes:
    return b"X" + len(said.encode()).to_bytes(4, "little") + said.encode()


def number(said: int) -> bytes:
    return b"\x8a\x11" + said.to_bytes(17, "little", signed=True)


def tensor(length: int, offset: int, size: list[int], stride: list[int], kind: str = "FloatStorage") -> bytes:
    """The operations that make a tensor of a part of the storage 0, which says that it has `length` elements."""
    storage = text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + number(length)
    shape = b"(" + b"".join(map(number, size)) + b"t(" + b"".join(map(number, stride)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + number(offset) + shape + b"\x89}tR"


FOUR = bytes(16)
"""A storage of four numbers, float32."""
BILLION = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
"""A tuple of tuples of tuples: it has 2 to the 60 parts, and as many steps are needed to hash it."""
STRANGE: dict[str, tuple[bytes, str]] = {
    "a call": (archive(b"cos\nsystem\n" + text("true") + b"\x85R"), "os system is called"),
    "a call of what torch allows": (archive(b"c__builtin__\nbytearray\n" + number(2**40) + b"\x85R"), "is called"),
    "a tensor of nothing": (
        archive(b"ctorch\nFloatTensor\n" + number(2**40) + b"\x85R"),
        "torch FloatTensor is called",
    ),
    "a call of text": (archive(text("collections OrderedDict") + b")R"), "is called"),
    "a state": (archive(b"]}b"), "BUILD is no operation"),
    "a name": (archive(b"cos\nsystem\n"), "it contains os system"),
    "more than the entry has": (archive(tensor(2**30, 0, [2**30], [1]), FOUR), "data/0 has 16 bytes"),
    "2 to the 50 elements": (archive(tensor(2**50, 0, [2**50], [1]), FOUR), "data/0 has 16 bytes"),
    "fewer than no elements": (archive(tensor(-4, 0, [4], [1]), FOUR), "data/0 has 16 bytes"),
    "a larger shape": (archive(tensor(4, 0, [2**50], [1]), FOUR), "more elements than its storage"),
    "a shape without bytes": (archive(tensor(4, 0, [2**40], [0]), FOUR), "more elements than its storage"),
    "a stride beyond": (archive(tensor(4, 0, [2], [2**40]), FOUR), "out of bounds"),
    "an offset beyond": (archive(tensor(4, 2**40, [4], [1]), FOUR), "out of bounds"),
    "a stride backwards": (archive(tensor(4, 3, [2], [-1]), FOUR), "shape of a tensor is none"),
    "a storage of objects": (archive(tensor(4, 0, [4], [1], "UntypedStorage"), FOUR), "no storage of a payload"),
    "no storage": (archive(tensor(4, 0, [4], [1])), "data/0"),
    "a key without end": (archive(b"}" + BILLION + b"K\x01s"), "keys"),
    "parts without end": (archive(b"(" + BILLION + b"t"), "says more than|nested too deep"),
    "a list in itself": (archive(b"]q\x00h\x00a"), "nested too deep"),
    "a deep list": (archive(b"]" * 5000 + b"a" * 4999), "nested too deep"),
    "a long pickle": (archive(b"N" * 2_000_000), "more than 1,000,000 operations"),
    "nothing": (archive(b""), r"\S"),
    "two things": (archive(b"NN"), r"\S"),
    "too little": (archive(b"s"), "too little"),
    "deflated entries": (archive(tensor(4, 0, [4], [1]), FOUR, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "no archive": (b"PK\x03\x04" + bytes(1000), r"\S"),
    "an archive without a pickle": (archive(b"N").replace(b"data.pkl", b"date.pkl"), "data.pkl"),
    "another byte order": (archive(b"N").replace(b"little", b"bigger"), "byte order"),
    "two of a name": (archive(b"N", b"", b"").replace(b"data/1", b"data/0"), "same name"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_no_payload_consists_of_is_refused(kind: str) -> None:
    body, reason = STRANGE[kind]
    with pytest.raises(Exception, match=reason):
        read_archive(body)


def test_a_quarter_of_a_gigabyte_in_a_quarter_of_a_megabyte_is_refused() -> None:
    body = archive(tensor(2**26, 0, [2**26], [1]), bytes(2**28), compression=zipfile.ZIP_DEFLATED)
    assert len(body) < 300_000
    with pytest.raises(ValueError, match="is compressed"):
        read_archive(body)


def test_entries_that_lie_in_one_another_are_refused() -> None:
    """The directory is outside every checksum of an entry: it can name the same bytes a thousand times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as into:
        into.writestr("archive/data/0", bytes(100_000))
        (entry,) = into.filelist
        for name in range(1, 100):
            again = zipfile.ZipInfo(f"archive/data/{name}")
            again.file_size, again.compress_size, again.CRC = entry.file_size, entry.compress_size, entry.CRC
            again.header_offset, again._raw_time = entry.header_offset, 0  # type: ignore[attr-defined]
            into.filelist.append(again)
    with pytest.raises(ValueError, match="overlap"):
        read_archive(file.getvalue())


def test_a_size_in_the_directory_takes_no_memory() -> None:
    body = archive(b"N", FOUR)
    sizes = (16).to_bytes(4, "little") * 2
    assert body.count(sizes) == 2
    first, _, rest = body.rpartition(sizes)
    with pytest.raises(ValueError, match="are cut off"):
        read_archive(first + (2**31).to_bytes(4, "little") * 2 + rest)


def test_a_directory_of_a_million_entries_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as into:
        into.writestr("archive/data/0", b"")
        into.filelist *= 150_000
    with pytest.raises(ValueError, match="directory has more than"):
        read_archive(file.getvalue())


@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_pickle_runs_nothing_and_says_no_more_than_plain_values(data: st.DataObject) -> None:
    weights = {"a": torch.arange(6).reshape(2, 3), "b": [1.5, None, ("x", 2)], "c": torch.tensor(1.0)}
    body = bytearray(saved(weights))
    with zipfile.ZipFile(io.BytesIO(body)) as stored:
        size = stored.getinfo("archive/data.pkl").file_size
    first = body.index(b"\x80\x02")
    for _ in range(data.draw(st.integers(1, 6))):
        body[first + data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_archive(bytes(body))
    except Exception:
        return
    same(found, found)


def test_the_trap_of_these_tests_works(tmp_path: Path) -> None:
    """A reader that believes a pickle does what this one says."""
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trap),)

    body = saved({"model": Trap()})
    with pytest.raises(ValueError, match="posix mkdir is called"):
        read_archive(body)
    assert not trap.exists()
    torch.load(io.BytesIO(body), weights_only=False)
    assert trap.exists()
