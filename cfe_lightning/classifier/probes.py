"""Asks a network questions whose answers are known, however it came in, before anything is explained with it.

The answer for an image must not depend on chance, on earlier calls or on the other images of a batch, and it must be
logits: numbers that grow without bound when the network's last layer does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfe_lightning.classifier.outputs import Outputs, logits_of
from cfe_lightning.classifier.tracing import evaluating, probe_image
from cfe_lightning.files.text import one_line

#: Largest difference between two answers for the same image, relative to the spread of the answers.
_TOLERANCE = 1e-3
#: Factor by which the last layer is enlarged, and factors of the inputs.
_SCALE = 1e3
_INPUTS = (1.0, 1e2, 1e4)
#: A bounded output may exceed its bound by this much, as a softmax does to which a constant was added.
_SLACK = 0.05
#: Sums of probabilities differ from one another by no more than this share.
_SUM_TOLERANCE = 1e-3
_TRAIN_MODE = "it was exported in train mode: call network.eval() and export it again"
_CAUSES = "usual causes are dropout called without training=self.training, and batch norm left in train mode"


def check_network(
    network: nn.Module,
    name: str,
    channels: int,
    image_size: int,
    num_classes: int,
    outputs: Outputs,
    *,
    labelled: bool,
    exported: bool,
) -> None:
    """Checks that a network answers every image by itself, and with what ``outputs`` says.

    Args:
        network: Network from [B, C, S, S] to its answers.
        name: Name of the network in messages.
        channels: Number of image channels, C.
        image_size: Image side S in pixels.
        num_classes: Number of class names, as in ``logits_of``.
        outputs: Meaning of the outputs.
        labelled: One of several outputs is explained against its absence, so they need not exclude each other.
        exported: The network is a program, whose mode cannot be changed here.

    Raises:
        ValueError: If the network refuses a batch of one, answers the same image differently, or returns squashed
            numbers where logits are declared, or numbers that are no probabilities where those are.
    """
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=[]):
        ask = partial(_ask, network, num_classes)
        images = probe_image(network, channels, image_size, batch_size=3)
        answers = ask(images)
        _check_repetition(name, images, answers, ask, exported)
        if outputs == "probabilities":
            _check_probabilities(name, answers, labelled)
        elif is_squashed(network, images, num_classes):
            raise ValueError(
                f"{name} returns probabilities, but logits are needed: its outputs stay within "
                "[0, 1] or [-1, 1] however strong the input, or always have the same sum. Remove the softmax, sigmoid, "
                "tanh or calibration, or, where softmax or sigmoid is the last operation, declare "
                "outputs: probabilities, which are turned back into logits."
            )


def is_squashed(network: nn.Module, images: Tensor, num_classes: int | None = None) -> bool:
    """Tells whether outputs stay bounded by 1, or are shares of a whole, however strong the input or the last layer.

    Args:
        network: Network in eval mode.
        images: Any normalised images, [B, C, S, S].
        num_classes: Number of class names, as in ``logits_of``.
    """
    with evaluating(network), torch.no_grad():
        usual = [_ask(network, num_classes, images * factor) for factor in _INPUTS]
        with _enlarged(network, usual[0].numel(), images):
            strong = [_ask(network, num_classes, images * factor) for factor in _INPUTS]
    every = torch.cat([*usual, *strong])
    every = every[every.isfinite().all(dim=1)]
    # An answer that never changes shows nothing.
    if not len(every) or bool((every == every[0]).all()):
        return False
    if float(every.abs().max()) <= 1 + _SLACK:
        return True
    # Shares of a whole: probabilities, or percentages.
    sums = every.sum(dim=1)
    alike = float(sums.max() - sums.min()) <= _SUM_TOLERANCE * float(sums.abs().max())
    return every.shape[1] > 1 and bool((every >= 0).all()) and alike


def _ask(network: nn.Module, num_classes: int | None, images: Tensor) -> Tensor:
    # A copy, because the network may change its input in place.
    return logits_of(network(images.clone()), len(images), num_classes)


def _check_repetition(
    name: str, images: Tensor, answers: Tensor, ask: Callable[[Tensor], Tensor], exported: bool
) -> None:
    """Asks for the same images again, in another order, alone and in other company."""
    company = torch.cat([images[:1], 10 * images[1:]])
    questions = (
        ("when it is asked twice", images, answers),
        ("in another order of the batch", images.flip(0), answers.flip(0)),
        ("alone", images[:1], answers[:1]),
        ("in other company", company, answers[:1]),
    )
    spread = float(answers.std())
    for number, (words, asked, expected) in enumerate(questions):
        try:
            again = ask(asked)[: len(expected)]
        # A network may raise anything on batches that it was not made for.
        except Exception as error:
            raise ValueError(
                f"{name} takes {len(images)} images, but fails on {len(asked)} {words}: {one_line(error)}."
            ) from error
        difference = float((again - expected).abs().max())
        if not difference <= _TOLERANCE * max(spread, float(expected.abs().max()) / 100):
            cause = f"so {_TRAIN_MODE}" if exported and number else _CAUSES
            raise ValueError(
                f"{name} answers the same image differently {words}: by {difference:.2g}, where the answers for "
                f"different images spread by {spread:.2g}; {cause}."
            )


def _check_probabilities(name: str, answers: Tensor, labelled: bool) -> None:
    """Checks declared probabilities: each in [0, 1], and of exclusive classes with a sum of 1."""
    if bool((answers < -_SUM_TOLERANCE).any()) or bool((answers > 1 + _SUM_TOLERANCE).any()):
        raise ValueError(
            f"outputs says that {name} returns probabilities, but it returns {float(answers.min()):.3g} to "
            f"{float(answers.max()):.3g}: leave outputs out if these are logits."
        )
    sums = answers.sum(dim=1)
    if answers.shape[1] > 1 and not labelled and float((sums - 1).abs().max()) > _SUM_TOLERANCE:
        raise ValueError(
            f"The {answers.shape[1]} probabilities of {name} do not sum to 1 but to {float(sums.min()):.3g} to "
            f"{float(sums.max()):.3g}, so its classes do not exclude each other: name one of them as label."
        )


@contextmanager
def _enlarged(network: nn.Module, numel: int, images: Tensor) -> Iterator[None]:
    """Enlarges the weights of the last layer that returns ``numel`` numbers, and adds noise: it may start at zero."""
    last: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel() == numel:
            last[:] = [module]

    with ExitStack() as hooks:
        for module in network.modules():
            # A scripted module takes no hooks.
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                hooks.callback(module.register_forward_hook(note).remove)
        network(images.clone())
    weights = [weight for module in last for weight in module.parameters()]
    kept = [weight.data for weight in weights]
    noise = torch.Generator().manual_seed(0)
    try:
        for weight in weights:
            drawn = torch.randn(weight.shape, generator=noise).to(weight)
            weight.data = _SCALE * (weight.data + weight.data.std(correction=0).clamp_min(0.1) * drawn)
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data
