"""Third-party explainers, guarded: one that fails gets a reason and does not abort the evaluation of the others."""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cfe_lightning.explanation import Decomposer, Explainer, Explanation
from cfe_lightning.files.text import one_line


class FaultyExplainerError(Exception):
    """An explainer gave no answer, or none that can be measured; the message is a clause that says why."""


class GuardedExplainer:
    """An explainer whose failures and non-finite answers become a ``FaultyExplainerError``.

    Args:
        explainer: Any explainer, also of third parties.
        names: Names of the images of the next calls, for messages.
    """

    def __init__(self, explainer: Explainer, names: Sequence[str] = ()) -> None:
        self.explainer = explainer
        self.classifier = explainer.classifier
        self.names = names

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """Returns the explainer's explanation after checking that all of its images are finite."""
        explanation = self._ask(self.explainer.explain, image, target)
        answer = {"attribution": explanation.attribution, **explanation.parts}
        if explanation.counterfactual is not None:
            answer["counterfactual"] = explanation.counterfactual
        self._check(answer)
        return explanation

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """Returns the explainer's distinct part after checking that it is finite."""
        assert is_decomposer(self.explainer)
        distinct = self._ask(self.explainer.distinct, image, source)
        self._check({"distinct part": distinct})
        return distinct

    def _ask(self, question: Callable[..., Any], *arguments: Tensor | None) -> Any:
        try:
            return question(*arguments)
        except torch.OutOfMemoryError:
            raise
        # Third-party code may raise anything.
        except Exception as error:
            raise FaultyExplainerError(f"fails with {type(error).__name__}: {one_line(error)}") from error

    def _check(self, answer: dict[str, Tensor]) -> None:
        """Refuses tensors [B, ...] that are not finite, and names the first such image."""
        for what, value in answer.items():
            finite = value.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                name = self.names[int((~finite).nonzero()[0])] if len(self.names) == len(finite) else "unknown"
                raise FaultyExplainerError(f"gave a {what} that is not finite for image {name!r}")


def is_decomposer(explainer: Explainer) -> TypeGuard[Decomposer]:
    """Tells whether an explainer can split off the distinct part of an image, which makes the image its class."""
    return callable(getattr(explainer, "distinct", None))
