from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from PIL import Image
from torch import Tensor

from cfe_lightning import images
from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.memory import BackOff
from cfe_lightning.explaining.folder import OutputFolder
from cfe_lightning.explaining.row import Row
from cfe_lightning.explaining.writer import ExplanationWriter
from cfe_lightning.explanation import Explanation

NAMES = ["a.png", "b/c.png", "B/C.png"]


def explanation(**changes: Any) -> Explanation:
    explainer = toy.FixedToyExplainer(toy.toy_classifier(3))
    made = explainer.explain(toy.toy_images(3, 3))
    fields = {name: getattr(made, name) for name in Explanation.__dataclass_fields__}
    return Explanation(**{**fields, **changes})


def with_counterfactual(image: Tensor, counterfactual: Tensor, target: Tensor, **changes: Any) -> Explanation:
    classifier = toy.toy_classifier(image.shape[0] if image.shape[0] > 1 else 2)
    return Explanation(
        image=image,
        logits=classifier(image),
        target=target,
        attribution=torch.ones_like(image[:, :1]),
        counterfactual=counterfactual,
        counterfactual_logits=classifier(counterfactual),
        **changes,
    )


def save(folder: Path, given: Explanation, names: list[str] = NAMES) -> list[Row]:
    classifier = toy.toy_classifier(given.logits.shape[1])
    writer = ExplanationWriter(OutputFolder(folder))
    return writer.save(given, classifier, names[: len(given)], [[1, 2]] * len(given), 0.5)


def test_a_row_holds_what_the_explanation_says(tmp_path: Path):
    given = explanation()
    rows = save(tmp_path, given)
    before, after = given.logits.softmax(dim=1), given.counterfactual_logits.softmax(dim=1)
    for index, row in enumerate(rows):
        predicted, target = int(given.predicted[index]), int(given.target[index])
        assert (row.name, row.status, row.source, row.seconds) == (NAMES[index], "ok", [1, 2], 0.5)
        assert (row.predicted, row.target) == (f"stripe {predicted}", f"stripe {target}")
        assert row.p_predicted_before == pytest.approx(float(before[index, predicted]), rel=1e-5)
        assert row.p_target_before == pytest.approx(float(before[index, target]), rel=1e-5)
        assert row.p_predicted_after == pytest.approx(float(after[index, predicted]), rel=1e-5)
        assert row.p_target_after == pytest.approx(float(after[index, target]), rel=1e-5)
        # Decisions and files.
        assert (row.flipped, row.flipped_saved, row.note) == (True, True, None)
        assert row.scores["change"] == pytest.approx(float(given.scores["change"][index]), rel=1e-5)
        saved = {path.name for path in (tmp_path / row.folder).iterdir()}
        assert saved == set(row.files.values())
    assert set(rows[0].files) == {
        *("image", "counterfactual", "difference", "attribution", "steps"),
        *("part_reconstruction", "part_agnostic", "part_distinct", "part_residual"),
    }


def test_the_judged_pixels_are_those_that_a_reader_of_the_file_sees(tmp_path: Path):
    given = explanation()
    rows = save(tmp_path, given)
    for index, row in enumerate(rows):
        path = tmp_path / row.folder / row.files["counterfactual"]
        assert torch.equal(images.read_image(path, channels=3), images.saved(given.counterfactual[index]))


def test_a_flip_below_one_grey_level_is_lost_when_saved(tmp_path: Path):
    # 102 of 255 is -0.2: the left stripe is ahead by a little, then behind by less than half a grey level.
    image = torch.full((1, 3, 16, 16), -0.2)
    image[..., :8] += 0.0001
    counterfactual = torch.full((1, 3, 16, 16), -0.2)
    counterfactual[..., 8:] += 0.001
    (row,) = save(tmp_path, with_counterfactual(image, counterfactual, torch.tensor([1])))
    assert (row.predicted, row.flipped, row.flipped_saved) == ("stripe 0", True, False)


def test_distance_is_the_mean_absolute_change_on_the_unit_range_and_sees_no_invisible_change(tmp_path: Path):
    # A quarter of the pixels changes by 0.5.
    image = torch.full((1, 3, 16, 16), -1.0)
    counterfactual = image.clone()
    counterfactual[..., :8, :8] = 0.0
    counterfactual[..., 8:, 8:] = -3.0
    (row,) = save(tmp_path, with_counterfactual(image, counterfactual, torch.tensor([1])))
    assert row.l1 == 0.125
    assert row.difference_scale == 0.5


def test_the_curve_is_what_the_classifier_says_about_the_saved_steps(tmp_path: Path):
    given = explanation()
    classifier = toy.toy_classifier(3)
    for index, row in enumerate(save(tmp_path, given)):
        strip = images.read_image(tmp_path / row.folder / "steps.png", channels=3)
        assert list(strip.shape) == [3, 16, 3 * 16]
        frames = torch.stack(strip.split(16, dim=2))
        p = classifier(frames).softmax(dim=1)
        assert row.curve["strength"] == [0.0, 0.5, 1.0]
        assert row.curve["predicted"] == pytest.approx(p[:, given.predicted[index]].tolist(), rel=1e-5)
        assert row.curve["target"] == pytest.approx(p[:, given.target[index]].tolist(), rel=1e-5)


def test_numbers_of_the_steps_stand_beside_the_curve(tmp_path: Path):
    given = explanation(step_scores={"l2_norm": torch.arange(9.0).view(3, 3) / 8})
    for index, row in enumerate(save(tmp_path, given)):
        assert row.curve["scores"] == {"l2_norm": [(3 * index + step) / 8 for step in range(3)]}
    assert "scores" not in save(tmp_path / "plain", explanation())[0].curve


def test_motion_is_drawn_and_its_longest_arrow_told(tmp_path: Path):
    motion = torch.zeros(3, 2, 16, 16)
    motion[1, 1, :, :8] = 2.5
    rows = save(tmp_path, explanation(motion=motion))
    assert [row.motion_scale for row in rows] == [0.0, 2.5, 0.0]
    still, moving, _ = (images.read_image(tmp_path / row.folder / row.files["motion"], 3) for row in rows)
    assert still.shape == moving.shape == (3, 160, 160)
    coloured = (moving.amax(dim=0) - moving.amin(dim=0)) > 0.5
    assert coloured[:, :80].any()
    assert not coloured[:, 100:].any()
    assert not ((still.amax(dim=0) - still.amin(dim=0)) > 0.5).any()
    (row, *_) = save(tmp_path / "none", explanation())
    assert row.motion_scale is None
    assert "motion" not in row.files


@pytest.mark.parametrize("form", ["gif", "webp"])
def test_an_animation_goes_there_and_back_without_end(tmp_path: Path, form: str):
    given = explanation()
    writer = ExplanationWriter(OutputFolder(tmp_path), animation=form)
    rows = writer.save(given, toy.toy_classifier(3), NAMES, [(0, 0)] * 3, 0.1)
    with Image.open(tmp_path / rows[0].folder / f"steps.{form}") as animation:
        assert animation.size == (16, 16)
        assert animation.n_frames == 4  # steps 1, 2, 3 and 2
        assert animation.info["loop"] == 0
        animation.seek(2)
        last = images.from_pil(animation.convert("RGB"), channels=3)
    assert given.steps is not None
    tolerance = 0.2 if form == "gif" else 0.005  # a GIF has 256 colours
    torch.testing.assert_close(last, given.steps[0, 2], atol=tolerance, rtol=0)


def test_an_animation_as_a_video_is_enlarged_and_even(tmp_path: Path):
    av = pytest.importorskip("av")
    steps = torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 15, 17)
    images.save_animation(steps, tmp_path / "steps.mp4", milliseconds=50)
    assert [path.name for path in tmp_path.iterdir()] == ["steps.mp4"]
    with av.open(str(tmp_path / "steps.mp4")) as video:
        assert video.streams.video[0].average_rate == 20
        frames = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(224, 254)] * 6
    means = [frame.mean() for frame in frames]
    assert means == pytest.approx([0, 85, 170, 255, 170, 85], abs=6)


def test_what_the_steps_were_meant_to_be_is_in_the_row(tmp_path: Path):
    intended = torch.randn(3, 3, 3)
    given = explanation(intended=intended)
    for index, row in enumerate(save(tmp_path, given)):
        p = intended.softmax(dim=2)[index]
        assert row.curve["intended_predicted"] == pytest.approx(p[:, given.predicted[index]].tolist(), rel=1e-5)
        assert row.curve["intended_target"] == pytest.approx(p[:, given.target[index]].tolist(), rel=1e-5)
    assert "intended_target" not in save(tmp_path, explanation())[0].curve


def test_differences_are_drawn_around_grey_and_amplified_by_the_gain_in_the_row(tmp_path: Path):
    image = torch.zeros(3, 3, 16, 16)
    distinct = torch.zeros_like(image)
    distinct[0, :, 0, 0] = -0.5  # amplified twofold to black
    distinct[1, :, 0, 0] = 1.5  # more than fits: shown as it is
    distinct[2, :, 0, 0] = 1e-5  # rounding error: not blown up to a picture
    given = with_counterfactual(
        image, image + 0.1, torch.tensor([1, 2, 1]), parts={"distinct": distinct, "other": distinct}
    )
    # Amplified, and around grey.
    rows = save(tmp_path, given)
    assert [row.gains["distinct"] for row in rows] == [2.0, 1.0, 64.0]
    shown = [images.read_image(tmp_path / row.folder / "part_distinct.png", channels=3) for row in rows]
    assert [round(float((picture[0, 0, 0] + 1) / 2 * 255)) for picture in shown] == [0, 255, 128]
    assert all(round(float((picture[0, 5, 5] + 1) / 2 * 255)) == 128 for picture in shown)
    other = images.read_image(tmp_path / rows[0].folder / "part_other.png", channels=3)
    assert round(float((other[0, 0, 0] + 1) / 2 * 255)) == 64
    assert "other" not in rows[0].gains


def test_what_was_measured_of_the_saved_change_is_in_the_row(tmp_path: Path):
    image = torch.full((1, 3, 18, 18), -1.0)
    image[..., :9] = -0.5
    counterfactual = image.clone()
    counterfactual[..., :6, 12:] = 1.0  # 36 of 324 pixels
    counterfactual[..., 12:, 12:] += 8 / 255  # four levels: seen by the sum, not by the eye
    (row,) = save(tmp_path, with_counterfactual(image, counterfactual, torch.tensor([1])))
    assert row.changed_area == pytest.approx(36 / 324, rel=1e-5)
    assert (row.where, row.where_share) == ("upper right", pytest.approx(255 / 259, rel=1e-5))
    assert (row.attribution_where, row.attribution_share) == ("spread over the picture", None)
    assert (row.flipped_saved, row.survives, row.lost_under) == (False, None, None)
    rows = save(tmp_path, explanation())
    for row in rows:
        assert row.flipped_saved
        assert row.survives == ["jpeg90", "blur1", "down_up"]
        assert row.lost_under == []


def test_an_image_that_is_the_target_already_has_nothing_to_flip(tmp_path: Path):
    given = toy.FixedToyExplainer(toy.toy_classifier(3)).explain(toy.toy_images(3, 3), torch.tensor([0, 0, 0]))
    same, other, _ = save(tmp_path, given)
    assert (same.flipped, same.flipped_saved) == (None, None)
    assert same.note == "already predicted as the target: nothing to flip"
    assert (tmp_path / same.folder / "counterfactual.png").is_file()
    assert (other.flipped, other.note) == (True, None)


def test_caveats_are_noted_for_the_images_that_they_hold_for(tmp_path: Path):
    given = toy.FixedToyExplainer(toy.toy_classifier(3)).explain(toy.toy_images(3, 3), torch.tensor([0, 0, 0]))
    given.caveats = {
        "it is blurred": torch.tensor([True, True, False]),
        "it is dark": torch.tensor([False, True, False]),
    }
    notes = [row.note for row in save(tmp_path, given)]
    assert notes == [
        "already predicted as the target: nothing to flip; it is blurred",
        "it is blurred; it is dark",
        None,
    ]


def test_attributions_alone_leave_counterfactual_cells_empty(tmp_path: Path):
    given = explanation(
        counterfactual=None, counterfactual_logits=None, steps=None, strengths=None, parts={}, scores={}
    )
    row = save(tmp_path, given)[0]
    assert set(row.files) == {"image", "attribution"}
    for key in ("p_predicted_after", "p_target_after", "flipped", "flipped_saved", "l1", "difference_scale"):
        assert getattr(row, key) is None
        assert key in vars(row)
    assert "curve" not in vars(row)


@pytest.mark.parametrize("spoilt", ["logits", "attribution", "counterfactual", "steps", "part", "score"])
def test_values_that_are_no_numbers_fail_their_image_only(tmp_path: Path, spoilt: str):
    given = explanation()
    places = {"part": given.parts["distinct"], "score": given.scores["change"]}
    place = places[spoilt] if spoilt in places else getattr(given, spoilt)
    place = place.clone()
    place[1] = torch.nan
    if spoilt == "part":
        given.parts["distinct"] = place
    elif spoilt == "score":
        given.scores["change"] = place
    else:
        setattr(given, spoilt, place)
    # The neighbours are fine.
    rows = save(tmp_path, given)
    assert [row.status for row in rows] == ["ok", "failed", "ok"]
    assert vars(rows[1]) == {
        "name": "b/c.png",
        "source": [1, 2],
        "status": "failed",
        "error": "The explanation holds values that are not finite.",
    }


class Limited(FrozenClassifier):
    """A classifier that has room for ``most`` images at a time; keeps the batch sizes of its calls."""

    most = 3

    def forward(self, image: Tensor) -> Tensor:
        self.asked.append(len(image))
        if len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(image)


def test_judging_backs_off_too_and_says_the_same(tmp_path: Path):
    given = toy.FixedToyExplainer(toy.toy_classifier(3)).explain(toy.toy_images(7, 3))
    names = [f"{index}.png" for index in range(7)]
    rows, back_off = save(tmp_path / "whole", given, names), BackOff()
    classifier = toy.toy_classifier(3)
    classifier.asked, classifier.__class__ = [], Limited
    writer = ExplanationWriter(OutputFolder(tmp_path / "parts"))
    parts = writer.save(given, classifier, names, [[1, 2]] * 7, 0.5, back_off=back_off)
    assert back_off.at_once == 2
    # In vain twice, then no more than fits.
    assert classifier.asked[:2] == [7, 4]
    assert max(classifier.asked[2:]) == 2
    assert parts == rows
    written = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.png/*.png")}
    assert len(written) == 7 * len(rows[0].files)
    for path in written:
        assert (tmp_path / "parts" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_one_image_that_cannot_be_judged_is_the_end(tmp_path: Path):
    classifier = toy.toy_classifier(3)
    classifier.asked, classifier.__class__, classifier.most = [], Limited, 0
    back_off = BackOff()
    writer = ExplanationWriter(OutputFolder(tmp_path))
    with pytest.raises(torch.OutOfMemoryError):
        writer.save(explanation(), classifier, NAMES, [[1, 2]] * 3, 0.5, back_off=back_off)
    assert back_off.at_once == 1
