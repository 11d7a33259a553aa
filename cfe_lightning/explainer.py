"""The base class of every method, a LightningModule around one frozen classifier, and its loading from a checkpoint."""

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

#: Keys of a checkpoint that only resuming needs.
RESUME_ONLY = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "current_model_state", "averaging_state")


class ExplainerModule(pl.LightningModule, ABC):
    """A method that explains one frozen classifier; subclasses implement ``explain`` and, if they learn, training.

    Args:
        classifier: The classifier to explain. Every checkpoint contains its weights, so one file is enough; all other
            constructor arguments must be plain data (numbers, strings, lists).

    Attributes:
        needs_gradient: True if the method sends gradients through the classifier. False also allows classifiers that
            were exported without gradients.
        needs_training: True if the method learns. False saves it as soon as it is configured, and lets
            ``explain.py --method`` use it untrained.
        caution: Warning for every reader of the explanations, a sentence for the report; None for no warning.
        num_slices: Number of a patient's slices tiled into one image, see ``data.patient_slices``; 1 for plain images.
        back_off: Splits batches that do not fit into memory and remembers the size that fits.
    """

    needs_gradient: ClassVar[bool] = True
    needs_training: ClassVar[bool] = True
    caution: ClassVar[str | None] = None

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__()
        # Records the arguments of the subclass. Lightning collects those of all calling constructors; arguments of
        # classes in between, which the subclass does not take, are removed.
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
        """Explains images [B, C, H, W] in [-1, 1] for target classes [B]; None means ``default_target``."""

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks with most of the work, none inside another, for ``compute.acceleration``."""
        return []

    def default_target(self, logits: Tensor) -> Tensor:
        """Returns the target where none is given, logits [B, K] -> [B]: the runner-up."""
        return runner_up(logits)

    def survey(self) -> dict[str, Any] | None:
        """Computes the facts about the classifier that all explanations share, as plain data; None if there are none.

        ``explain`` computes them unless they were adopted; ``explain.py`` stores them beside the checkpoint.
        """
        return None

    def adopt(self, survey: dict[str, Any]) -> None:
        """Uses the result of an earlier ``survey`` with the same weights and arguments."""
        raise ValueError(f"{type(self).__name__} surveys nothing, so there is nothing to adopt.")

    def atlas(self) -> Atlas | None:
        """Draws the survey of the classifier; None for methods without one."""
        return None

    def setup(self, stage: str) -> None:
        """Refuses float16 training where it fails; a subclass that overrides this method calls it."""
        if stage == "fit":
            check_precision(self, str(self.trainer.precision))

    @final
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Explanation:
        """Explains the ``image`` of a batch, for its ``target`` if it has one, and in parts if memory is short."""
        image, target = batch["image"], batch.get("target")

        def part(rows: slice) -> Explanation:
            return self.explain(image[rows], None if target is None else target[rows])

        return self.back_off.in_parts(len(image), part, Explanation.joined)

    @final
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the entries from which ``load_explainer`` rebuilds method and classifier without other files."""
        checkpoint["explainer"] = {"class_path": public_path(type(self)), "version": VERSION}
        checkpoint["classifier"] = self.classifier.spec.to_dict()
        # Lightning omits the key for a method without arguments.
        checkpoint.setdefault("hyper_parameters", {})


def check_precision(module: pl.LightningModule, precision: str) -> None:
    """Refuses float16 training of a module that steps its optimisers by hand.

    float16 gradients vanish unless they are scaled, and a trainer has one scale that changes after every step: an
    optimiser would see the scale of another one's gradients, and a penalty on gradients would see scaled ones.

    Raises:
        ValueError: If the precision is float16 and the module's optimisation is manual.
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
        path: Checkpoint of ``train.py``.
        trusted: Packages, besides cfe_lightning and torchvision, whose classes the file may name.
        changes: Arguments of the method to replace, such as ``num_steps``; none that the shapes of weights depend on.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is no explainer checkpoint, names a class outside the trusted packages, or the method
            does not take the changes.
    """
    path, changes = Path(path), changes or {}
    checkpoint = load_checkpoint(path)
    class_path, spec, arguments, weights = _explainer_entries(checkpoint, path)
    # Class and arguments.
    kind = resolve_class_path(class_path, trusted)
    if not (isinstance(kind, type) and issubclass(kind, ExplainerModule)):
        raise ValueError(f"{path} names {class_path}, which is not an explainer.")
    check_arguments(kind, changes)
    version = checkpoint["explainer"].get("version")
    # Networks, no larger than the file.
    with allocation_limit(path):
        classifier = FrozenClassifier(build_network(spec, trusted), spec)
        try:
            explainer = kind(classifier, **(arguments | dict(changes)))
        except ValueError:  # the method's own message
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


def _explainer_entries(checkpoint: dict[str, Any], path: Path) -> tuple[str, ClassifierSpec, dict[str, Any], Any]:
    """Returns class path, classifier spec, constructor arguments and weights of a checkpoint, or refuses it."""
    # Names.
    if missing := {"explainer", "classifier", "state_dict", "hyper_parameters"} - checkpoint.keys():
        raise ValueError(
            f"{path} is not an explainer checkpoint (missing: {', '.join(sorted(missing))}): give the best.ckpt or "
            "last.ckpt that train.py wrote under checkpoints/<run>/."
        )
    # Types.
    try:
        class_path = checkpoint["explainer"]["class_path"]
        spec = ClassifierSpec.from_dict(checkpoint["classifier"])
        arguments, weights = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        if not (isinstance(class_path, str) and has_names(arguments) and has_names(weights)):
            raise ValueError("one of its entries has the wrong type")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise ValueError(f"{path} is not an explainer checkpoint that train.py wrote: {reason}.") from error
    return class_path, spec, arguments, weights


def has_names(part: Any) -> bool:
    """Tells whether an entry of a checkpoint is a dictionary with text keys."""
    return isinstance(part, dict) and all(isinstance(name, str) for name in part)


def check_arguments(kind: type[ExplainerModule], arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that a method's constructor does not take.

    Raises:
        ValueError: If a name is unknown, or a value has the wrong type or is none of the choices; one sentence.
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
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    # A whole number is accepted as a float; true is no number.
    accepted: Any = {float: (int, float), None: NoneType}.get(hint, origin or hint)
    return isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_described, inner))
    if origin is list:
        return f"a list (of {_described(inner[0])})"
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    return words.get(hint, str(getattr(hint, "__name__", hint)))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint as plain data, so that nothing in the file is executed.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is truncated, no checkpoint, holds anything but plain data and tensors, or was written
            by a newer version of this package.
    """
    # Plain data.
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
    # A checkpoint of this version or an earlier one.
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint written by train.py.")
    for part in ("explainer", "autoencoder"):
        if isinstance(checkpoint.get(part), dict) and "version" in checkpoint[part]:
            _check_version(checkpoint[part]["version"], path)
    return checkpoint


def _check_version(written: Any, path: Path) -> None:
    """Refuses the file of a newer version, which this one could misread."""
    try:
        newer = Version(written) > Version(VERSION)
    except (InvalidVersion, TypeError) as error:
        raise ValueError(
            f"{path} does not say which version of cfe_lightning wrote it but {written!r:.80}: give the best.ckpt or "
            "last.ckpt of a run of train.py."
        ) from error
    if newer:
        raise ValueError(
            f"{path} was written by version {written} of cfe_lightning, newer than this {VERSION}: "
            f"upgrade to {written} or later."
        )


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strip_checkpoint(source: Path, destination: Path) -> None:
    """Copies a checkpoint without the state that only resuming needs; the copy is smaller and explains the same."""
    checkpoint = load_checkpoint(source)
    save_plain(destination, {key: value for key, value in checkpoint.items() if key not in RESUME_ONLY})
