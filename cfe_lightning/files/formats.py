"""Names what a file is that a user gave for a classifier, by its content, and the way in."""

import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError

from cfe_lightning.files.tensors import ForeignObjectError

_WRAP = "cfe_lightning.classifier.wrap_classifier"
_EXPORTED = "take it with cfe_lightning.classifier.exported_classifier"
_FROM_PYTORCH = "give the PyTorch network that it was made from, as a file of torch.save(network.state_dict(), ...)"
_AGAIN = "download the file itself"
#: First bytes of a file, what it is, and the way in.
_BEGINNINGS = (
    (rb"\x89HDF\r\n\x1a\n", f"an HDF5 file, as Keras writes them: {_FROM_PYTORCH}"),
    (rb".{4}TFL3", f"a TensorFlow Lite network: {_FROM_PYTORCH}"),
    (rb"\x08[\x01-\x1f][\x12\x1a\x22\x28\x32\x3a\x42]", f"an ONNX network: {_FROM_PYTORCH}"),
    (rb"version https://git-lfs", "a pointer of Git LFS to a file: fetch that file with git lfs pull"),
    (rb"\s*<(!DOCTYPE|html)", f"a web page: {_AGAIN}"),
)
#: Names of parts of an archive, what it is, and the way in; the first that fits counts.
_PARTS = (
    (r"/constants\.pkl$", f"a TorchScript program: {_EXPORTED}"),
    (r"(/archive_format|^serialized_exported_program\.json)$", f"a torch.export program: {_EXPORTED}"),
    (r"\.weights\.h5$", f"a Keras network: {_FROM_PYTORCH}"),
)
#: Longest header that the library safetensors reads.
_LONGEST_HEADER = 100_000_000
#: A name on a model hub, "organisation/model", or anything behind a scheme such as "hf-hub:" or "https:".
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_SCHEME = re.compile(r"\w[\w-]+:.+")
_FILE_ENDING = re.compile(
    r"\.(pth?|pt2|pkl|pickle|ckpt|bin|safetensors|onnx|h5|hdf5|keras|tar|zip|ts|torch|tflite)$", re.I
)


def is_safetensors(path: Path) -> bool:
    """Tells whether a file, perhaps a truncated one, begins like one of safetensors."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= _LONGEST_HEADER


def foreign_format(given: str | Path, reason: Exception | None = None) -> str | None:
    """Names what was given instead of a file of plain weights, and the way in; None where that is not recognised.

    Args:
        given: Path of a file, or a text that names none.
        reason: Error of ``load_plain`` on the file.
    """
    path = Path(given)
    if path.is_dir():
        return "a folder: name the file of weights in it"
    if not path.is_file():
        # A missing file in a folder that exists, or with the ending of weights, is a missing file.
        hub = _HUB_NAME.fullmatch(str(given)) and not _FILE_ENDING.search(str(given)) and not path.parent.exists()
        if hub or _SCHEME.fullmatch(str(given)):
            return f"no file, but looks like a name on a model hub: download its weights and give that file to {_WRAP}"
        return None

    # Content.
    if is_safetensors(path):
        return f"a file of weights alone, written by safetensors: take it with {_WRAP} or torchvision_classifier"
    with path.open("rb") as file:
        start = file.read(512)
    if found := next((what for pattern, what in _BEGINNINGS if re.match(pattern, start, re.DOTALL | re.I)), None):
        return found
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        parts = _names(path)
        if found := next((what for part, what in _PARTS if any(re.search(part, name) for name in parts)), None):
            return found

    # Pickles; those of newer protocols do not name what they call in one place.
    cause = reason.__cause__ if reason is not None else None
    if isinstance(cause, ForeignObjectError) or (is_archive and isinstance(cause, UnpicklingError)):
        name = f" ({cause})" if isinstance(cause, ForeignObjectError) else ""
        return (
            f"a pickle of more than tensors{name}, such as a whole model, and opening that could run its code: write "
            f"the weights alone, with torch.save(network.state_dict(), ...), for {_WRAP}"
        )
    return None


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    # The end of an archive may be all that is left of it.
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError):
        return []
