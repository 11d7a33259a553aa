"""Tests of ``cfe_lightning.methods.dxai``: blending, losses, separation of the steps, determinism."""

import copy
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from cases import DXAI
from torch.nn import functional as F
from toy import ToyData, toy_classifier, toy_images, toy_trainer

from cfe_lightning.decisions import kl_from_uniform
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.dxai.blending import blend, branch_orthogonality, distance, masked_distance, neutral_strength
from cfe_lightning.methods.dxai.method import SWEEP
from cfe_lightning.methods.dxai.training import Slice
from cfe_lightning.training import EMA


def tiny(num_classes=3, channels=3, **changes) -> Dxai:
    torch.manual_seed(0)
    return Dxai(toy_classifier(num_classes, channels=channels), **{**DXAI, **changes})


def drawn_for(model: Dxai, num_images: int = 4) -> Slice:
    """Draws a batch whose own and alternative classes are known."""
    label, alternative = torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]])[:, :num_images]
    return replace(model._draw({"image": toy_images(num_images, 3), "label": label}), alternative=alternative)


def trained_in_steps(model: Dxai, batches: int = 2) -> tuple[list[dict[str, float]], Dxai]:
    """Runs real training steps and returns what they logged."""
    logged: list[dict[str, float]] = []
    keep = lambda terms, **_: logged.append({k: v.item() for k, v in terms.items()})  # noqa: E731
    model.log_dict = lambda terms, **_: "train/generator" in terms and keep(terms)  # type: ignore[method-assign]
    trainer = toy_trainer(Path(), limit_train_batches=batches, limit_val_batches=1, inference_mode=True)
    trainer.fit(model, ToyData(num_classes=model.classifier.num_classes, channels=model.channels))
    return logged, model


def branch_images(batch=4, branches=3):
    torch.manual_seed(1)
    return torch.randn(batch, branches, 3, 8, 8), torch.randn(batch, branches, 3, 8, 8)


# Decomposition


def test_parts_sum_to_the_image_and_to_the_reconstruction():
    model, image = tiny().eval(), toy_images(4, 3)
    parts = model.explain(image).parts
    torch.testing.assert_close(parts["agnostic"] + parts["distinct"] + parts["residual"], image, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts["agnostic"] + parts["distinct"], parts["reconstruction"], atol=1e-5, rtol=0)


def test_sweep_removes_the_distinct_part_without_clamping():
    model, image = tiny().eval(), toy_images(4, 3)
    explanation = model.explain(image)
    assert explanation.strengths[0].tolist() == pytest.approx(SWEEP)
    torch.testing.assert_close(explanation.steps[:, 0], image)
    torch.testing.assert_close(explanation.steps[:, -1], image - explanation.parts["distinct"])


def test_target_is_respected_and_its_own_class_changes_nothing():
    model, image = tiny().eval(), toy_images(3, 3)
    explanation = model.explain(image, torch.tensor([2, 2, 2]))
    assert explanation.target.tolist() == [2, 2, 2]
    own = model.explain(image, explanation.predicted)
    torch.testing.assert_close(own.counterfactual, image, atol=1e-6, rtol=0)


def test_distinct_for_the_predicted_class_is_the_explanation_s():
    model, image = tiny().eval(), toy_images(4, 3)
    explanation = model.explain(image)
    torch.testing.assert_close(model.distinct(image, explanation.predicted), explanation.parts["distinct"])


def test_explanations_are_deterministic_and_independent_of_the_batch():
    model, image = tiny().eval(), toy_images(6, 3)
    whole = model.explain(image)
    again = model.explain(image)
    assert torch.equal(whole.counterfactual, again.counterfactual)
    single = torch.cat([model.explain(image[i : i + 1]).parts["distinct"] for i in range(6)])
    torch.testing.assert_close(single, whole.parts["distinct"], atol=1e-4, rtol=0)


def test_cached_styles_follow_the_weights():
    model = tiny().eval()
    before = model.mean_styles().clone()
    model.train()
    with torch.no_grad():
        model.mapping.towers[-1].bias.add_(1)
    model.eval()
    torch.testing.assert_close(model.mean_styles(), before + 1)


def test_cached_styles_are_exact_whatever_was_asked_for_first():
    model, image = tiny().eval(), toy_images(4, 3)
    exact = model.mean_styles().clone()
    model.eval()  # forgets them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.explain(image)
    assert torch.equal(model.mean_styles(), exact)
    model.explain(image)


@pytest.mark.parametrize("training", [True, False])
def test_styles_of_a_validation_do_not_outlive_its_weights(training, tmp_path):
    model = tiny(mapping_learning_rate=0.1).train(training)
    # The last epoch, which no validation follows, moves the average on.
    trainer = toy_trainer(tmp_path, [EMA(0.9)], max_epochs=3, check_val_every_n_epoch=2)
    trainer.fit(model, ToyData(num_classes=3))
    after = model.mean_styles().clone()
    torch.testing.assert_close(after, model.eval().mean_styles(), rtol=0, atol=0)


def test_few_images_at_a_time_are_judged_for_the_neutral_strength(monkeypatch):
    classifier, image, judged = toy_classifier(2), toy_images(16, 2), []
    forward = classifier.forward
    monkeypatch.setattr(classifier, "forward", lambda images: judged.append(len(images)) or forward(images))
    neutral_strength(classifier, image, image - image.flip(-1))
    assert max(judged) <= 128 < 16 * 21
    assert sum(judged) == 16 * (21 + 11 + 11)


def test_neutral_strength_finds_where_a_known_classifier_is_undecided():
    classifier, image = toy_classifier(2), toy_images(4, 2)
    # Class k is the brighter half; moving brightness from one half to the other crosses the boundary in between.
    other = image.flip(-1)
    expected = torch.tensor([0.25, 0.5, 1.25, 1.9])
    distinct = (image - other) / (2 * expected).view(4, 1, 1, 1)
    torch.testing.assert_close(neutral_strength(classifier, image, distinct), expected, atol=4e-3, rtol=0)


def test_neutral_strength_leaves_no_decision_and_parts_that_sum_to_the_image():
    model, image = tiny(num_classes=2, strength="neutral").eval(), toy_images(4, 2)
    with torch.no_grad():
        model.generator.head.weight.mul_(3)
    explanation = model.explain(image)
    parts = explanation.parts
    torch.testing.assert_close(parts["agnostic"] + parts["distinct"] + parts["residual"], image, atol=1e-5, rtol=0)
    # The full strength never leaves the classifier less decided.
    full = tiny(num_classes=2).eval()
    full.load_state_dict(model.state_dict())
    whole = full.explain(image).parts
    for neutral, removed in (
        (image - parts["distinct"], image - whole["distinct"]),
        (parts["agnostic"], whole["agnostic"]),
    ):
        undecided = kl_from_uniform(model.classifier(neutral))
        assert (undecided <= kl_from_uniform(model.classifier(removed)) + 1e-6).all()
        assert undecided.mean() < kl_from_uniform(model.classifier(removed)).mean()
    torch.testing.assert_close(model.distinct(image, explanation.predicted), parts["distinct"], atol=1e-4, rtol=0)


def test_a_counterfactual_that_stops_short_of_its_target_goes_the_whole_way(monkeypatch):
    model, image = tiny(num_classes=2, strength="neutral").eval(), toy_images(4, 2)
    distinct, other = image - image.flip(-1), (image.flip(-1) - image) * torch.tensor([1.0, 0, 1, 0]).view(4, 1, 1, 1)
    empty = torch.zeros_like(image)
    branches = torch.cat([torch.stack([x, empty, empty], dim=1) for x in (distinct, other)])
    monkeypatch.setattr(model.generator, "decode", lambda *_: branches)
    monkeypatch.setattr(model, "_share", lambda *_: torch.full((4, 1, 1, 1), 0.4))
    explanation = model.explain(image)
    assert explanation.flipped.all()
    torch.testing.assert_close(explanation.counterfactual[0], (image - 0.4 * distinct + 0.4 * other)[0].clamp(-1, 1))
    torch.testing.assert_close(explanation.counterfactual[1], image.flip(-1)[1])


# Blending


def test_alpha_one_mixes_nothing():
    own, other = branch_images()
    mixed = blend(own, other, torch.ones(4, 2, 1, 1, 1))
    torch.testing.assert_close(mixed.own, own.sum(dim=1))
    torch.testing.assert_close(mixed.alternative, other[:, 1:].sum(dim=1))


def test_alpha_zero_swaps_the_agnostic_branches():
    own, other = branch_images()
    mixed = blend(own, other, torch.zeros(4, 2, 1, 1, 1))
    torch.testing.assert_close(mixed.alternative, own[:, 1:].sum(dim=1))
    torch.testing.assert_close(mixed.own, own[:, 0] + other[:, 1:].sum(dim=1))


def test_the_sum_of_both_renderings_does_not_depend_on_alpha():
    own, other = branch_images()
    sums = [m.own + m.alternative for m in (blend(own, other, torch.rand(4, 2, 1, 1, 1)) for _ in range(2))]
    torch.testing.assert_close(sums[0], sums[1])


def test_equal_agnostic_branches_leave_the_distinct_part_as_the_only_difference():
    own, other = branch_images()
    other[:, 1:] = own[:, 1:]
    mixed = blend(own, other, torch.rand(4, 2, 1, 1, 1))
    torch.testing.assert_close(mixed.own - mixed.alternative, own[:, 0])


def test_alpha_is_drawn_per_sample_and_branch_and_constant_over_pixels(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "cfe_lightning.methods.dxai.method.blend", lambda a, b, alpha: drawn.append(alpha) or blend(a, b, alpha)
    )
    model = tiny()
    model._render(drawn_for(model))
    assert drawn[0].shape == (4, 2, 1, 1, 1)
    assert drawn[0].unique().numel() == 8


# Gradients


def test_the_alternative_rendering_never_uses_branch_zero():
    model = tiny()
    rendered = model._render(drawn_for(model))
    rendered.alternative.square().sum().backward()
    for name, parameter in model.generator.named_parameters():
        rows = parameter.grad.unflatten(0, (2 if ".affine." in name else 1, 3, -1))
        assert rows[:, 0].abs().max() == 0, name
    assert model.generator.head.weight.grad.abs().max() > 0


def test_classifier_stays_bit_identical_without_gradients_but_lets_them_through():
    model = tiny()
    before = copy.deepcopy(model.classifier.state_dict())
    trained_in_steps(model)
    after = model.classifier.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and not p.requires_grad for p in model.classifier.parameters())
    assert not any(module.training for module in model.classifier.modules())
    rendered = model._render(drawn_for(model))
    F.cross_entropy(model.classifier(rendered.own), torch.tensor([0, 1, 2, 0])).backward()
    assert model.generator.head.weight.grad.abs().max() > 0


def test_each_step_changes_only_its_own_networks():
    model = tiny()
    images = drawn_for(model)
    rendered = model._render(images)
    model.__dict__["_trainer"] = None

    # Critic step.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dxai, "global_step", 0)
        critic = model._critic_loss(images, rendered)["critic"]
    critic.backward()
    assert all(p.grad is None for p in [*model.generator.parameters(), *model.mapping.parameters()])
    assert all(p.grad is not None for p in model.critic.parameters())

    # Generator step.
    model.zero_grad(set_to_none=True)
    model.critic.requires_grad_(False)
    model._generator_loss(images, rendered)["generator"].backward()
    assert all(p.grad is None for p in model.critic.parameters())
    assert all(p.grad is not None for p in model.mapping.parameters())


def test_one_pass_gives_the_losses_of_the_two_pass_order():
    model = tiny()
    losses = []
    for passes in (1, 2):
        torch.manual_seed(3)
        images = drawn_for(model)
        first = model._render(images)
        second = model._render(images) if passes == 2 else first
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dxai, "global_step", 0)
            critic = model._critic_loss(images, first)["critic"]
        losses.append((critic.item(), model._generator_loss(images, second)["generator"].item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Refused arguments


def test_one_branch_is_refused():
    with pytest.raises(ValueError, match="num_branches must be at least 2"):
        tiny(num_branches=1)


# Losses


def test_distance_is_mean_square_plus_mean_absolute():
    assert distance(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)).item() == pytest.approx(0.75)


def test_masked_distance_on_selected_pixels_only():
    image = torch.zeros(1, 1, 2, 2)
    distinct = torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]], requires_grad=True)
    rendering = torch.tensor([[[[9.0, 9.0], [9.0, 0.5]]]], requires_grad=True)
    loss = masked_distance(distinct, rendering, image)
    assert loss.item() == pytest.approx(0.75)
    loss.backward()
    assert distinct.grad is None
    assert rendering.grad.flatten().tolist()[:3] == [0, 0, 0]


def test_masked_distance_edge_cases():
    image = torch.rand(2, 3, 4, 4)
    assert masked_distance(torch.randn(2, 3, 4, 4), image, image).item() == 0
    assert masked_distance(torch.ones(2, 3, 4, 4), image + 1, image).item() == 0


def test_orthogonality_is_zero_for_orthogonal_branches_and_one_for_equal_ones():
    wave = torch.linspace(0, 2 * torch.pi, 65)[:64]
    sine, cosine = wave.sin().view(1, 1, 8, 8), wave.cos().view(1, 1, 8, 8)
    assert branch_orthogonality([torch.cat([sine, cosine], dim=1)], 2).item() == pytest.approx(0, abs=1e-6)
    assert branch_orthogonality([torch.cat([sine, 2 * sine], dim=1)], 2).item() == pytest.approx(1, abs=1e-4)


# Presets and objectives


@pytest.mark.parametrize("preset", ["paper", "final", "first", "joint_d"])
@pytest.mark.parametrize("objective", ["paper", "neutral"])
def test_every_preset_trains_all_its_parameters(preset, objective):
    model = tiny(preset=preset, objective=objective, neutral_weight=1.0, counterfactual_weight=1.0, sparsity_weight=1.0)
    before = copy.deepcopy(dict(model.named_parameters()))
    logged, _ = trained_in_steps(model, batches=3)
    assert all(torch.isfinite(torch.tensor(list(terms.values()))).all() for terms in logged)
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert still == []
    assert ("train/orthogonality" in logged[0]) == (preset == "first")
    assert ("train/critic_class" in logged[0]) == (preset != "final")
    assert ("train/neutral" in logged[0]) == (objective == "neutral")


@pytest.mark.parametrize("preset", ["paper", "final", "first", "joint_d"])
@pytest.mark.parametrize("source", ["label", "classifier"])
def test_the_classifier_judges_a_batch_only_where_its_answer_is_used(preset, source):
    model, judged = tiny(preset=preset, source=source), []
    model.classifier.register_forward_pre_hook(lambda *_: judged.append(1))
    image, label = toy_images(4, 3), torch.tensor([0, 1, 2, 0])
    part = model._draw({"image": image, "label": label})
    needed = source == "classifier" or preset in ("paper", "first")
    assert len(judged) == needed
    assert (part.logits is not None) == needed
    wanted = label if source == "label" else model.classifier(image).argmax(dim=1)
    assert torch.equal(part.label, wanted)


def test_a_validation_renders_a_batch_once(tmp_path):
    model, encoded = tiny(), []
    encode = model.generator.encode
    model.generator.encode = lambda image: encoded.append(len(image)) or encode(image)  # type: ignore[method-assign]
    toy_trainer(tmp_path, limit_val_batches=2).validate(model, ToyData(num_classes=3), verbose=False)
    assert len(encoded) == 2


def test_weights_override_the_preset():
    assert tiny(preset="paper").losses.class_weight == 2.0
    assert tiny(preset="paper", class_weight=0.0).losses.class_weight == 0.0


def test_joint_critic_is_what_is_explained():
    model = tiny(preset="joint_d").eval()
    image = toy_images(4, 3)
    torch.testing.assert_close(model.explain(image).logits, model.critic(image), atol=1e-5, rtol=0)
    assert model.classifier.class_names == toy_classifier(3).class_names


def test_neutral_objective_asks_for_no_decision():
    model = tiny(objective="neutral")
    images = drawn_for(model, 3)
    rendered = model._render(images)
    own, removed = model.classifier(rendered.own), model.classifier(rendered.alternative)
    expected = 0.5 * (F.cross_entropy(own, images.label) + kl_from_uniform(removed).mean())
    torch.testing.assert_close(model._generator_loss(images, rendered)["class"], expected)


def test_lazy_r1_is_as_strong_on_average(monkeypatch):
    model = tiny(r1_interval=4, r1_weight=2.0)
    images = drawn_for(model, 3)
    rendered = model._render(images)
    with_penalty = []
    for iteration in range(8):
        # Two optimisers: Lightning counts two steps per iteration.
        monkeypatch.setattr(Dxai, "global_step", 2 * iteration)
        terms = model._critic_loss(images, rendered)
        plain = terms["critic_real"] + terms["critic_fake"] + terms["critic_class"]
        with_penalty.append("r1" in terms)
        extra = terms["critic"] - plain
        assert extra.item() == pytest.approx(8.0 * terms["r1"].item() if "r1" in terms else 0.0, abs=1e-5)
    assert with_penalty == [True, False, False, False] * 2


def test_same_seed_gives_the_same_losses():
    runs = []
    for _ in range(2):
        pl.seed_everything(5, verbose=False)
        runs.append(trained_in_steps(tiny())[0])
    assert runs[0] == runs[1]


def test_grey_images_of_an_odd_size():
    model = Dxai(toy_classifier(2, image_size=28, channels=1), **DXAI).eval()
    assert model.explain(toy_images(2, 2, 28, 1)).counterfactual.shape == (2, 1, 28, 28)
