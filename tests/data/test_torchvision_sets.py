"""Sets of torchvision, from files that the test writes itself; no network."""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from torchvision.datasets import VisionDataset

from cfe_lightning.data.base import Split
from cfe_lightning.data.torchvision_sets import TorchvisionData

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def write_mnist(root: Path, name: str = "MNIST", num_train: int = 200, num_test: int = 40) -> None:
    """Images of class k are as bright as 10 k."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        pixels = np.broadcast_to((10 * labels)[:, None, None], (count, 28, 28)).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, count, 28, 28) + pixels.tobytes()
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_mnist(tmp_path)
    return tmp_path


def mnist(root: Path, **options: Any) -> TorchvisionData:
    return TorchvisionData(**({"name": "MNIST", "root": str(root), "image_size": 32, "channels": 1} | options))


def all_of(data: TorchvisionData, split: Split) -> list[dict[str, Any]]:
    return [data.dataset(split)[index] for index in range(len(data.dataset(split)))]


class TestMnist:
    def test_val_is_taken_out_of_train_and_test_stays(self, root: Path) -> None:
        data = mnist(root, val_fraction=0.2)
        assert data.class_names == tuple("0123456789")
        assert len(data.dataset("test")) == 40
        assert len(data.dataset("train")) + len(data.dataset("val")) == 200
        assert 20 < len(data.dataset("val")) < 60
        names = [{sample["name"] for sample in all_of(data, split)} for split in SPLITS]
        assert len(set.union(*names)) == 240
        assert all(name.startswith("train_") for name in names[1])

    def test_images_and_labels_belong_together(self, root: Path) -> None:
        for split in SPLITS:
            for sample in all_of(mnist(root), split):
                assert sample["image"].shape == (1, 32, 32)
                assert sample["image"].mean() == pytest.approx(10 * sample["label"] / 255 * 2 - 1, abs=1e-5)
                assert sample["label"] == int(sample["name"].split("_")[1]) % 10
        assert mnist(root, channels=3).dataset("test")[0]["image"].shape == (3, 32, 32)

    def test_classes_can_be_limited_and_ordered(self, root: Path) -> None:
        data = mnist(root, class_names=["8", "3"])
        assert data.class_names == ("8", "3")
        assert data.dataset("test").labels.tolist() == [0, 1] * 4
        for sample in all_of(data, "train"):
            assert sample["image"].mean() == pytest.approx((80, 30)[sample["label"]] / 255 * 2 - 1, abs=1e-5)

    def test_limiting_moves_no_image_to_another_split(self, root: Path) -> None:
        every, some = mnist(root), mnist(root, class_names=["8", "3"])
        wanted = {sample["name"] for sample in all_of(every, "val") if sample["label"] in (3, 8)}
        assert {sample["name"] for sample in all_of(some, "val")} == wanted

    def test_batches_of_the_contract(self, root: Path) -> None:
        batch = next(iter(mnist(root, batch_size=16, balanced=True).train_dataloader()))
        assert batch["image"].shape == (16, 1, 32, 32)
        assert batch["label"].dtype == torch.int64
        assert len(batch["name"]) == 16

    def test_an_unknown_class(self, root: Path) -> None:
        with pytest.raises(ValueError, match=re.escape("class_names asks for 'three', but MNIST has 0, 1, 2")):
            mnist(root, class_names=["three", "8"])
        with pytest.raises(ValueError, match=r"At least two different classes are needed, got \['3'\]"):
            mnist(root, class_names=["3"])

    def test_what_is_not_there_is_not_fetched(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"MNIST is not complete below .* set download=true, or put its files there"
        ):
            mnist(tmp_path)

    def test_download_is_handed_on(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(torchvision.datasets.MNIST, "download", lambda self: asked.append(self.root))
        mnist(root)
        assert asked == []
        mnist(root, download=True)
        assert asked == [str(root)] * 2

    def test_no_images_for_validation(self, root: Path) -> None:
        with pytest.raises(ValueError, match=r"The val split of MNIST is empty: raise val_fraction"):
            mnist(root, val_fraction=0).dataset("val")


def test_fashion_mnist_has_words(tmp_path: Path) -> None:
    write_mnist(tmp_path, "FashionMNIST")
    data = mnist(tmp_path, name="FashionMNIST", class_names=["Sneaker", "Ankle boot"])
    assert data.dataset("test").labels.tolist() == [0, 1] * 4


def test_cifar_in_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
    words = ["airplane", "automobile", *"cdefghij"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": words}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *arguments: True)
    data = TorchvisionData(name="CIFAR10", root=str(tmp_path), image_size=32)
    assert data.class_names == tuple(words)
    assert len(data.dataset("test")) == 20
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"][0].reshape(3, 32, 32)
    wanted = torch.from_numpy(stored).float() / 255 * 2 - 1
    torch.testing.assert_close(data.dataset("test")[0]["image"], wanted, atol=1e-6, rtol=0)


class Split3(VisionDataset):
    """A set with a ``split`` argument, as Food101, PCAM or DTD have it, ordered by class."""

    words = ("train", "val", "test")

    def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
        super().__init__(root)
        if split not in self.words:
            raise ValueError(f"Unknown value '{split}' for argument split. Valid values are {self.words}.")
        self.split = split
        self._labels = [k for k in range(3) for _ in range(20)]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (4, 4), (self._labels[index], len(self.split), 0)), self._labels[index]


class Split2(Split3):
    words = ("trainval", "test")


class NoSplit(Split3):
    def __init__(self, root: str) -> None:
        super().__init__(root)


class Captions(Split3):
    def __getitem__(self, index: int) -> tuple[Image.Image, str]:  # type: ignore[override]
        return Image.new("RGB", (4, 4)), "a cat"


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Split3, Split2, NoSplit, Captions):
        monkeypatch.setattr(torchvision.datasets, kind.__name__, kind, raising=False)
    names = (*torchvision.datasets.__all__, "Split3", "Split2", "NoSplit", "Captions")
    monkeypatch.setattr(torchvision.datasets, "__all__", names)


@pytest.mark.usefixtures("invented")
class TestSplits:
    @pytest.mark.parametrize(
        ("name", "given"), [("Split3", {"train": 60, "val": 60, "test": 60}), ("Split2", {"test": 60}), ("NoSplit", {})]
    )
    def test_own_splits_are_kept_and_missing_ones_taken_out_of_train(self, name: str, given: dict[Split, int]) -> None:
        data = TorchvisionData(name=name, root="x", image_size=4, val_fraction=0.2, test_fraction=0.2)
        sizes = {split: len(data.dataset(split)) for split in SPLITS}
        for split, size in given.items():
            assert sizes[split] == size
        assert sum(sizes.values()) == 60 * max(len(given), 1) + (60 if given == {"test": 60} else 0)
        assert all(sizes.values())

    def test_classes_without_names_are_numbers_and_take_turns(self) -> None:
        data = TorchvisionData(name="Split3", root="x", image_size=4)
        assert data.class_names == ("0", "1", "2")
        assert data.dataset("val").labels[:6].tolist() == [0, 1, 2, 0, 1, 2]
        red = data.dataset("val")[4]["image"][0]
        assert red.mean() == pytest.approx(1 / 255 * 2 - 1)

    def test_options_reach_the_set(self) -> None:
        data = TorchvisionData(name="Split3", root="x", image_size=4, options={"split": "val"})
        assert sum(len(data.dataset(split)) for split in SPLITS) == 60
        green = data.dataset("test")[0]["image"][1]
        assert green.mean() == pytest.approx(3 / 255 * 2 - 1), "not taken from the split that was asked for"

    def test_unknown_options(self) -> None:
        with pytest.raises(ValueError, match=r"Split3 takes no option 'subset' but root, split, download"):
            TorchvisionData(name="Split3", root="x", image_size=4, options={"subset": 1})
        with pytest.raises(ValueError, match=r"Split3: Unknown value 'dev' for argument split"):
            TorchvisionData(name="Split3", root="x", image_size=4, options={"split": "dev"})

    def test_no_classification_set(self) -> None:
        with pytest.raises(ValueError, match=r"Captions is no classification set: it yields no image and class number"):
            TorchvisionData(name="Captions", root="x", image_size=4)


def test_arguments_that_a_set_hands_on_to_its_base(tmp_path: Path) -> None:
    write_mnist(tmp_path, "EMNIST")
    for file in (tmp_path / "EMNIST" / "raw").iterdir():
        file.rename(file.with_name(file.name.replace("t10k", "test").replace("train-", "emnist-digits-train-")))
    for file in (tmp_path / "EMNIST" / "raw").glob("test-*"):
        file.rename(file.with_name(f"emnist-digits-{file.name}"))
    data = mnist(tmp_path, name="EMNIST", options={"split": "digits"})
    assert len(data.dataset("test")) == 40
    assert len(data.dataset("train")) + len(data.dataset("val")) == 200


def test_an_option_that_the_set_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EMNIST: .*missing .*'split'; further arguments go into options"):
        TorchvisionData(name="EMNIST", root=str(tmp_path), image_size=28)


@pytest.mark.parametrize(("name", "hint"), [("mnist", "did you mean .*MNIST"), ("zzzzzz", "its documentation lists")])
def test_an_unknown_set(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"torchvision has no data set '{name}': {hint}"):
        TorchvisionData(name=name, root="x", image_size=28)


def test_fractions_must_leave_something(root: Path) -> None:
    with pytest.raises(ValueError, match=r"must be shares that leave something for training"):
        mnist(root, val_fraction=0.6, test_fraction=0.5)
