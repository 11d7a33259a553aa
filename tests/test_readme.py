"""The README's commands, YAML and links: what has been renamed fails here, not in a reader's terminal."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml

from cfe_lightning.cli import evaluate, explain, train
from cfe_lightning.training import folder as run_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}((?:python (?:train|explain)\.py|cfe-\w+|make) .*)$", README, flags=re.MULTILINE)


def named(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_understood(line: str) -> None:
    command, *arguments = shlex.split(line.removeprefix("python "), comments=True)
    if command == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif command in ("explain.py", "cfe-explain"):
        explain.parser().parse_args(arguments)
    elif command == "cfe-evaluate":
        evaluate.parser().parse_args(arguments)
    else:
        options, overrides = train.parser().parse_known_args(arguments)
        config = yaml.safe_load(run_folder.find_configs(options.config)[0].read_text())
        for section, option in re.findall(r"--(\w+)\.(\w+)", " ".join(overrides)):
            kind = pl.Trainer if section == "trainer" else named(config[section]["class_path"])
            assert option in inspect.signature(kind).parameters


def test_the_network_of_ones_own_is_described_as_it_is_read() -> None:
    block = re.search(r"^ {4}classifier:.*\n(?: {5,}.*\n)+", README, flags=re.MULTILINE)
    assert block is not None
    classifier = yaml.safe_load(textwrap.dedent(block[0]))["classifier"]
    inspect.signature(named(classifier["class_path"])).bind(**classifier["init_args"])


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10
