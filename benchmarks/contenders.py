"""What ``benchmarks/run.py`` measures: the methods, the variants, and one training step or explanation as a function.

Networks are untrained: their weights do not matter for time, but what explanations look for should be found, so the
classifier is scaled and shifted until it decides for either class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import lcm
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from straightforward import Straightforward, explain_one_by_one
from torch import Tensor
from torch.utils.data import default_collate

from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.file import build_network
from cfe_lightning.compute import acceleration
from cfe_lightning.data.synthetic import SyntheticShapes
from cfe_lightning.methods.diff_explainer import DiffExplainer, DiffusionAutoencoder
from cfe_lightning.methods.dxai import Dxai
from cfe_lightning.methods.mirror_cfe import MirrorCFE
from cfe_lightning.methods.steerable_lens import SteerableLens
from cfe_lightning.methods.stylex import StylEx

#: What a training step reads of a batch.
_FED = ("image", "label")
#: Head, feature map and further arguments of the classifiers.
_CLASSIFIERS: dict[str, tuple[str, str | None]] = {
    "SimpleCnn": ("fc", None),
    "PooledCnn": ("fc", "stage3"),
    "ResNet18": ("fc", "layer4"),
    "DenseNet121": ("classifier", None),
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a module is run.

    Attributes:
        bf16: As ``--precision bf16-mixed``.
        compiled: Its blocks, by ``acceleration.compile_blocks``.
        channels_last: ``acceleration.to_channels_last``.
        recompute: ``acceleration.recompute_activations``.
    """

    bf16: bool = False
    compiled: bool = False
    channels_last: bool = False
    recompute: bool = False

    @classmethod
    def named(cls, name: str) -> Variant:
        """The variant of a name such as "bf16+compile+channels_last".

        Raises:
            ValueError: If it has an unknown part.
        """
        parts = name.split("+")
        if unknown := {*parts} - {"fp32", "bf16", "compile", "channels_last", "recompute"}:
            raise ValueError(
                f"{name!r} is no variant ({', '.join(sorted(unknown))} is unknown): join fp32 or bf16 and any of "
                "compile, channels_last and recompute by +."
            )
        return cls(
            bf16="bf16" in parts,
            compiled="compile" in parts,
            channels_last="channels_last" in parts,
            recompute="recompute" in parts,
        )

    def apply(self, module: pl.LightningModule) -> None:
        """Changes a module in place; the precision is ``context``."""
        if self.channels_last:
            acceleration.to_channels_last(module)
        if self.recompute:
            acceleration.recompute_activations(module)
        if self.compiled:
            acceleration.compile_blocks(module)

    def context(self, device: str) -> AbstractContextManager[None]:
        """What a Trainer with this precision puts around every step."""
        return MixedPrecision("bf16-mixed", device).forward_context() if self.bf16 else nullcontext()


# --- methods ---

#: Widths of ``configs/dxai_synthetic.yaml``.
_DXAI_SMALL: dict[str, Any] = {
    "num_branches": 3,
    "branch_width": 8,
    "max_branch_width": 24,
    "min_resolution": 8,
    "blocks_per_stage": 1,
    "style_dim": 16,
    "latent_dim": 8,
    "mapping_width": 64,
    "mapping_shared": 2,
    "mapping_unshared": 1,
    "critic_width": 24,
    "critic_max_width": 64,
    "r1_interval": 4,
}
_DXAI_PUBLISHED: dict[str, Any] = {"branch_width": 7, "stem_norm": "instance", "head_norm": "instance"}
#: Widths of ``configs/stylex_synthetic.yaml``; the search of an untrained generator needs few images.
_STYLEX_SMALL: dict[str, Any] = {
    "base": 512,
    "max_width": 32,
    "z_dim": 64,
    "w_dim": 64,
    "mapping_layers": 4,
    "reference_size": 16,
}
_STYLEX_PUBLISHED: dict[str, Any] = {"reference_size": 64}
#: The form of the swap that the paper's L-BFGS converges to, so that gradients can be compared; both cost the same.
_MIRROR_PUBLISHED: dict[str, Any] = {"swap": "logits"}
#: Widths of ``configs/mirror_synthetic.yaml``.
_MIRROR_SMALL: dict[str, Any] = {
    **_MIRROR_PUBLISHED,
    "width": 24,
    "max_width": 96,
    "editor_width": 32,
    "critic_widths": [64, 128, 128],
}
#: Widths of ``configs/diffusion_autoencoder_synthetic.yaml``.
_AUTOENCODER_SMALL: dict[str, Any] = {
    "width": 16,
    "blocks": 1,
    "attention_sizes": [8],
    "code_dim": 64,
    "time_dim": 64,
    "groups": 8,
    "dropout": 0.0,
}


def _autoencoder(size: int, small: bool) -> dict[str, Any]:
    """The lowest maps have 8 x 8 cells at any size, as in the paper's at 256 pixels."""
    halvings = size.bit_length() - 4
    published = [1, 1, 2, 2, 4, 4]
    multipliers = [1, 2, *[4] * (halvings - 1)] if small else published[-1 - halvings :]
    return {"image_size": size, "multipliers": multipliers, **(_AUTOENCODER_SMALL if small else {})}


def untrained_classifier(kind: str, size: int, images: Tensor | None = None) -> FrozenClassifier:
    """A random network of ``networks.classifiers`` with two classes, which decides for either on these images."""
    head, feature_map = _CLASSIFIERS[kind]
    further: dict[str, Any] = {
        "SimpleCnn": {"image_size": size},
        "ResNet18": {"small_image": size < 100},
        "DenseNet121": {"small_image": False},
    }.get(kind, {})
    spec = ClassifierSpec(
        class_path=f"cfe_lightning.classifier.networks.{kind}",
        init_args={"num_classes": 2, "channels": 3, **further},
        head=head,
        feature_map=feature_map,
        class_names=("healthy", "pathology"),
        image_size=size,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    classifier = FrozenClassifier(build_network(spec), spec)
    if images is not None:
        layer: Any = classifier.network.get_submodule(head)
        with torch.no_grad():
            layer.weight.mul_(2 / classifier(images).diff(dim=1).std())
            layer.bias[1] -= classifier(images).diff(dim=1).median()
    return classifier


def shapes(count: int, size: int) -> dict[str, Tensor]:
    """A batch of the built-in shapes: images [count, 3, size, size] and labels [count]."""
    dataset = SyntheticShapes(image_size=size).dataset("val")
    return {name: value for name, value in default_collate([dataset[i] for i in range(count)]).items() if name in _FED}


def _fill_zeros(module: torch.nn.Module) -> None:
    """Layers of a diffusion autoencoder that begin as zero: its pictures would not depend on its codes."""
    for parameter in module.parameters():
        if not bool(parameter.any()):
            parameter.data.normal_(std=0.1)


def _diff_explainer(classifier: FrozenClassifier, size: int, small: bool) -> DiffExplainer:
    model = DiffExplainer(classifier, autoencoder=_autoencoder(size, small), metric="identity", largest_step=16.0)
    _fill_zeros(model.autoencoder)
    return model


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        classifier: Kind of the classifier that it explains, small and published.
        build: Classifier, side of the images and whether small widths are asked for, to the untrained module.
        works: What of it is measured.
    """

    classifier: tuple[str, str]
    build: Callable[[FrozenClassifier, int, bool], pl.LightningModule]
    works: tuple[str, ...]


METHODS: Mapping[str, Method] = {
    "Dxai": Method(
        classifier=("SimpleCnn", "SimpleCnn"),
        build=lambda classifier, size, small: Dxai(classifier, **(_DXAI_SMALL if small else _DXAI_PUBLISHED)),
        works=("train", "explain"),
    ),
    "DiffusionAutoencoder": Method(
        classifier=("SimpleCnn", "SimpleCnn"),
        build=lambda classifier, size, small: DiffusionAutoencoder(**_autoencoder(size, small)),
        works=("train",),
    ),
    "DiffExplainer": Method(classifier=("SimpleCnn", "ResNet18"), build=_diff_explainer, works=("explain", "decode")),
    "StylEx": Method(
        classifier=("PooledCnn", "DenseNet121"),
        build=lambda classifier, size, small: StylEx(classifier, **(_STYLEX_SMALL if small else _STYLEX_PUBLISHED)),
        works=("train", "explain"),
    ),
    "MirrorCFE": Method(
        classifier=("PooledCnn", "ResNet18"),
        build=lambda classifier, size, small: MirrorCFE(classifier, **(_MIRROR_SMALL if small else _MIRROR_PUBLISHED)),
        works=("train", "explain"),
    ),
    "SteerableLens": Method(
        classifier=("PooledCnn", "ResNet18"),
        build=lambda classifier, size, small: SteerableLens(classifier),
        works=("explain",),
    ),
}


def build(name: str, size: int, small: bool) -> pl.LightningModule:
    """The untrained module of a method around an untrained classifier, the same for the same arguments."""
    torch.manual_seed(0)
    method = METHODS[name]
    classifier = untrained_classifier(method.classifier[0 if small else 1], size, shapes(16, size)["image"])
    return method.build(classifier, size, small)


# --- one step of work ---


class Contender:
    """Something that does the work of one batch when it is called with the number of an iteration.

    Args:
        module: What works; it is moved to the device.
        work: "train", "explain" or "decode".
        batch: Images and labels.
        device: "cpu" or "cuda".
        variant: How; applied to the module here.
        one_by_one: Explain image by image.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        work: str,
        batch: dict[str, Tensor],
        device: str,
        variant: Variant | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.variant = variant or Variant()
        self.module = module.to(device).train(work == "train")
        self.device = device
        self.work = work
        self.one_by_one = one_by_one
        self.batch = {name: value.to(device) for name, value in batch.items()}
        self.num_images = len(batch["image"])
        self.variant.apply(self.module)
        if self.variant.channels_last:
            self.batch["image"] = self.batch["image"].contiguous(memory_format=torch.channels_last)
        if work == "train":
            _detach(self.module)
        elif work == "explain":
            # What is found out once for a whole data set is no part of an explanation's time.
            explainer: Any = self.module
            if (survey := explainer.survey()) is not None:
                explainer.adopt(survey)

    def __call__(self, iteration: int) -> Any:
        """Trains a step; or explains or decodes the batch, and returns the answer."""
        if self.work == "train":
            self._train(iteration)
            return None
        with torch.no_grad(), self.variant.context(self.device):
            if self.work == "decode":
                return self._decode()
            explain = explain_one_by_one if self.one_by_one else type(self.module).explain
            return explain(self.module, self.batch["image"])

    def _train(self, iteration: int) -> None:
        module: Any = self.module
        module._trainer.fit_loop.total_batch_idx = iteration
        optimizers = module.optimizers()
        module._trainer.global_step = iteration * (len(optimizers) if isinstance(optimizers, list) else 1)
        with self.variant.context(self.device):
            loss = module.training_step(self.batch, iteration)
        if module.automatic_optimization:
            optimizers.zero_grad()
            loss.backward()
            optimizers.step()

    def _decode(self) -> Tensor:
        module: Any = self.module
        if not hasattr(self, "_code"):
            self._code = module.autoencoder.encode(self.batch["image"])
        # By shape: the memory layout of the images must not change the numbers.
        noise = torch.randn(self.batch["image"].shape, device=self.device)
        return module.autoencoder.decode(noise, self._code, module.decoding_steps)

    def phases(self) -> list[tuple[int, float]]:
        """Iterations that stand for all others, with their shares: penalties come every few iterations only."""
        names = {"r1_interval": "r1_weight", "path_interval": "path_weight"} if self.work == "train" else {}
        weights = getattr(self.module, "losses", self.module)
        intervals = [
            getattr(self.module, name)
            for name, weight in names.items()
            if hasattr(self.module, name) and getattr(weights, weight)
        ]
        cycle = lcm(*intervals)
        kinds: dict[tuple[bool, ...], list[int]] = {}
        for iteration in range(cycle):
            kinds.setdefault(tuple(iteration % interval == 0 for interval in intervals), []).append(iteration)
        return [(members[0], len(members) / cycle) for members in kinds.values()]


def copied(module: pl.LightningModule, way: Straightforward | None = None) -> pl.LightningModule:
    """A copy of a module, which does its work in a straightforward way if one is given."""
    module = copy.deepcopy(module)
    if way is not None:
        way.exchange(module)
    return module


def _detach(module: Any) -> None:
    """Lets training steps run without a Trainer; nothing is logged."""
    optimizers = module.configure_optimizers()
    module.optimizers = lambda: optimizers
    module.manual_backward = lambda loss: loss.backward()
    module.log = module.log_dict = lambda *_, **__: None
    module.all_gather = lambda value: value
    module._trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(total_batch_idx=0), global_step=0, strategy=None, training=False, world_size=1
    )
