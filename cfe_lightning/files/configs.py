"""Reads YAML configs safely: bounds their size and restricts the classes they may name before anything is built."""

import importlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings

from cfe_lightning.files.trust import ALLOWED_PACKAGES, only_trusted, present_path

#: Packages whose classes every config may name, besides those that the user trusts.
CONFIG_PACKAGES = (*ALLOWED_PACKAGES, "lightning", "pytorch_lightning", "torch")

_ADVICE = "give the YAML file that describes the run"
# Limits of one config: bytes of the file, entries with all references expanded, nesting, digits of an integer.
_MOST_BYTES = 500_000
_MOST_ENTRIES = 100_000
_DEEPEST = 50
_MOST_DIGITS = 300
#: YAML tags of plain values.
_PLAIN = re.compile(r"tag:yaml\.org,2002:(str|int|float|bool|null|map|seq|timestamp|merge)")
#: Keys of a config that hold names of classes.
_NAMES = ("class_names", "label")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load_value = get_loader("yaml")
#: Packages trusted by earlier calls of ``classes_of`` in this process.
_trusted_before: set[str] = set()

# Parts of jsonargparse's messages: lines without information, and the refusal of a class.
_NOISE = re.compile("Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed.*? to allow it\.")


@contextmanager
def classes_of(trusted: Sequence[str]) -> Iterator[None]:
    """Restricts the classes that configs, and the files they name, may use: importing a module executes it.

    ``trusted`` are packages in addition to ``CONFIG_PACKAGES``; the word ``exported_program`` is that of
    ``files.trust``. Nothing from a config may be built outside this context.

    Raises:
        ValueError: If an entry is not the name of a third-party package.
    """
    for package in trusted:
        if not package.isidentifier() or package in (*sys.stdlib_module_names, "jsonargparse"):
            raise ValueError(f"--trusted takes the name of a package of yours, as my_package, not {package!r}.")
    # Lightning's import lets configs come from any URL, which the settings below revoke.
    importlib.import_module("lightning.pytorch.cli")
    allowed = {*CONFIG_PACKAGES, *trusted}
    set_parsing_settings(
        import_path_denylist=["*", *(_trusted_before - allowed)],
        import_path_allowlist=sorted(allowed),
        # Only arguments declared as classes are built, and a config is always a local file.
        instantiate_subclass_spec_in_any=False,
        config_read_mode_urls_enabled=False,
        config_read_mode_fsspec_enabled=False,
    )
    _trusted_before.update(trusted)
    set_loader("yaml", _load_checked, (yaml.YAMLError,))
    with only_trusted(trusted):
        yield


def in_our_words(message: str) -> str:
    """Shortens jsonargparse's report of every type it has tried to the cause, and adds what to do about it."""
    # Class outside the trusted packages.
    if (denied := _DENIED.search(message)) is not None:
        package, _, _ = denied[1].partition(".")
        advice = f"if you trust the package {package!r}, add --trusted {package}"
        if package in sys.stdlib_module_names or package == "jsonargparse":
            advice = "nothing of it is needed here, so leave it out"
        return f"{denied[1]} is not part of {', '.join(CONFIG_PACKAGES)}: {advice}."
    # Any other cause.
    lines = (line.strip().removeprefix("- ") for line in message.splitlines())
    causes = takewhile(lambda line: not line.startswith("Not a valid subclass"), lines)
    told = " ".join(line for line in causes if line and not _NOISE.match(line)) or " ".join(message.split())[:300]
    return f"{told} a class_path, and its arguments below init_args, are needed here." if told.endswith(":") else told


def load_config(path: Path) -> dict[str, Any]:
    """Reads a YAML file of named values.

    Raises:
        ValueError: If the file is no UTF-8 text, no YAML, or too large once its references are expanded; one sentence.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than the {_MOST_BYTES:,} that a config may have: {_ADVICE}.")
    # Reading, and one sentence for every failure.
    try:
        text = path.read_text(encoding="utf-8")
        _check(text)
        content = yaml.load(_with_names_as_text(text), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {_ADVICE}.") from error
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f", {_place(error.problem_mark)}"
        told = " ".join(filter(None, (error.context, error.problem)))
        hint = "; YAML is indented by blanks, not by tabs" if "\n\t" in text else ""
        raise ValueError(f"{path} is not readable as YAML: {told}{where}{hint}.") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(
            f"{path} is not readable as YAML: the character {chr(error.character)!r} is no text, so {_ADVICE}."
        ) from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not readable as YAML: {error}") from error
    # Named values.
    if not isinstance(content, dict):
        kind = {NoneType: "nothing", list: "a list", str: "a text"}.get(type(content), "a single value")
        raise ValueError(
            f"{path} holds {kind}, but a config has named values, as model: and data:, see the folder configs/."
        )
    return content


def _load_checked(text: str) -> Any:
    _check(text)
    return _in_present_paths(_load_value(_with_names_as_text(text)))


def _with_names_as_text(text: str) -> str:
    """Quotes class names that YAML would read as numbers or truth values, such as ``no`` and ``1.0``."""
    if not any(key in text for key in _NAMES):
        return text
    # In Python's loader the marks count characters.
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = {node.start_mark.index: node for node in _names_below(root) if not node.tag.endswith(":str")}
    for start in sorted(found, reverse=True):
        node = found[start]
        text = text[:start] + json.dumps(node.value) + text[node.end_mark.index :]
    return text


def _names_below(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Yields the values of all keys that hold class names; an empty value stays null."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _names_below(child)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            values = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if key.value in _NAMES:
                yield from (one for one in values if isinstance(one, yaml.ScalarNode) and one.tag[-5:] != ":null")
            else:
                yield from _names_below(value)


def _in_present_paths(value: Any) -> Any:
    """Translates the class paths of earlier versions wherever they stand in a config."""
    if isinstance(value, dict):
        return {key: _in_present_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_in_present_paths(one) for one in value]
    return present_path(value) if isinstance(value, str) else value


def _check(text: str) -> None:
    """Refuses YAML that nests too deeply, expands to too many entries, or holds more than plain values."""
    # Nesting first, because composing the tree recurses.
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
    """Counts the entries of a node with its references expanded, and checks every value on the way."""
    if id(node) in known:
        return known[id(node)]
    # Values.
    if depth > _DEEPEST:
        raise ValueError("a reference (*) in it leads back to itself, or deeper than a config may be.")
    if not _PLAIN.fullmatch(node.tag):
        raise ValueError(f"{node.tag!r} in {_place(node.start_mark)} is no plain value: leave it out.")
    if node.tag.endswith(":int") and len(node.value) > _MOST_DIGITS:
        raise ValueError(f"a number in {_place(node.start_mark)} has {len(node.value):,} digits.")
    # Children.
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[id(node)] = 1 + sum(_entries(child, known, depth + 1) for child in children)
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
