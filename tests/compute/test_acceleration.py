"""Layout, compiler and recomputing change neither results nor checkpoints; recomputing saves memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import AUTOENCODER, DIFF_EXPLAINER, DXAI, IMAGE_SIZE, MIRROR, NUM_CLASSES, pooled_classifier, with_noise
from saved_tensors import SavedTensors
from torch import Tensor, nn
from toy import STYLEX, FixedToyExplainer, ToyData, toy_classifier, toy_images, toy_trainer

from cfe_lightning.compute.acceleration import (
    ChannelsLast,
    CompileBlocks,
    RecomputeActivations,
    compile_blocks,
    recompute_activations,
    to_channels_last,
)
from cfe_lightning.compute.batch_norm import uncounted
from cfe_lightning.compute.precision import double_backward
from cfe_lightning.explainer import ExplainerModule, load_explainer
from cfe_lightning.explanation import Explanation
from cfe_lightning.methods.diff_explainer import DiffExplainer, DiffusionAutoencoder
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.dxai.generator import ResidualBlock
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.stylex import StylEx
from cfe_lightning.training import EMA, LastCheckpoint
from cfe_lightning.training.checkpoints import RandomState

pytestmark = pytest.mark.filterwarnings("ignore:.*in eval mode at the start.*", "ignore:.*LeafSpec.*")

Build = Callable[[], pl.LightningModule]


def dxai() -> Dxai:
    return Dxai(toy_classifier(NUM_CLASSES), **DXAI)


def mirror() -> MirrorCFE:
    return MirrorCFE(pooled_classifier(), **(MIRROR | {"norm": "batch"}))


def stylex() -> StylEx:
    return StylEx(toy_classifier(NUM_CLASSES), **STYLEX)


def autoencoder() -> DiffusionAutoencoder:
    model = DiffusionAutoencoder(**(AUTOENCODER | {"dropout": 0.3, "validation_steps": 2}))
    with_noise(model)
    return model


def diff_explainer() -> DiffExplainer:
    model = DiffExplainer(toy_classifier(NUM_CLASSES), **DIFF_EXPLAINER)
    with_noise(model)
    return model


TRAINED = [dxai, mirror, stylex, autoencoder]
CALLBACKS = {
    "ChannelsLast": ChannelsLast,
    "CompileBlocks": lambda: CompileBlocks("aot_eager"),
    "RecomputeActivations": RecomputeActivations,
}


class Gradients(pl.Callback):
    """Records gradients, buffers and logged terms of the first batch."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        terms = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        # For example the counters of batch norms.
        buffers = {name: buffer.clone().float() for name, buffer in pl_module.named_buffers()}
        self.seen = self.seen or (terms | gradients | buffers)


def trained(
    build: Build, folder: Path, callbacks: list[pl.Callback], batches: int = 1, resume: Path | None = None
) -> pl.LightningModule:
    pl.seed_everything(0, verbose=False)
    model = build()
    trainer = toy_trainer(folder, callbacks, max_epochs=1, limit_train_batches=batches, limit_val_batches=1)
    data = ToyData(num_classes=NUM_CLASSES, image_size=IMAGE_SIZE, batch_size=4, num_images=16)
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    return model


def first_batch(build: Build, folder: Path, callbacks: list[pl.Callback]) -> dict[str, Tensor]:
    gradients = Gradients()
    trained(build, folder, [*callbacks, gradients])
    return gradients.seen


def assert_alike(seen: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert seen.keys() == expected.keys()
    assert len(seen) > 10
    for name, value in seen.items():
        # Zeros come out as rounding errors.
        size = float(expected[name].abs().max()) + 0.01
        assert (value - expected[name]).abs().max() <= tolerance * size, name


@pytest.mark.parametrize("build", TRAINED)
def test_a_step_is_the_same_when_recomputed(build: Build, tmp_path: Path) -> None:
    # Dropout included, which has to be drawn alike.
    assert_alike(first_batch(build, tmp_path, [RecomputeActivations()]), first_batch(build, tmp_path, []), 1e-6)


@pytest.mark.parametrize("build", [dxai, mirror, stylex])
def test_a_step_is_nearly_the_same_in_another_layout(build: Build, tmp_path: Path) -> None:
    # Not bit for bit: sums are added up in another order.
    assert_alike(first_batch(build, tmp_path, [ChannelsLast()]), first_batch(build, tmp_path, []), 2e-3)


@pytest.mark.parametrize(("build", "others"), [(dxai, []), (mirror, [RecomputeActivations])], ids=["dxai", "both"])
def test_a_step_is_nearly_the_same_when_compiled(build: Build, others: list[type[pl.Callback]], tmp_path: Path) -> None:
    expected = first_batch(build, tmp_path, [])
    counters = torch._dynamo.utils.counters
    counters.clear()
    callbacks = [CompileBlocks("aot_eager"), *(other() for other in others)]
    assert_alike(first_batch(build, tmp_path, callbacks), expected, 2e-3)
    assert counters["stats"]["unique_graphs"] > 0
    # A break would leave a block uncompiled without a word.
    assert not counters["graph_break"]


@pytest.mark.parametrize("build", TRAINED)
def test_recomputing_keeps_less_for_the_gradient(build: Build, tmp_path: Path) -> None:
    peaks = []
    for callbacks in ([], [RecomputeActivations()]):
        with SavedTensors() as saved:
            trained(build, tmp_path, callbacks)
        peaks.append(saved.peak)
    assert peaks[1] < 0.8 * peaks[0]


class Killed(pl.Callback):
    """Dies before the third batch."""

    class Now(Exception):
        pass

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == 2:
            raise self.Now


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("last", [True, False], ids=["after-EMA", "before-EMA"])
def test_checkpoints_know_nothing_of_it_and_resume(name: str, last: bool, tmp_path: Path) -> None:
    # Trainings with the callback and without.
    def run(folder: str, *others: pl.Callback, resume: Path | None = None, extra: bool = True) -> Path:
        callbacks: list[pl.Callback] = [EMA(0.5)]
        if extra:
            callbacks.insert(last, CALLBACKS[name]())
        callbacks += [RandomState(), LastCheckpoint(1, str(tmp_path / folder)), *others]
        try:
            trained(dxai, tmp_path / folder, callbacks, 4, resume)
        except Killed.Now:
            assert others
        return tmp_path / folder / "last.ckpt"

    def weights(path: Path) -> dict[str, Tensor]:
        saved = torch.load(path, weights_only=True)
        return saved["state_dict"] | {f"own.{name}": value for name, value in saved["current_model_state"].items()}

    # Resumed with it, and without it.
    straight = weights(run("straight"))
    resumed = weights(run("resumed", resume=run("killed", Killed())))
    assert straight.keys() == resumed.keys()
    for weight, value in straight.items():
        assert torch.equal(value, resumed[weight]), weight
    without = weights(run("without", resume=tmp_path / "killed" / "last.ckpt", extra=False))
    assert {weight: value.shape for weight, value in without.items()} == {
        weight: value.shape for weight, value in straight.items()
    }
    # Explained without it.
    explained = load_explainer(tmp_path / "straight" / "last.ckpt", ["toy"]).explain(toy_images(4, NUM_CLASSES))
    assert explained.counterfactual is not None
    assert explained.counterfactual.isfinite().all()


def assert_same_answer(seen: Explanation, expected: Explanation) -> None:
    assert seen.counterfactual is not None
    torch.testing.assert_close(seen.counterfactual, expected.counterfactual, rtol=0, atol=1e-3)
    torch.testing.assert_close(seen.logits, expected.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("build", [dxai, mirror, stylex, diff_explainer])
def test_an_explanation_is_the_same_in_another_layout(build: Callable[[], ExplainerModule]) -> None:
    torch.manual_seed(0)
    model, image = build().eval(), toy_images(6, NUM_CLASSES)
    expected = model.explain(image)
    to_channels_last(model)
    assert_same_answer(model.explain(image.contiguous(memory_format=torch.channels_last)), expected)


def test_an_explanation_is_the_same_when_compiled() -> None:
    torch.manual_seed(0)
    model, image = dxai().eval(), toy_images(6, NUM_CLASSES)
    expected = model.explain(image)
    counters = torch._dynamo.utils.counters
    counters.clear()
    compile_blocks(model, "aot_eager")
    assert_same_answer(model.explain(image), expected)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_grouped_convolutions_keep_their_layout() -> None:
    # Layers.
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3),
    )
    to_channels_last(network)
    laid_out = [layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in network]
    assert laid_out == [True, False, False, True]
    # Maps between the layers of DXAI's generator.
    model, seen = dxai(), []
    to_channels_last(model)
    for layer in model.generator.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    model.eval().explain(toy_images(6, NUM_CLASSES).contiguous(memory_format=torch.channels_last))
    assert seen
    assert all(seen)


def test_images_of_every_stage_are_laid_out(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watched(FixedToyExplainer):
        def explain(self, image: Tensor, target: Tensor | None = None) -> Any:
            seen.append(image.is_contiguous(memory_format=torch.channels_last))
            return super().explain(image, target)

    model = Watched(toy_classifier())
    trainer = toy_trainer(tmp_path, [ChannelsLast()])
    trainer.validate(model, ToyData(), verbose=False)
    trainer.predict(model, ToyData().test_dataloader(), return_predictions=False)
    assert seen
    assert all(seen)
    weight = model.classifier.network.mix.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_trainer_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model = trained(dxai, tmp_path, [CompileBlocks("aot_eager"), RecomputeActivations()])
    for block in model.blocks():  # type: ignore[operator]
        assert "forward" not in vars(block)
        assert block._compiled_call_impl is None


def test_a_copy_recomputes_for_itself() -> None:
    model = dxai()
    recompute_activations(model)
    other = copy.deepcopy(model)
    for block, twin in zip(model.blocks(), other.blocks(), strict=True):
        assert block.forward.args[0] is block
        assert twin.forward.args[0] is twin


# torch's own patch, because monkeypatch would delete the limits instead of restoring them.
@torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8)
def test_the_compiler_does_not_stop_after_eight_widths() -> None:
    class Widening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(ResidualBlock(2 * width, 2 * width, 1) for width in range(1, 11))

        def blocks(self) -> list[nn.Module]:
            return [*self.layers]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = Widening()
    compile_blocks(network, "eager")
    for index, block in enumerate(network.blocks()):
        block(torch.zeros(1, 2 * index + 2, 4, 4))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 10


@pytest.mark.parametrize(("dynamic", "num_graphs"), [(False, 3), (None, 2)])
@torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=8, optimize_ddp=True)
def test_maps_of_another_size_are_compiled_anew(dynamic: bool | None, num_graphs: int) -> None:
    class Narrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(ResidualBlock(4, 4, 1) for _ in range(3))

        def blocks(self) -> list[nn.Module]:
            return [*self.layers]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    network = Narrowing()
    compile_blocks(network, "eager", dynamic=dynamic)
    for side, block in zip((16, 8, 4), network.blocks(), strict=True):
        block(torch.zeros(2, 4, side, side))
    # With dynamic=None the second size already stands for any.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    assert not torch._dynamo.config.optimize_ddp


@pytest.mark.parametrize(("stage", "dynamic"), [("fit", False), ("predict", None), ("validate", None)])
def test_training_alone_is_compiled_for_fixed_sizes(stage: str, dynamic: bool | None, monkeypatch: Any) -> None:
    model, asked = dxai(), []
    monkeypatch.setattr(ResidualBlock, "compile", lambda self, **options: asked.append(options))
    CompileBlocks("eager").setup(pl.Trainer(logger=False), model, stage)
    assert asked
    assert all(options == {"backend": "eager", "dynamic": dynamic} for options in asked)


def test_what_is_differentiated_twice_is_not_compiled() -> None:
    torch.manual_seed(0)
    critic = dxai().critic
    image = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, requires_grad=True)

    def penalty() -> Tensor:
        with double_backward(image):
            (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), [critic.heads.weight])
        return second

    # Compiled, then under autocast.
    expected = penalty()
    for block in critic.blocks():
        block.compile(backend="aot_eager")
    torch.testing.assert_close(penalty(), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(penalty(), expected, rtol=1e-2, atol=1e-3)


def test_a_method_without_blocks_is_refused() -> None:
    for change in (compile_blocks, recompute_activations):
        with pytest.raises(ValueError, match="FixedToyExplainer names no blocks that could be compiled or recomputed"):
            change(FixedToyExplainer(toy_classifier()))


def test_blocks_do_not_lie_inside_each_other() -> None:
    for build in [*TRAINED, diff_explainer]:
        blocks = build().blocks()  # type: ignore[operator]
        assert blocks
        inside = {id(inner) for block in blocks for inner in list(block.modules())[1:]}
        assert not inside & {id(block) for block in blocks}


def test_an_uncounted_pass_leaves_running_statistics() -> None:
    norm = nn.BatchNorm2d(3)
    network = nn.Sequential(norm)
    image = torch.randn(4, 3, 5, 5) + 2
    with uncounted(network):
        # A norm that is synchronised over processes needs a counter.
        assert norm.num_batches_tracked is not None
        same = network(image)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    assert norm.running_mean.abs().max() == 0
    assert int(norm.num_batches_tracked) == 0
    assert torch.equal(network(image), same)
    assert int(norm.num_batches_tracked) == 1
    assert norm.running_mean.abs().max() > 0
