"""Trusted class paths: a file that could name any callable could run anything, so only trusted packages are allowed."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

#: Packages whose classes a checkpoint may name; others must be named by the user.
ALLOWED_PACKAGES = ("cfe_lightning", "torchvision")
#: Modules that files of version 0.1.0 name, and the module or package that exports their classes today.
MOVED = {
    "cfe_lightning.acceleration": "cfe_lightning.compute.acceleration",
    "cfe_lightning.baselines": "cfe_lightning.methods.baselines",
    "cfe_lightning.callbacks": "cfe_lightning.training",
    "cfe_lightning.checkpointing": "cfe_lightning.training",
    "cfe_lightning.classifier_sources": "cfe_lightning.classifier",
    "cfe_lightning.classifier_training": "cfe_lightning.classifier.training",
    "cfe_lightning.csv_log": "cfe_lightning.training.csv_log",
    "cfe_lightning.methods.diffusion_autoencoder": "cfe_lightning.methods.diff_explainer",
    "cfe_lightning.networks.classifiers": "cfe_lightning.classifier.networks",
    "cfe_lightning.networks.discriminators": "cfe_lightning.methods.dxai.critic",
    "cfe_lightning.networks.exported": "cfe_lightning.classifier.exported",
}
#: Word that trusts stored TorchScript and torch.export programs.
TRUST_EXPORTED = "exported_program"
#: Overrides all ``trusted`` arguments inside ``only_trusted``.
_ONLY: ContextVar[tuple[str, ...] | None] = ContextVar("only_trusted", default=None)


@contextmanager
def only_trusted(trusted: Sequence[str]) -> Iterator[None]:
    """Fixes the trusted packages while a config is built, whatever its own ``trusted`` arguments say."""
    token = _ONLY.set(tuple(trusted))
    try:
        yield
    finally:
        _ONLY.reset(token)


def resolve_class_path(class_path: str, trusted: Sequence[str] = ()) -> Callable[..., Any]:
    """Returns the class or builder that a file names; refuses everything outside the trusted packages.

    Args:
        class_path: Dotted path, for example ``cfe_lightning.methods.dxai.Dxai`` or ``torchvision.models.resnet18``.
        trusted: Packages trusted in addition to cfe_lightning and torchvision; the word ``exported_program`` trusts
            stored TorchScript and torch.export programs.

    Raises:
        ValueError: If the package is not trusted, or the path names neither a module class nor a torchvision builder.
    """
    # Imported here, so that commands that only name files start without torch.
    from torch import nn
    from torchvision import models

    trusted = _effective(trusted)
    class_path = present_path(class_path)
    package, _, _ = class_path.partition(".")
    if package not in (*ALLOWED_PACKAGES, *trusted):
        raise ValueError(
            f"The file names {class_path!r}, which is not part of {' or '.join(ALLOWED_PACKAGES)}: if you trust the "
            f"package {package!r}, pass trusted=[{package!r}] (on the command line --trusted {package})."
        )
    # Class or builder.
    module_path, _, name = class_path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_path), name)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "" if package in ALLOWED_PACKAGES else " (put the folder that holds it on PYTHONPATH)"
        raise ValueError(f"{class_path!r} cannot be imported: {error}{hint}") from error
    # Only registered builders: another function of torchvision.models downloads a file and unpickles it.
    if module_path == "torchvision.models" and name in models.list_models():
        return found
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{class_path!r} is neither an nn.Module class nor a torchvision.models builder.")
    # A trusted module also holds the classes that it imports from other packages.
    owner, _, _ = found.__module__.partition(".")
    if package in ALLOWED_PACKAGES and owner not in (*ALLOWED_PACKAGES, *trusted):
        raise ValueError(f"{class_path!r} is a class of {owner}, not of {package}.")
    if getattr(found, "runs_foreign_code", False):
        check_exported_trusted(trusted)
    return found


def present_path(class_path: str) -> str:
    """Translates a class path of an earlier version to the one of today."""
    module_path, _, name = class_path.rpartition(".")
    return f"{MOVED[module_path]}.{name}" if module_path in MOVED else class_path


def public_path(kind: type) -> str:
    """Returns the class path to write into files: that of the outermost package that exports the class."""
    module_path, name = kind.__module__, kind.__qualname__
    packages = accumulate(module_path.split("."), "{}.{}".format)
    exporting = (package for package in packages if getattr(sys.modules.get(package), name, None) is kind)
    # No module exports a class that was defined inside a function, or anew in a notebook.
    return f"{next(exporting, module_path)}.{name}"


def check_exported_trusted(trusted: Sequence[str]) -> None:
    """Refuses a TorchScript or torch.export program that the user has not trusted.

    Raises:
        ValueError: If ``exported_program`` is not among the trusted words.
    """
    if TRUST_EXPORTED not in _effective(trusted):
        raise ValueError(
            "The file holds a TorchScript or torch.export program, which can do anything on this machine when it is "
            f"loaded: if you trust its author, pass trusted=[{TRUST_EXPORTED!r}] (on the command line --trusted "
            f"{TRUST_EXPORTED})."
        )


def _effective(trusted: Sequence[str]) -> Sequence[str]:
    only = _ONLY.get()
    return trusted if only is None else only
