"""Rows of batches in every structure that can hold tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfe_lightning.compute.rows import joined, rows_of


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True, slots=True)
class Held:
    image: Tensor
    pair: Pair
    named: dict[str, Tensor]
    listed: list[Tensor]
    name: str


def held() -> Held:
    count = torch.arange(5)
    return Held(count.view(5, 1), Pair(count + 10, None), {"x": count + 20}, [count + 30, count + 40], "toy")


def test_rows_are_those_of_every_tensor() -> None:
    for rows in (slice(1, 3), torch.tensor([1, 2])):
        some = rows_of(held(), rows)
        assert some.image.tolist() == [[1], [2]]
        assert (some.pair.first.tolist(), some.pair.second) == ([11, 12], None)
        assert some.named["x"].tolist() == [21, 22]
        assert [one.tolist() for one in some.listed] == [[31, 32], [41, 42]]
        assert some.name == "toy"


def test_a_slice_copies_nothing() -> None:
    whole = held()
    assert rows_of(whole, slice(1, 3)).named["x"].data_ptr() == whole.named["x"][1:].data_ptr()


def test_joined_parts_are_the_whole() -> None:
    whole = held()
    parts = [rows_of(whole, slice(0, 2)), rows_of(whole, slice(2, 3)), rows_of(whole, slice(3, 5))]
    again: Any = joined(parts)
    assert torch.equal(again.image, whole.image)
    assert torch.equal(again.listed[1], whole.listed[1])
    assert again.pair.second is None
    assert joined([whole]) is whole
