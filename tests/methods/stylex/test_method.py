"""Order and isolation of the training steps, penalties, search and explanations of ``StylEx``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from urllib.error import URLError

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy import STYLEX, ToyData, save_checkpoint, toy_classifier, toy_images, toy_trainer

from cfe_lightning.compute.losses import Lpips, r1_penalty
from cfe_lightning.compute.micro_batches import accumulate_and_step
from cfe_lightning.explainer import load_explainer
from cfe_lightning.methods.stylex import StylEx
from cfe_lightning.methods.stylex.reference import first_of_each_class
from cfe_lightning.methods.stylex.search import LogitsOfEdits, direction_table
from cfe_lightning.methods.stylex.training import Mixture, path_lengths
from cfe_lightning.training import EMA

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")


def tiny(num_classes: int = 2, **changes: Any) -> StylEx:
    torch.manual_seed(0)
    return StylEx(toy_classifier(num_classes), **{**STYLEX, **changes})


def data(num_classes: int = 2, num_images: int = 16) -> ToyData:
    return ToyData(num_classes=num_classes, batch_size=4, num_images=num_images)


class Steps(pl.Callback):
    """Records the logged terms of every iteration and the networks that every optimiser step moved."""

    def __init__(self, model: StylEx, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logged: list[set[str]] = []
        self.moved: list[tuple[str, ...]] = []
        self.without_gradient: list[dict[str, bool]] = []
        self._networks = {"generator": model.generator, "critic": model.critic, "encoder": model.encoder}

        # Logged terms.
        log = model.log_dict

        def log_dict(terms: dict[str, Tensor], **options: Any) -> None:
            if any(name.startswith("train/") for name in terms):
                self.logged.append({name.removeprefix("train/") for name in terms})
            log(terms, **options)

        # Weights before and after every step, and gradients that it left.
        def watched(*arguments: Any) -> dict[str, Tensor]:
            before = {name: self._weights(name) for name in self._networks}
            for network in self._networks.values():
                for parameter in network.parameters():
                    parameter.grad = None
            terms = accumulate_and_step(*arguments)
            changed = (name for name in before if not torch.equal(before[name], self._weights(name)))
            self.moved.append(tuple(changed))
            weights = {name: list(network.parameters()) for name, network in self._networks.items()}
            none = {name: all(weight.grad is None for weight in own) for name, own in weights.items()}
            self.without_gradient.append(none)
            return terms

        model.log_dict = log_dict  # type: ignore[method-assign]
        monkeypatch.setattr("cfe_lightning.methods.stylex.method.accumulate_and_step", watched)

    def _weights(self, name: str) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._networks[name].parameters()]).clone()


def trained(model: StylEx, tmp_path: Path, batches: int, callbacks: list[pl.Callback] | None = None) -> StylEx:
    num_classes = model.classifier.num_classes
    trainer = toy_trainer(tmp_path, callbacks or [], max_epochs=1)
    trainer.fit(model, data(num_classes, 4 * batches))
    return model


# Training


def test_sixteen_iterations_have_one_r1_step_and_four_path_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(r1_interval=16, path_interval=4)
    steps = Steps(model, monkeypatch)
    trained(model, tmp_path, 16)
    assert len(steps.logged) == 16
    assert [i for i, terms in enumerate(steps.logged) if "r1" in terms] == [0]
    assert [i for i, terms in enumerate(steps.logged) if "path" in terms] == [0, 4, 8, 12]
    assert all("reconstruction" in terms for terms in steps.logged)


def test_every_step_moves_its_own_networks_and_gives_no_other_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(r1_interval=1, path_interval=1)
    steps = Steps(model, monkeypatch)
    trained(model, tmp_path, 2)
    order = [("critic",), ("critic",), ("generator",), ("generator",), ("generator", "encoder")]
    assert steps.moved == order * 2
    for moved, alone in zip(steps.moved, steps.without_gradient, strict=True):
        assert {name for name, none in alone.items() if not none} == set(moved)


def test_optimisers_are_corrected_for_lazy_penalties() -> None:
    generator, critic, encoder = tiny(r1_interval=16, path_interval=4).configure_optimizers()
    assert generator.defaults["lr"] == pytest.approx(0.0016)
    assert generator.defaults["betas"] == pytest.approx((0, 0.99199), abs=1e-5)
    assert critic.defaults["lr"] == pytest.approx(0.001882, abs=1e-6)
    assert critic.defaults["betas"] == pytest.approx((0, 0.99059), abs=1e-5)
    assert encoder.defaults["lr"] == pytest.approx(0.002)
    assert encoder.defaults["betas"] == (0.9, 0.999)
    uncorrected, *_ = tiny(path_weight=0.0).configure_optimizers()
    assert uncorrected.defaults["lr"] == pytest.approx(0.002)


def test_r1_of_a_linear_critic_is_half_its_squared_weight() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 4)
    image = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty((image * weight).sum(dim=(1, 2, 3)), image)
    torch.testing.assert_close(penalty, 0.5 * weight.square().sum())


def test_path_length_of_a_linear_generator_is_its_norm() -> None:
    torch.manual_seed(0)
    slots, side = 3, 4
    matrix = torch.randn(side * side, 5)
    latents = torch.randn(20000, slots, 5, requires_grad=True)
    picture = (latents[:, 1] @ matrix.T).unflatten(1, (1, side, side))
    expected = matrix.square().sum() / (side * side * slots)
    torch.testing.assert_close(
        path_lengths(picture, latents, torch.randn_like(picture)).square().mean(), expected, rtol=0.02, atol=0
    )


def test_path_length_can_be_differentiated_again() -> None:
    model = tiny()
    latents = Mixture.draw(model.generator, 2, model.mixing, model.device).latents(model.generator)
    picture = model.generator(latents, torch.full((2, 2), 0.5))
    path_lengths(picture, latents, torch.randn_like(picture)).sum().backward()
    assert all(layer.weight.grad is not None for layer in model.generator.synthesis.layers())


@pytest.mark.parametrize(
    ("noise_label", "rows"), [("empirical", {(0.9, 0.1), (0.2, 0.8)}), ("uniform", {(1, 0), (0, 1)})]
)
def test_labels_of_noise(noise_label: str, rows: set[tuple[float, float]]) -> None:
    drawn = tiny(noise_label=noise_label)._draw_labels(torch.tensor([[0.9, 0.1], [0.2, 0.8]] * 20))
    assert {tuple(round(value, 3) for value in row) for row in drawn.tolist()} == rows


def test_lpips_compares_images_and_stays_out_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfe_lightning.methods.stylex.method.Lpips", lambda: Lpips(pretrained=False))
    torch.manual_seed(0)
    model = StylEx(toy_classifier(image_size=32), **{**STYLEX, "perception": "lpips"})
    steps = Steps(model, monkeypatch)
    toy_trainer(tmp_path, max_epochs=1).fit(model, ToyData(image_size=32, num_images=4))
    assert "perceptual" in steps.logged[0]
    assert not [name for name in model.state_dict() if "lpips" in name or "alex" in name]


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> Lpips:
        raise URLError("no route")

    monkeypatch.setattr("cfe_lightning.methods.stylex.method.Lpips", unreachable)
    with pytest.raises(ValueError, match=r"LPIPS could not be loaded .*no route.* --model.perception classifier"):
        trained(tiny(perception="lpips"), tmp_path, 1)


def test_profiles_switch_and_every_switch_can_be_set() -> None:
    code = tiny(profile="paper_code")
    assert (code.real_label, code.noise_label, code.label_form) == ("truth", "uniform", "one_hot")
    assert (code.pixel_weight, code.latent_search.scoring) == (2.2, "paper_code")
    mixed = tiny(profile="paper_code", scoring="strict", pixel_weight=3.0)
    assert (mixed.latent_search.scoring, mixed.pixel_weight, mixed.label_form) == ("strict", 3.0, "one_hot")
    logits = torch.tensor([[0.0, 1.0]])
    assert code.label(logits).tolist() == [[0, 1]]
    torch.testing.assert_close(tiny().label(logits), logits.softmax(dim=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_label": "classifier", "conditioning": "w_concat"}, "needs conditioning 'none'"),
        ({"search_space": "pca"}, "search_space must be one of pca_w, sefa_w, pca_s"),
        ({"edited_layers": [9]}, "edited_layers must be convolutions from 0 to 4"),
        ({"image_size": 20}, "power of two from 8 on, got 20: set image_size of model and data to 16"),
        ({"degree": 0.0}, "degree must be positive, got 0.0"),
        ({"edited_layers": [1], "search_space": "pca_s"}, "edited_layers chooses slots of the latent"),
        ({"kept_directions": 1}, "kept_directions must be at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


# The reference and the search


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> StylEx:
    """Trains briefly; the reference holds the validation images."""
    folder = tmp_path_factory.mktemp("fitted")
    return trained(tiny(), folder, 4, [EMA(0.5)]).eval()


def test_the_last_validation_leaves_its_latents_with_the_averaged_encoder(fitted: StylEx) -> None:
    count = int(fitted.reference.count)
    assert count == 16
    image = torch.stack([sample["image"] for sample in data().dataset("val")])  # type: ignore[attr-defined]
    torch.testing.assert_close(fitted.reference.latents, fitted.encoder(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fitted.reference.logits, fitted.classifier(image), rtol=1e-4, atol=1e-5)


def test_the_reference_is_in_every_checkpoint(tmp_path: Path) -> None:
    class Saved(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "late.ckpt")

    model = tiny()
    toy_trainer(tmp_path, [EMA(0.5), Saved()], max_epochs=2).fit(model, data())
    state = torch.load(tmp_path / "late.ckpt", weights_only=True)
    # Saved in the second epoch, after batches that copied buffers from model to average.
    for key in ("state_dict", "current_model_state"):
        assert int(state[key]["reference.count"]) == 16
        assert state[key]["reference.latents"].abs().sum() > 0


def test_no_step_changes_nothing_and_explains_nothing(fitted: StylEx) -> None:
    still = copy.deepcopy(fitted)
    still.latent_search.degree = 0.0
    result = still.search()
    torch.testing.assert_close(result.table, result.before[:, None, None].expand_as(result.table), rtol=0, atol=1e-5)
    assert all(result.ranking(s, 1 - s, 8).covered == 0 for s in (0, 1))


def test_results_do_not_depend_on_the_batch_size(fitted: StylEx) -> None:
    tables = [fitted.search(batch_size=size) for size in (1, 7, 64)]
    for other in tables[1:]:
        torch.testing.assert_close(other.table, tables[0].table, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.kept, tables[0].kept)


@pytest.mark.parametrize("space", ["pca_w", "pca_s", "sefa_w"])
def test_an_edit_is_the_latent_or_the_style_moved(space: str, fitted: StylEx) -> None:
    model = copy.deepcopy(fitted)
    model.latent_search.search_space = space  # type: ignore[assignment]
    latent, logits = model.starting_points()
    direction = model.latent_search.directions(model.generator, latent, model.label(logits)).vectors[0]
    latent, label = latent[:3], model.label(logits[:3])
    picture = model.render(latent, label, (2 * direction).expand(3, 1, -1))[:, 0]
    generator = model.generator
    if space == "pca_s":
        styles = generator.styles(latent, label)
        flat = torch.cat(list(styles.conv), dim=1) + 2 * direction
        expected = generator.synthesis(generator.synthesis.replace_styles(styles, flat))
    else:
        expected = generator(latent + 2 * direction, label)
    torch.testing.assert_close(picture, expected.clamp(-1, 1), rtol=0, atol=1e-5)


def test_edited_layers_leave_other_slots_alone(fitted: StylEx) -> None:
    model = copy.deepcopy(fitted)
    model.latent_search.edited_layers = [2]
    latent, logits = (value[:2] for value in model.starting_points())
    change = torch.randn(2, 1, model.generator.w_dim)
    moved = model.generator.spread(latent).clone()
    moved[:, 2] += change[:, 0]
    expected = model.generator(moved, model.label(logits)).clamp(-1, 1)
    torch.testing.assert_close(model.render(latent, model.label(logits), change)[:, 0], expected, rtol=0, atol=1e-5)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="are 32 x 32 pixels, but the generator renders 16 x 16"):
        tiny().explain(torch.zeros(1, 3, 32, 32))


def test_only_so_many_images_of_each_class_are_searched() -> None:
    assert first_of_each_class(torch.tensor([0, 0, 1, 0, 2, 1, 1]), 2).tolist() == [0, 1, 2, 4, 5]


def test_without_a_validation_noise_stands_in_for_images() -> None:
    model = tiny().eval()
    latent, logits = model.starting_points()
    assert latent.shape == (16, 8)
    assert logits.shape == (16, 2)
    state = torch.get_rng_state()
    assert torch.equal(model.starting_points()[0], latent)
    assert torch.equal(torch.get_rng_state(), state)


# Explanations: a generator that is known


class Planted(nn.Module):
    """A generator whose latent is the brightness of both halves: entry 0 moves it from left to right."""

    w_dim = 8
    num_slots = 1
    z_dim = 8

    def __init__(self, model: StylEx) -> None:
        super().__init__()
        self.synthesis = model.generator.synthesis
        self.conditioning = "none"

    def spread(self, w: Tensor) -> Tensor:
        return w[:, None] if w.ndim == 2 else w

    def styles(self, w: Tensor, condition: Tensor) -> Tensor:
        return w


def planted(**changes: Any) -> StylEx:
    """Builds a model with an exact autoencoder; class 0 of the toy is a bright left half, class 1 a right one."""
    # Generator.
    model = tiny(search_space="pca_w", degree=4.0, kept_directions=2, search_directions=2, **changes).eval()

    def draw(styles: Tensor, noise: Any = None) -> Tensor:
        w = styles[:, 0]
        left = torch.arange(16) < 8
        level = torch.where(left, -w[:, :1], w[:, :1]) * 0.2 + 0.05 * w[:, 1:2]
        return level[:, None, None].expand(-1, 3, 16, -1)

    class Draw(nn.Module):
        layer_sizes: tuple[int, ...] = ()

        def forward(self, styles: Tensor, noise: Any = None) -> Tensor:
            return draw(styles, noise)

    # Encoder.
    def encode(image: Tensor) -> Tensor:
        left, right = image[..., :8].mean(dim=(1, 2, 3)), image[..., 8:].mean(dim=(1, 2, 3))
        w = torch.zeros(len(image), 8)
        w[:, 0], w[:, 1] = (right - left) / 0.4, (right + left) / 0.1
        return w

    # Model and reference.
    generator = Planted(model)
    generator.synthesis = Draw()  # type: ignore[assignment]
    model.generator = generator  # type: ignore[assignment]
    model.encoder = type("Encode", (nn.Module,), {"forward": staticmethod(encode)})()
    torch.manual_seed(0)
    w = torch.randn(16, 8) * torch.tensor([1.0, 0.3, *[0.0] * 6])
    image = draw(w[:, None])
    model.reference.count.fill_(16)
    model.reference.latents.copy_(w)
    model.reference.logits.copy_(model.classifier(image))
    return model


def images_of(model: StylEx) -> Tensor:
    return model.generator.synthesis(model.reference.latents[:, None], None)  # type: ignore[operator]


def test_the_planted_direction_ranks_first_and_explains_all() -> None:
    model = planted()
    result = model.search()
    # One entry of the latent carries the class: the direction is that axis.
    assert result.vectors[0].abs().argmax() == 0
    for source in (0, 1):
        ranking = result.ranking(source, 1 - source, 2)
        assert ranking.direction[0] == 0
        assert int(ranking.sign[0]) == (1 if source == 0 else -1) * int(result.vectors[0, 0].sign())
        assert ranking.covered == 1


def test_explaining_finds_the_smallest_step_that_flips() -> None:
    model = planted()
    image = images_of(model)
    explanation = model.explain(image)
    assert explanation.flipped is not None
    assert explanation.flipped.all()
    assert explanation.scores["explained"].all()
    assert (explanation.scores["rank"] == 1).all()
    torch.testing.assert_close(explanation.parts["reconstruction"], image, rtol=0, atol=1e-5)
    # The boundary is where both halves are equally bright: the whole way there along the one axis, in its spread.
    sigma = model.search().spread[0]
    needed = model.reference.latents[:, 0].abs() / sigma
    travelled = explanation.scores["standard_deviations"].abs()
    assert (travelled >= needed).all()
    # Within one of 8 x 9 points, and what it takes to lead by two hundredths.
    assert (travelled <= needed + 4 / 72 + 0.05).all()
    whole = planted(smallest=False).explain(image)
    torch.testing.assert_close(whole.scores["standard_deviations"].abs(), torch.full((16,), 4.0))


def test_an_image_that_no_direction_flips_is_said_to_be_unexplained() -> None:
    model = planted()
    image = images_of(model)
    model.latent_search.degree = 0.01
    explanation = model.explain(image)
    assert explanation.flipped is not None
    unmoved = ~explanation.flipped
    assert unmoved.any()
    assert not explanation.scores["explained"][unmoved].any()
    assert (explanation.scores["directions_that_flip"][unmoved] == 0).all()
    rendering, nothing, unknown = explanation.caveats.values()
    assert torch.equal(nothing, unmoved)
    assert not rendering.any()
    assert not unknown.any()


def test_a_reconstruction_that_is_decided_otherwise_is_no_explanation() -> None:
    model = planted()
    image = images_of(model)
    encode = model.encoder.forward
    model.encoder.forward = lambda picture: encode(picture) * torch.tensor([-1.0, *[1.0] * 7])  # type: ignore[method-assign]
    explanation = model.explain(image)
    assert not explanation.scores["reconstruction_kept"].any()
    assert explanation.caveats["the rendering alone changes the decision, so another image is explained"].all()
    assert not explanation.scores["explained"].any()


def test_a_target_that_is_predicted_already_leads_away_from_the_runner_up() -> None:
    model = planted()
    image = images_of(model)
    predicted = model.classifier(image).argmax(dim=1)
    explanation = planted().explain(image, predicted)
    assert (explanation.scores["standard_deviations"].abs() > 3.9).all()
    before = F.log_softmax(explanation.logits, dim=1).gather(1, predicted[:, None])
    assert explanation.counterfactual_logits is not None
    after = F.log_softmax(explanation.counterfactual_logits, dim=1).gather(1, predicted[:, None])
    assert (after > before - 1e-3).all()


def test_a_survey_is_adopted_instead_of_made(tmp_path: Path) -> None:
    model = planted()
    survey = model.survey()
    file = tmp_path / "survey.pt"
    torch.save(survey, file)
    other = planted()
    other.search = lambda *_, **__: pytest.fail("searched again")  # type: ignore[method-assign]
    other.adopt(torch.load(file, weights_only=True))
    one, two = model.explain(images_of(model)), other.explain(images_of(model))
    assert torch.equal(one.counterfactual, two.counterfactual)  # type: ignore[arg-type]


def test_training_forgets_the_search() -> None:
    model = planted()
    model.survey()
    assert model._result is not None
    model.train()
    assert model._result is None


def test_the_atlas_shows_the_direction_towards_the_target() -> None:
    # Pairs.
    model = planted()
    model.reference.masks[:, :, :8] = True
    atlas = model.atlas()
    assert atlas is not None
    assert [(pair.source, pair.target) for pair in atlas.pairs] == [("stripe 0", "stripe 1"), ("stripe 1", "stripe 0")]
    unmoved = planted()
    unmoved.latent_search.degree = 0.0
    assert unmoved.atlas() is None

    # The best direction of each pair.
    for pair in atlas.pairs:
        best = pair.directions[0]
        towards = best.probabilities if best.step > 0 else best.probabilities.flip(1)
        assert (towards[:, -1] > towards[:, 0]).all()
        assert best.strengths.tolist() == pytest.approx([-4, -3, -2, -1, 0, 1, 2, 3, 4], abs=1e-3)
        assert best.inside == pytest.approx(0.5, abs=0.02)
        assert pair.covered == 1
        assert pair.curve[0] == (0.0, 0.0)
        shares = [share for _, share in pair.curve]
        assert shares == sorted(shares)
        assert shares[-1] == 1


def test_many_classes_show_the_pairs_that_are_confused(fitted: StylEx) -> None:
    from cfe_lightning.methods.stylex.atlas import _pairs

    logits = torch.full((10, 5), -9.0)
    for row in range(10):
        logits[row, row // 2], logits[row, (row // 2 + 1) % 5] = 5.0, 1.0
    assert list(_pairs(logits)) == [(k, (k + 1) % 5) for k in range(5)]
    assert len(list(_pairs(torch.randn(10, 3)))) == 6


def test_fresh_noise_only_where_everything_is_as_released(fitted: StylEx) -> None:
    released = tiny(profile="paper_code").eval()
    for layer in released.generator.synthesis.layers():
        layer.noise_strength.data.fill_(1.0)
    image = toy_images(2, 2)
    latent, label = released.encoder(image), released.label(released.classifier(image))
    still = torch.zeros(2, 1, released.generator.w_dim)
    assert not torch.equal(released.render(latent, label, still), released.render(latent, label, still))
    released.latent_search.scoring = "strict"
    assert torch.equal(released.render(latent, label, still), released.render(latent, label, still))


def test_a_checkpoint_alone_searches_the_same(fitted: StylEx, tmp_path: Path) -> None:
    loaded = load_explainer(save_checkpoint(fitted, tmp_path / "x.ckpt"), ["toy"])
    assert isinstance(loaded, StylEx)
    torch.testing.assert_close(loaded.search().table, fitted.eval().search().table)


def edited(model: StylEx, latent: Tensor, label: Tensor) -> LogitsOfEdits:
    return model.latent_search.logits_of_edits(model.generator, model.classifier, latent, label)


def test_the_exact_judge_is_exact_in_a_training_in_half_precision(fitted: StylEx) -> None:
    latent, logits = fitted.starting_points()
    logits_of, rows = edited(fitted, latent, fitted.label(logits)), torch.arange(4)
    change = torch.randn(4, latent.shape[-1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = logits_of(rows, change)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = logits_of(rows, change)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, exact, atol=1e-6, rtol=1e-6)


def test_judging_moved_images_equals_a_loop(fitted: StylEx) -> None:
    latent, logits = fitted.starting_points()
    label = fitted.label(logits)
    changes = torch.randn(3, 8)
    table = direction_table(edited(fitted, latent, label), 4, changes, 5)
    for image in range(4):
        for direction in range(3):
            for place, sign in enumerate((1, -1)):
                w = latent[image : image + 1] + sign * changes[direction]
                after = fitted.classifier(fitted.generator(w, label[:1]).clamp(-1, 1))[0]
                torch.testing.assert_close(table[image, direction, place], after, rtol=1e-4, atol=1e-4)
