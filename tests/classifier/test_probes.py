"""Questions to networks: answers in every usual shape, squashed outputs, chance, memory, neighbours, changed inputs."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.classifier import FrozenClassifier, exported_classifier, wrap_classifier
from cfe_lightning.classifier.file import load_classifier
from cfe_lightning.classifier.outputs import logits_of, logits_of_probabilities
from cfe_lightning.classifier.probes import check_network, is_squashed
from cfe_lightning.classifier.tracing import probe_image

#: Endings of a network by name, from logits [B, K] to the answer.
ENDS: dict[str, Callable[[Tensor], Any]] = {}
Pair = namedtuple("Pair", ["features", "logits"])


@dataclass
class ModelOutput:
    """Results of a network as libraries return them."""

    loss: None
    logits: Tensor


class Ends(nn.Module):
    """Pooled features, a linear layer, and an ending out of ``ENDS``."""

    def __init__(self, end: str = "plain", outputs: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.end = end
        self.body = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, outputs)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2

    def forward(self, image: Tensor) -> Any:
        return ENDS[self.end](self.fc(self.body(image).relu().mean(dim=(2, 3))))


def wrapped(
    end: str, tmp_path, outputs: int = 2, kind: str = "Ends", declared: str = "logits", **options: Any
) -> FrozenClassifier:
    network = globals()[kind](end, outputs)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    names = options.pop("class_names", ["a", "b", "c"][: max(outputs, 2)])
    return wrap_classifier(
        class_path=f"{__name__}.{kind}", state_dict_path=str(tmp_path / "weights.pt"), class_names=names, image_size=8,
        mean=[0.5] * 3, std=[0.5] * 3, init_args={"end": end, "outputs": outputs}, outputs=declared,
        **options,
    )  # fmt: skip


ENDS |= {
    "plain": lambda x: x,
    "squeezed": lambda x: x.squeeze(),
    "cells": lambda x: x[:, :, None, None],
    "dictionary": lambda x: {"features": torch.ones(len(x), 7), "logits": x},
    "nameless": lambda x: {"embedding": torch.ones(len(x), 7), "scores": x},
    "tuple": lambda x: (x, x * 2),
    "features first": lambda x: [torch.ones(len(x), 7), x],
    "named tuple": lambda x: Pair(torch.ones_like(x), x),
    "model output": lambda x: ModelOutput(None, x),
}


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("end", list(ENDS))
def test_answers_of_every_usual_shape_are_understood(end, outputs, tmp_path):
    classifier, plain = wrapped(end, tmp_path, outputs), wrapped("plain", tmp_path, outputs)
    for batch_size in (1, 3):
        image = torch.rand(batch_size, 3, 8, 8) * 2 - 1
        assert torch.equal(classifier(image), plain(image))
    # The head is found whatever lies around the logits, and the file holds all of it.
    assert classifier.spec.head == "fc"
    assert torch.allclose(classifier.head(classifier.features(image)), plain(image), atol=1e-6)
    classifier.save(tmp_path / "file.pt")
    assert torch.equal(load_classifier(str(tmp_path / "file.pt"), [__name__.partition(".")[0]])(image), plain(image))


@pytest.mark.parametrize("answer", [None, "text", {}, torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long), ()])
def test_what_holds_no_logits_is_described(answer):
    with pytest.raises(ValueError, match=r"logits \[B, K\] are needed, but 2 images gave"):
        logits_of(answer, 2)


# --- squashed outputs ------------------------------------------------------------------------------------------------


def pieces(x: Tensor) -> Tensor:
    """An operating point: probabilities moved so that a table's threshold becomes 0.5."""
    p = x.sigmoid()
    return torch.where(p < 0.2, p * 2.5, 0.5 + (p - 0.2) * 0.625)


SQUASHED: dict[str, Callable[[Tensor], Any]] = {
    "softmax": lambda x: x.softmax(dim=1),
    "softmax plus": lambda x: x.softmax(dim=1) + 1e-3,
    "softmax by hand": lambda x: x.exp() / x.exp().sum(dim=1, keepdim=True).clamp_max(1e30),
    "no gradient": lambda x: x.softmax(dim=1).detach(),
    "percent": lambda x: 100 * x.softmax(dim=1),
    "sigmoid, clamped": lambda x: x.sigmoid().clamp(1e-6, 1 - 1e-6),
    "two views": lambda x: (x.sigmoid() + (x + 0.5).sigmoid()) / 2,
    "cast": lambda x: x.sigmoid().double(),
    "tanh": torch.tanh,
    "operating point": pieces,
    "rational": lambda x: x / (1 + x.abs()),
    "temperature": lambda x: (x / 1.7).softmax(dim=1),
}
LOGITS: dict[str, Callable[[Tensor], Any]] = {
    "logits": lambda x: x,
    "small": lambda x: x / 100,
    "log probabilities": lambda x: x.log_softmax(dim=1),
    "rectified": lambda x: x.relu(),
    "wide clamp": lambda x: x.clamp(-30, 30),
}
ENDS |= SQUASHED | LOGITS


@pytest.mark.parametrize("end", list(SQUASHED))
def test_squashed_outputs_are_no_logits(end, tmp_path):
    with pytest.raises(ValueError, match=r"Ends returns probabilities, but logits are needed.*outputs: probabilities"):
        wrapped(end, tmp_path)


@pytest.mark.parametrize("end", list(LOGITS))
def test_logits_pass_and_the_weights_are_left_as_they_were(end, tmp_path):
    network = Ends(end)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert not is_squashed(network, probe_image(network, 3, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    wrapped(end, tmp_path)


def test_a_head_that_starts_at_zero_is_judged_by_what_it_can_answer(tmp_path):
    for end, expected in (("plain", False), ("softmax", True)):
        network = Ends(end)
        nn.init.zeros_(network.fc.weight)
        nn.init.zeros_(network.fc.bias)
        assert is_squashed(network, probe_image(network, 3, 8)) is expected


def test_a_program_that_returns_probabilities_is_seen(tmp_path):
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Ends("plain", 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.body(image).sigmoid().clamp(1e-6, 1)

    program = torch.export.export(Program(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program, tmp_path / "program.pt2")
    options = {"class_names": ["a", "b"], "image_size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match="returns probabilities, but logits are needed"):
        exported_classifier(str(tmp_path / "program.pt2"), **options)
    classifier = exported_classifier(str(tmp_path / "program.pt2"), **options, outputs="probabilities")
    image = torch.rand(3, 3, 8, 8) * 2 - 1
    assert torch.allclose(classifier(image)[:, 1:], Ends("plain", 1)(image), atol=1e-4)


# --- declared probabilities ------------------------------------------------------------------------------------------

ENDS |= {"sigmoid": torch.sigmoid, "sigmoid squeezed": lambda x: x.sigmoid().squeeze()}


@pytest.mark.parametrize(
    ("end", "outputs", "options"),
    [
        ("softmax", 3, {}),
        ("sigmoid", 1, {}),
        ("sigmoid squeezed", 1, {}),
        ("sigmoid", 3, {"label": "b"}),
        ("temperature", 2, {}),
    ],
)
def test_declared_probabilities_become_logits(end, outputs, options, tmp_path):
    classifier = wrapped(end, tmp_path, outputs, declared="probabilities", **options)
    image = torch.rand(4, 3, 8, 8) * 2 - 1
    told = Ends(end, outputs)(image).reshape(4, outputs)
    if outputs == 1 or options:
        told = told[:, 1:2] if options else told
        told = torch.cat([1 - told, told], dim=1)
    assert torch.allclose(classifier(image).softmax(dim=1), told, atol=1e-6)
    # Kept in the file.
    classifier.save(tmp_path / "file.pt")
    again = load_classifier(str(tmp_path / "file.pt"), [__name__.partition(".")[0]])
    assert torch.equal(again(image), classifier(image))


def test_logits_of_probabilities_are_exact_and_finite():
    x = torch.linspace(-80, 14, 50)[:, None]
    back = logits_of_probabilities(x.sigmoid(), exclusive=False)
    assert torch.allclose(back[x < 5], x[x < 5], rtol=1e-4, atol=1e-4)
    assert logits_of_probabilities(torch.tensor([[0.0, 1.0]]), exclusive=True).isfinite().all()
    assert logits_of_probabilities(torch.tensor([[0.0], [1.0]]), exclusive=False).isfinite().all()


def test_declared_probabilities_must_be_some(tmp_path):
    with pytest.raises(ValueError, match=r"outputs says that .*Ends returns probabilities, but .* leave outputs out"):
        wrapped("percent", tmp_path, declared="probabilities")


def test_several_probabilities_that_are_no_shares_need_a_label(tmp_path):
    with pytest.raises(ValueError, match=r"do not sum to 1.*name one of them as label"):
        wrapped("sigmoid", tmp_path, 3, declared="probabilities")


# --- chance, memory, neighbours --------------------------------------------------------------------------------------


class Dropped(Ends):
    """Dropout that does not know the network's mode."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(F.dropout(image, 0.1))


class Remembers(Ends):
    """Each call adds a little to the answers of the next."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(image) + 0.1 * self.calls


class Compares(Ends):
    """Normalises with the statistics of the batch."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(F.batch_norm(image, None, None, training=True))


class Ranks(Ends):
    """The first image of a batch gets another answer."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) + torch.arange(len(image))[:, None]


class Lonely(Ends):
    """Takes no single image."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image[1:]) if len(image) == 1 else super().forward(image)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Dropped", "differently when it is asked twice: by .*usual causes are dropout"),
        ("Remembers", "differently when it is asked twice: by"),
        ("Ranks", "differently in another order of the batch: by"),
        ("Compares", "differently alone: by"),
        ("Lonely", "takes 3 images, but fails on 1 alone"),
    ],
)
def test_an_answer_depends_on_its_image_alone(kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        wrapped("plain", tmp_path, kind=kind)


def test_probing_leaves_the_global_random_state_alone():
    network, state = Dropped(), torch.get_rng_state()
    with pytest.raises(ValueError, match="differently"):
        check_network(network, "it", 3, 8, 2, "logits", labelled=False, exported=False)
    assert torch.equal(torch.get_rng_state(), state)


# --- inputs changed in place, modules that refuse --------------------------------------------------------------------


class InPlace(Ends):
    """Normalises its input in place."""

    def forward(self, image: Tensor) -> Tensor:
        image -= 0.1
        return super().forward(image.mul_(2))


def test_an_input_may_be_changed_in_place(tmp_path):
    classifier = wrapped("plain", tmp_path, kind="InPlace")
    image = torch.rand(2, 3, 8, 8, requires_grad=True)
    kept = image.detach().clone()
    classifier(image).sum().backward()
    assert torch.equal(image.detach(), kept)
    assert torch.allclose(classifier(kept), Ends("plain")((kept - 0.1) * 2), atol=1e-5)
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


class Tutorial(nn.Module):
    """The network of many tutorials: features, then a block that flattens the map."""

    def __init__(self, end: str, outputs: int) -> None:
        super().__init__()
        del end
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, outputs))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image))


class Insists(Tutorial):
    """A block that raises something of its own on a map of one cell."""

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image))

    def __init__(self, end: str, outputs: int) -> None:
        super().__init__(end, outputs)
        self.classifier.register_forward_pre_hook(self._insist)

    @staticmethod
    def _insist(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[-1] == 1:
            raise KeyError("no such size")


@pytest.mark.parametrize("kind", ["Tutorial", "Insists"])
def test_a_module_that_refuses_a_probe_is_not_the_head(kind, tmp_path):
    classifier = wrapped("plain", tmp_path, kind=kind)
    assert (classifier.spec.head, classifier.spec.feature_map) == ("classifier.3", None)
