"""Loaders: the same images in the same order with the same augmentation, wherever a run was interrupted."""

from __future__ import annotations

import pickle
from collections.abc import Iterable

import pytest
import torch
from torch.utils.data import DataLoader
from toy import ToyData, toy_trainer

from cfe_lightning.data.base import Sample, check_groups, split_by_group


def epoch(loader: DataLoader[Sample], number: int) -> list[Sample]:
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return list(loader)


def names(batches: Iterable[Sample]) -> list[str]:
    return [name for batch in batches for name in batch["name"]]


def assert_same(one: list[Sample], other: list[Sample]) -> None:
    assert names(one) == names(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a["image"], b["image"])


def test_every_epoch_has_its_own_order_of_all_images() -> None:
    loader = ToyData(num_images=16).train_dataloader()
    first, second = names(epoch(loader, 0)), names(epoch(loader, 1))
    assert sorted(first) == sorted(second) == [f"train/{index:04d}" for index in range(16)]
    assert first != second
    assert first != sorted(first)


def test_order_and_augmentation_depend_on_seed_and_epoch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ToyData(horizontal_flip=True)
    expected = epoch(data.train_dataloader(), 3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert_same(expected, epoch(data.train_dataloader(), 3))
    list(data.val_dataloader())
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert names(epoch(data.train_dataloader(), 3)) != names(expected)


def test_augmentation_flips_some_images_and_keeps_the_rest() -> None:
    data = ToyData(horizontal_flip=True, num_images=32)
    plain = {sample["name"]: sample["image"] for sample in data.dataset("train")}
    flipped = 0
    for batch in epoch(data.train_dataloader(), 0):
        for name, image in zip(batch["name"], batch["image"], strict=True):
            same = torch.equal(image, plain[name])
            assert same or torch.equal(image, plain[name].flip(-1))
            flipped += not same
    assert 8 <= flipped <= 24


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_continues_after_the_batches_it_has_delivered(num_workers: int) -> None:
    data = ToyData(horizontal_flip=True, num_images=24, num_workers=num_workers)
    expected = epoch(data.train_dataloader(), 1)
    interrupted = data.train_dataloader()
    interrupted.sampler.set_epoch(1)  # type: ignore[attr-defined]
    batches = iter(interrupted)
    for _ in range(2):
        next(batches)
    # Loader processes have drawn further by now; only what was delivered counts.
    state = interrupted.state_dict()  # type: ignore[attr-defined]
    assert state == {"delivered": 2}
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)  # type: ignore[attr-defined]
    assert len(resumed) == 6
    assert_same(expected[2:], epoch(resumed, 1))
    assert_same(epoch(data.train_dataloader(), 2), epoch(resumed, 2))


def test_a_finished_epoch_resumes_with_the_next() -> None:
    loader = ToyData().train_dataloader()
    epoch(loader, 0)
    assert loader.state_dict() == {"delivered": 0}  # type: ignore[attr-defined]


def test_processes_share_an_epoch_without_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    data = ToyData(num_images=16, batch_size=2)
    data.trainer = toy_trainer(tmp_path)
    monkeypatch.setattr(type(data.trainer), "world_size", 2)
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(type(data.trainer), "global_rank", rank)
        drawn += names(epoch(data.train_dataloader(), 0))
    assert sorted(drawn) == [f"train/{index:04d}" for index in range(16)]


@pytest.mark.parametrize("num_processes", [2, 3, 4])
@pytest.mark.parametrize("num_images", [5, 8, 9, 13])
def test_processes_share_a_validation_in_as_many_batches_and_no_image_twice(
    num_images: int, num_processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    data = ToyData(num_images=num_images, batch_size=2)
    data.trainer = toy_trainer(tmp_path)
    monkeypatch.setattr(type(data.trainer), "world_size", num_processes)
    seen, counts = [], set()
    for rank in range(num_processes):
        monkeypatch.setattr(type(data.trainer), "global_rank", rank)
        batches = list(data.val_dataloader())
        counts.add(len(batches))
        assert len(batches) == len(data.val_dataloader())
        assert names(batches) == [f"val/{index:04d}" for index in range(rank, num_images, num_processes)]
        seen += names(batches)
    # A process that had another number of batches would wait for the others for ever.
    assert len(counts) == 1
    assert len(seen) == len({*seen}) == num_images


def test_a_process_without_an_image_to_validate_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    data = ToyData(num_images=3)
    data.trainer = toy_trainer(tmp_path)
    monkeypatch.setattr(type(data.trainer), "world_size", 4)
    with pytest.raises(ValueError, match="There are 3 images to validate or test for 4 processes: use at most 3"):
        data.val_dataloader()


def test_balanced_drawing_evens_out_a_rare_class() -> None:
    data = ToyData(num_images=400, batch_size=50, balanced=True)
    dataset = data.dataset("train")
    dataset.labels = torch.tensor([0] * 380 + [1] * 20)  # type: ignore[attr-defined]
    data.dataset = lambda split: dataset  # type: ignore[method-assign]
    labels = torch.cat([batch["label"] for batch in epoch(data.train_dataloader(), 0)])
    assert 0.4 < labels.float().mean() < 0.6


def test_a_split_smaller_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"training split has 3 images for 1 process.*fewer than one batch of 4 each"):
        ToyData(num_images=3).train_dataloader()


def test_loader_processes_stay_from_one_epoch_or_validation_to_the_next() -> None:
    data = ToyData(num_workers=2)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert names(loader)
        first = [worker.pid for worker in loader._iterator._workers]  # type: ignore[union-attr, attr-defined]
        assert names(loader)
        assert first == [worker.pid for worker in loader._iterator._workers]  # type: ignore[union-attr, attr-defined]


def test_loader_processes_can_be_spawned() -> None:
    # Windows and macOS start them by pickling the data set.
    loader = ToyData(horizontal_flip=True).train_dataloader()
    assert len(pickle.loads(pickle.dumps(loader.dataset))) == 16


def test_the_trainer_can_overfit_one_batch(tmp_path) -> None:
    from toy import ToyExplainer, toy_classifier

    trainer = toy_trainer(tmp_path, overfit_batches=1, max_epochs=2)
    trainer.fit(ToyExplainer(toy_classifier()), ToyData(horizontal_flip=True))
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 2}, r"channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"batch_size": 0}, "batch_size and image_size must be positive, got 0 and 16"),
    ],
)
def test_wrong_arguments(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ToyData(**arguments)


def test_groups_stay_together_and_do_not_move() -> None:
    groups = [f"patient {index // 3}" for index in range(3000)]
    splits = split_by_group(groups, {"train": 0.7, "val": 0.15, "test": 0.15})
    assert len({*zip(groups, splits, strict=True)}) == 1000
    assert 0.65 < splits.count("train") / 3000 < 0.75
    fewer = split_by_group(groups[30:], {"train": 0.7, "val": 0.15, "test": 0.15})
    assert splits[30:] == fewer
    with pytest.raises(ValueError, match="must sum to 1"):
        split_by_group(groups, {"train": 0.7})


def test_a_group_in_two_splits_is_a_leak() -> None:
    check_groups({"train": ["a", "b"], "val": ["c"]})
    with pytest.raises(ValueError, match="Group 'b' is in both the train and the val split"):
        check_groups({"train": ["a", "b"], "val": ["b"]})
