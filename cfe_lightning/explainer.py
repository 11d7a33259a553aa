"""The base of every method: a LightningModule around one frozen classifier, and its loading from one file."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, final, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from cfe_lightning.atlas import Atlas
from cfe_lightning.classifier import ClassifierSpec, FrozenClassifier
from cfe_lightning.classifier.file import build_network, check_outputs, fill
from cfe_lightning.compute.memory import BackOff
from cfe_lightning.decisions import runner_up
from cfe_lightning.explanation import Explanation
from cfe_lightning.files.tensors import allocation_limit, load_plain, save_plain
from cfe_lightning.files.text import VERSION
from cfe_lightning.files.trust import public_path, resolve_class_path

#: Keys of a checkpoint that only a resumed training needs.
RESUME_ONLY = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "current_model_state", "averaging_state")


class ExplainerModule(pl.LightningModule, ABC):
    """A method that explains one frozen classifier; subclasses implement ``explain`` and, if they learn, training.

    Args:
        classifier: The classifier to be explained. Its weights are stored in every checkpoint, so a checkpoint alone
            is enough; all other constructor arguments must be plain data (numbers, strings, lists).

    Attributes:
        needs_gradient: Whether the method sends gradients through the classifier; one that only asks for its answers
            sets this to False, and then works with classifiers that were exported without gradients.
        needs_training: Whether the method learns anything; one that does not is saved as soon as it is configured, and
            ``explain.py --method`` takes it as it is.
        caution: What every reader of its explanations has to keep in mind, a sentence for the report; None for nothing.
        num_slices: Slices of a patient that are tiled into one image, see ``data.patient_slices``; 1 for images.
        back_off: Explains a batch in parts where memory is short; knows how many images fit.
    """

    needs_gradient: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    caution: ClassVar[str | None] = None

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__()
        # Records the arguments of the subclass's constructor: Lightning walks up the calling frames, and so also meets
        # those of classes in between, which the subclass does not take.
        self.save_hyperparameters(ignore=["classifier"])
        own = inspect.signature(type(self)).parameters
        self.save_hyperparameters(ignore=["classifier", *(name for name in self.hparams if name not in own)])
        self.classifier = classifier
        self.image_size = classifier.spec.image_size
        self.channels = classifier.spec.channels
        self.num_slices = 1
        self.back_off = BackOff()

    @abstractmethod
    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Explains images [B, C, H, W] in [-1, 1] for target classes [B]; None asks for ``default_target``."""

    def blocks(self) -> list[nn.Module]:
        """The building blocks of the networks, largest share of the work, to be compiled or recomputed one by one.

        None may lie inside another; ``acceleration`` says what is done with them.
        """
        return []

    def default_target(self, logits: Tensor) -> Tensor:
        """The class that is asked for where none is named, logits [B, K] -> [B]: the runner-up."""
        return runner_up(logits)

    def survey(self) -> dict[str, Any] | None:
        """What the method has to find out once about the classifier before it explains images, as plain data.

        ``explain`` makes it where nothing was adopted; ``explain.py`` keeps it beside the checkpoint. None where images
        are explained one by one.
        """
        return None

    def adopt(self, survey: dict[str, Any]) -> None:
        """Takes over what ``survey`` returned with the same weights and arguments."""
        raise ValueError(f"{type(self).__name__} surveys nothing, so there is nothing to adopt.")

    def atlas(self) -> Atlas | None:
        """What was found out about the classifier as a whole, drawn; None where images are explained one by one."""
        return None

    def setup(self, stage: str) -> None:
        """Refuses to train in float16 where that goes wrong; a subclass with a ``setup`` of its own calls this one."""
        if stage == "fit":
            check_precision(self, str(self.trainer.precision))

    @final
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Explanation:
        """Explains one batch of the batch contract, for its ``target`` if it has one; in parts if memory is short."""
        image, target = batch["image"], batch.get("target")

        def part(rows: slice) -> Explanation:
            return self.explain(image[rows], None if target is None else target[rows])

        return self.back_off.in_parts(len(image), part, Explanation.joined)

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what ``load_explainer`` needs to rebuild method and classifier from this file alone."""
        kind = type(self)
        checkpoint["explainer"] = {
            "class_path": public_path(kind),
            "version": VERSION,
        }
        checkpoint["classifier"] = self.classifier.spec.to_dict()
        # Lightning leaves the key out where a method takes no argument.
        checkpoint.setdefault("hyper_parameters", {})


def check_precision(module: pl.LightningModule, precision: str) -> None:
    """Refuses to train in float16 where optimisers are stepped by hand.

    Its gradients have to be scaled so that they do not vanish, and the one scale of a trainer changes after every
    step: that of one optimiser would be judged by the gradient of another, and a penalty on gradients by scaled ones.

    Args:
        module: What is to be trained.
        precision: The trainer's.

    Raises:
        ValueError: If that was asked for.
    """
    if precision.startswith("16") and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} cannot be trained with precision {precision}, because float16 gradients vanish "
            "or overflow in its alternating steps: use bf16-mixed or 32-true."
        )


def load_explainer(
    path: str | Path, trusted: Sequence[str] = (), changes: Mapping[str, Any] | None = None
) -> ExplainerModule:
    """Rebuilds an explainer and its classifier from one checkpoint, in eval mode on the CPU.

    Args:
        path: A checkpoint written by ``train.py``.
        trusted: Packages besides cfe_lightning and torchvision whose classes the file may name.
        changes: Arguments of the method that should differ from training, as ``num_steps``; not those that the weights
            depend on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no explainer checkpoint, names a class outside the trusted packages, or cannot be
            changed in this way.
    """
    path = Path(path)
    checkpoint = load_checkpoint(path)
    missing = {"explainer", "classifier", "state_dict", "hyper_parameters"} - checkpoint.keys()
    if missing:
        raise ValueError(
            f"{path} is not an explainer checkpoint (missing: {', '.join(sorted(missing))}): give the best.ckpt or "
            "last.ckpt that train.py wrote under checkpoints/<run>/."
        )
    try:
        class_path = checkpoint["explainer"]["class_path"]
        spec = ClassifierSpec.from_dict(checkpoint["classifier"])
        arguments, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        if not (isinstance(class_path, str) and has_names(arguments) and has_names(weights)):
            raise ValueError("a part of it is of another form")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(f"{path} is not an explainer checkpoint that train.py wrote: {reason}.") from error
    kind = resolve_class_path(class_path, trusted)
    if not (isinstance(kind, type) and issubclass(kind, ExplainerModule)):
        raise ValueError(f"{path} names {class_path}, which is not an explainer.")
    changes = changes or {}
    check_arguments(kind, changes)
    version = checkpoint["explainer"].get("version")
    with allocation_limit(path):
        classifier = FrozenClassifier(build_network(spec, trusted), spec)
        try:
            explainer = kind(classifier, **(arguments | dict(changes)))
        except ValueError:  # a sentence of the method's own
            raise
        except Exception as error:
            raise ValueError(
                f"{path} was written by version {version} of cfe_lightning and cannot be read by this one "
                f"({VERSION}): {str(error) or type(error).__name__}."
            ) from error
    fill(explainer, weights, f"{path} (written by version {version})", kind.__name__)
    check_outputs(explainer.classifier, str(path))
    explainer.eval()
    return explainer


def has_names(part: Any) -> bool:
    """Whether a part of a file is a dictionary by text."""
    return isinstance(part, dict) and all(isinstance(name, str) for name in part)


def check_arguments(kind: type[ExplainerModule], arguments: Mapping[str, Any]) -> None:
    """Refuses what a method's constructor does not take, in one sentence.

    Raises:
        ValueError: If it has no argument of a name, or a value is of another type or none of the choices.
    """
    known = {name: hint for name, hint in get_type_hints(kind.__init__).items() if name not in ("classifier", "return")}
    if unknown := arguments.keys() - known.keys():
        raise ValueError(
            f"{kind.__name__} has no argument {', '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}."
        )
    for name, value in arguments.items():
        if not _fits(value, known[name]):
            raise ValueError(f"{kind.__name__} takes {_described(known[name])} as {name}, not {value!r}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from a command line or a file is of an annotated type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    # A whole number will do for a fraction; true is no number.
    accepted: Any = {float: (int, float), None: NoneType}.get(hint, origin or hint)
    return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    """An annotated type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(map(_described, inner))
    if origin is list:
        return f"a list (of {_described(inner[0])})"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint as plain data: ``weights_only``, so nothing in the file is executed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, no checkpoint, holds anything but plain data and tensors, or was written
            by a newer version of this package.
    """
    if not path.is_file():
        held = f"{path} is no file" if path.exists() else f"There is no checkpoint {path}"
        raise FileNotFoundError(f"{held}: give a .ckpt file that train.py wrote.")
    try:
        checkpoint = load_plain(path)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint (truncated, or not plain data): {error}; give the best.ckpt or "
            "last.ckpt of a run of train.py."
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint written by train.py.")
    for part in ("explainer", "autoencoder"):
        if isinstance(checkpoint.get(part), dict) and "version" in checkpoint[part]:
            _check_version(checkpoint[part]["version"], path)
    return checkpoint


def _check_version(written: Any, path: Path) -> None:
    """Refuses a newer version: what this one would make of its file, nobody knows."""
    ours = VERSION
    try:
        newer = Version(written) > Version(ours)
    except (InvalidVersion, TypeError) as error:
        raise ValueError(
            f"{path} does not say which version of cfe_lightning wrote it but {written!r:.80}: give the best.ckpt or "
            "last.ckpt of a run of train.py."
        ) from error
    if newer:
        raise ValueError(
            f"{path} was written by version {written} of cfe_lightning, newer than this {ours}: upgrade "
            f"to {written} or later."
        )


def sha256_of(path: Path) -> str:
    """The digest that tells one checkpoint from all others, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strip_checkpoint(source: Path, destination: Path) -> None:
    """Copies a checkpoint without the state that only a resumed training needs: smaller, explains the same."""
    checkpoint = load_checkpoint(source)
    save_plain(destination, {key: value for key, value in checkpoint.items() if key not in RESUME_ONLY})
