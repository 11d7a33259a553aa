"""Untrusted files of torch.save are no larger than they claim, or refused before memory is allocated."""

from __future__ import annotations

import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cfe_lightning.files.tensors import LargerThanFileError, allocation_limit, load_plain


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def reason(path: Path, **options: bool) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at
        load_plain(path, **options)
    return str(caught.value)


def test_what_torch_saves_is_read_as_it_was(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    content = {
        "a": tied,
        "b": tied,
        "part": tied[2:4],
        "turned": tied.view(2, 3).T,
        "none": torch.empty(0),
        "x": [1, "y"],
    }
    read = load_plain(saved(tmp_path / "file.pt", content))
    assert all(torch.equal(read[key], content[key]) for key in ("a", "b", "part", "turned", "none"))
    assert read["x"] == [1, "y"]


def test_old_files_are_read_where_they_are_expected(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_plain(tmp_path / "old.pt", any_age=True)["a"], torch.ones(3))
    assert reason(tmp_path / "old.pt") == "it is no file of PyTorch, or holds more than plain data and tensors"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a": torch.zeros(1).expand(10**12)}, "claims a tensor [1000000000000] of 4,000,000,000,000 bytes"),
        ({"a": torch.sparse_coo_tensor(size=(10**6, 10**6))}, "not an array of numbers"),
        ({"a": torch.empty(10**12, device="meta")}, "not an array of numbers"),
        ({"a": 1 << 1000}, "a whole number of 1,001 bits"),
        ({"a": bytearray(5)}, "raw bytes"),
        ({f"{i}": torch.zeros(100)[: 100 - i] for i in range(5)} | {"a": nn.Linear(2, 2)}, "no file of PyTorch"),
    ],
)
def test_what_is_small_in_the_file_only_is_refused(content: Any, told: str, tmp_path: Path) -> None:
    assert told in reason(saved(tmp_path / "file.pt", content))


class Grown:
    """A number that is repeated and then copied, in the form in which tensors of some accelerators are stored."""

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (torch.zeros(1).expand(10**7), torch.float64, "cpu", False)


class Bytes:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (10**9,)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(("content", "told"), [(Grown(), "not an array of numbers"), (Bytes(), "raw bytes")])
def test_what_would_grow_while_it_is_read_is_refused_before(
    content: Any, told: str, archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"a": content}, tmp_path / "file.pt", _use_new_zipfile_serialization=archive)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("is read"))
    assert told in reason(tmp_path / "file.pt", any_age=True)


@pytest.mark.parametrize("archive", [True, False])
def test_all_that_trainings_save_is_plain(archive: bool, tmp_path: Path) -> None:
    # Content.
    marked = nn.Parameter(torch.ones(2))
    marked.note = "an attribute"  # type: ignore[attr-defined]
    tensors = {
        str(kind): torch.zeros(2, dtype=kind) for kind in (torch.float16, torch.bfloat16, torch.bool, torch.int8)
    }
    content = {
        **tensors,
        "complex": torch.zeros(2, dtype=torch.complex64),
        "parameter": nn.Parameter(torch.ones(2)),
        "marked": marked,
        "state": nn.BatchNorm2d(2).state_dict(),
        "milestones": Counter([1, 2]),
        "plain": [1.5, None, True, {1, 2}, 1j, b"bytes", torch.Size([1]), torch.float32, torch.device("cpu")],
    }
    if archive:  # PyTorch cannot read this type from older files
        content["unsigned"] = torch.zeros(2, dtype=torch.uint16)
    # Read back.
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=archive)
    read = load_plain(tmp_path / "file.pt", any_age=True)
    assert read.keys() == content.keys()
    assert read["plain"] == content["plain"]
    assert all(torch.equal(read[name], value) for name, value in content.items() if isinstance(value, torch.Tensor))


def test_the_oldest_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "N.N.N.N.N.").write_bytes(b"x")
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        archive.add(tmp_path / "N.N.N.N.N.", "N.N.N.N.N.")
    assert reason(tmp_path / "old.pt", any_age=True) == "it was written by a version of PyTorch before 0.2"


def test_many_views_of_the_same_bytes_are_refused(tmp_path: Path) -> None:
    whole = torch.zeros(10_000)
    views = [whole[index:] for index in range(1000)]
    assert "it claims tensors of" in reason(saved(tmp_path / "file.pt", views))


def test_lists_that_grow_when_they_are_written_out_are_refused(tmp_path: Path) -> None:
    lists: Any = ["x"] * 10
    for _ in range(8):
        lists = [lists] * 10
    assert "refer to one another until they have more than" in reason(saved(tmp_path / "file.pt", lists))
    itself: list[Any] = []
    itself.append(itself)
    assert "nest deeper than 100 levels" in reason(saved(tmp_path / "file.pt", itself))


def test_an_archive_is_as_large_as_its_parts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    assert "it unpacks to 1,000,000 bytes, more than its own" in reason(tmp_path / "bomb.pt")
    content = saved(tmp_path / "good.pt", {"a": torch.zeros(2)}).read_bytes()
    (tmp_path / "two.pt").write_bytes(content + content)
    assert "something before or behind" in reason(tmp_path / "two.pt")
    (tmp_path / "cut.pt").write_bytes(content[:-1])
    assert reason(tmp_path / "cut.pt") == "the file is truncated, damaged or not written by torch.save"


def test_a_missing_permission_is_the_systems_own_complaint(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        load_plain(tmp_path / "gone.pt")


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(10**6, 10**6),
        lambda: nn.ModuleList([nn.Linear(4000, 4000) for _ in range(40)]),
        lambda: nn.ParameterList([torch.zeros(1) for _ in range(100_000)]),
        lambda: nn.Module().register_buffer("table", torch.arange(10**12)),
        lambda: torch.zeros(2, 3, 10**5, 10**5),
    ],
)
def test_a_network_far_beyond_its_file_is_not_built(build: Any, tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pt", {"a": torch.zeros(2)})
    with pytest.raises(LargerThanFileError, match="its arguments do not belong to its weights"), allocation_limit(file):
        build()
    # Afterwards everything can be built again.
    assert nn.Linear(300, 10_000).weight.shape == (10_000, 300)


def test_a_network_is_built_as_without_a_limit(tmp_path: Path) -> None:
    file = saved(tmp_path / "file.pt", {"a": torch.zeros(2)})

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))

    expected = build().state_dict()
    with allocation_limit(file):
        actual = build().state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
