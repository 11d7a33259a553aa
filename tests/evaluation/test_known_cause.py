"""Tests of the known-cause bench on maps and networks with known answers."""

from __future__ import annotations

import base64
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import spec_of
from torch import Tensor, nn

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.evaluation import known_cause
from cfe_lightning.evaluation.known_cause import VALUES, Bench, Cell, MarkUse, headline, image_auc, mark_use, measure
from cfe_lightning.evaluation.known_cause_page import save
from cfe_lightning.explanation import Explanation

NUMBER = 8


class ReadsPixel(nn.Module):
    """Decides for class 0 where the pixel (row, column) is brighter than mid grey."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__()
        self.place = row, column

    def forward(self, image: Tensor) -> Tensor:
        value = image[:, :, self.place[0], self.place[1]].mean(dim=1)
        return torch.stack([4 * value, -4 * value], dim=1)


def frozen(network: nn.Module) -> FrozenClassifier:
    spec = spec_of(head=None, class_names=("healthy", "lesion"), image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    return FrozenClassifier(network, spec)


class Paints:
    """Explains by changing the image, or only marking it, where a map [H, W] is positive."""

    def __init__(self, classifier: FrozenClassifier, where: Tensor, attribution_only: bool = False) -> None:
        self.classifier = classifier
        self.where = where
        self.attribution_only = attribution_only

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        logits = self.classifier(image)
        painted = (image - image.sign() * 0.1 * self.where).detach()
        return Explanation(
            image=image,
            logits=logits,
            target=1 - logits.argmax(dim=1),
            attribution=self.where.expand(len(image), 1, -1, -1).clone(),
            counterfactual=None if self.attribution_only else painted,
            counterfactual_logits=None if self.attribution_only else self.classifier(painted),
        )


@pytest.fixture
def batch() -> dict[str, Any]:
    """All known causes of the first test images."""
    data = SyntheticShapes(shortcut=0.5, num_test=NUMBER).dataset("test")
    samples = [data[index] for index in range(NUMBER)]
    keys = ("image", "mask", "mark", "counterfactual")
    return {key: torch.stack([s[key] for s in samples]) for key in keys} | {"label": data.labels}


@pytest.fixture
def moved() -> Tensor:
    data = SyntheticShapes(shortcut=0.5, num_test=NUMBER).dataset("test")
    return torch.stack([data.render(i, int(data.labels[i]), 1 - data.mark_corner(i)) for i in range(NUMBER)])


class TestCell:
    def test_the_random_corner_is_among_all(self) -> None:
        cells = [Cell(cue="lesion", cue_size=1.0, p=p) for p in (0.0, 0.5, 1.0)]
        assert [cell.shortcut() for cell in cells] == [0.5, 0.75, 1.0]
        assert cells[0].shortcut(num_classes=4) == 0.25
        assert cells[1].name == "lesion_1_p0.5"


class TestUse:
    cell = Cell(cue="lesion", cue_size=1.0, p=1.0)

    def test_a_classifier_blind_to_the_corners_has_none(self, batch: dict[str, Any], moved: Tensor) -> None:
        use = mark_use(self.cell, frozen(ReadsPixel(16, 16)), batch["image"], moved, batch["label"])
        assert use.probability.tolist() == [0.0] * NUMBER
        assert not use.decision.any()
        assert use.verdict == "blind"

    def test_one_that_reads_a_corner_changes_every_decision(self, batch: dict[str, Any], moved: Tensor) -> None:
        # The background is -0.72 to -0.45 and a mark 0.6, so the sign of a corner's pixel shows the mark.
        classifier = frozen(ReadsPixel(2, 2))
        use = mark_use(self.cell, classifier, batch["image"], moved, batch["label"])

        # Definition.
        before, after = classifier(batch["image"]).softmax(dim=1), classifier(moved).softmax(dim=1)
        decided = before.argmax(dim=1)
        expected = (before - after).abs()[torch.arange(NUMBER), decided]
        assert torch.allclose(use.probability, expected, atol=1e-6)
        assert use.probability.min() > 0.1
        assert use.verdict == "uses"
        assert torch.equal(use.decision, after.argmax(dim=1) != decided)
        assert torch.equal(use.correct, decided == batch["label"])

    @pytest.mark.parametrize(
        ("mean", "verdict"), [(0.1, "uses"), (0.099, "between"), (0.02, "between"), (0.019, "blind")]
    )
    def test_limits(self, mean: float, verdict: str) -> None:
        nothing = torch.zeros(4, dtype=torch.bool)
        probability = torch.full((4,), mean, dtype=torch.float64)
        assert MarkUse(cell=self.cell, probability=probability, decision=nothing, correct=nothing).verdict == verdict


class TestMeasure:
    @pytest.mark.parametrize("attribution_only", [False, True])
    def test_a_map_on_marks_alone_has_the_largest_alarm(self, batch: dict[str, Any], attribution_only: bool) -> None:
        explainer = Paints(frozen(ReadsPixel(16, 16)), batch["mark"][0, 0], attribution_only)
        _, values = measure(explainer, batch)
        assert list(values) == list(VALUES)
        # All of the change.
        assert torch.allclose(values["mark_share"], torch.ones(NUMBER))
        # Two squares of 3 x 3 in 32 x 32 pixels.
        assert torch.allclose(values["alarm"], torch.full((NUMBER,), 32 * 32 / 18))
        assert values["cue_share"].nan_to_num().max() == 0

    def test_an_even_map_has_the_alarm_of_chance(self, batch: dict[str, Any]) -> None:
        _, values = measure(Paints(frozen(ReadsPixel(16, 16)), torch.ones(32, 32), attribution_only=True), batch)
        assert torch.allclose(values["alarm"], torch.ones(NUMBER))
        assert torch.allclose(values["cue_share"], batch["mask"].mean(dim=(1, 2, 3)))
        assert values["truth_l1"].isnan().all()

    def test_no_change_is_undefined_and_not_finite_is_refused(self, batch: dict[str, Any]) -> None:
        # No change.
        classifier = frozen(ReadsPixel(16, 16))
        _, values = measure(Paints(classifier, torch.zeros(32, 32)), batch)
        assert values["alarm"].isnan().all()
        assert values["flip"].max() == 0

        # A map, and a counterfactual.
        with pytest.raises(ValueError, match="gave an explanation that is not finite"):
            measure(Paints(classifier, torch.full((32, 32), math.nan), attribution_only=True), batch)
        # The map of an infinite counterfactual would be finite: it is clamped to the range of images.
        with pytest.raises(ValueError, match="gave a counterfactual that is not finite"):
            measure(Paints(classifier, torch.full((32, 32), math.inf)), batch)

    def test_the_exact_counterfactual_is_at_distance_zero_where_the_decision_is_right(
        self, batch: dict[str, Any]
    ) -> None:
        class Exact(Paints):
            def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
                found = super().explain(image, target)
                found.counterfactual = batch["counterfactual"]
                return found

        explanation, values = measure(Exact(frozen(ReadsPixel(2, 2)), torch.zeros(32, 32)), batch)
        right = explanation.predicted == batch["label"]
        assert 0 < right.sum() < NUMBER
        assert values["truth_l1"][right].abs().max() == 0
        assert values["truth_l1"][~right].isnan().all()
        assert values["mark_share"].max() == 0


class TestAuc:
    def test_numbers_with_ties(self) -> None:
        # Pairs: 3>1, 3>2, 3=3, 2>1, 2=2, 2<3 -> 3 wins and 2 ties of 6.
        auc = known_cause.area_under_curve
        assert auc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(4 / 6)
        assert auc(torch.tensor([3.0, math.nan]), torch.tensor([1.0, math.nan])) == 1
        assert auc(torch.ones(3), torch.ones(2)) == 0.5
        assert math.isnan(auc(torch.tensor([math.nan]), torch.ones(2)))

    def test_images_of_cells_are_pooled(self) -> None:
        generator = torch.Generator().manual_seed(0)
        used = list(torch.rand(3, 20, generator=generator) + 0.3)
        blind = list(torch.rand(2, 20, generator=generator))
        used[0][3] = math.nan
        found = image_auc(used, blind)
        assert found.value == pytest.approx(known_cause.area_under_curve(torch.cat(used), torch.cat(blind)))
        assert (found.n_used, found.n_total) == (99, 100)
        assert found.low is not None
        assert found.high is not None
        assert found.low < (found.value or 0) < found.high
        assert image_auc(used, blind, seed=0) == found
        assert image_auc(used, blind, seed=1).low != found.low

    def test_one_kind_of_classifier_is_not_enough(self) -> None:
        assert image_auc([], [torch.ones(2)]).reason == "no classifier here uses the mark"
        assert image_auc([torch.ones(2)], []).reason == "no classifier here is blind to the mark"
        assert image_auc([torch.full((2,), math.nan)], [torch.ones(2)]).reason == "no explanation changes anything"
        assert known_cause.classifier_auc([torch.ones(2)], []).status == "undefined"

    def test_classifiers_are_compared_by_their_means(self) -> None:
        # Means 2 and 1 against 1: a win and a tie.
        used, blind = [torch.tensor([0.0, 4.0]), torch.tensor([1.0, math.nan])], [torch.tensor([1.0, 1.0])]
        found = known_cause.classifier_auc(used, blind)
        assert (found.value, found.n_used) == (0.75, 3)


def small_bench() -> Bench:
    """Returns a used cell, an unused one and one in between; ``right`` sees the mark, ``mute`` failed in one cell."""
    bench = Bench(explainers=["right", "mute"], num_cells=4)
    for p, use, alarm in ((0.0, 0.0, 1.0), (0.5, 0.05, 99.0), (1.0, 0.9, 5.0)):
        cell = Cell(cue="lesion", cue_size=1.0, p=p)
        change, flips = torch.full((4,), use), torch.full((4,), use > 0.5)
        bench.uses.append(MarkUse(cell=cell, probability=change, decision=flips, correct=torch.ones(4).bool()))
        values = {key: torch.full((4,), 0.25) for key in VALUES} | {"alarm": torch.arange(4.0) / 10 + alarm}
        bench.values[cell.name, "right"] = values
    bench.failures["lesion_1_p0", "mute"] = "it <b>broke</b>"
    return bench


class TestReport:
    def test_cells_in_between_count_in_neither_group(self) -> None:
        found = headline(small_bench(), "right")
        assert found["auc_images"].value == 1
        assert found["auc_lesion"].value == 1
        assert found["alarm_uses"].value == pytest.approx(5.15)
        assert found["alarm_blind"].value == pytest.approx(1.15)
        assert headline(small_bench(), "mute")["auc_images"].reason == "no classifier here uses the mark"

    def test_files(self, tmp_path: Path) -> None:
        # Names.
        save(small_bench(), tmp_path, {"seed": 3, "bench": "synthetic"}, tmp_path / "cells", 18 / 1024)
        names = ["known_cause.csv", "known_cause.html", "known_cause.json", "known_cause.md"]
        assert sorted(path.name for path in tmp_path.iterdir()) == names

        # Numbers.
        content = json.loads((tmp_path / "known_cause.json").read_text())
        assert [one["verdict"] for one in content["classifiers"]] == ["blind", "between", "uses"]
        assert content["explainers"]["right"]["auc_images"]["value"] == 1
        with (tmp_path / "known_cause.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        found = [(row["cell"], row["explainer"], row["n"]) for row in rows[:2]]
        assert found == [("lesion_1_p0", "right", "4"), ("lesion_1_p0", "mute", "0")]
        assert rows[1]["alarm"] == ""

        # Text and page.
        text = (tmp_path / "known_cause.md").read_text()
        assert "1 classifiers use the mark, 1 do not, 1 lie in between" in text
        page = (tmp_path / "known_cause.html").read_text()
        assert "it &lt;b&gt;broke&lt;/b&gt;" in page
        assert "<b>broke" not in page
        assert " style=" not in page, "the content policy forbids it"
        # A dot per image of the two groups.
        assert page.count("h0") == 8

    def test_no_picture_of_an_earlier_call_is_shown_for_what_failed_now(self, tmp_path: Path) -> None:
        place = tmp_path / "cells/lesion_1_p0"
        place.mkdir(parents=True)
        for name in ("truth", "right", "mute"):
            (place / f"{name}.png").write_bytes(name.encode())
        save(small_bench(), tmp_path, {"seed": 3, "bench": "synthetic"}, tmp_path / "cells", 18 / 1024)
        page = (tmp_path / "known_cause.html").read_text()
        shown = {name: base64.b64encode(name.encode()).decode() in page for name in ("truth", "right", "mute")}
        assert shown == {"truth": True, "right": True, "mute": False}
