"""Reads and writes files of ``torch.save`` safely: plain data and tensors only, no larger than the file itself."""

import io
import os
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from cfe_lightning.files.atomic import atomic_path

# Limits of one file: entries of lists and dictionaries with shared ones counted again, nesting, bits of an integer.
_MOST_ENTRIES = 10_000_000
_DEEPEST = 100
_MOST_BITS = 512
#: Names that torch.save writes for plain data and tensors, with those of Python 2. PyTorch would also call others, some
#: of which make tensors of any size from a few bytes. Number types are added.
_NAMES = re.compile(
    r"(builtins|__builtin__)\.(set|complex)|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|torch\.(Size|device|Tensor|nn\.parameter\.Parameter|_tensor\._rebuild_from_type_v2)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.(cuda\.|storage\.)?[A-Z]\w*Storage"
)
_NUMBER_TYPES = frozenset(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_RAW_BYTES = ("builtins.bytearray", "__builtin__.bytearray")
_ODD_TENSOR = "it holds a tensor that is not an array of numbers (sparse, quantised or without memory)"
#: Pickles at the start of a file from before PyTorch 1.6: three headers, the object, the keys of its storages.
_OLD_PICKLES = 5
# Allowance for tensors that a network creates but does not save: a replaced head, tables, a blank image.
_SPARE_BYTES = 1 << 30
_SPARE_TENSORS = 10_000
#: Functions that make tensors of any size from a few numbers.
_MAKERS: tuple[Any, ...] = (
    torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace, torch.logspace,
    torch.rand, torch.randn, torch.randint, torch.randperm,
)  # fmt: skip


def load_plain(path: Path, *, any_age: bool = False) -> Any:
    """Reads a file of ``torch.save``, with ``any_age`` also of PyTorch before version 1.6.

    Nothing in the file is executed, and nothing read is larger than the file.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is truncated, not from ``torch.save``, holds anything but plain data and tensors, or claims
            to hold more than its size. The message is a short reason and does not repeat the path.
    """
    try:
        if not any_age or _is_archive(path):
            _check_archive(path)
        else:
            _check_old(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(_tensors(content), path.stat().st_size)
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    except OSError:  # names the file
        raise
    except UnpicklingError as error:
        raise ValueError("it is no file of PyTorch, or holds more than plain data and tensors") from error
    # PyTorch raises nearly anything on broken files.
    except Exception as error:
        raise ValueError("the file is truncated, damaged or not written by torch.save") from error
    return content


def save_plain(path: Path, content: Any, owner: str = "") -> None:
    """Writes plain data and tensors for ``load_plain``, as ``atomic_path``, and waits until they are on the disk.

    Raises:
        OSError: If the file cannot be written; the error names the file.
    """
    with atomic_path(path, owner) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # PyTorch's writer hides the OSError that says why a file was not written.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror) from error
        file.flush()
        os.fsync(file.fileno())


class LargerThanFileError(ValueError):
    """The arguments in a file ask for a network far larger than its weights."""


class ForeignObjectError(UnpicklingError):
    """A pickle calls something beyond plain data and tensors; the message is its name."""


class _RefusedError(Exception):
    """A file is refused; the message is the reason for the user."""


@contextmanager
def allocation_limit(path: Path) -> Iterator[None]:
    """Limits the network that is built inside, for the weights of a file, to little more than the size of that file.

    A single tensor is checked before it is allocated, the sum of all tensors as they are registered.

    Raises:
        LargerThanFileError: If the network exceeds the limit; one sentence.
    """
    budget = _Budget(path)
    with (
        registration.register_module_parameter_registration_hook(budget.register),
        registration.register_module_buffer_registration_hook(budget.register),
        budget,
    ):
        yield


class _Budget(TorchFunctionMode):
    """Counts the memory of a network that is built for the weights in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._size = path.stat().st_size
        self._bytes = 0
        self._tensors = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            # On the meta device a tensor has a size but no memory.
            described = {key: value for key, value in kwargs.items() if key not in ("out", "generator", "pin_memory")}
            self._check(func(*args, **{**described, "device": "meta"}).nbytes)
        return func(*args, **kwargs)

    def register(self, _module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        """Counts a registered tensor; one that is registered in several modules counts every time."""
        if tensor is not None:
            self._bytes, self._tensors = self._bytes + tensor.nbytes, self._tensors + 1
            self._check(self._bytes)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > 4 * self._size + _SPARE_BYTES or self._tensors > self._size + _SPARE_TENSORS:
            raise LargerThanFileError(
                f"{self._path} has {self._size:,} bytes and asks for a network of more than {num_bytes:,}: its "
                "arguments do not belong to its weights, so use a file that train.py or save() wrote."
            )


def _is_archive(path: Path) -> bool:
    """Tells whether a file is a ZIP archive, by the same rule as PyTorch."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """Refuses an archive that unpacks to more than its own size: ``torch.save`` does not compress."""
    if not _is_archive(path):
        raise UnpicklingError("no archive")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        # Readers disagree on which archive is meant when other bytes surround it.
        if archive.comment or min((part.header_offset for part in parts), default=0):
            raise _RefusedError("there is something before or behind what torch.save wrote")
        unpacked = sum(part.file_size for part in parts)
        if unpacked > path.stat().st_size:
            raise _RefusedError(f"it unpacks to {unpacked:,} bytes, more than its own {path.stat().st_size:,}")
        for part in parts:
            # PyTorch's reader ignores case.
            if part.filename.lower().endswith("data.pkl"):
                _check_names(io.BytesIO(archive.read(part)))


def _check_old(path: Path) -> None:
    """Checks the pickles at the start of a file from before PyTorch 1.6; TAR archives, which are older, are refused."""
    if tarfile.is_tarfile(path):
        raise _RefusedError("it was written by a version of PyTorch before 0.2")
    with path.open("rb") as file:
        for _ in range(_OLD_PICKLES):
            _check_names(file)


def _check_names(pickled: BinaryIO) -> None:
    """Refuses a pickle that calls anything beyond what plain data and tensors need; reads up to its end."""
    for opcode, argument, _ in pickletools.genops(pickled):
        name = str(argument).replace(" ", ".")
        if opcode.name != "GLOBAL" or _NAMES.fullmatch(name) or name in _NUMBER_TYPES:
            continue
        if name in _RAW_BYTES:  # the one plain type that a few bytes of pickle make as large as they like
            raise _RefusedError("it holds raw bytes")
        if name.startswith("torch._utils."):
            raise _RefusedError(_ODD_TENSOR)
        raise ForeignObjectError(name)


def _tensors(content: Any) -> list[Tensor]:
    """Collects every tensor once; refuses containers that are endless or deeper than any checkpoint."""
    found: dict[int, Tensor] = {}
    if _entries(content, {}, found, 0) > _MOST_ENTRIES:
        raise _RefusedError(f"its lists refer to one another until they have more than {_MOST_ENTRIES:,} entries")
    return list(found.values())


def _entries(value: Any, known: dict[int, int], found: dict[int, Tensor], depth: int) -> int:
    # Leaves.
    if isinstance(value, Tensor):
        found[id(value)] = value
        return 1
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _RefusedError(f"it holds a whole number of {value.bit_length():,} bits")
    if not isinstance(value, dict | list | tuple | set):
        return 1
    # Containers.
    if id(value) in known:
        return known[id(value)]
    if depth > _DEEPEST:
        raise _RefusedError(f"its lists nest deeper than {_DEEPEST} levels")
    parts: Iterable[Any] = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
    known[id(value)] = 1 + sum(_entries(part, known, found, depth + 1) for part in parts)
    return known[id(value)]


def _check_tensors(tensors: Iterable[Tensor], size: int) -> None:
    """Refuses tensors larger than their bytes in the file: repeated strides, types without memory of their own."""
    views: dict[tuple[Any, ...], int] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise _RefusedError(_ODD_TENSOR)
        storage = tensor.untyped_storage()
        if tensor.nbytes > storage.nbytes():
            claimed = f"a tensor {list(tensor.shape)} of {tensor.nbytes:,} bytes"
            raise _RefusedError(f"it claims {claimed} where it holds {storage.nbytes():,}")
        views[storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()] = tensor.nbytes
    # Tied weights count once; overlapping ones, which hardly occur, count each.
    if sum(views.values()) > 8 * size:
        raise _RefusedError(f"it claims tensors of {sum(views.values()):,} bytes together where it has {size:,}")
