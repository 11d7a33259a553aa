"""Who may import whom: a layer of the package imports only layers that stand before it (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cfe_lightning"
LAYERS = (
    "files compute images decisions classifier atlas explanation explainer data metrics methods training explaining "
    "report evaluation cli"
).split()
#: Pairs that the order would allow.
NEVER = {
    *(("methods", "data"), ("methods", "metrics"), ("report", "torch"), ("report", "lightning")),
    *((layer, "methods") for layer in LAYERS if layer not in ("methods", "cli")),
}
#: Library -> the only module that may import it.
OWNED = {
    "captum": "methods.baselines",
    "pydicom": "images.medical",
    "nibabel": "images.medical",
    "jinja2": "report.html",
}


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong(module: str, source: str) -> list[str]:
    """Imports of a module, named without the package, that its layer may not have."""
    layer, _, rest = module.partition(".")
    found = []
    for name in imports(source):
        library, *path = name.split(".")
        target = path[0] if library == "cfe_lightning" else library
        later = target in LAYERS and layer in LAYERS and LAYERS.index(target) > LAYERS.index(layer)
        sibling = layer == target == "methods" and rest != "find" and path[1] != rest.partition(".")[0]
        owned = not f"{module}.".startswith(f"{OWNED.get(library, module)}.")
        if later or sibling or owned or (layer, target) in NEVER:
            found.append(f"{module} imports {name}")
    return found


def test_every_module_imports_only_layers_before_its_own() -> None:
    modules = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    assert {name.parts[0] for name in modules} == {*LAYERS, "__init__"}
    named = {".".join(name.parts).removesuffix(".__init__"): path for name, path in modules.items()}
    assert not [line for name, path in named.items() for line in wrong(name, path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "planted", ["classifier.new import explainer", "methods.new import data", "metrics.x import cli"]
)
def test_a_wrong_import_is_seen(planted: str) -> None:
    module, _, name = planted.split()
    assert wrong(module, f"def f():\n    from cfe_lightning import {name}") == [
        f"{module} imports cfe_lightning.{name}"
    ]
