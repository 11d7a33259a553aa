"""Options of every source: those of the base classes are shown once, with default and help, and no other is taken."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from cfe_lightning.cli.train import main

#: Shared options with the beginning of their help.
IMAGE_DATA = {
    "image_size": "Side of the ",
    "channels": "1 for grey, 3 for RGB.",
    "batch_size": "Images per batch and process.",
    "num_workers": "Loader processes per training process;",
    "balanced": "Draws training images with replacement",
    "horizontal_flip": "Mirrors training images left to right",
    "vertical_flip": "Mirrors training images top to bottom",
    "quarter_turns": "Rotates training images by 0, 90, 180 or 270",
}
CACHE = {"cache": "Keeps images in memory after their first reading"}
SLICES = IMAGE_DATA | CACHE | {"cache_folder": "Folder in which resized images are kept"}
FILES = SLICES | {"skip_unreadable": "Reads every file at the start and leaves unreadable ones out"}
DEFAULTS = {"channels": 3, "batch_size": 32, "num_workers": 0, "cache": True, "cache_folder": None}
DEFAULTS |= dict.fromkeys(["balanced", "horizontal_flip", "vertical_flip", "quarter_turns", "skip_unreadable"], False)
GREY = {"channels": 1}
#: Source, its shared options, and values of required ones or defaults of its own.
SOURCES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("folder.ImageFolder", FILES, {"root": "x", "image_size": 8}),
    ("celeba.CelebA", FILES, {"root": "x", "attribute": "Male", "image_size": 8}),
    ("chexpert.CheXpert", FILES, {"root": "x", "pathology": "Edema", "uncertain": "ones", "image_size": 8} | GREY),
    ("patient_slices.PatientSlices", SLICES, {"root": "x", "labels": "y", "slice_size": 8} | GREY),
    ("torchvision_sets.TorchvisionData", IMAGE_DATA | CACHE, {"name": "MNIST", "root": "x", "image_size": 8}),
    ("synthetic.SyntheticShapes", IMAGE_DATA, {"image_size": 32}),
]
every_source = pytest.mark.parametrize(("source", "shared", "values"), SOURCES, ids=[row[0] for row in SOURCES])


def found(source: str) -> type:
    module, _, name = source.partition(".")
    return getattr(import_module(f"cfe_lightning.data.{module}"), name)


def own_options(source: str) -> dict[str, Any]:
    parameters = inspect.signature(found(source)).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is not one.VAR_KEYWORD}


def wanted_options(source: str, shared: dict[str, str]) -> set[str]:
    # The side of a montage follows from that of its slices.
    return {*own_options(source), *shared} - ({"image_size"} if "slice_size" in own_options(source) else set())


@every_source
def test_help_shows_every_option_once_with_its_text_and_default(
    source: str, shared: dict[str, str], values: dict[str, Any], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit):
        main(["--data.help", f"cfe_lightning.data.{source}"])
    shown = re.findall(r"^  --data\.(\w+).*?\s{2,}(\S.*) \((.*)\)$", capsys.readouterr().out, re.MULTILINE)
    assert Counter(name for name, _, _ in shown) == dict.fromkeys(wanted_options(source, shared), 1)

    # Texts, types and defaults.
    defaults = {"image_size": inspect.Parameter.empty} | DEFAULTS | own_options(source)
    for name, text, kind in shown:
        assert text.startswith(shared.get(name, "")), name
        assert re.match(r"[A-Z\d]", text), name
        required = defaults[name] is inspect.Parameter.empty
        assert kind.startswith("required, type: " if required else "type: "), name
        assert required or yaml.safe_load(kind.partition("default: ")[2]) == defaults[name], name


@every_source
def test_a_config_shows_every_default_and_refuses_a_typo(
    source: str, shared: dict[str, str], values: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    section = {"class_path": f"cfe_lightning.data.{source}", "init_args": values | {"batch_size": 7}}
    model = {"class_path": "cfe_lightning.classifier.training.ClassifierTraining", "init_args": {"output": "x.pt"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": section}))
    command = ["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path), "--data.num_workers", "2"]
    with pytest.raises(SystemExit):
        main([*command, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    expected = DEFAULTS | own_options(source) | values | {"batch_size": 7, "num_workers": 2}
    assert printed == {name: expected[name] for name in wanted_options(source, shared)}
    assert main([*command, "--data.horizontal_flips", "true"]) == 2
    assert f"{source}': Option 'horizontal_flips' is not accepted" in capsys.readouterr().err


@every_source
def test_a_typo_in_python_is_a_type_error(source: str, shared: dict[str, str], values: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        found(source)(**values, batchsize=3)
