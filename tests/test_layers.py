"""Who may import whom: the package's layers as data (docs/architecture.md), checked against the parsed imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cfe_lightning"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

#: Module or folder -> what of the package it may import. A folder stands for everything in it; the longest name counts.
#: A part is a file that was split off another one and stands in its layer.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"classifier", "explainer", "explanation"},
    # Tensors in, tensors out.
    "images": {"whole_file"},
    "medical_files": {"images"},
    "precision": set(),
    "losses": {"precision"},
    "processes": set(),
    "step_search": {"explanation"},
    "networks": {"networks", "precision"},
    "networks.classifiers": {"images"},
    "networks.embeddings": {"images"},
    # The frozen classifier; class_paths, tracing and weights are its parts, sources are what builds one.
    "class_paths": set(),
    "classifier_tracing": set(),
    "tensor_file": {"whole_file"},
    "classifier_weights": {"tensor_file"},
    "classifier_calls": set(),
    "classifier": {"images", "class_paths", "classifier_calls", "classifier_tracing", "precision", "tensor_file"},
    "classifier_sources": {"classifier", "class_paths", "classifier_tracing", "classifier_weights", "networks"},
    "classifier_check": {"classifier"},
    "classifier_training": {"classifier", "classifier_tracing", "processes"},
    # The answer and who gives it; atlas is an answer about a whole data set.
    "atlas": {"images", "manifest", "whole_file"},
    "explanation": {"classifier", "images"},
    "back_off": {"explanation"},
    "explainer": {"explanation", "back_off", "classifier", "class_paths", "atlas", "tensor_file"},
    # Parts of one method may import each other; a test below sees to it that methods do not.
    "methods": {
        *("explainer", "explanation", "classifier", "images", "networks", "losses", "methods", "atlas", "step_search"),
        *("micro_batches", "precision", "processes"),
    },
    "micro_batches": {"precision", "processes"},
    "data": {"images", "medical_files", "data", "whole_file"},
    # Whoever looks at an explanation knows no method; manifest and explanation_writer are parts of explain.py's
    # output, report_atlas of report, tally, evaluation_comparison and evaluation_table of evaluation, drawing and
    # checkpointing of callbacks, neutral_descent of baselines; untrained finds methods and baselines by name.
    "metrics": {"explanation", "classifier", "images", "metrics", "step_search"},
    "drawing": {"explanation", "images"},
    "callbacks": {"whole_file", "explanation", "classifier", "images", "drawing"},
    "acceleration": {"networks"},
    "checkpointing": {"processes", "stop_signals", "tensor_file"},
    "csv_log": {"whole_file"},
    "environment": set(),
    "stop_signals": set(),
    "whole_file": set(),
    "manifest_row": set(),
    "manifest": {"manifest_row", "metrics", "measured_sentence", "whole_file"},
    "measured_sentence": {"report_values"},
    "saved_change": {"explanation", "classifier", "images", "metrics"},
    "global_view": {"images", "manifest", "saved_change", "whole_file"},
    "explanation_writer": {
        *("back_off", "stop_signals", "explanation", "classifier", "images", "manifest", "saved_change"),
    },
    "survey_file": {"atlas", "explainer", "tensor_file"},
    "verification": {"explanation", "classifier", "images", "manifest", "saved_change"},
    "report": {"manifest", "measured_sentence", "report_atlas", "report_global", "report_values", "whole_file"},
    "report_atlas": {"manifest", "report_values"},
    "report_global": {"manifest", "measured_sentence", "report_values"},
    "report_values": set(),
    "neutral_descent": {"explanation", "classifier", "losses", "metrics"},
    # What measures beside the judge, from files of the user's.
    "instruments": {"classifier", "classifier_weights", "explainer", "images", "losses", "metrics", "networks"},
    "baselines": {"explanation", "explainer", "classifier", "images", "neutral_descent"},
    "untrained": {"baselines", "classifier", "explainer", "methods"},
    "columns": set(),
    "tally": {
        *("explanation", "classifier", "classifier_calls", "columns", "guarded_explainer", "images", "instruments"),
        *("losses", "metrics"),
    },
    "guarded_explainer": {"explanation"},
    "tally_summary": {"instruments", "metrics", "tally"},
    "evaluation": {
        *("explanation", "classifier", "evaluation_gallery", "evaluation_store", "images", "metrics", "tally"),
        "tally_summary",
    },
    "evaluation_store": {"tensor_file"},
    "evaluation_comparison": {"evaluation", "metrics", "tally_summary"},
    "evaluation_table": {"evaluation", "evaluation_comparison", "metrics", "whole_file"},
    "evaluation_gallery": {"explanation", "images", "report", "report_values", "whole_file"},
    "evaluation_report": {"evaluation", "evaluation_table", "metrics", "report", "whole_file"},
    "known_cause": {"classifier", "explanation", "metrics"},
    "known_cause_report": {
        *("known_cause", "evaluation_table", "explanation", "images", "metrics", "report", "whole_file"),
    },
    # The entry points may use everything but name no method: that is what configs are for.
    "cli": {
        "acceleration", "atlas", "back_off", "baselines", "callbacks", "checkpointing", "class_paths", "classifier",
        "classifier_check", "classifier_sources", "cli", "csv_log", "data", "environment", "evaluation",
        "evaluation_gallery", "evaluation_report", "evaluation_store", "evaluation_table", "explainer", "explanation",
        "explanation_writer", "global_view", "images", "instruments", "known_cause", "known_cause_report", "manifest",
        "medical_files", "processes", "report", "stop_signals", "survey_file", "tally", "tally_summary", "untrained",
        "verification", "whole_file",
    },
}  # fmt: skip

#: Library -> the only modules that may import it.
OWNED = {
    "wandb": {"callbacks"},
    "captum": {"baselines"},
    "lpips": {"losses"},
    "jsonargparse": {"cli.config_file", "cli.configured_run", "cli.evaluate"},
    "jinja2": {"report"},
    "pydicom": {"medical_files"},
    "nibabel": {"medical_files"},
}
#: Layers that know neither Lightning nor files.
PLAIN = ("images", "losses", "networks", "metrics", "classifier_tracing", "explanation")


def imports(source: str) -> Iterator[str]:
    """Every imported module, absolute, with the imported name where that may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def covers(layer: str, module: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def violations(module: str, source: str) -> list[str]:
    layers = [layer for layer in ALLOWED if covers(layer, module)]
    if not layers:
        return [f"{module} is in no layer: add it to ALLOWED in tests/test_layers.py"]
    allowed = ALLOWED[max(layers, key=len)]
    found = []
    for name in imports(source):
        library, _, rest = name.partition(".")
        if library == "cfe_lightning":
            if not any(covers(layer, rest) for layer in allowed):
                found.append(f"{module} imports {name}")
        elif library in OWNED and module not in OWNED[library]:
            found.append(f"{module} imports {library}, which belongs to {sorted(OWNED[library])}")
        elif library == "lightning" and any(covers(layer, module) for layer in PLAIN):
            found.append(f"{module} imports Lightning")
    return found


@pytest.mark.parametrize("path", MODULES, ids=[name_of(path) for path in MODULES])
def test_imports_follow_the_layers(path: Path) -> None:
    module = name_of(path)
    if path.name == "__init__.py" and module != "__init__":
        assert not list(imports(path.read_text(encoding="utf-8"))), "only the package itself has public names"
        return
    assert not violations(module, path.read_text(encoding="utf-8"))


def test_a_method_does_not_import_another() -> None:
    parts = {
        "dxai": {"dxai_blending"},
        "stylex": {
            "style_atlas",
            "style_ranking",
            "style_reference",
            "style_search",
            "style_training",
        },
        "style_atlas": {"style_ranking"},
        "style_training": {"style_ranking"},
        "diff_explainer": {"diffusion_autoencoder", "semantic_agent"},
        "mirror_cfe": {"mirror_geometry", "mirror_spread"},
        "steerable_lens": {"lens_course", "phase_extrapolation"},
        "lens_course": {"phase_extrapolation"},
        "mirror_spread": {"mirror_geometry"},
    }
    for path in (PACKAGE / "methods").glob("*.py"):
        for name in imports(path.read_text(encoding="utf-8")):
            other = name.removeprefix("cfe_lightning.methods.").partition(".")[0]
            if name.startswith("cfe_lightning.methods."):
                assert other in parts.get(path.stem, ()), f"{path.stem} imports {other}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metrics.localisation", "from cfe_lightning.methods.dxai import Dxai"),
        ("methods.new", "from cfe_lightning import data"),
        ("callbacks", "def f():\n    import cfe_lightning.methods.dxai"),
        ("networks.new", "import lightning.pytorch as pl"),
        ("cli.train", "import wandb"),
        ("cli.train", "from cfe_lightning.methods import dxai"),
        ("utils", "import os"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_the_table_names_no_file_that_is_gone() -> None:
    for layer in ALLOWED:
        path = PACKAGE / layer.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), layer
