"""Evaluation against plain loops, against a known truth, and what a table says about what it cannot measure."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import FAST, only, row_of, toy_batches, value
from torch import Tensor
from torch.utils.data import DataLoader
from toy import FixedToyExplainer, toy_classifier

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.networks import SimpleCnn
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.evaluation import tables as evaluation_table
from cfe_lightning.evaluation.comparison import at_equal_strength
from cfe_lightning.evaluation.evaluate import Evaluation, evaluate, sample_indices, unavailable
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.methods.baselines.captum import build_baseline
from cfe_lightning.metrics import path, realism
from cfe_lightning.metrics.case import Measures
from cfe_lightning.metrics.catalogue import METRICS
from cfe_lightning.metrics.similarity import cosine

KEYS = {metric.key for metric in METRICS}
PATH = {"mono", "rho", "regress", "crossing", "schedule", "smooth", "agree", "agent_kl"}
#: What a user has to ask for, or must have.
ASKED_FOR = {
    *("cycles", "diversity", "sanity", "lpips", "inception", "user", "face", "simsiam", "oracle", "table", "asked"),
    *("multi_label", "ranked", "cuda"),
}


class Truth:
    """Knows the exact counterfactual of every synthetic image and hides ``share`` of it."""

    def __init__(self, classifier: FrozenClassifier, batches: list[dict[str, Any]], share: float = 1.0) -> None:
        self.classifier = classifier
        self.answers = {
            self._key(image): other
            for batch in batches
            for image, other in zip(batch["image"], batch["counterfactual"], strict=True)
        }
        self.share = share

    @staticmethod
    def _key(image: Tensor) -> bytes:
        return image.numpy().tobytes()

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        return self.share * torch.stack([one - self.answers[self._key(one)] for one in image])

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        assert target is not None
        distinct = self.distinct(image, target)
        logits = self.classifier(image)
        return Explanation(
            image=image,
            logits=logits,
            target=target,
            attribution=distinct.abs().mean(dim=1, keepdim=True),
            counterfactual=image - distinct,
            counterfactual_logits=self.classifier(image - distinct),
            parts={
                "reconstruction": image * 0.9,
                "agnostic": image - distinct,
                "distinct": distinct,
                "residual": torch.zeros_like(image),
            },
        )


@pytest.fixture(scope="module")
def shapes() -> list[dict[str, Any]]:
    data = SyntheticShapes(image_size=28, num_test=12, cue="lesion")
    return list(DataLoader(data.dataset("test"), batch_size=4))


@pytest.fixture(scope="module")
def simple() -> FrozenClassifier:
    torch.manual_seed(0)
    spec = ClassifierSpec(
        class_path="",
        init_args={},
        head="fc",
        class_names=("healthy", "lesion"),
        image_size=28,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    return FrozenClassifier(SimpleCnn(2, image_size=28), spec)


# --- known truth ---


def test_every_metric_of_the_catalogue_is_measured_and_the_truth_scores_perfectly(
    shapes: list[dict[str, Any]], simple: FrozenClassifier
) -> None:
    row = row_of({"truth": Truth(simple, shapes)}, shapes, measures=Measures(second=simple, curve_steps=4))
    assert set(row.measurements) == KEYS
    # The parts of a decomposition are no path.
    off = PATH | {metric.key for metric in METRICS if set(metric.needs) & ASKED_FOR}
    assert {key for key, measured in row.measurements.items() if measured.status != "ok"} == off
    for key in ("correlation", "signed_cosine", "mask_mass_cf"):
        assert value(row, key) == pytest.approx(1, abs=2e-2), key
    # The mask holds what is visible, so a little of the difference lies outside.
    assert value(row, "mask_mass") > 0.98
    assert value(row, "leak") < 1e-3
    assert value(row, "l1_truth") == pytest.approx(0, abs=1e-6)
    assert value(row, "amplitude") == pytest.approx(value(row, "true_amplitude"))
    assert value(row, "mask_lift") > 5
    assert value(row, "mask_chance") == pytest.approx(float(torch.cat([b["mask"] for b in shapes]).mean()))
    assert row.measurements["l1_truth"].population == "correct"
    right = torch.cat([simple(batch["image"]).argmax(1) == batch["label"] for batch in shapes])
    assert row.measurements["l1_truth"].n_used == int(right.sum())
    assert value(row, "additivity") < 1e-6


def test_half_the_truth_keeps_the_place_and_halves_the_amplitude(
    shapes: list[dict[str, Any]], simple: FrozenClassifier
) -> None:
    row = row_of({"half": Truth(simple, shapes, share=0.5)}, shapes)
    assert value(row, "correlation") == pytest.approx(1, abs=1e-4)
    assert value(row, "amplitude") == pytest.approx(value(row, "true_amplitude") / 2)
    assert value(row, "l1_truth") == pytest.approx(value(row, "true_amplitude") / 2, rel=0.3)
    assert row.measurements["cout"].reason.startswith("switched off")


def test_target_is_the_class_of_the_exact_counterfactual_where_the_classifier_is_right() -> None:
    data = SyntheticShapes(image_size=28, num_test=9, cue="colour", num_classes=3)
    batches = list(DataLoader(data.dataset("test"), batch_size=9))
    torch.manual_seed(0)
    spec = ClassifierSpec(
        class_path="",
        init_args={},
        head="fc",
        class_names=data.class_names,
        image_size=28,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    classifier = FrozenClassifier(SimpleCnn(3, image_size=28), spec)
    asked: list[Tensor] = []

    class Listening(Truth):
        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            assert target is not None
            asked.append(target)
            return super().explain(image, target)

    evaluate({"truth": Listening(classifier, batches)}, batches, measures=FAST)
    logits, label = classifier(batches[0]["image"]), batches[0]["label"]
    for index in range(9):
        right = logits[index].argmax() == label[index]
        assert asked[0][index] == ((label[index] + 1) % 3 if right else logits[index].topk(2).indices[1])


# --- against plain loops ---


@pytest.mark.parametrize("num_classes", [2, 3])
def test_dxai_curves_equal_plain_loops_also_where_the_classifier_is_wrong(num_classes: int) -> None:
    classifier = toy_classifier(num_classes)
    explainer = FixedToyExplainer(classifier)
    batches = toy_batches(num_classes=num_classes, wrong=3)
    row = row_of({"toy": explainer}, batches)
    image, label = torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])
    clean = classifier(image).argmax(1)
    expected: dict[str, list[float]] = {"label": [], "prediction": [], "fidelity": []}
    for step in range(11):
        for mode, source, wanted in (("label", label, label), ("prediction", clean, label), ("fidelity", clean, clean)):
            moved = image - step / 10 * explainer.distinct(image, source)
            expected[mode].append(float((classifier(moved).argmax(1) == wanted).float().mean()))
    for mode, curve in expected.items():
        torch.testing.assert_close(row.curves[f"dxai_{mode}"], torch.tensor(curve))
        area = float(np.trapezoid(curve, dx=0.1))
        assert value(row, f"dxai_auc_{mode}") == pytest.approx(area / curve[0])
    assert expected["label"] != expected["prediction"]
    assert expected["fidelity"][0] == 1.0
    assert value(row, "dxai_auc_label_raw") == pytest.approx(float(np.trapezoid(expected["label"], dx=0.1)))
    for true in range(num_classes):
        moved = image[label == true] - 0.3 * explainer.distinct(image, label)[label == true]
        torch.testing.assert_close(
            row.curves["class_probability"][3, true], classifier(moved).softmax(1).mean(0), atol=1e-5, rtol=0
        )


def test_agnostic_numbers_equal_plain_loops() -> None:
    classifier = toy_classifier()
    explainer = FixedToyExplainer(classifier)
    batches = toy_batches(wrong=2)
    row = row_of({"toy": explainer}, batches)
    image, label = torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches])
    clean = classifier(image).argmax(1)
    p = classifier(image - explainer.distinct(image, clean)).softmax(1)
    kl = sum(0.5 * math.log(0.5 / float(q)) for q in p.flatten()) / len(p)
    # The toy's generated agnostic part is image - distinct itself.
    for what in ("removed", "agnostic"):
        assert value(row, f"kl_{what}") == pytest.approx(kl, rel=1e-4)
        assert value(row, f"max_p_{what}") == pytest.approx(float(p.amax(1).mean()))
        assert value(row, f"accuracy_{what}") == pytest.approx(float((p.argmax(1) == label).float().mean()))
        former = p.gather(1, clean[:, None]).mean()
        assert value(row, f"former_p_{what}") == pytest.approx(float(former))


def test_flips_and_closeness_of_the_toy() -> None:
    classifier = toy_classifier()
    explainer = FixedToyExplainer(classifier)
    batches = toy_batches()
    row = row_of({"toy": explainer}, batches, measures=Measures(curve_steps=4))
    image = torch.cat([b["image"] for b in batches])
    explanation = explainer.explain(image)
    assert explanation.counterfactual is not None
    assert value(row, "flip_rate") == 1.0
    assert row.measurements["flip_rate"].low == pytest.approx(0.7575, abs=1e-4)
    assert value(row, "flip_rate_any") == 1.0
    assert value(row, "l1") == pytest.approx(float((image - explanation.counterfactual).abs().mean() / 2))
    assert value(row, "psnr") == 100.0
    assert any("12 images are rendered exactly" in note for note in row.notes)
    assert value(row, "recon_flip") == 0.0
    assert value(row, "s_per_image_p95") >= value(row, "s_per_image") > 0
    assert row.curves["cout_target"].shape == (5,)
    assert float(row.curves["cout_target"][-1]) > 0.5


@pytest.mark.parametrize("batch_size", [1, 7, 12])
def test_numbers_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    classifier = toy_classifier(3)
    explainers: dict[str, Explainer] = {
        "toy": FixedToyExplainer(classifier),
        "random": build_baseline("random", classifier),
    }
    reference = evaluate(explainers, toy_batches(5, 3, wrong=2), measures=Measures(curve_steps=4, max_batch=7))
    other = evaluate(explainers, toy_batches(batch_size, 3, wrong=2), measures=Measures(curve_steps=4))
    for expected, found in zip(reference.rows, other.rows, strict=True):
        for key in KEYS - {"s_per_image", "s_per_image_p95"}:
            a, b = expected.measurements[key], found.measurements[key]
            assert (a.status, a.n_used, a.reason) == (b.status, b.n_used, b.reason), key
            if a.value is not None:
                assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), abs=1e-5), key


# --- who judges ---


class Mirrored(FrozenClassifier):
    """Decides for the other class."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).flip(1)


def test_judge_decides_everywhere() -> None:
    classifier = toy_classifier()
    judge = Mirrored(classifier.network, classifier.spec)
    row = row_of({"toy": FixedToyExplainer(classifier)}, toy_batches(), judge=judge)
    assert value(row, "flip_rate") == 0.0
    assert row.measurements["dxai_auc_label"].status == "undefined"
    assert "right on none of these images" in row.measurements["dxai_auc_label"].reason
    # Agreement with its own clean decision is still defined.
    assert value(row, "dxai_auc_fidelity") < 1


def test_a_flip_below_the_resolution_of_a_file_is_told() -> None:
    classifier = toy_classifier()

    class Whisper(FixedToyExplainer):
        """Moves each image to just beyond the decision boundary, by less than a grey level."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            grey = torch.full_like(image, 1 / 255)
            grey[..., :8] += torch.where(classifier(image).argmax(1) == 1, 1e-4, -1e-4).view(-1, 1, 1, 1)
            explanation = super().explain(image, target)
            explanation.counterfactual = grey
            return explanation

    row = row_of({"whisper": Whisper(classifier)}, toy_batches())
    assert value(row, "flip_rate") == 1.0
    assert value(row, "flip_rate_saved") == 0.0
    assert any("some flips live below the resolution of a file" in note for note in row.notes)


def test_a_flip_of_a_pixel_pattern_is_not_robust_and_the_least_counts() -> None:
    classifier = toy_classifier()

    class Brittle(FixedToyExplainer):
        """Flips by half a grey level more than the boundary, which JPEG and 8 bits round away or not."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            explanation = super().explain(image, target)
            grey = torch.full_like(image, -0.2)
            grey[..., :8] += torch.where(classifier(image).argmax(1) == 1, 1e-4, -1e-4).view(-1, 1, 1, 1)
            explanation.counterfactual = grey
            return explanation

    row = row_of({"brittle": Brittle(classifier)}, toy_batches())
    assert value(row, "flip_rate") == 1.0
    assert value(row, "robust_flip_quant8") == 0.0
    assert value(row, "robust_flip") == 0.0
    sturdy = row_of({"toy": FixedToyExplainer(classifier)}, toy_batches())
    names = ("quant8", "jpeg90", "blur1", "down_up")
    assert value(sturdy, "robust_flip") == min(value(sturdy, f"robust_flip_{name}") for name in names)
    assert value(sturdy, "robust_flip_quant8") == 1.0


def test_a_second_classifier_counts_where_it_agreed_before() -> None:
    classifier = toy_classifier()
    batches, explainer = toy_batches(), {"toy": FixedToyExplainer(classifier)}
    row = row_of(explainer, batches, measures=Measures(second=toy_classifier(), curve_steps=0))
    assert value(row, "transfer_flip") == 1.0
    assert row.measurements["transfer_flip"].n_used == 12
    # One that sees the opposite agrees on no image.
    other = row_of(
        explainer, batches, measures=Measures(second=Mirrored(classifier.network, classifier.spec), curve_steps=0)
    )
    assert other.measurements["transfer_flip"].status == "undefined"
    without = row_of(explainer, batches)
    assert without.measurements["transfer_flip"].reason == "no second classifier: give a file of one with --second"


def test_distances_of_features_equal_their_definitions() -> None:
    classifier = toy_classifier()
    explainer = FixedToyExplainer(classifier)
    batches = toy_batches()
    row = row_of({"toy": explainer}, batches, seed=3)
    image = torch.cat([b["image"] for b in batches])
    edited = explainer.explain(image).counterfactual
    assert edited is not None
    before, after = classifier.features(image), classifier.features(edited)
    assert value(row, "fid_f") == pytest.approx(realism.fid(before, after), rel=1e-4)
    assert value(row, "sim_f") == pytest.approx(float(cosine(before, after).mean()), abs=1e-5)
    found = row.measurements["sfid_f"]
    assert found.low is not None
    assert found.high is not None
    assert found.low <= value(row, "sfid_f") <= found.high
    assert value(row, "fid_f_floor") < value(row, "fid_f")
    # Its only maps are as large as the image: nothing that would see more than pixels.
    assert row.measurements["lpips_f"].reason == "the classifier has no layers that can be watched"
    still = row_of({"still": Still(classifier)}, batches)
    assert value(still, "fid_f") == pytest.approx(0, abs=1e-6)
    few = row_of({"toy": explainer}, toy_batches(3)[:1])
    assert few.measurements["fid_f"].reason == "fewer than 4 counterfactuals"


def test_the_classifiers_maps_tell_how_far_an_edit_is(shapes: list[dict[str, Any]], simple: FrozenClassifier) -> None:
    rows = evaluate({"truth": Truth(simple, shapes), "still": Still(simple)}, shapes, measures=FAST).rows
    found = {row.name: value(row, "lpips_f") for row in rows}
    assert found["truth"] > 0
    assert found["still"] == 0


def test_a_classifier_without_readable_layers_skips_what_needs_them() -> None:
    classifier = toy_classifier()
    closed = FrozenClassifier(classifier.network, replace(classifier.spec, head=None, feature_map=None))
    row = row_of({"toy": FixedToyExplainer(closed)}, toy_batches())
    for key in ("fid_f", "kid_f", "sim_f"):
        assert row.measurements[key].reason == "the classifier's features cannot be read"
    assert value(row, "flip_rate") == 1.0


def test_the_path_is_judged_frame_by_frame() -> None:
    classifier = toy_classifier()
    row = row_of({"walker": Walker(classifier)}, toy_batches())
    image = torch.cat([b["image"] for b in toy_batches()])
    explanation = Walker(classifier).explain(image)
    assert explanation.steps is not None
    said = torch.stack(
        [classifier(step).softmax(1)[torch.arange(12), explanation.target] for step in explanation.steps.unbind(1)], 1
    )
    k = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(12, -1)
    expected = {
        "mono": path.monotone(said),
        "rho": path.rank_correlation(k, said),
        "regress": path.regress(said),
        "crossing": path.crossing(k, said),
        "smooth": path.roughness(explanation.steps),
        "schedule": (said - 0.5).abs().mean(dim=1),
    }
    logits = torch.stack([classifier(step) for step in explanation.steps.unbind(1)], 1)
    assert explanation.intended is not None
    p, log_q = logits.softmax(2), explanation.intended.log_softmax(2)
    expected["agree"] = (logits.argmax(2) == explanation.intended.argmax(2)).float().mean(dim=1)
    expected["agent_kl"] = (p * (p.log() - log_q)).sum(2).mean(dim=1)
    assert set(expected) == PATH
    for key, values in expected.items():
        assert value(row, key) == pytest.approx(float(values.nanmean()), abs=1e-5), key


def test_at_equal_strength_everyone_stops_at_the_same_confidence(tmp_path: Path) -> None:
    classifier = toy_classifier()

    class Bold(Walker):
        """Goes on beyond the toy's counterfactual, in the same direction."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            made = super().explain(image, target)
            assert made.steps is not None
            made.steps = (image[:, None] + 1.5 * (made.steps - image[:, None])).clamp(-1, 1)
            made.counterfactual = made.steps[:, -1]
            return made

    explainers: dict[str, Explainer] = {
        "walker": Walker(classifier),
        "bold": Bold(classifier),
        "toy": FixedToyExplainer(classifier),
        "heat": HeatMapOnly(classifier),
    }
    result = evaluate(explainers, toy_batches(), measures=Measures(iso=(0.5, 0.9), curve_steps=0))
    rows = {row.name: row for row in result.rows}
    assert result.measures.iso == (0.5, 0.9)
    # As they are, the bold one looks farther; at the same confidence it is no farther than the other.
    assert value(rows["bold"], "l1") > 1.2 * value(rows["walker"], "l1")
    for level in ("0.5", "0.9"):
        assert value(rows["walker"], f"iso_{level}_reached") == value(rows["bold"], f"iso_{level}_reached") == 1.0
        ratio = value(rows["bold"], f"iso_{level}_l1") / value(rows["walker"], f"iso_{level}_l1")
        assert ratio == pytest.approx(1, abs=0.1)
        # Of a decomposition, whose steps lead elsewhere, the way is straight; here it is the walker's.
        straight = value(rows["toy"], f"iso_{level}_l1") / value(rows["walker"], f"iso_{level}_l1")
        assert straight == pytest.approx(1, abs=0.05)
    assert value(rows["walker"], "iso_0.9_l1") > value(rows["walker"], "iso_0.5_l1")
    assert rows["heat"].measurements["iso_0.5_l1"].reason == "this explainer makes no counterfactual image"
    evaluation_table.save(result, tmp_path, {})
    text = (tmp_path / "table.md").read_text()
    assert "## At equal confidence (0.9)" in text
    assert "on the 12 of 12 images that all of them can change so far" in text
    assert "each on its own images" not in text
    assert "`iso_0.5_l1`: l1 of the smallest edit with a probability of the target of at least 0.5" in text
    with (tmp_path / "table.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["iso_0.5_reached"]) == 1.0


def test_equal_strength_is_compared_on_what_all_can_reach() -> None:
    classifier = toy_classifier()

    class Timid(Walker):
        """Makes edits of every other image only."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            made = super().explain(image, target)
            assert made.steps is not None
            assert made.counterfactual is not None
            still = torch.arange(len(image)) % 2 == 0
            made.steps[still] = image[still, None]
            made.counterfactual = torch.where(still.view(-1, 1, 1, 1), image, made.counterfactual)
            return made

    explainers: dict[str, Explainer] = {"walker": Walker(classifier), "timid": Timid(classifier)}
    result = evaluate(explainers, toy_batches(12), measures=Measures(iso=(0.5,), curve_steps=0))
    rows = {row.name: row for row in result.rows}
    assert value(rows["timid"], "iso_0.5_reached") == 0.5
    count, found = at_equal_strength(result, 0.5)
    assert count == 6
    assert found["walker"]["l1"].n_used == found["timid"]["l1"].n_used == 6
    assert found["walker"]["l1"].value == pytest.approx(found["timid"]["l1"].value)
    assert rows["walker"].measurements["iso_0.5_l1"].n_used == 12
    titles = [table.title for table in evaluation_table.tables(result, [], [])]
    assert titles[:2] == ["At equal confidence (0.5)", "At equal confidence (0.5), each on its own images"]
    # Where one changes nothing there is no image in common, and the others are still shown.
    result.rows[1].per_image["iso_0.5_reached"][:] = False
    alone = evaluation_table.tables(result, [], [])[0]
    assert alone.title == "At equal confidence (0.5), each on its own images"
    assert "(n 12/12)" not in alone.lines[0][2]
    assert alone.lines[0][2]
    none = evaluate({"still": Still(classifier)}, toy_batches(), measures=Measures(iso=(0.5,), curve_steps=0))
    assert only(none.rows).measurements["iso_0.5_l1"].status != "ok"
    assert at_equal_strength(none, 0.5)[0] == 0


# --- what cannot be measured ---


class Walker(FixedToyExplainer):
    """Walks from the image to the toy's counterfactual in uneven steps, and means to be undecided all the way."""

    distinct = None  # type: ignore[assignment]

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        toy = FixedToyExplainer(self.classifier).explain(image, target)
        assert toy.counterfactual is not None
        strengths = torch.tensor([2.0, 3.0, 4.0, 6.0]).expand(len(image), -1)
        share = ((strengths - 2) / 4).view(len(image), 4, 1, 1, 1)
        return Explanation(
            image=image,
            logits=toy.logits,
            target=toy.target,
            attribution=toy.attribution,
            counterfactual=toy.counterfactual,
            counterfactual_logits=toy.counterfactual_logits,
            steps=image[:, None] + share * (toy.counterfactual - image)[:, None],
            strengths=strengths,
            intended=torch.zeros(len(image), 4, 2),
        )


class HeatMapOnly:
    """Neither parts nor counterfactual."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        self.classifier = classifier

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        logits = self.classifier(image)
        return Explanation(
            image=image,
            logits=logits,
            target=1 - logits.argmax(dim=1),
            attribution=image.abs().mean(dim=1, keepdim=True),
        )


class Still(HeatMapOnly):
    """Returns the image as its counterfactual."""

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        explanation = super().explain(image, target)
        explanation.counterfactual, explanation.counterfactual_logits = image, explanation.logits
        return explanation


def test_what_is_missing_is_skipped_with_its_reason() -> None:
    row = row_of({"heat": HeatMapOnly(toy_classifier())}, toy_batches(), measures=Measures(curve_steps=2))
    reasons = {key: measured.reason for key, measured in row.measurements.items() if measured.status == "skipped"}
    assert reasons["flip_rate"] == "this explainer makes no counterfactual image"
    assert reasons["dxai_auc_label"] == "this explainer does not split an image into parts"
    assert reasons["psnr"] == "this explainer does not render the image itself"
    assert reasons["mask_mass_attribution"] == "the data has no known mask: only synthetic data has"
    assert reasons["true_amplitude"] == "the data has no known counterfactual: only synthetic data has"
    assert {key for key in KEYS if key not in reasons} == {
        *("ins_auc", "del_auc", "s_per_image", "s_per_image_p95", "classifier_forwards", "classifier_backwards")
    }


def test_a_broken_explainer_is_named_and_spares_the_others() -> None:
    classifier = toy_classifier()

    class Broken(FixedToyExplainer):
        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            explanation = super().explain(image, target)
            explanation.parts["distinct"][-1] = math.nan
            return explanation

    explainers: dict[str, Explainer] = {"broken": Broken(classifier), "toy": FixedToyExplainer(classifier)}
    broken, fine = evaluate(explainers, toy_batches(), measures=FAST).rows
    assert {measured.status for measured in broken.measurements.values()} == {"undefined"}
    assert broken.measurements["l1"].reason == "gave a distinct that is not finite for image 'test/0004'"
    assert broken.measurements["l1"].n_total == 12
    assert value(fine, "flip_rate") == 1.0


def test_a_broken_distinct_part_is_seen_too() -> None:
    class Broken(FixedToyExplainer):
        def distinct(self, image: Tensor, source: Tensor) -> Tensor:
            return super().distinct(image, source) / (0 if self.asked_by_evaluation else 1)

        asked_by_evaluation = True

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            self.asked_by_evaluation = False
            explanation = super().explain(image, target)
            self.asked_by_evaluation = True
            return explanation

    row = row_of({"broken": Broken(toy_classifier())}, toy_batches())
    expected = "gave a distinct part that is not finite for image 'test/0000'"
    assert row.measurements["dxai_auc_label"].reason == expected


def test_nothing_to_evaluate_is_an_error() -> None:
    classifier = toy_classifier()
    with pytest.raises(ValueError, match="give at least one explainer"):
        evaluate({}, toy_batches())
    with pytest.raises(ValueError, match="no image to evaluate"):
        evaluate({"toy": FixedToyExplainer(classifier)}, [])
    with pytest.raises(ValueError, match=r"label 2, but the classifier knows 2 classes \(stripe 0, stripe 1\)"):
        evaluate({"toy": FixedToyExplainer(classifier)}, toy_batches(num_classes=3))


def test_sample_covers_the_whole_set_and_is_seeded() -> None:
    assert sample_indices(5, None) == sample_indices(5, 9) == [0, 1, 2, 3, 4]
    drawn = sample_indices(1000, 100, seed=3)
    assert drawn == sorted(set(drawn)) == sample_indices(1000, 100, seed=3)
    assert len(drawn) == 100
    assert drawn != sample_indices(1000, 100, seed=4)
    # Classes in order, or taking turns: each keeps about its share.
    assert 30 <= sum(index < 500 for index in drawn) <= 70
    assert 30 <= sum(index % 2 for index in drawn) <= 70


# --- tables ---


@pytest.fixture
def measured() -> Evaluation:
    classifier = toy_classifier()
    explainers: dict[str, Explainer] = {"toy": FixedToyExplainer(classifier), "heat": HeatMapOnly(classifier)}
    result = evaluate(explainers, toy_batches(), measures=Measures(curve_steps=2))
    result.rows.append(unavailable("lrp", "lrp has no rule for LeakyReLU", Measures()))
    return result


def test_undefined_is_no_number_anywhere(tmp_path: Path) -> None:
    result = evaluate({"still": Still(toy_classifier())}, toy_batches(), measures=Measures(curve_steps=2))
    row = only(result.rows)
    assert (value(row, "l1"), value(row, "flip_rate")) == (0.0, 0.0)
    for key in ("area90", "gini", "cout"):
        assert row.measurements[key].status == "undefined"
        assert row.measurements[key].reason == "not defined on any image"
    evaluation_table.save(result, tmp_path, {})
    for name in ("table.md", "table.csv", "per_image.csv", "metrics.json"):
        assert "nan" not in (tmp_path / name).read_text().lower(), name


def test_short_table_explains_its_columns(measured: Evaluation) -> None:
    table = evaluation_table.short_table(measured).markdown()
    heading, _, first, second, third, *_ = table.splitlines()
    titles = [cell.strip() for cell in heading.strip("|").split("|")]
    assert titles[0] == "explainer"
    assert "AUC label" in titles
    # A column without a single number is left out, and so is its explanation.
    assert "mask" not in titles
    cells = dict(zip(titles, (cell.strip() for cell in first.strip("|").split("|")), strict=True))
    assert cells["flip"] == "1.000"
    assert cells["l1"] == f"{value(measured.rows[0], 'l1'):.3f}"
    assert second.startswith("| heat ")
    assert dict(zip(titles, (cell.strip() for cell in second.strip("|").split("|")), strict=True))["flip"] == ""
    assert third.startswith("| lrp ")
    legend = [line for line in table.splitlines() if line.startswith("- ")]
    for metric in METRICS:
        if metric.title in titles:
            (line,) = (line for line in legend if line.startswith(f"- {metric.title} ("))
            assert metric.key in line
            assert metric.value_range in line
            assert {"higher": "higher is better", "lower": "lower is better", "neither": "context"}[
                metric.better
            ] in line
    assert "- note: lrp has no rule for LeakyReLU" in table
    assert "12 images" in table


def test_files_hold_the_numbers(measured: Evaluation, tmp_path: Path) -> None:
    evaluation_table.save(measured, tmp_path / "out", {"seed": 0})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("curves.npz", "differences.csv", "groups.csv"),
        *("metrics.json", "per_image.csv", "table.csv", "table.md"),
    ]
    toy = measured.rows[0]
    with (tmp_path / "out/table.csv").open(newline="") as stream:
        first, second, third = csv.DictReader(stream)
    assert first["explainer"] == "toy"
    assert float(first["l1"]) == value(toy, "l1")
    assert float(first["flip_rate_low"]) == pytest.approx(0.7575, abs=1e-4)
    assert first["l1_n"] == "12"
    assert (second["flip_rate"], second["flip_rate_n"], third["l1"]) == ("", "", "")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in metrics.json")

    content = json.loads((tmp_path / "out/metrics.json").read_text(), parse_constant=refuse)
    assert (content["seed"], content["n_images"]) == (0, 12)
    assert content["rows"][0]["metrics"]["l1"]["n_used"] == 12
    assert content["rows"][1]["metrics"]["l1"]["reason"] == "this explainer makes no counterfactual image"
    with (tmp_path / "out/per_image.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["image"] for line in lines if line["explainer"] == "toy"] == measured.image_names
    assert {line["flip_rate"] for line in lines if line["explainer"] == "toy"} == {"1"}
    assert {line["flip_rate"] for line in lines if line["explainer"] == "heat"} == {""}
    assert lines[1]["label"] == "stripe 1"
    curves = np.load(tmp_path / "out/curves.npz", allow_pickle=False)
    np.testing.assert_allclose(curves["toy/dxai_label"], toy.curves["dxai_label"])
    markdown = (tmp_path / "out/table.md").read_text()
    assert "- lrp: lrp has no rule for LeakyReLU" in markdown
    assert "[0.758, 1]" in markdown


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0.000"), (0.6543, "0.654"), (31.416, "31.4"), (100.0, "100"), (0.001234, "0.00123"), (4.5e-5, "4.5e-05")],
)
def test_numbers_are_readable(number: float, text: str) -> None:
    row = unavailable("a", "b", Measures())
    measured = Evaluation(rows=[row], image_names=["x"], labels=torch.zeros(1), class_names=("a", "b"))
    row.measurements["psnr"] = type(row.measurements["psnr"])(status="ok", value=number, n_used=1, n_total=1)
    assert f" {text} |" in evaluation_table.short_table(measured).markdown()
