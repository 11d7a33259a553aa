"""The built-in set: its truth must be exact, its nuisance blind to the class, its classes learnable."""

from __future__ import annotations

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.data.base import Split
from cfe_lightning.data.synthetic import VISIBLE, Shapes, SyntheticShapes
from cfe_lightning.images import read_image

CUES = ["lesion", "colour", "texture"]


def shapes(split: Split = "test", **options: Any) -> Shapes:
    return SyntheticShapes(**options).dataset(split)


def stacked(data: Shapes, key: str, count: int) -> Tensor:
    return torch.stack([data[i][key] for i in range(count)])


class TestContract:
    @pytest.mark.parametrize("num_classes", [2, 3, 4])
    @pytest.mark.parametrize(
        ("cue", "size", "channels"),
        [
            ("lesion", 28, 3),
            ("lesion", 33, 1),
            ("colour", 28, 3),
            ("colour", 64, 3),
            ("texture", 33, 1),
            ("texture", 64, 3),
        ],
    )
    def test_sample(self, cue: Any, num_classes: int, size: int, channels: int) -> None:
        data = SyntheticShapes(cue=cue, num_classes=num_classes, image_size=size, channels=channels)
        assert len(data.class_names) == len(set(data.class_names)) == num_classes
        split = data.dataset("val")
        for index in range(num_classes):
            sample = split[index]
            assert sample["label"] == split.labels[index] == index
            assert sample["name"] == f"{data.class_names[index]}/val_{index:06d}"
            for key in ("image", "counterfactual"):
                assert sample[key].shape == (channels, size, size)
                assert sample[key].dtype == torch.float32
            assert sample["mask"].shape == (1, size, size)
            assert set(sample["mask"].unique().tolist()) == {0.0, 1.0}

    def test_the_largest_size(self) -> None:
        assert shapes(image_size=256)[0]["image"].shape == (3, 256, 256)

    def test_loaders_deliver_batches_of_the_contract(self) -> None:
        data = SyntheticShapes(batch_size=4, num_train=8, num_val=6, num_test=2)
        batch = next(iter(data.val_dataloader()))
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["counterfactual"].shape == (4, 3, 32, 32)
        assert batch["label"].tolist() == [0, 1, 0, 1]
        assert batch["mask"].shape == (4, 1, 32, 32)
        assert len(set(batch["name"])) == 4
        assert sum(len(b["label"]) for b in data.val_dataloader()) == 6
        assert len(list(data.train_dataloader())) == 2

    def test_an_index_outside_is_an_index_error(self) -> None:
        data = shapes(num_test=3)
        assert len(data) == len(data.labels) == 3
        for index in (-1, 3):
            with pytest.raises(IndexError, match="outside the 3 images"):
                data[index]


class TestSeeds:
    def test_an_image_depends_on_seed_split_and_index_alone(self) -> None:
        one, more = shapes(num_test=5), shapes(num_test=50)
        assert torch.equal(one[3]["image"], more[3]["image"])
        assert torch.equal(one[3]["image"], one[3]["image"])
        others = [shapes(num_test=5, seed=1)[3], shapes("val")[3], shapes("train")[3], one[1]]
        assert all(not torch.equal(one[3]["image"], other["image"]) for other in others)

    def test_the_global_generator_is_neither_used_nor_moved(self) -> None:
        torch.manual_seed(0)
        first = shapes()[0]["image"]
        after = torch.rand(())
        torch.manual_seed(0)
        assert torch.rand(()) == after
        torch.manual_seed(7)
        assert torch.equal(shapes()[0]["image"], first)

    def test_no_two_images_of_any_split_have_the_same_seed(self) -> None:
        from cfe_lightning.data.synthetic import _scrambled

        seeds = {_scrambled(shapes(split)._first_seed + i) for split in ("train", "val", "test") for i in range(3000)}
        assert len(seeds) == 9000
        starts = sorted(shapes(split)._first_seed for split in ("train", "val", "test"))
        assert all(b - a == 2**30 for a, b in pairwise(starts))


class TestTruth:
    @pytest.mark.parametrize("cue", CUES)
    @pytest.mark.parametrize("num_classes", [2, 4])
    @pytest.mark.parametrize("cue_size", [0.5, 1.0, 1.6])
    def test_no_value_needs_clamping(self, cue: Any, num_classes: int, cue_size: float) -> None:
        data = shapes(cue=cue, num_classes=num_classes, cue_size=cue_size, shortcut=0.5)
        for label in range(num_classes):
            drawn = torch.stack([data.render(index, label) for index in range(60)])
            assert drawn.abs().max() < 1

    @pytest.mark.parametrize("cue", CUES)
    def test_render_gives_the_image_and_its_counterfactual(self, cue: Any) -> None:
        data = shapes(cue=cue, num_classes=3)
        for index in range(6):
            sample = data[index]
            assert torch.equal(data.render(index, sample["label"]), sample["image"])
            assert torch.equal(data.render(index, (sample["label"] + 1) % 3), sample["counterfactual"])

    @pytest.mark.parametrize("cue", CUES)
    def test_image_and_counterfactual_differ_in_the_mask_only(self, cue: Any) -> None:
        data = shapes(cue=cue)
        for index in range(20):
            sample = data[index]
            difference = (sample["image"] - sample["counterfactual"]).abs().amax(dim=0, keepdim=True)
            assert torch.equal(sample["mask"] == 1, difference > VISIBLE)
            far = F.max_pool2d(sample["mask"], kernel_size=5, stride=1, padding=2) == 0
            assert difference[far].max() == 0, "the noise and all else must be the same, bit for bit"

    def test_a_lesion_is_a_sparse_bright_addition_of_the_specified_strength(self) -> None:
        data = shapes(cue="lesion")
        difference = stacked(data, "image", 200) - stacked(data, "counterfactual", 200)
        assert difference.abs().mean() == pytest.approx(0.02, abs=0.003)
        assert stacked(data, "mask", 200).mean() < 0.06
        sick = data.labels[:200] == 1
        assert difference[sick].min() > -1e-6
        assert difference[~sick].max() < 1e-6
        # Additive: the same amount in every channel.
        torch.testing.assert_close(difference[:, 0], difference[:, 2], atol=1e-6, rtol=0)

    @pytest.mark.parametrize("place", ["landmark", "anywhere"])
    @pytest.mark.parametrize("num_classes", [2, 4])
    def test_lesions_lie_inside_the_body(self, place: Any, num_classes: int) -> None:
        data = shapes(cue="lesion", lesion_place=place, num_classes=num_classes)
        last = num_classes - 1
        for index in range(60):
            scene = data._scene(index, 0)
            lesion = (data.render(index, last) - data.render(index, 0)).amax(dim=0)
            assert (scene.body[lesion > 0.36] == 1).all()

    def test_class_k_has_k_separate_lesions(self) -> None:
        data = shapes(cue="lesion", num_classes=4, image_size=96)
        for index in range(12):
            areas = [((data.render(index, k) - data.render(index, 0)).amax(0) > VISIBLE).sum().item() for k in range(4)]
            assert areas[0] == 0
            assert areas[1] > 50
            # Had two of them met, a part of the second would be missing.
            assert all(later - earlier > 0.6 * areas[1] for earlier, later in pairwise(areas))

    def test_landmark_lesions_share_a_place_and_free_ones_do_not(self) -> None:
        def spread(place: Any) -> float:
            data = shapes(cue="lesion", lesion_place=place, image_size=64)
            centres = []
            for index in range(0, 60):
                scene = data._scene(index, 0)
                lesion = (data.render(index, 1) - data.render(index, 0)).mean(dim=0)
                weight = lesion / lesion.sum()
                centres.append(torch.stack([(weight * scene.across).sum(), (weight * scene.down).sum()]))
            return float(torch.stack(centres).std(dim=0).mean())

        assert spread("landmark") < 0.03
        assert spread("anywhere") > 0.06

    def test_colour_changes_hue_and_not_lightness(self) -> None:
        data = shapes(cue="colour")
        difference = stacked(data, "image", 50) - stacked(data, "counterfactual", 50)
        assert difference.mean(dim=1).abs().max() < 1e-5
        assert difference.abs().mean() > 0.05
        assert stacked(data, "mask", 50).mean() > 0.2

    def test_texture_has_no_mean_and_the_named_direction(self) -> None:
        data = shapes(cue="texture", image_size=64)
        difference = stacked(data, "image", 60) - stacked(data, "counterfactual", 60)
        assert difference.abs().mean() > 0.04
        assert difference.mean(dim=(1, 2, 3)).abs().max() < 0.01
        for index in range(20):
            image = stacked(data, "image", 20)[index]
            along_x = (image[:, :, 1:] - image[:, :, :-1]).square().mean()
            along_y = (image[:, 1:] - image[:, :-1]).square().mean()
            assert (along_x > along_y) == (data.class_names[data.labels[index]] == "stripes_0")

    @pytest.mark.parametrize("cue", CUES)
    def test_a_larger_cue_is_a_larger_difference(self, cue: Any) -> None:
        sizes = []
        for cue_size in (0.7, 1.0, 1.4):
            data = shapes(cue=cue, cue_size=cue_size)
            sizes.append((stacked(data, "image", 40) - stacked(data, "counterfactual", 40)).abs().mean().item())
        assert sizes[1] > 1.25 * sizes[0]
        assert sizes[2] > 1.25 * sizes[1]


class TestNuisance:
    @pytest.mark.parametrize("cue", CUES)
    def test_it_is_the_same_whatever_the_class(self, cue: Any) -> None:
        data = shapes(cue=cue)
        for index in range(10):
            assert torch.equal(data._scene(index, 0).base, data._scene(index, 1).base)

    def test_its_mean_image_does_not_depend_on_the_class(self) -> None:
        data = shapes(cue="lesion", num_test=1000)
        base = torch.stack([data._scene(index, int(data.labels[index])).base for index in range(1000)])
        classes = [base[data.labels == label] for label in (0, 1)]
        standard_error = base.std(dim=0) * (2 / 500) ** 0.5
        z = (classes[0].mean(dim=0) - classes[1].mean(dim=0)) / standard_error
        assert z.abs().max() < 5

    def test_half_of_the_images_have_a_distractor_outside_the_body(self) -> None:
        data = shapes(cue="colour", image_size=64)
        with_one = 0
        for index in range(200):
            scene = data._scene(index, 0)
            outside = scene.base.mean(dim=0).masked_fill(scene.body > 0, -1)
            with_one += bool(outside.max() > -0.15)
        assert 70 < with_one < 130


class TestShortcut:
    @staticmethod
    def corners(data: Shapes, plain: Shapes, count: int) -> Tensor:
        """The corner in which each image has its mark."""
        found = []
        for index in range(count):
            mark = (data[index]["image"] - plain[index]["image"]).mean(dim=0)
            half = mark.shape[0] // 2
            sums = [mark[:half, :half], mark[:half, half:], mark[half:, :half], mark[half:, half:]]
            found.append(int(torch.stack([part.sum() for part in sums]).argmax()))
        return torch.tensor(found)

    @pytest.mark.parametrize("num_classes", [2, 4])
    @pytest.mark.parametrize("probability", [0.0, 0.8, 1.0])
    def test_the_mark_agrees_as_often_as_asked(self, num_classes: int, probability: float) -> None:
        options: Any = {"cue": "texture", "num_classes": num_classes, "num_test": 400}
        data, plain = shapes(shortcut=probability, **options), shapes(**options)
        corners = self.corners(data, plain, 400)
        assert corners.max() < num_classes
        agreement = (corners == data.labels).float().mean()
        assert agreement == pytest.approx(probability, abs=0.06 if probability == 0.8 else 0)

    def test_the_counterfactual_keeps_the_mark(self) -> None:
        data = shapes(cue="lesion", shortcut=1.0)
        assert (data[0]["image"] - data[0]["counterfactual"])[:, :6, :6].abs().max() == 0

    def test_images_are_what_they_always_were(self) -> None:
        digest = hashlib.sha256()
        for cue in CUES:
            for shortcut in (None, 0.0, 0.9):
                sample = shapes(cue=cue, shortcut=shortcut, num_classes=3)[4]
                for key in ("image", "counterfactual"):
                    # Rounded: another processor may differ in the last bit.
                    digest.update((sample[key] * 1000).round().to(torch.int32).numpy().tobytes())
        assert digest.hexdigest()[:16] == "ca5325425310e69d"

    def test_a_mark_is_small_and_bright(self) -> None:
        data, plain = shapes(shortcut=1.0, image_size=64), shapes(image_size=64)
        mark = data[0]["image"] - plain[0]["image"]
        assert mark.max() == pytest.approx(0.6, abs=1e-6)
        assert (mark.amax(dim=0) > 0).float().mean() < 0.01

    @pytest.mark.parametrize("num_classes", [2, 4])
    @pytest.mark.parametrize("cue", CUES)
    def test_moving_the_mark_moves_nothing_else(self, num_classes: int, cue: Any) -> None:
        data = shapes(cue=cue, num_classes=num_classes, shortcut=0.5)
        for index in range(6):
            sample, label = data[index], int(data.labels[index])
            here = data.mark_corner(index)
            assert torch.equal(data.render(index, label, here), sample["image"])
            for corner in set(range(num_classes)) - {here}:
                moved = data.render(index, label, corner)
                places = torch.zeros(1, 32, 32)
                for k in (here, corner):
                    places[0][data._patch(k)] = 1
                assert torch.equal((moved - sample["image"]) * (1 - places), torch.zeros_like(moved))
                # Everything in the two squares is lifted by the mark or lowered by its absence, the noise kept.
                lifted = (moved - sample["image"]).mean(dim=0)
                assert torch.allclose(lifted[data._patch(corner)], torch.full((3, 3), 0.6), atol=1e-6)
                assert torch.allclose(lifted[data._patch(here)], torch.full((3, 3), -0.6), atol=1e-6)

    @pytest.mark.parametrize("num_classes", [2, 3, 4])
    def test_mark_is_where_marks_can_sit(self, num_classes: int) -> None:
        data = shapes(num_classes=num_classes, shortcut=0.5, image_size=64)
        plain = shapes(num_classes=num_classes, image_size=64)
        assert "mark" not in plain[0]
        mark = data[0]["mark"]
        assert mark.shape == (1, 64, 64)
        assert mark.sum() == num_classes * 6**2
        seen = torch.zeros(64, 64)
        for index in range(40):
            assert torch.equal(data[index]["mark"], mark)
            seen += (data[index]["image"] - plain[index]["image"]).abs().amax(dim=0)
        assert ((seen > 0) & (mark[0] == 0)).sum() == 0
        assert all(seen[data._patch(corner)].max() > 0 for corner in range(num_classes))

    def test_no_mark_can_be_moved_where_there_is_none(self) -> None:
        with pytest.raises(ValueError, match="have no mark to put into corner 1: set shortcut from 0 to 1"):
            shapes().render(0, 0, 1)
        with pytest.raises(ValueError, match="have no mark: set shortcut"):
            shapes().mark_corner(0)
        with pytest.raises(ValueError, match="corner is the number of one of 2 classes, got 2"):
            shapes(shortcut=0.5).render(0, 0, 2)


class TestWrongCues:
    @pytest.mark.parametrize("num_classes", [2, 3])
    def test_so_many_images_show_the_cue_of_another_class(self, num_classes: int) -> None:
        options: Any = {"num_classes": num_classes, "num_test": 400, "shortcut": 0.9}
        wrong, right = shapes(cue_agreement=0.8, **options), shapes(**options)
        shown = torch.tensor([wrong._shown(index, int(wrong.labels[index])) for index in range(400)])
        assert torch.equal(wrong.labels, right.labels)
        assert (shown == wrong.labels).float().mean() == pytest.approx(0.8, abs=0.06)
        assert len(shown[shown != wrong.labels].unique()) == num_classes
        for index in range(20):
            cue = int(shown[index])
            assert torch.equal(wrong[index]["image"], right.render(index, cue))
            assert torch.equal(wrong[index]["counterfactual"], right.render(index, (cue + 1) % num_classes))
            assert wrong[index]["label"] == right[index]["label"]
            assert wrong.mark_corner(index) == right.mark_corner(index)

    def test_they_are_unrelated_to_the_scene(self) -> None:
        data = shapes(cue_agreement=0.5, num_test=600, shortcut=0.5)
        wrong = torch.tensor([data._shown(index, 0) for index in range(600)]).float()
        corner = torch.tensor([data.mark_corner(index) for index in range(600)]).float()
        side = torch.tensor([float(data._scene(index, 0).across[0, 0]) for index in range(600)])
        for other in (corner, side, data.labels.float()):
            assert abs(float(torch.corrcoef(torch.stack([wrong, other]))[0, 1])) < 0.13


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"cue": "colour", "channels": 1}, "needs channels=3: choose cue='lesion' or 'texture'"),
            ({"cue": "shape"}, "cue must be one of lesion, colour, texture, got 'shape'"),
            ({"num_classes": 5}, "num_classes must be 2, 3 or 4, got 5"),
            ({"num_classes": 1}, "num_classes must be 2, 3 or 4, got 1"),
            ({"image_size": 27}, "28 to 256 pixels, got image_size=27"),
            ({"image_size": 257}, "28 to 256 pixels, got image_size=257"),
            ({"cue_size": 2.0}, "cue_size must be from 0.5 to 1.6, got 2.0"),
            ({"shortcut": 1.5}, "shortcut is a probability from 0 to 1, or null for no mark, got 1.5"),
            ({"cue_agreement": 1.01}, "cue_agreement is a probability from 0 to 1, got 1.01"),
            ({"lesion_place": "left"}, "lesion_place must be one of landmark, anywhere, got 'left'"),
            ({"num_val": 0}, "num_val must be at least 1, got 0"),
            ({"channels": 2}, r"channels must be 1 (grey) or 3 (RGB), got 2"),
        ],
    )
    def test_one_sentence(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            SyntheticShapes(**options)


class TestWriting:
    def test_files_lie_in_class_folders_and_hold_the_images(self, tmp_path: Path) -> None:
        data = SyntheticShapes(num_test=10)
        paths = data.write_folder("test", tmp_path / "in", count=4)
        names = [str(path.relative_to(tmp_path / "in")) for path in paths]
        assert names == [f"{('healthy', 'lesion')[i % 2]}/test_{i:06d}.png" for i in range(4)]
        assert sorted(paths) == sorted(path for path in (tmp_path / "in").rglob("*") if path.is_file())
        for index, path in enumerate(paths):
            assert (read_image(path, 3) - data.dataset("test")[index]["image"]).abs().max() <= 1 / 255 + 1e-6

    def test_without_a_count_the_whole_split_is_written(self, tmp_path: Path) -> None:
        assert len(SyntheticShapes(num_test=3).write_folder("test", tmp_path)) == 3
        assert len(SyntheticShapes(num_test=3).write_folder("test", tmp_path, count=9)) == 3


@pytest.mark.parametrize(
    ("cue", "channels", "place"), [("lesion", 3, "anywhere"), ("colour", 3, "landmark"), ("texture", 1, "landmark")]
)
def test_a_small_network_learns_every_cue_and_follows_the_counterfactual(cue: Any, channels: int, place: Any) -> None:
    torch.manual_seed(0)
    data = SyntheticShapes(
        cue=cue, channels=channels, lesion_place=place, batch_size=64, num_train=64 * 60, num_test=200
    )
    network = nn.Sequential(
        nn.Conv2d(channels, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 64, 64),
        nn.ReLU(),
        nn.Linear(64, 2),
    )

    # One pass.
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for batch in data.train_dataloader():
        optimiser.zero_grad()
        F.cross_entropy(network(batch["image"]), batch["label"]).backward()
        optimiser.step()

    # Images and counterfactuals.
    test = data.dataset("test")
    with torch.no_grad():
        predicted = network(stacked(test, "image", 200)).argmax(dim=1)
        changed = network(stacked(test, "counterfactual", 200)).argmax(dim=1)
    assert (predicted == test.labels).float().mean() > 0.97
    assert (changed == 1 - test.labels).float().mean() > 0.97
