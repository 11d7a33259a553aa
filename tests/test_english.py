"""Docstrings are read once: their beginnings, their citations, and the share of headings and reasons in the code."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cfe_lightning"
MODULES = sorted(PACKAGE.rglob("*.py"))
Documented = ast.Module | ast.ClassDef | ast.FunctionDef
#: Beginnings that need the line above, or another file, to be understood.
CONTINUATION = re.compile(r"[a-z]|(Of|As|See|Its)\b")


def docstrings() -> Iterator[tuple[str, str]]:
    """Place and text of every docstring."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                yield f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 1)}", text


def arguments(text: str) -> Iterator[tuple[str, str]]:
    """Names and first lines of the texts below Args and Attributes."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text, re.MULTILINE):
        yield from re.findall(r"^    \*{0,2}(\w+): (.*)", section, re.MULTILINE)


def test_texts_of_arguments_stand_alone() -> None:
    texts = [(f"{place} {name}", said) for place, text in docstrings() for name, said in arguments(text)]
    assert len(texts) > 500
    assert not [(place, said) for place, said in texts if CONTINUATION.match(said)]


@pytest.mark.parametrize("text", ["Of the bootstrap.", "As ``mean``.", "but at most so many.", "Its mean."])
def test_a_text_that_goes_on_from_the_line_above_is_seen(text: str) -> None:
    ((_, said),) = arguments(f"Does it.\n\nArgs:\n    std: {text}\n")
    assert CONTINUATION.match(said)


def test_docstrings_begin_with_a_sentence() -> None:
    beginnings = [text for _, text in docstrings()]
    assert sum(bool(re.match(r"(What|Whether|How|Where|Which)\b", text)) for text in beginnings) < 10
    assert not [(place, text[:60]) for place, text in docstrings() if re.match(r"(Of|As|See|Its)\b", text)]


def test_nothing_is_cited_that_a_reader_cannot_open() -> None:
    for path in MODULES:
        assert not re.search(r"specification|rule R\d", path.read_text(encoding="utf-8"), re.IGNORECASE), path


def test_bodies_have_headings_and_reasons() -> None:
    comments = lines = 0
    for path in MODULES:
        with tokenize.open(path) as file:
            lines += len(file.readlines())
            file.seek(0)
            tokens = tokenize.generate_tokens(file.readline)
            comments += sum(t.type == tokenize.COMMENT and t.line.lstrip().startswith("#") for t in tokens)
    assert comments / lines >= 0.04
