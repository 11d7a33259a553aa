"""A batch computed in parts has the gradient of the whole batch, for every method with a critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import AUTOENCODER, DXAI, MIRROR, pooled_classifier
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ParallelStrategy
from saved_tensors import SavedTensors
from torch import Tensor, nn
from toy import STYLEX, ToyData, toy_classifier, toy_trainer

from cfe_lightning.classifier.training import ClassifierTraining
from cfe_lightning.compute import micro_batches
from cfe_lightning.compute.micro_batches import accumulate_and_step, check_micro_batches, parts_of
from cfe_lightning.compute.precision import full_precision
from cfe_lightning.explainer import ExplainerModule, check_precision
from cfe_lightning.methods.diff_explainer import DiffusionAutoencoder
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.stylex import StylEx

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")

Build = Callable[..., ExplainerModule]


def dxai(**changes: Any) -> ExplainerModule:
    terms = {"preset": "first", "objective": "neutral", "image_skip": True, "neutral_weight": 1.0}
    terms |= {"sparsity_weight": 1.0, "counterfactual_weight": 1.0}
    # Not the masked term, a mean over selected pixels of a part.
    return Dxai(toy_classifier(3), **(DXAI | terms | {"masked_weight": 0.0} | changes))


def stylex(**changes: Any) -> ExplainerModule:
    # The running mean of path lengths would be updated by the mean of a part.
    return StylEx(toy_classifier(3), **(STYLEX | {"path_decay": 0.0, "perception": "none"} | changes))


def stylex_with_labels(**changes: Any) -> ExplainerModule:
    return stylex(**({"profile": "paper_code", "conditioning": "w_concat", "encoder_space": "w+"} | changes))


def stylex_labelled_by_the_classifier(**changes: Any) -> ExplainerModule:
    return stylex(**({"noise_label": "classifier"} | changes))


def mirror(**changes: Any) -> ExplainerModule:
    # Both terms compare the images of a part.
    alone = {"feature_weight": 0.0, "triangulation_weight": 0.0}
    model = MirrorCFE(pooled_classifier(), **(MIRROR | alone | changes))
    # In training mode every call would update the critic's spectral norms.
    model.critic.eval()
    return model


METHODS = [dxai, stylex, stylex_with_labels, stylex_labelled_by_the_classifier, mirror]


def autoencoder() -> pl.LightningModule:
    return DiffusionAutoencoder(**AUTOENCODER, validation_steps=2)


def classifier() -> pl.LightningModule:
    return ClassifierTraining(output="unused.pt", noise=0.1)


class Descent(torch.optim.SGD):
    """Records the gradient of every step. Not Adam, which takes a full step for a gradient of rounding errors."""

    taken: list[list[Tensor]]

    def step(self, closure: Any = None) -> Any:
        # Where Lightning steps, it is the closure that computes the gradient.
        loss = closure() if closure else None
        self.taken.append([p.grad.clone() for p in self.param_groups[0]["params"] if p.grad is not None])
        super().step()
        return loss


class Reseeded(pl.Callback):
    """Seeds every batch, so that the numbers drawn by earlier parts do not matter."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        torch.manual_seed(index)


def watched(model: pl.LightningModule, rate: float) -> list[list[Tensor]]:
    """Replaces a module's optimisers by ``Descent`` and returns the list that receives the gradients of all steps."""
    taken: list[list[Tensor]] = []
    published = model.configure_optimizers

    def descents() -> Any:
        made: Any = published()
        descents = []
        for optimizer in made if isinstance(made, list) else [made]:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            descents.append(Descent(parameters, lr=rate))
            descents[-1].taken = taken
        return descents

    model.configure_optimizers = descents  # type: ignore[method-assign]
    return taken


def gradients(build: Build, folder: Path, batch_size: int = 6, **changes: Any) -> tuple[list[list[Tensor]], Any]:
    """Returns the gradients of every step of two batches, and the terms logged after the last."""
    torch.manual_seed(0)
    model = build(**changes)
    taken = watched(model, 0.01)
    trainer = toy_trainer(folder, [Reseeded()], limit_train_batches=2, limit_val_batches=0)
    trainer.fit(model, ToyData(num_classes=3, image_size=16, batch_size=batch_size, num_images=2 * batch_size))
    return taken, {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


@pytest.fixture
def images_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables the minibatch standard deviation, which StylEx' critic computes over the images of a part."""

    def zeros(x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros_like(x[:, :1])], dim=1)

    monkeypatch.setattr("cfe_lightning.methods.stylex.critic.stddev_map", zeros)


@pytest.mark.usefixtures("images_not_compared")
@pytest.mark.parametrize("build", METHODS)
def test_parts_have_the_gradient_and_the_terms_of_the_batch(build: Build, tmp_path: Path) -> None:
    whole, logged = gradients(build, tmp_path)
    # Four do not divide six: parts of one and of two images.
    for parts in (2, 4):
        in_parts, also_logged = gradients(build, tmp_path, micro_batches=parts)
        assert len(in_parts) == len(whole) > 3
        for index, (one, other) in enumerate(zip(whole, in_parts, strict=True)):
            expected, actual = (torch.cat([gradient.flatten() for gradient in each]) for each in (one, other))
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()), msg=index)
        assert also_logged.keys() == logged.keys()
        for name in logged.keys() - {"train/masked", "train/feature", "train/triangulation"}:
            torch.testing.assert_close(also_logged[name], logged[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("build", [dxai, stylex, mirror])
def test_parts_take_the_memory_of_a_part(build: Build, tmp_path: Path) -> None:
    peaks = []
    for parts in (1, 4):
        with SavedTensors() as saved:
            gradients(build, tmp_path, batch_size=8, micro_batches=parts)
        peaks.append(saved.peak)
    assert peaks[1] < 0.4 * peaks[0]


def test_a_batch_norm_counts_every_part_once(tmp_path: Path) -> None:
    built: list[MirrorCFE] = []

    def kept(**changes: Any) -> ExplainerModule:
        model = mirror(norm="batch", **changes)
        assert isinstance(model, MirrorCFE)
        built.append(model)
        return model

    gradients(kept, tmp_path, micro_batches=3)
    norm = built[0].decoder.bottom[1]
    assert int(norm.num_batches_tracked) == 2 * 3  # type: ignore[arg-type]


class Island(pl.LightningModule):
    """A layer in single precision inside a module of any precision."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(768, 16)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        def loss(image: Tensor) -> dict[str, Tensor]:
            with full_precision(image):
                return {"loss": self.layer(image.flatten(1)).square().mean()}

        accumulate_and_step(self, [batch["image"]], loss, "loss", self.optimizers())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_under_autocast_no_gradient_of_single_precision_is_rounded(tmp_path: Path) -> None:
    taken = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        model = Island()
        taken.append(watched(model, 0.01))
        toy_trainer(tmp_path, precision=precision, limit_train_batches=1).fit(model, ToyData())
    for exact, other in zip(taken[0][0], taken[1][0], strict=True):
        assert torch.equal(exact, other)


@pytest.mark.parametrize("build", [dxai, stylex, mirror])
def test_steps_by_hand_are_not_taken_in_float16(build: Build, tmp_path: Path) -> None:
    model, data = build(), ToyData(num_classes=3, image_size=16)
    named = f"{type(model).__name__} cannot be trained with precision 16-true, because float16 gradients vanish"
    with pytest.raises(ValueError, match=named):
        toy_trainer(tmp_path, precision="16-true", limit_train_batches=1, limit_val_batches=0).fit(model, data)
    # A CPU has no 16-mixed: Lightning takes another there.
    with pytest.raises(ValueError, match=r"with precision 16-mixed, .* in its alternating steps: use bf16-mixed or 32"):
        check_precision(model, "16-mixed")
    for precision in ("32-true", "bf16-mixed", "bf16-true", "64-true"):
        check_precision(model, precision)
    check_precision(autoencoder(), "16-mixed")


@pytest.mark.parametrize("build", [dxai, mirror])
def test_fused_steps_are_those_without_and_go_on_from_them(build: Build) -> None:
    """Checkpoints of earlier versions hold the state of optimisers that are not fused."""
    ends = []
    for fused_from in (0, 1, 3):
        torch.manual_seed(0)
        # One optimiser of each kind.
        optimizer, _ = build().configure_optimizers()  # type: ignore[misc]
        assert optimizer.defaults["fused"]
        plain = torch.optim.Adam([group | {"fused": False} for group in optimizer.param_groups])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        # Three steps with the same gradients, fused from one of them on.
        for step in range(3):
            if step == fused_from == 1:
                optimizer.load_state_dict(plain.state_dict())
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            (optimizer if step >= fused_from else plain).step()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    for end in ends[:2]:
        torch.testing.assert_close(end, ends[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("build", [autoencoder, classifier])
def test_with_one_optimiser_lightning_adds_up_gradients(
    build: Callable[[], pl.LightningModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    # Standing still, every batch by itself has the gradient that it contributes.
    for count, rate in ((1, 0.0), (2, 0.01)):
        torch.manual_seed(0)
        model = build()
        taken.append(watched(model, rate))
        trainer = toy_trainer(tmp_path, [Reseeded()], accumulate_grad_batches=count, num_sanity_val_steps=0)
        trainer.fit(model, ToyData(num_classes=3, image_size=16, batch_size=4, num_images=8))
    (first, second), (together,) = taken
    for one, other, both in zip(first, second, together, strict=True):
        torch.testing.assert_close(both, (one + other) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"), [(DDPStrategy, [True, True, True]), (FSDPStrategy, [True, True, False])], ids=["DDP", "other"]
)
def test_processes_exchange_gradients_once(
    kind: type[ParallelStrategy], expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under DDP by hand, for the weights that take a step; under other strategies by themselves, with the last part."""
    # Recorded exchanges.
    weight, apart, seen, averaged = torch.ones(1, requires_grad=True), [False], [], []

    @contextmanager
    def block(_: Any) -> Iterator[None]:
        apart[0] = True
        yield
        apart[0] = False

    def backward(value: Tensor) -> None:
        seen.append(apart[0])
        value.backward()

    monkeypatch.setattr(kind, "block_backward_sync", block)
    monkeypatch.setattr(micro_batches, "average_gradients", lambda weights: averaged.append([*weights]))
    module: Any = SimpleNamespace(trainer=SimpleNamespace(strategy=kind()), manual_backward=backward)
    # Three parts of a batch of four.
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([6.0])]
    optimizer = torch.optim.SGD([weight], lr=0.0)
    terms = accumulate_and_step(module, parts, lambda part: {"loss": (weight * part).mean()}, "loss", optimizer)
    assert seen == expected
    assert averaged == ([[weight]] if kind is DDPStrategy else [])
    assert weight.grad is not None
    assert weight.grad.item() == terms["loss"].item() == 3.0


def test_parts_differ_by_one_image_at_most() -> None:
    assert parts_of(6, 4) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)]
    assert parts_of(2, 5) == [slice(0, 1), slice(1, 2)]
    assert parts_of(7, 1) == [slice(0, 7)]
    with pytest.raises(ValueError, match="micro_batches is the number of parts of a batch, at least 1, got 0"):
        check_micro_batches(0)
