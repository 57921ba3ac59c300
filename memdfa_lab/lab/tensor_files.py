"""Tensors in files of the safetensors format, read and written without an extra copy.

A file has the length of its header in eight bytes, the header in JSON (dtype, shape and place of each tensor by name),
and the numbers, in logical order.
"""

import ctypes
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.watcher import unwatched

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_AT_ONCE = 2**30  # macOS refuses 2 GiB
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write(path: Path, tensors: Mapping[str, Tensor], sync: bool) -> int:
    """Write tensors by name, in place of the file's content, and return its size in bytes.

    With `sync` the function returns when they are on the disk.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with opened(path, os.O_WRONLY | os.O_CREAT) as file:
        at = _write_at(file, 0, memoryview(len(text).to_bytes(8, "little") + text))
        for tensor in tensors.values():
            at = _write_at(file, at, _bytes_of(tensor.detach().contiguous()))
        os.ftruncate(file, at)
        if sync:
            os.fsync(file)
    return at


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Return the tensors whose names are wanted, contiguous. Raises OSError if the file is truncated."""
    found = {}
    with unwatched(), opened(path, os.O_RDONLY) as file:  # profilers are told of this memory later, by label
        entries, start = _header(file)
        for name, entry in entries.items():
            if wanted(name):
                found[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                _read_at(file, start + entry["data_offsets"][0], _bytes_of(found[name]))
    return found


def check(path: Path) -> None:
    """Raise ValueError if a file is missing, damaged or truncated."""
    try:
        with opened(path, os.O_RDONLY) as file:
            entries, start = _header(file)
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        for entry in entries.values():
            size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if entry["data_offsets"][1] - entry["data_offsets"][0] != size:
                raise ValueError(entry)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes of {end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise ValueError(f"{path} is damaged or not a complete file of this network ({why})") from problem


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's list of files, to the disk.

    Windows cannot open a folder, and keeps its list by itself.
    """
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return
    with opened(path, os.O_RDONLY if is_folder else os.O_RDWR) as file:  # Windows flushes only files opened for writing
        os.fsync(file)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file in the with-block, and name it in errors."""
    file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield file
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise
    finally:
        os.close(file)


def _header(file: int) -> tuple[dict[str, dict[str, Any]], int]:
    """Return each tensor's entry (dtype, shape, data_offsets), and the offset of the numbers."""
    size = bytearray(8)
    _read_at(file, 0, memoryview(size))
    length = int.from_bytes(size, "little")
    if length > os.fstat(file).st_size:
        raise ValueError("its header is longer than the file")
    text = bytearray(length)
    _read_at(file, 8, memoryview(text))
    entries = json.loads(text)
    entries.pop("__metadata__", None)  # text from other programs
    return entries, 8 + length


def give_back_at_once() -> None:
    """Make this process return memory of 64 KiB and more to the system when it is freed (M_MMAP_THRESHOLD of mallopt).

    Otherwise glibc keeps it, and places small objects of later blocks in it. Activations then no longer fit there, and
    memory grows with depth.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(-3, 2**16)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(numbers)


def _write_at(file: int, at: int, data: memoryview) -> int:
    while data:
        part = data[:MOST_AT_ONCE]
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, part, at)
        else:  # Windows
            os.lseek(file, at, os.SEEK_SET)
            written = os.write(file, part)
        at, data = at + written, data[written:]
    return at


def _read_at(file: int, at: int, into: memoryview) -> None:
    while into:
        if hasattr(os, "preadv"):
            got = os.preadv(file, [into[:MOST_AT_ONCE]], at)
        else:  # Windows
            os.lseek(file, at, os.SEEK_SET)
            part = os.read(file, min(len(into), 2**20))
            got = len(part)
            into[:got] = part
        if not got:
            raise OSError(0, "the file is truncated")
        at, into = at + got, into[got:]
