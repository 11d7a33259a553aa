"""A training run: its folder, callbacks, checkpoints and logs; configs name the callbacks by this package."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfe_lightning.training.averaging import EMA
    from cfe_lightning.training.last_checkpoint import LastCheckpoint
    from cfe_lightning.training.samples import SampleGrid
    from cfe_lightning.training.watching import NonFiniteGuard, Throughput

__all__ = ["EMA", "LastCheckpoint", "NonFiniteGuard", "SampleGrid", "Throughput"]

#: Names of configs by module, also those that every run has by itself and a config of version 0.1.0 may list.
_MODULES = {
    "averaging": ("EMA",),
    "checkpoints": ("AtomicCheckpointIO", "RandomState"),
    "last_checkpoint": ("LastCheckpoint",),
    "samples": ("SampleGrid",),
    "tracking": ("WandbRun",),
    "watching": ("FreshMetrics", "NonFiniteGuard", "Throughput"),
}


def __getattr__(name: str) -> Any:
    # Importing Lightning takes seconds: `train.py --help` must not wait for it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"cfe_lightning.training.{module}"), name)
    raise AttributeError(f"module 'cfe_lightning.training' has no attribute {name!r}")
