"""A start-up check: torch and torchvision must be releases made for each other."""

from __future__ import annotations

import importlib
import importlib.metadata

from cfe_lightning.files.text import one_line

_REPAIR = "python -m pip install --upgrade --force-reinstall torch torchvision"


def check_torchvision() -> None:
    """Imports torchvision and turns the puzzling failure beside a foreign torch into a sentence.

    Call it before Lightning is imported, which imports torchvision itself.

    Raises:
        ValueError: If torchvision is missing or does not fit torch; one sentence with the command that repairs it.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: torch and torchvision are both needed; install them with `{_REPAIR}`.") from error
    # RuntimeError: "operator torchvision::nms does not exist"; ImportError and OSError: undefined symbols;
    # AttributeError: a moved part of torch.
    except (RuntimeError, ImportError, OSError, AttributeError) as error:
        reason = one_line(error)
        raise ValueError(
            f"torchvision {_version('torchvision')} does not fit torch {_version('torch')} ({reason}); it was made "
            f"for {_made_for()}: install matching releases from the same index with `{_REPAIR}`."
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _made_for() -> str:
    """Returns the torch release that torchvision's metadata require, such as ``torch==2.10.0``."""
    try:
        wanted = importlib.metadata.requires("torchvision") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    # "torch==2.10.0", "torch (>=2.14.0)", but not "torchaudio" and no optional part.
    found = [
        name for name in wanted if name.split(";")[0].strip().startswith(("torch=", "torch (", "torch>", "torch<"))
    ]
    return found[0].replace(" (", "").rstrip(")") if found else "another release of torch"
