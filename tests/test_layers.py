"""Who may import whom: the layers in the package's docstring, each importing only those above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import cfe_lightning

PACKAGE = Path(str(cfe_lightning.__file__)).parent
LAYERS = re.findall(r"^    (\w+)  ", str(cfe_lightning.__doc__), re.MULTILINE)
#: What the order would allow.
NEVER = {("methods", "data"), ("report", "torch"), ("report", "lightning")}
#: Library -> the only module that may import it.
OWNED = {"captum": "methods.baselines", "wandb": "training.tracking", "lpips": "compute.losses"}
OWNED |= {"jinja2": "report.html", "pydicom": "images.medical", "nibabel": "images.medical"}


def imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong(module: str, source: str) -> list[str]:
    """Imports that the layer of a module, named without the package, may not have."""
    layer, _, rest = module.partition(".")
    found = []
    for name in imports(source):
        library, *path = name.split(".")
        target = path[0] if library == "cfe_lightning" else library
        later = {layer, target} <= {*LAYERS} and LAYERS.index(target) > LAYERS.index(layer)
        method = target == "methods" and layer != "cli" and rest != "find" and path[1] != rest.partition(".")[0]
        foreign = not f"{module}.".startswith(f"{OWNED.get(library, module)}.")
        if later or method or foreign or (layer, target) in NEVER:
            found.append(f"{module} imports {name}")
    return found


def test_every_module_imports_only_the_layers_above_its_own() -> None:
    paths = {path: ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert {name.partition(".")[0] for name in paths.values()} == {*LAYERS, "__init__"}
    for path, name in paths.items():
        assert not wrong(name.removesuffix(".__init__"), path.read_text("utf-8"))


@pytest.mark.parametrize("planted", ["classifier.new explainer", "methods.new data", "metrics.new methods.dxai"])
def test_a_wrong_import_is_seen(planted: str) -> None:
    module, name = planted.split()
    assert wrong(module, f"def f():\n    import cfe_lightning.{name}") == [f"{module} imports cfe_lightning.{name}"]
