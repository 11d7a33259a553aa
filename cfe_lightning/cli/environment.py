"""A start-up check: torch and torchvision must be releases made for each other."""

import importlib
import importlib.metadata
import re

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
        (torch, _), (torchvision, required) = _installed("torch"), _installed("torchvision")
        # "torch==2.10.0" or, in older metadata, "torch (>=2.14.0)"; not "torchaudio".
        wanted = re.search(r"^torch ?\(?([=<>][^;)\n]*)", required, re.MULTILINE)
        made_for = f"torch{wanted[1]}" if wanted else "another release of torch"
        raise ValueError(
            f"torchvision {torchvision} does not fit torch {torch} ({one_line(error)}); it was made for {made_for}: "
            f"install matching releases from the same index with `{_REPAIR}`."
        ) from error


def _installed(package: str) -> tuple[str, str]:
    """Returns the version of a package, and the packages that it requires, one per line."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)", ""
    return found.version, "\n".join(found.requires or [])
