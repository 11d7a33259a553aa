"""Generative explainers for frozen image classifiers.

The layers of the package; a module imports its own layer and those above it:

    files         atomic writes, plain tensor files, trusted class paths, configs, options
    compute       precision, memory, processes, signals, losses, searches: no images, no classifiers
    images        files to tensors in [-1, 1] and back, drawing, DICOM and NIfTI
    decisions     decisions in logits: winner, runner-up, margins, divergences
    classifier    the frozen classifier: spec, file, sources, checks, training
    atlas         the answer for a whole data set: directions and what they do
    explanation   the answer for a batch of images
    explainer     the base of every method, and loading one from a checkpoint
    data          data modules, one file per source
    metrics       one file per family of metrics
    methods       one folder per method; only ``cli`` imports it
    training      one run: folder, callbacks, checkpoints, logs
    explaining    one output folder: rows, pictures, verification
    report        the page of an output folder; without torch
    evaluation    explainers side by side: measurements, tables, pages
    cli           the commands ``train.py``, ``explain.py`` and ``cfe-evaluate``
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier, load_classifier
    from cfe_lightning.explainer import ExplainerModule, load_explainer
    from cfe_lightning.explanation import Explainer, Explanation

__all__ = [
    "ClassifierSpec", "Explainer", "ExplainerModule", "Explanation", "FrozenClassifier", "load_classifier",
    "load_explainer",
]  # fmt: skip
_MODULES = {
    "classifier": ("ClassifierSpec", "FrozenClassifier", "load_classifier"),
    "explainer": ("ExplainerModule", "load_explainer"),
    "explanation": ("Explainer", "Explanation"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use, because torch takes seconds that `--help` and the report need not wait for.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"cfe_lightning.{module}"), name)
    raise AttributeError(f"module 'cfe_lightning' has no attribute {name!r}")
