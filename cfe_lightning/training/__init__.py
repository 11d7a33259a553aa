"""A training run: its folder, callbacks, checkpoints and logs; configs name the callbacks by this package."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfe_lightning.training.callbacks import EMA, NonFiniteGuard, SampleGrid, Throughput
    from cfe_lightning.training.last_checkpoint import LastCheckpoint

__all__ = ["EMA", "LastCheckpoint", "NonFiniteGuard", "SampleGrid", "Throughput"]

_MODULES = {
    "callbacks": ("EMA", "NonFiniteGuard", "SampleGrid", "Throughput"),
    "last_checkpoint": ("LastCheckpoint",),
}


def __getattr__(name: str) -> Any:
    # Importing Lightning takes seconds: `train.py --help` must not wait for it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"cfe_lightning.training.{module}"), name)
    raise AttributeError(f"module 'cfe_lightning.training' has no attribute {name!r}")
