"""Tests of measurements on request: repeated questions, other networks, published populations, and resuming."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluated import FAST, row_of, toy_batches, value
from torch import Tensor
from torchvision.models import VisionTransformer
from toy import FixedToyExplainer, toy_classifier

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.counting import counted
from cfe_lightning.classifier.networks import SimpleCnn
from cfe_lightning.decisions import runner_up
from cfe_lightning.evaluation.evaluate import Evaluation, evaluate, evenly
from cfe_lightning.evaluation.gallery import Gallery
from cfe_lightning.evaluation.store import EvaluationStore
from cfe_lightning.explanation import Explainer, Explanation
from cfe_lightning.methods.baselines.captum import build_baseline
from cfe_lightning.metrics import realism
from cfe_lightning.metrics.case import Instruments, Measures
from cfe_lightning.metrics.repetition import forgetful, sensitivity
from cfe_lightning.metrics.similarity import cosine


def answer(image: Tensor, logits: Tensor, target: Tensor, edit: Tensor, after: Tensor) -> Explanation:
    change = (edit - image).abs().mean(dim=1, keepdim=True)
    edited = {"counterfactual": edit, "counterfactual_logits": after}
    return Explanation(image=image, logits=logits, target=target, attribution=change, **edited)


class Adds:
    """Adds ``step`` everywhere when asked for class 1, and takes it away for class 0; once more each time."""

    def __init__(self, classifier: FrozenClassifier, step: float = 0.02, noise: float = 0.0) -> None:
        self.classifier = classifier
        self.step = step
        self.noise = noise

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        logits = self.classifier(image)
        target = runner_up(logits) if target is None else target
        sign = (target * 2 - 1).view(-1, 1, 1, 1)
        edit = image + self.step * sign + self.noise * torch.randn(len(image), 1, 1, 1)
        return answer(image, logits, target, edit, self.classifier(edit))


def grey(classes: int = 2) -> list[dict[str, Any]]:
    """Toy images with half the contrast, so that what is added stays in range."""
    return [{**batch, "image": batch["image"] * 0.5} for batch in toy_batches(num_classes=classes)]


# --- asked again ---


def test_composition_adds_up_and_going_back_comes_back() -> None:
    row = row_of({"adds": Adds(toy_classifier())}, grey(), measures=Measures(curve_steps=0, cycles=True))
    # 0.02 on [-1, 1] is 0.01 on [0, 1].
    assert value(row, "composition_1") == pytest.approx(0.01, abs=1e-6)
    assert value(row, "composition_10") == pytest.approx(0.1, abs=1e-6)
    # It never flips, so there is no way back from a flip.
    assert row.measurements["reversibility"].status == "undefined"
    flips = row_of({"toy": FixedToyExplainer(toy_classifier())}, toy_batches())
    assert "switched off" in flips.measurements["composition_1"].reason
    toy = row_of({"toy": FixedToyExplainer(toy_classifier())}, grey(), measures=Measures(curve_steps=0, cycles=True))
    assert value(toy, "reversibility") == 1.0
    assert value(toy, "reversibility_l1") < 0.5


def test_diversity_is_the_distance_of_edits_with_other_random_numbers() -> None:
    def sigma(noise: float) -> float:
        explainer = Adds(toy_classifier(), noise=noise)
        measures = Measures(
            curve_steps=0, diversity=3, instruments=Instruments(lpips=lambda a, b: (a - b).abs().flatten(1).mean(dim=1))
        )
        return value(row_of({"adds": explainer}, grey(), measures=measures), "sigma_l")

    assert sigma(0.0) == 0.0
    # The mean distance of two normal numbers is 2 / sqrt(pi) of their deviation.
    assert sigma(0.05) == pytest.approx(0.05 * 1.128, rel=0.35)


def test_an_explanation_that_ignores_the_classifier_is_seen() -> None:
    torch.manual_seed(0)
    classifier = FrozenClassifier(
        SimpleCnn(2, image_size=16), replace(toy_classifier().spec, head="fc", feature_map=None)
    )
    explainers = {"random": build_baseline("random", classifier), "saliency": build_baseline("saliency", classifier)}
    measures = Measures(curve_steps=0, sanity=True)
    random, saliency = evaluate(explainers, toy_batches(), measures=measures).rows
    assert value(random, "sanity_head") == pytest.approx(0.0, abs=1e-6)
    assert value(random, "sanity_all") == pytest.approx(0.0, abs=1e-6)
    assert 0.1 < value(saliency, "sanity_all") < 1.9
    assert saliency.measurements["sanity_all"].n_used == 12


def test_a_network_that_cannot_forget_is_no_sane_one() -> None:
    row = row_of({"repaints": Repaints(labels())}, [label_batch()], measures=Measures(curve_steps=0, sanity=True))
    assert row.measurements["sanity_all"].reason == "the classifier has no layer that could forget what it learned"


def test_forgetting_everything_leaves_nothing_of_a_transformer() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(16, 8, 1, 2, 8, 16, num_classes=2)
    torch.nn.init.normal_(network.heads.head.weight)
    spec = replace(toy_classifier().spec, head="heads.head", feature_map=None)
    twin = forgetful(Adds(FrozenClassifier(network, spec)), "all")
    assert twin is not None
    new = dict(twin.classifier.network.named_parameters())
    same = [n for n, old in network.named_parameters() if old.ndim > 1 and torch.equal(old, new[n])]
    assert same == []


def test_forgetting_leaves_the_classifier_alone() -> None:
    classifier = toy_classifier()
    before = classifier.fingerprint()
    twin = forgetful(FixedToyExplainer(classifier), "head")
    assert twin is not None
    assert twin.classifier.fingerprint() != before == classifier.fingerprint()
    again = forgetful(FixedToyExplainer(classifier), "head")
    assert again is not None
    assert again.classifier.fingerprint() == twin.classifier.fingerprint()
    assert torch.equal(twin.classifier.network.mix.weight, classifier.network.mix.weight)
    every = forgetful(FixedToyExplainer(classifier), "all")
    assert every is not None
    assert not torch.equal(every.classifier.network.mix.weight, classifier.network.mix.weight)


def test_sensitivity_of_equal_opposite_and_constant_maps() -> None:
    one = torch.arange(16.0).view(1, 1, 4, 4)
    found = sensitivity(torch.cat([one, one, one]), torch.cat([one * 3 + 1, -one, torch.ones_like(one)]))
    torch.testing.assert_close(found[:2], torch.tensor([0.0, 2.0]))
    assert bool(found[2].isnan())


# --- cost ---


def test_calls_are_counted_in_images_also_of_copies() -> None:
    classifier = toy_classifier()
    image = toy_batches(12)[0]["image"]
    with counted() as calls:
        classifier(image)
        classifier.features(image[:3])
        classifier(image[:2].clone().requires_grad_()).sum().backward()
    assert (calls.forwards, calls.backwards) == (17, 2)
    rows = evaluate(
        {"adds": Adds(classifier), "integrated": build_baseline("integrated_gradients", classifier)},
        toy_batches(),
        measures=FAST,
    ).rows
    assert value(rows[0], "classifier_forwards") == 2.0
    assert value(rows[0], "classifier_backwards") == 0.0
    # One look at the image, then 50 steps of Captum on its copy.
    assert value(rows[1], "classifier_forwards") >= 51
    assert value(rows[1], "classifier_backwards") >= 50
    assert rows[0].measurements["peak_memory"].reason == "is measured on a GPU only"


# --- other networks and populations ---


class Labels(torch.nn.Module):
    """Three labels of an image: whether each third is bright."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack([third.flatten(1).mean(dim=1) for third in image.tensor_split(3, dim=3)], dim=1) * 10


def labels(label: str = "left") -> FrozenClassifier:
    spec = ClassifierSpec(
        class_path="",
        init_args={},
        head=None,
        class_names=("left", "middle", "right"),
        image_size=16,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        label=label,
    )
    return FrozenClassifier(Labels(), spec)


class Repaints:
    """Makes the whole image bright where "left" is asked for, and dark where it is not."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        self.classifier = classifier

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        logits = self.classifier(image)
        target = runner_up(logits) if target is None else target
        edit = torch.zeros_like(image) + ((target * 2 - 1) * 0.5).view(-1, 1, 1, 1)
        return answer(image, logits, target, edit, self.classifier(edit))


def label_batch() -> dict[str, Any]:
    """Four dark images; on two of them "right" is there already."""
    image = torch.full((4, 3, 16, 16), -0.5)
    image[:2, :, :, 11:] = 0.5
    return {"image": image, "label": torch.zeros(4, dtype=torch.int64), "name": list("abcd")}


def test_other_labels_that_go_along_are_counted_by_the_classifier_and_by_an_oracle() -> None:
    batch = label_batch()
    correlations = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    instruments = Instruments(oracle=labels(), correlations=correlations, asked=0)
    measures = Measures(curve_steps=0, instruments=instruments)
    row = row_of({"repaints": Repaints(labels())}, [batch], measures=measures)
    assert value(row, "flip_rate") == 1.0
    # "middle" goes along always, "right" on two of four.
    assert value(row, "collateral") == value(row, "mnac_others") == 1.5
    assert value(row, "mnac") == 2.5
    # Every image changes "left" and "middle", so their changes are constant: correlation 0.
    assert value(row, "cd") == pytest.approx(1.5)
    assert value(row, "cd_mean") == pytest.approx(0.5)
    without = Measures(curve_steps=0, instruments=Instruments(oracle=labels(), asked=0))
    row = row_of({"repaints": Repaints(labels())}, [batch], measures=without)
    assert value(row, "mnac_others") == 1.5
    assert row.measurements["cd"].reason.startswith("needs the data's labels")
    none = row_of({"repaints": Repaints(labels())}, [batch])
    assert none.measurements["mnac"].reason.startswith("needs a classifier of many labels: --weights oracle=FILE")
    assert value(none, "collateral") == 1.5


def test_features_of_other_networks_and_held_out_images() -> None:
    classifier = toy_classifier()
    batches = toy_batches()
    image = torch.cat([batch["image"] for batch in batches])

    def user(picture: Tensor) -> Tensor:
        return picture.flatten(2).mean(dim=2)

    measures = Measures(curve_steps=0, instruments=Instruments(user=user, face=user, simsiam=user))
    explainer = FixedToyExplainer(classifier)
    row = row_of({"toy": explainer}, batches, measures=measures)
    edit = explainer.explain(image).counterfactual
    assert edit is not None
    assert value(row, "fid_user") == pytest.approx(realism.fid(user(image), user(edit.clamp(-1, 1))), abs=1e-5)
    similar = cosine(user(image), user(edit.clamp(-1, 1)))
    assert value(row, "fs") == value(row, "s3") == pytest.approx(float(similar.mean()), abs=1e-5)
    assert value(row, "fva") == pytest.approx(float((similar > 0.5).float().mean()))
    held_out = [image[:5] * 0.5, image[5:] * 0.5]
    against = row_of({"toy": explainer}, batches, measures=measures, reference=held_out)
    assert value(against, "fid_user") == pytest.approx(
        realism.fid(user(image * 0.5), user(edit.clamp(-1, 1))), abs=1e-5
    )
    assert value(against, "sfid_user") == value(row, "sfid_user")
    # Fewer held-out images than edits: as many of these.
    few = row_of({"toy": explainer}, batches, measures=measures, reference=[image[:8]])
    assert few.measurements["fid_user"].n_used == 8
    assert few.measurements["sfid_user"].n_used == 12
    tiny = row_of({"toy": explainer}, batches, reference=[image[:5]])
    assert not tiny.notes[:-1]
    five = Measures(curve_steps=0, instruments=Instruments(user=lambda picture: picture[:, 0, 0, :7]))
    assert any(
        "fid_user is of 5 images in 7 dimensions" in note
        for note in row_of({"toy": explainer}, batches, measures=five, reference=[image[:5]]).notes
    )


def test_features_that_are_not_finite_end_it_with_the_networks_name() -> None:
    bad = Instruments(user=lambda picture: picture.flatten(2).mean(dim=2) * torch.inf)
    with pytest.raises(ValueError, match="The features of the network given as user are not finite"):
        evaluate({"adds": Adds(toy_classifier())}, grey(), measures=Measures(curve_steps=0, instruments=bad))


def test_small_images_are_said_to_be_enlarged_for_lpips() -> None:
    instruments = Instruments(lpips=lambda a, b: (a - b).abs().flatten(1).mean(dim=1))
    measures = Measures(curve_steps=0, instruments=instruments)
    row = row_of({"adds": Adds(toy_classifier())}, grey(), measures=measures)
    assert "adds: images of 16 pixels were enlarged to 64 for lpips" in row.notes


def test_published_populations_leave_out_what_did_not_flip_and_what_was_wrong() -> None:
    classifier = toy_classifier()
    batches = toy_batches(wrong=3)

    class Half(FixedToyExplainer):
        """Gives up on images whose class is 0."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            explanation = super().explain(image, target)
            assert explanation.counterfactual is not None
            explanation.counterfactual[explanation.predicted == 0] = image[explanation.predicted == 0]
            return explanation

    half: dict[str, Explainer] = {"half": Half(classifier)}
    ours = row_of(half, batches, measures=Measures(curve_steps=2))
    theirs = row_of(half, batches, measures=Measures(curve_steps=2, ace=True))
    assert value(ours, "flip_rate") == value(theirs, "flip_rate") == 0.5
    assert (ours.measurements["fid_f"].population, ours.measurements["fid_f"].n_used) == ("all", 12)
    assert (theirs.measurements["fid_f"].population, theirs.measurements["fid_f"].n_used) == ("flipped", 6)
    assert (theirs.measurements["cout"].population, theirs.measurements["cout"].n_total) == ("correct", 12)
    right = torch.cat([classifier(b["image"]).argmax(1) == b["label"] for b in batches])
    assert theirs.measurements["cout"].n_used <= int(right.sum()) < 12
    assert theirs.measurements["l1"].population == "all"
    # The curve is that of the number, and methods without edits have no flips to be chosen by.
    edge = float(theirs.curves["cout_target"][-1])
    assert edge != pytest.approx(float(ours.curves["cout_target"][-1]))
    heat: dict[str, Explainer] = {"saliency": build_baseline("saliency", classifier)}
    alone = row_of(heat, batches, measures=Measures(curve_steps=2, ace=True))
    assert alone.measurements["fid_f"].status == "skipped"


def test_the_published_target_of_a_wrong_decision_is_the_true_class() -> None:
    classifier = toy_classifier(3)
    batches = toy_batches(12, num_classes=3, wrong=4)
    row = row_of({"toy": FixedToyExplainer(classifier)}, batches, measures=Measures(curve_steps=0, ace=True))
    logits, label = classifier(batches[0]["image"]), batches[0]["label"]
    wrong = logits.argmax(1) != label
    assert int(wrong.sum()) >= 4
    assert row.target is not None
    assert torch.equal(row.target[wrong], label[wrong])
    assert torch.equal(row.target[~wrong], runner_up(logits)[~wrong])


# --- going on ---


class Killed(Exception):
    """Stands for a kill."""


def stopping(batches: list[dict[str, Any]], after: int) -> Any:
    yield from batches[:after]
    raise Killed


def explainers() -> dict[str, Explainer]:
    classifier = toy_classifier()
    return {
        "toy": FixedToyExplainer(classifier),
        "adds": Adds(classifier, noise=0.1),
        "shap": build_baseline("gradient_shap", classifier),
    }


def numbers(found: Evaluation) -> dict[tuple[str, str], Any]:
    return {
        (row.name, key): measured
        for row in found.rows
        for key, measured in row.measurements.items()
        if not key.startswith("s_per_image")
    }


def test_what_was_killed_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    batches = toy_batches(3)
    measures = Measures(curve_steps=2, iso=(0.5,), cycles=True, diversity=2)
    held_out = [torch.cat([batch["image"] for batch in batches]).flip(3) * 0.7]

    def run(given: Any, store: EvaluationStore | None) -> tuple[Evaluation, str]:
        gallery = Gallery()
        found = evaluate(
            explainers(),
            given,
            measures=measures,
            reference=held_out,
            store=store,
            gallery=gallery,
            shown=evenly(12, 5),
            seed=1,
        )
        page = gallery.write(tmp_path, found.class_names)
        assert page is not None
        return found, page.read_text(encoding="utf-8")

    expected, page = run(batches, None)
    with pytest.raises(Killed):
        run(stopping(batches, 2), EvaluationStore(tmp_path, "key"))
    store = EvaluationStore(tmp_path, "key")
    assert len(store) == 2
    (tmp_path / "unfinished/key/000002.part").write_bytes(b"torn")
    found, again = run(batches[2:], store)
    assert numbers(found) == numbers(expected)
    assert again == page
    assert found.image_names == expected.image_names
    assert torch.equal(found.labels, expected.labels)
    for one, other in zip(found.rows, expected.rows, strict=True):
        for name, curve in other.curves.items():
            assert torch.equal(one.curves[name], curve), name
    assert len(EvaluationStore(tmp_path, "another")) == 0
    assert len(EvaluationStore(tmp_path, "key")) == 4
    store.clear()
    assert not (tmp_path / "unfinished").exists()


def test_a_torn_batch_is_named(tmp_path: Path) -> None:
    store = EvaluationStore(tmp_path, "key")
    store.add({"names": ["a"]})
    (tmp_path / "unfinished/key/000000.pt").write_bytes(b"torn")
    with pytest.raises(
        ValueError, match=r"000000\.pt of an interrupted evaluation cannot be read .* delete the folder"
    ):
        list(EvaluationStore(tmp_path, "key").finished())


def test_a_broken_explainer_stays_broken_after_going_on(tmp_path: Path) -> None:
    class Broken(Adds):
        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            explanation = super().explain(image, target)
            assert explanation.counterfactual is not None
            explanation.counterfactual[0] = torch.nan
            return explanation

    batches = toy_batches(4)
    both: dict[str, Explainer] = {"broken": Broken(toy_classifier()), "adds": Adds(toy_classifier())}
    with pytest.raises(Killed):
        evaluate(both, stopping(batches, 1), measures=FAST, store=EvaluationStore(tmp_path, "key"))
    gallery = Gallery()
    found = evaluate(
        both, batches[1:], measures=FAST, store=EvaluationStore(tmp_path, "key"), gallery=gallery, shown=evenly(12, 3)
    )
    assert "is not finite for image" in found.rows[0].measurements["l1"].reason
    assert value(found.rows[1], "l1") > 0


@pytest.mark.parametrize("when", ["explain", "again"])
def test_an_explainer_that_fails_costs_nobody_elses_results(when: str) -> None:
    class Fails(Adds):
        asked = 0

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            self.asked += 1
            if when == "explain" or self.asked == 2:
                raise RuntimeError("mat1 and mat2\nshapes cannot be multiplied")
            return super().explain(image, target)

    both: dict[str, Explainer] = {"fails": Fails(toy_classifier()), "adds": Adds(toy_classifier())}
    found = evaluate(both, grey(), measures=Measures(curve_steps=0, cycles=True))
    reason = "fails with RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    assert found.rows[0].measurements["l1"].reason == reason
    assert found.agreeing == ("adds",)
    assert value(found.rows[1], "composition_10") == pytest.approx(0.1, abs=1e-6)


def test_what_is_kept_of_a_batch_grows_with_the_batch_alone(tmp_path: Path) -> None:
    batches = toy_batches(3)
    with pytest.raises(Killed):
        evaluate(explainers(), stopping(batches, 4), measures=FAST, store=EvaluationStore(tmp_path, "key"))
    # A kill after the last batch: nothing is left but to sum up.
    states = list(EvaluationStore(tmp_path, "key").finished())
    for state in states:
        tally = state["tallies"]["toy"]
        assert len(tally["seconds"]) == 1
        assert len(tally["columns"]["values"]["l1"]) == 3
        assert tally["class_sums"].shape[1] == len(tally["labels"]) <= 2


def test_images_are_spread_over_all() -> None:
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(7, 0) == []


# --- agreement ---


def test_explainers_that_point_at_the_same_places_agree() -> None:
    classifier = toy_classifier()

    class Points(Adds):
        """Changes the left half more than the right one, or the other way round."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            explanation = super().explain(image, target)
            assert explanation.counterfactual is not None
            ramp = torch.linspace(self.step, -self.step, image.shape[-1])
            explanation.counterfactual[:] = (image + 0.1 + ramp).clamp(-1, 1)
            return explanation

    three: dict[str, Explainer] = {
        "left": Points(classifier, 0.02),
        "also left": Points(classifier, 0.05),
        "right": Points(classifier, -0.02),
    }
    found = evaluate(three, grey(), measures=FAST)
    assert found.agreeing == ("left", "also left", "right")
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])
    torch.testing.assert_close(found.agreement, expected, atol=0.01, rtol=0)


def test_seconds_are_of_explaining_alone_and_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("cfe_lightning.compute.clock.time.perf_counter", lambda: clock[0])

    class Slow(Adds):
        """Takes 0.01 s per image, and 1 s per image of the first batch."""

        def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
            clock[0] += 0.01 * len(image) if clock[0] else 1.0 * len(image)
            return super().explain(image, target)

    row = row_of({"slow": Slow(toy_classifier())}, toy_batches(2))
    # The first two batches warm up.
    assert value(row, "s_per_image") == value(row, "s_per_image_p95") == pytest.approx(0.01)
    few = row_of({"slow": Slow(toy_classifier())}, toy_batches(6))
    assert value(few, "s_per_image_p95") == pytest.approx(0.01)
