import logging

import pytest
import torch
from classifiers import spec_of
from torch import nn
from torch.utils.data import DataLoader, Dataset

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.classifier.check import _near_chance, check_classifier

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Judge(nn.Module):
    """Turns any function of the prepared image into a network that counts its images."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.seen = 0

    def forward(self, image):
        self.seen += len(image)
        return self.logits(image)


def classifier_of(logits, class_names=("dark", "light"), size=8, mean=(0.5,) * 3, std=(0.5,) * 3, bgr=False):
    spec = spec_of(head=None, class_names=tuple(class_names), image_size=size, mean=mean, std=std, bgr=bgr)
    return FrozenClassifier(Judge(logits), spec)


def batches_of(image, label, batch_size=16):
    return [
        {"image": images, "label": labels}
        for images, labels in zip(image.split(batch_size), label.split(batch_size), strict=True)
    ]


def grey_levels(num_images=40, levels=(0.49, 0.51)):
    """Returns uniform images, the class of each being its grey level on the [0, 1] scale, and their labels."""
    label = torch.arange(num_images) % len(levels)
    level = torch.tensor(levels)[label]
    return (level * 2 - 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8), label


def lighter_than_middle(mean, std):
    """Returns a network as if trained with this mean and std: class 1 if the image is lighter than 0.5."""

    def logits(image):
        level = (image[:, 0] * std[0] + mean[0]).mean(dim=(1, 2))
        return torch.stack([torch.full_like(level, 0.5), level], dim=1)

    return logits


def answers(table):
    """Returns a network that answers ``table[i]`` for an image of the level i / len(table)."""

    def logits(image):
        index = (image[:, 0, 0, 0] * len(table)).round().long()
        return nn.functional.one_hot(torch.tensor(table)[index], max(table) + 1).float()

    return logits


def asked(labels, table, class_names):
    """Checks a network that answers ``table[i]`` for image i, which has the label ``labels[i]``."""
    level = torch.arange(len(table)) / len(table)
    image = (level * 2 - 1).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    classifier = classifier_of(answers(table), class_names, mean=(0.0,) * 3, std=(1.0,) * 3)
    return check_classifier(classifier, batches_of(image, torch.tensor(labels)), class_names)


def test_a_right_classifier_passes_with_the_share_of_right_answers():
    # 8 of 8 and 1 of 2 are right: the share is 0.9, though the mean over classes is 0.75.
    assert asked([0] * 8 + [1, 1], [0] * 8 + [1, 0], ("a", "b")) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("expected", "given", "words", "remedy"),
    [
        (IMAGENET, ((0.0,) * 3, (1.0,) * 3), "ImageNet's", r"mean: \[0.485, 0.456, 0.406\] and std: \[0.229, 0.224"),
        (((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3), r"\[-1, 1\]", r"mean: \[0.5, 0.5, 0.5\] and std"),
        (((0.0,) * 3, (1.0,) * 3), IMAGENET, r"\[0, 1\]", r"mean: \[0.0, 0.0, 0.0\] and std: \[1.0, 1.0, 1.0\]"),
        (((0.0,) * 3, (1 / 255,) * 3), IMAGENET, r"\[0, 255\]", r"mean: .* std: \[0.003922, 0.003922, 0.003922\]"),
    ],
)
def test_a_wrong_normalisation_is_named_with_the_right_one(expected, given, words, remedy):
    classifier = classifier_of(lighter_than_middle(*expected), mean=given[0], std=given[1])
    message = rf"is 0\.50 with the given mean, std and size, but 1\.00 with {words} mean and std: set {remedy}"
    with pytest.raises(ValueError, match=message):
        check_classifier(classifier, batches_of(*grey_levels()), ("dark", "light"))
    right = classifier_of(lighter_than_middle(*expected), mean=expected[0], std=expected[1])
    assert check_classifier(right, batches_of(*grey_levels()), ("dark", "light")) == 1.0


def test_a_wrong_normalisation_of_a_grey_classifier_is_found():
    classifier = classifier_of(lighter_than_middle((0.1307,), (0.3081,)), mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match=r"1\.00 with MNIST's mean and std: set mean: \[0.1307\] and std: \[0.3081\]"):
        check_classifier(classifier, batches_of(*grey_levels()), ("dark", "light"))


@pytest.mark.parametrize(("trained_bgr", "order"), [(True, "blue, green, red"), (False, "red, green, blue")])
def test_swapped_colours_are_found(trained_bgr, order):
    # Class 1 is more red than the middle; the blue channel knows nothing.
    label = torch.arange(64) % 2
    image = torch.zeros(64, 3, 8, 8)
    image[:, 0] = (label * 2 - 1).view(-1, 1, 1) * 0.5
    image[:, 2] = (torch.arange(64) // 2 % 2 * 2 - 1).view(-1, 1, 1) * 0.5
    red = 2 if trained_bgr else 0
    classifier = classifier_of(lambda x: torch.stack([-x[:, red, 0, 0], x[:, red, 0, 0]], 1), bgr=not trained_bgr)
    message = rf"is 0\.50 .* but 1\.00 with colours in the order {order}: set bgr: {str(trained_bgr).lower()}\.$"
    with pytest.raises(ValueError, match=message):
        check_classifier(classifier, batches_of(image, label), ("dark", "light"))


def halves():
    """Returns images that are bright in the upper half (class 0) or in the lower (class 1), and their labels."""
    label = torch.arange(20) % 2
    image = torch.full((20, 3, 16, 16), -0.5)
    for index, lower in enumerate(label.tolist()):
        image[index, :, slice(8, 16) if lower else slice(0, 8)] = 0.5
    return image, label


def test_a_wrong_size_is_found():
    # Trained at 64 pixels: it compares rows 0 to 31 with rows 32 to 63.
    def logits(image):
        lower = image[:, 0, 32:64].mean(dim=(1, 2)) - image[:, 0, :32].mean(dim=(1, 2))
        return torch.stack([-lower, lower], dim=1).nan_to_num()

    message = r"is 0\.50 with .* but 1\.00 at 64 x 64 pixels: set image_size: 64"
    with pytest.raises(ValueError, match=message):
        check_classifier(classifier_of(logits, size=32), batches_of(*halves()), ("dark", "light"))
    assert check_classifier(classifier_of(logits, size=64), batches_of(*halves()), ("dark", "light")) == 1.0


def test_a_network_of_one_size_is_not_asked_for_others():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    nn.init.zeros_(network[1].weight)
    with pytest.raises(ValueError, match=r"is 0\.50 \(chance is 0\.50\), and no usual normalisation, colour order"):
        check_classifier(classifier_of(network), batches_of(*grey_levels()), ("dark", "light"))


def test_a_constant_answer_is_chance_however_unequal_the_classes():
    # A share of 0.95 looks good; the mean over classes is 0.5.
    with pytest.raises(ValueError, match=r"is 0\.50 \(chance is 0\.50\)"):
        asked([0] * 95 + [1] * 5, [0] * 99 + [0], ("a", "b"))


def test_a_weak_classifier_passes_with_a_warning(caplog):
    table = [0] * 70 + [1] * 30 + [1] * 70 + [0] * 30
    with caplog.at_level(logging.WARNING):
        assert asked([0] * 100 + [1] * 100, table, ("a", "b")) == pytest.approx(0.7)
    assert "only 0.70 (chance 0.50)" in caplog.text


@pytest.mark.parametrize(
    ("right", "near"),
    # 100 images of each of two classes: 0.5 + 2.576 * sqrt(0.25 / 100 + 0.25 / 100) / 2 = 0.591
    [(50, True), (59, True), (60, False), (10, True)],
)
def test_near_chance_is_the_99_percent_interval(right, near):
    counts = torch.tensor([[right, 100 - right], [100 - right, right]], dtype=torch.float32)
    assert _near_chance(counts) is near


def test_two_swapped_outputs_are_named():
    message = (
        r"another order than its class_names say: 'cat' is its output 'dog', 'dog' is its output 'cat' "
        r"\(accuracy 0\.00 as named, 1\.00 in that order\)"
    )
    with pytest.raises(ValueError, match=message):
        asked([0] * 5 + [1] * 5, [1] * 5 + [0] * 5, ("cat", "dog"))


def test_two_swapped_of_ten_are_found_though_the_accuracy_is_high():
    names = [f"c{index}" for index in range(10)]
    labels = [index for index in range(10) for _ in range(4)]
    table = [{2: 7, 7: 2}.get(label, label) for label in labels]
    message = r"'c2' is its output 'c7', 'c7' is its output 'c2' \(accuracy 0\.80 as named, 1\.00 in that order\)"
    with pytest.raises(ValueError, match=message):
        asked(labels, table, names)


def test_a_swap_beside_a_weak_class_is_found():
    # The most frequent answers are 1, 0, 0: no order by themselves, but the best order is 1, 0, 2.
    labels = [0] * 20 + [1] * 20 + [2] * 20
    table = [1] * 20 + [0] * 20 + [0] * 11 + [2] * 9
    with pytest.raises(ValueError, match=r"'a' is its output 'b', 'b' is its output 'a' \(accuracy 0\.15 as named"):
        asked(labels, table, ("a", "b", "c"))


def test_a_class_that_moves_only_in_part_is_not_called_swapped(caplog):
    # The best order is 1, 0, 2, 3 with accuracy 0.86, but less than half of class 0 is answered 1.
    labels = [label for label in range(4) for _ in range(20)]
    table = [1] * 9 + [0] * 8 + [2] * 3 + [0] * 20 + [2] * 20 + [3] * 20
    with caplog.at_level(logging.WARNING):
        assert asked(labels, table, ("a", "b", "c", "d")) == pytest.approx(0.6)
    assert "only 0.60 (chance 0.25)" in caplog.text


def test_two_classes_at_chance_are_not_called_swapped():
    labels = [0] * 50 + [1] * 50
    table = [1] * 26 + [0] * 24 + [0] * 26 + [1] * 24
    with pytest.raises(ValueError, match="no usual normalisation"):
        asked(labels, table, ("a", "b"))


def test_names_in_another_order_stop():
    classifier = classifier_of(lighter_than_middle(*IMAGENET), ("light", "dark"))
    message = r"The data number the classes \['dark', 'light'\], the classifier \['light', 'dark'\]"
    with pytest.raises(ValueError, match=message):
        check_classifier(classifier, [], ("dark", "light"))


def test_other_names_stop():
    classifier = classifier_of(lighter_than_middle(*IMAGENET), [str(index) for index in range(1000)])
    message = r"data's classes are \['dark', 'light'\], the classifier's are \['0', .* '9', ... 1000 in all\]"
    with pytest.raises(ValueError, match=message):
        check_classifier(classifier, [], ("dark", "light"))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "There are no validation images"),
        ([{"image": torch.zeros(1, 3, 8, 8)}], "The validation images have no labels"),
        ([{"image": torch.zeros(1, 3, 8, 8), "label": torch.tensor([2])}], "labels reach 2, but there are 2 classes"),
    ],
)
def test_unusable_data_are_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        check_classifier(classifier_of(lighter_than_middle(*IMAGENET)), batches, ("dark", "light"))


class Sorted(Dataset):
    """Holds 1,200 images, first all of class 0 and then all of class 1."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 1200

    def __getitem__(self, index):
        self.read += 1
        return {"image": torch.zeros(3, 8, 8), "label": index // 600, "name": str(index)}


def test_a_sorted_set_is_sampled_everywhere_and_only_in_part():
    dataset = Sorted()
    classifier = classifier_of(lambda image: torch.tensor([[1.0, 0.0]]).expand(len(image), -1))
    with pytest.raises(ValueError, match=r"is 0\.50 \(chance is 0\.50\)"):
        check_classifier(classifier, DataLoader(dataset, batch_size=100), ("dark", "light"))
    # 500 images for the measurement, 150 again and for each of 12 scales and colour orders and 6 sizes.
    assert dataset.read <= 500 + 19 * 150


def test_nothing_changes_on_the_classifier():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    classifier = classifier_of(network)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    fingerprint = classifier.fingerprint()
    with pytest.raises(ValueError, match="accuracy"):
        check_classifier(classifier, batches_of(torch.zeros(20, 3, 8, 8), torch.arange(20) % 2), ("dark", "light"))
    assert classifier.fingerprint() == fingerprint
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not network._forward_hooks
