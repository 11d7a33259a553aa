"""Untrusted configs name classes of trusted packages only, and are read in bounded time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError, ArgumentParser

from cfe_lightning.data.base import ImageData
from cfe_lightning.files.configs import classes_of, in_our_words, load_config
from cfe_lightning.files.trust import resolve_class_path

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def refused(class_path: str, trusted: list[str]) -> str:
    reader = ArgumentParser(exit_on_error=False)
    reader.add_subclass_arguments(ImageData, "data", required=True)
    with classes_of(trusted):
        try:
            reader.parse_object({"data": {"class_path": class_path}})
        except ArgumentError as error:
            return in_our_words(str(error))
    return ""


def test_a_module_is_not_imported_before_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "beside_it.py").write_text("from toy import ToyData\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert refused("beside_it.ToyData", ["toy"]) == (
        "beside_it.ToyData is not part of cfe_lightning, torchvision, lightning, pytorch_lightning, torch: if you "
        "trust the package 'beside_it', add --trusted beside_it."
    )
    assert "beside_it" not in sys.modules
    assert refused("beside_it.ToyData", ["beside_it", "toy"]) == ""
    # Trust ends with the run.
    assert "add --trusted beside_it" in refused("beside_it.ToyData", ["toy"])


def test_a_class_of_an_allowed_module_that_is_of_another_package_is_refused() -> None:
    for class_path in ("torch.os.system", "os.system", "jsonargparse.ArgumentParser"):
        assert "nothing of it is needed here, so leave it out" in refused(class_path, [])


def test_only_the_command_line_trusts(tmp_path: Path) -> None:
    assert resolve_class_path("toy.ToyNetwork", ["toy"])
    with classes_of([]), pytest.raises(ValueError, match="on the command line --trusted toy"):
        resolve_class_path("toy.ToyNetwork", ["toy"])
    with classes_of(["toy"]):
        assert resolve_class_path("toy.ToyNetwork")


@pytest.mark.parametrize("package", ["../evil", "", "os", "subprocess", "jsonargparse", "a.b"])
def test_what_cannot_be_trusted(package: str) -> None:
    with pytest.raises(ValueError, match="--trusted takes the name of a package of yours"), classes_of([package]):
        pass


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_this_package_are_read(path: Path) -> None:
    assert load_config(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


def test_references_are_allowed_where_they_stay_small(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert load_config(file) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds nothing, but a config has named values"),
        ("- 1", "holds a list, but"),
        ("a: 1\na: 2", "'a' is there twice, in line 1, column 1 and in line 2, column 1: keep one of them."),
        ("a:\n\tb: 1", "YAML is indented by blanks, not by tabs"),
        ("a: !!python/name:os.system", "is no plain value: leave it out"),
        ("a: &a [*a]", "leads back to itself"),
        ("a: " + "[" * 60 + "]" * 60, "nests deeper than the 50 levels"),
        ("a: " + "9" * 1000, "a number in line 1, column 4 has 1,000 digits"),
        ("a: \0", "is no text, so give the YAML file"),
        ("b: x" * 200_000, "more than the 500,000 that a config may have"),
    ],
)
def test_a_config_is_refused_in_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at
        load_config(file)
    assert str(caught.value).startswith(str(file))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("[no, yes]", ["no", "yes"]),
        ("[0, 1]", ["0", "1"]),
        ("[1.0, 1e3, 2024-01-01]", ["1.0", "1e3", "2024-01-01"]),
        ("[On, 'off', \"ja\", nein]", ["On", "off", "ja", "nein"]),
        ("\n    - no   # none\n    - 007\n", ["no", "007"]),
        ("null", None),
    ],
)
def test_class_names_are_text_as_they_are_written(written: str, expected: list[str] | None, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"größe: é\ndata:\n  class_names: {written}\n  image_size: 010\nnumber: 1\n", encoding="utf-8")
    content = load_config(config)
    assert content["data"]["class_names"] == expected
    assert (content["number"], content["größe"]) == (1, "é")


def test_one_class_name_is_text_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a:\n- label: no\n  b: no\n")
    assert load_config(tmp_path / "config.yaml") == {"a": [{"label": "no", "b": False}]}
