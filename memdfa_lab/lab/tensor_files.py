"""Tensors in files of the safetensors format, which many tools open; read and written without a copy in between.

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], sync: bool) -> int:
    """Write tensors and texts by name over what the file had, and return its size in bytes.

    With `sync` they are on the disk at the end.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)}
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


def header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Return what the file says of each tensor (dtype, shape, data_offsets), its texts, and where the numbers begin."""
    with opened(path, os.O_RDONLY) as file:
        return _header(file)


def read(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Return the tensors whose names are wanted, contiguous. Raises OSError if the file has been cut."""
    found = {}
    with unwatched(), opened(path, os.O_RDONLY) as file:  # profilers are told of it later, as of memory of ours
        entries, _, start = _header(file)
        for name, entry in entries.items():
            if wanted(name):
                found[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                _read_at(file, start + entry["data_offsets"][0], _bytes_of(found[name]))
    return found


def check(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the file says of its tensors. Raises ValueError if it is not there, damaged or cut."""
    try:
        entries, _, start = header(path)
        end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        for entry in entries.values():
            size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if entry["data_offsets"][1] - entry["data_offsets"][0] != size:
                raise ValueError(entry)
        if path.stat().st_size != end:
            raise ValueError(f"it has {path.stat().st_size:,} bytes of {end:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise ValueError(f"{path} is damaged or not a whole file of this network ({why})") from problem
    return entries


def sync(path: Path) -> None:
    """Bring what has been written to a file, or which files a folder has, onto the disk."""
    with opened(path, os.O_RDONLY) as file:
        os.fsync(file)


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file for what is done within, and name it in errors."""
    file = os.open(path, flags, 0o666)
    try:
        yield file
    except OSError as problem:
        problem.filename = problem.filename or str(path)
        raise
    finally:
        os.close(file)


def _header(file: int) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    size = bytearray(8)
    _read_at(file, 0, memoryview(size))
    length = int.from_bytes(size, "little")
    if length > os.fstat(file).st_size:
        raise ValueError("its header is longer than the file")
    text = bytearray(length)
    _read_at(file, 8, memoryview(text))
    entries = json.loads(text)
    return entries, entries.pop(METADATA, {}), 8 + length


def give_back_at_once() -> None:
    """Let memory of 64 KiB and more go back to the system when it is freed, in this process.

    Else glibc keeps it, and puts small objects of a block that comes later into it, so that no activation fits there
    any more: memory would grow with depth. (M_MMAP_THRESHOLD of mallopt.)
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
        written = os.pwrite(file, data, at)
        at, data = at + written, data[written:]
    return at


def _read_at(file: int, at: int, into: memoryview) -> None:
    while into:
        got = os.preadv(file, [into], at)
        if not got:
            raise OSError(0, "the file has been cut")
        at, into = at + got, into[got:]
