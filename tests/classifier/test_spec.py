import pytest
from classifiers import spec_of

from cfe_lightning.classifier import ClassifierSpec


def test_a_spec_written_before_its_newer_fields_is_read():
    data = spec_of().to_dict()
    for newer in ("feature_map_transform", "bgr", "label", "feature_map"):
        del data[newer]
    data["class_names"] = list(data["class_names"])
    assert ClassifierSpec.from_dict(data) == spec_of()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("a",)}, r"needs one name per logit and at least two, got \['a'\]"),
        ({"class_names": ("a", "a", "b")}, "must differ from each other, but repeat 'a': write each"),
        ({"label": "d"}, r"label 'd' is not one of the class names \['a', 'b', 'c'\]"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"mean": (0.5, 0.5)}, r"one number per channel .* got mean \[0.5, 0.5\]"),
        ({"std": (0.5,)}, r"one number per channel .* std \[0.5\]"),
        ({"std": (0.5, 0.0, 0.5)}, "positive std"),
        ({"mean": (0.5,), "std": (0.5,), "bgr": True}, "bgr is for networks that take three channels"),
    ],
)
def test_a_contradictory_spec_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(**changes)
