"""The door for files of ``torch.save``: plain data and tensors, no larger than the file that holds them."""

from __future__ import annotations

import io
import os
import pickletools
import re
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from cfe_lightning.files.atomic import atomic_path

#: Entries of lists and dictionaries once what is referred to twice is written out, and how deep they may nest.
_MOST_ENTRIES = 10_000_000
_DEEPEST = 100
#: Whole numbers of more bits are none that a training writes.
_MOST_BITS = 512
#: What torch.save names in a file of plain data and tensors, in Python 2's words, too; PyTorch would also call others,
#: some of which make tensors of any size. Types of numbers and of memory come on top.
_NAMES = frozenset(
    {
        *("collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set", "_codecs.encode"),
        *("builtins.complex", "__builtin__.complex", "torch.Size", "torch.device", "torch.Tensor"),
        *("torch.nn.parameter.Parameter", "torch._tensor._rebuild_from_type_v2"),
        *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")),
        *(f"torch._utils._rebuild_{name}" for name in ("parameter", "parameter_with_state")),
        *(f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    }
)
_MEMORY = re.compile(r"torch\.(cuda\.|storage\.)?[A-Z]\w*Storage")
_RAW_BYTES = ("builtins.bytearray", "__builtin__.bytearray")
_ODD_TENSOR = "it holds a tensor that is not an array of numbers (sparse, quantised or without memory)"
#: Before version 1.6 a file began with so many pickles: of numbers that tell its kind, of its content, of its tensors.
_OLD_PICKLES = 5
#: What a network may have beside the weights that end up in its file: a head that is replaced, tables, a blank image.
_SPARE_BYTES = 1 << 30
_SPARE_TENSORS = 10_000
#: What makes tensors of any size out of a few numbers.
_MAKERS: tuple[Any, ...] = (
    *(torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace, torch.logspace),
    *(torch.rand, torch.randn, torch.randint, torch.randperm),
)


def load_plain(path: Path, *, any_age: bool = False) -> Any:
    """Reads what ``torch.save`` wrote; nothing in the file is executed, and nothing is larger than it.

    Args:
        path: The file.
        any_age: Also read what PyTorch wrote before version 1.6.

    Raises:
        ValueError: If it is truncated, no such file, holds anything but plain data and tensors, or claims to hold more
            than it has bytes. The message is a reason in few words and does not repeat the path.
    """
    try:
        if not any_age or _is_archive(path):
            _check_archive(path)
        else:
            _check_old(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(_tensors(content), path.stat().st_size)
    # PyTorch raises nearly anything on files that are broken.
    except _RefusedError as error:
        raise ValueError(str(error)) from error
    except OSError:  # of the system, which names the file
        raise
    except UnpicklingError as error:
        raise ValueError("it is no file of PyTorch, or holds more than plain data and tensors") from error
    except Exception as error:
        raise ValueError("the file is truncated, damaged or not written by torch.save") from error
    return content


def save_plain(path: Path, content: Any, owner: str = "") -> None:
    """Writes what ``load_plain`` reads, whole or not at all, and waits until the disk has it.

    Args:
        path: The file.
        content: Plain data and tensors.
        owner: See ``atomic_path``.

    Raises:
        OSError: If the file cannot be written; it names the file.
    """
    with atomic_path(path, owner) as temporary, temporary.open("wb") as file:
        with _complaint_of_the_system():
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _complaint_of_the_system() -> Iterator[None]:
    """PyTorch's writer hides why a file could not be written."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror) from error


class LargerThanFileError(ValueError):
    """A file's arguments ask for far more than its weights can fill."""


class _RefusedError(Exception):
    """What is wrong with a file, in our own words."""


@contextmanager
def allocation_limit(path: Path) -> Iterator[None]:
    """While a network is built for the weights of a file: stops as soon as it grows far beyond that file.

    A single tensor that is too large is refused before it is made, all of them together while they are registered.

    Raises:
        LargerThanFileError: If it does; one sentence.
    """
    budget = _Budget(path)
    with ExitStack() as stack:
        for register in (
            registration.register_module_parameter_registration_hook,
            registration.register_module_buffer_registration_hook,
        ):
            stack.callback(register(budget.register).remove)
        stack.enter_context(budget)
        yield


class _Budget(TorchFunctionMode):
    """How much a network may take that is built for the weights in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._size = path.stat().st_size
        self._bytes = 0
        self._tensors = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS:
            # Without memory it is made in any size.
            described = {key: value for key, value in kwargs.items() if key not in ("out", "generator", "pin_memory")}
            self._check(func(*args, **{**described, "device": "meta"}).nbytes)
        return func(*args, **kwargs)

    def register(self, _module: nn.Module, _name: str, tensor: Tensor | None) -> None:
        """Networks are put together from networks: a weight may be registered more than once."""
        if tensor is None:
            return
        self._bytes, self._tensors = self._bytes + tensor.nbytes, self._tensors + 1
        self._check(self._bytes)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > 4 * self._size + _SPARE_BYTES or self._tensors > self._size + _SPARE_TENSORS:
            raise LargerThanFileError(
                f"{self._path} has {self._size:,} bytes and asks for a network of more than {num_bytes:,}: its "
                "arguments do not belong to its weights, so use a file that train.py or save() wrote."
            )


def _is_archive(path: Path) -> bool:
    """As PyTorch decides it."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """Refuses an archive whose parts unpack to more than it has bytes; ``torch.save`` packs nothing."""
    if not _is_archive(path):
        raise UnpicklingError("no archive")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        # Readers disagree about archives with something around them: which one is meant?
        if archive.comment or min((part.header_offset for part in parts), default=0):
            raise _RefusedError("there is something before or behind what torch.save wrote")
        unpacked = sum(part.file_size for part in parts)
        if unpacked > path.stat().st_size:
            raise _RefusedError(f"it unpacks to {unpacked:,} bytes, more than its own {path.stat().st_size:,}")
        for part in parts:
            # PyTorch's reader takes capitals for small letters.
            if part.filename.lower().endswith("data.pkl"):
                _check_names(io.BytesIO(archive.read(part)))


def _check_old(path: Path) -> None:
    """Looks through the pickles that an old file begins with; older ones yet were archives of tar."""
    if tarfile.is_tarfile(path):
        raise _RefusedError("it was written by a version of PyTorch before 0.2")
    with path.open("rb") as file:
        for _ in range(_OLD_PICKLES):
            _check_names(file)


def _check_names(pickled: BinaryIO) -> None:
    """Refuses what a pickle would call beside what plain data and tensors need; reads up to its end."""
    for opcode, argument, _ in pickletools.genops(pickled):
        name = str(argument).replace(" ", ".")
        if opcode.name != "GLOBAL" or name in _NAMES or _MEMORY.fullmatch(name):
            continue
        if name in _RAW_BYTES:  # the one plain thing of which a few bytes of pickle make any number
            raise _RefusedError("it holds raw bytes")
        if name.startswith("torch._utils."):
            raise _RefusedError(_ODD_TENSOR)
        raise UnpicklingError(f"{name} is no plain data")


def _tensors(content: Any) -> list[Tensor]:
    """Every tensor once, found in containers that are neither endless nor deeper than any checkpoint."""
    known: dict[int, int] = {}
    found: dict[int, Tensor] = {}
    if _entries(content, known, found, 0) > _MOST_ENTRIES:
        raise _RefusedError(f"its lists refer to one another until they have more than {_MOST_ENTRIES:,} entries")
    return list(found.values())


def _entries(value: Any, known: dict[int, int], found: dict[int, Tensor], depth: int) -> int:
    if isinstance(value, Tensor):
        found[id(value)] = value
        return 1
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise _RefusedError(f"it holds a whole number of {value.bit_length():,} bits")
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) in known:
        return known[id(value)]
    if depth > _DEEPEST:
        raise _RefusedError(f"its lists nest deeper than {_DEEPEST} levels")
    parts: Iterable[Any] = [part for pair in value.items() for part in pair] if isinstance(value, Mapping) else value
    known[id(value)] = 1 + sum(_entries(part, known, found, depth + 1) for part in parts)
    return known[id(value)]


def _check_tensors(tensors: Iterable[Tensor], size: int) -> None:
    """Refuses tensors that a few bytes claim to fill: repeated strides, kinds without memory of their own."""
    views: dict[tuple[Any, ...], int] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise _RefusedError(_ODD_TENSOR)
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise _RefusedError(
                f"it claims a tensor {list(tensor.shape)} of {tensor.nbytes:,} bytes where it holds "
                f"{tensor.untyped_storage().nbytes():,}"
            )
        where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        views[where] = tensor.nbytes
    # Weights that are tied are one; those that overlap are hardly ever there.
    if sum(views.values()) > 8 * size:
        raise _RefusedError(f"it claims tensors of {sum(views.values()):,} bytes together where it has {size:,}")
