"""The door for YAML: what a stranger's config may be and which classes it may name, before anything is made of it."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings

from cfe_lightning.files.trust import ALLOWED_PACKAGES, only_trusted, present_path

#: Packages whose classes a config may name besides those that the user trusts.
CONFIG_PACKAGES = (*ALLOWED_PACKAGES, "lightning", "pytorch_lightning", "torch")
_MOST_BYTES = 500_000
_MOST_ENTRIES = 100_000
_DEEPEST = 50
_MOST_DIGITS = 300
_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp", "merge")
)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load_value = get_loader("yaml")
_named_before: set[str] = set()
_NOISE = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected a path",
)
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed.*? to allow it\.")


@contextmanager
def classes_of(trusted: Sequence[str]) -> Iterator[None]:
    """Lets configs and the files that they name use classes of some packages only: importing a module is running it.

    Outside of the context nothing of a config may be built.

    Args:
        trusted: Packages besides ``CONFIG_PACKAGES``; the word ``exported_program`` is for programs, see
            ``class_paths``.

    Raises:
        ValueError: If one is no name of a package.
    """
    for package in trusted:
        if not package.isidentifier() or package in (*sys.stdlib_module_names, "jsonargparse"):
            raise ValueError(f"--trusted takes the name of a package of yours, as my_package, not {package!r}.")
    importlib.import_module("lightning.pytorch.cli")  # lets configs come from anywhere, which the settings take back
    allowed = {*CONFIG_PACKAGES, *trusted}
    set_parsing_settings(
        import_path_denylist=["*", *(_named_before - allowed)],
        import_path_allowlist=sorted(allowed),
        # What is no class for sure is no class, and a config is a file here.
        instantiate_subclass_spec_in_any=False,
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )
    _named_before.update(trusted)
    set_loader("yaml", _load_checked, (yaml.YAMLError,))
    with only_trusted(trusted):
        yield


def in_our_words(message: str) -> str:
    """What a person needs of jsonargparse's report about every type that it has tried, and what to do about it."""
    denied = _DENIED.search(message)
    if denied is not None:
        package, _, _ = denied[1].partition(".")
        advice = f"if you trust the package {package!r}, add --trusted {package}"
        if package in sys.stdlib_module_names or package == "jsonargparse":
            advice = "nothing of it is needed here, so leave it out"
        return f"{denied[1]} is not part of {', '.join(CONFIG_PACKAGES)}: {advice}."
    kept: list[str] = []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if line.startswith("Not a valid subclass"):
            break
        if line and not line.startswith(_NOISE):
            kept.append(line)
    told = " ".join(kept) or " ".join(message.split())[:300]
    return f"{told} a class_path, and its arguments below init_args, are needed here." if told.endswith(":") else told


def load_config(path: Path) -> dict[str, Any]:
    """Reads a YAML file of named values.

    Raises:
        ValueError: If it is no text, no YAML, or grows beyond any config when it is read; one sentence.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, more than the {_MOST_BYTES:,} that a config may have: give the YAML file that "
            "describes the run."
        )
    try:
        text = path.read_text(encoding="utf-8")
        _check(text)
        content = yaml.load(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: give the YAML file that describes the run.") from error
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", {_place(error.problem_mark)}"
        told = " ".join(filter(None, (error.context, error.problem)))
        hint = "; YAML is indented by blanks, not by tabs" if "\n\t" in text else ""
        raise ValueError(f"{path} is not readable as YAML: {told}{where}{hint}.") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{path} is not readable as YAML: the character {chr(error.character)!r} is no text, so give the YAML file "
            "that describes the run."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        kind = {NoneType: "nothing", list: "a list", str: "a text"}.get(type(content), "a single value")
        raise ValueError(
            f"{path} holds {kind}, but a config has named values, as model: and data:, see the folder configs/."
        )
    return content


def _load_checked(text: str) -> Any:
    _check(text)
    return _in_present_paths(_load_value(text))


def _in_present_paths(value: Any) -> Any:
    """Translates the class paths of earlier versions wherever they stand in a config."""
    if isinstance(value, dict):
        return {key: _in_present_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_in_present_paths(one) for one in value]
    return present_path(value) if isinstance(value, str) else value


def _check(text: str) -> None:
    """Refuses what is small in a file and endless when it is read, and what means more than plain values."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it nests deeper than the {_DEEPEST} levels that a config may have.")
    root = yaml.compose(text, Loader=_Loader)
    if root is not None and _entries(root, {}, 0) > _MOST_ENTRIES:
        raise ValueError(
            f"its references (*) repeat so much that it has more than {_MOST_ENTRIES:,} entries: write out what is "
            "meant."
        )


def _entries(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many entries a node has once its references are written out."""
    if id(node) in known:
        return known[id(node)]
    if depth > _DEEPEST:
        raise ValueError("a reference (*) in it leads back to itself, or deeper than a config may be.")
    if node.tag not in _TAGS:
        raise ValueError(f"{node.tag!r} in {_place(node.start_mark)} is no plain value: leave it out.")
    parts: list[yaml.Node] = []
    if node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
        raise ValueError(f"a number in {_place(node.start_mark)} has {len(node.value):,} digits.")
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    known[id(node)] = 1 + sum(_entries(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: dict[str, yaml.Mark] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"the name in {_place(key.start_mark)} is no text.")
        if key.value in seen and key.value != "<<":
            raise ValueError(
                f"{key.value!r} is there twice, in {_place(seen[key.value])} and in {_place(key.start_mark)}: "
                "keep one of them."
            )
        seen[key.value] = key.start_mark


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"
