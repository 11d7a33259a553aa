"""Anybody's explainer among others: what it stumbles over must not cost the others' results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from cfe_lightning.explanation import Decomposer, Explainer, Explanation
from cfe_lightning.files.text import one_line


class FaultyExplainerError(Exception):
    """An explainer gave no answer, or none that can be measured; says what, as a clause."""


class GuardedExplainer:
    """Asks an explainer and turns whatever it stumbles over into a reason.

    Args:
        explainer: Anybody's code.
        names: Of the images that it is asked about next.
    """

    def __init__(self, explainer: Explainer, names: Sequence[str] = ()) -> None:
        self.explainer = explainer
        self.classifier = explainer.classifier
        self.names = names

    def explain(self, image: Tensor, target: Tensor | None = None) -> Explanation:
        """As the explainer does; every part of the answer is finite."""
        explanation = self._ask(self.explainer.explain, image, target)
        answer = {"attribution": explanation.attribution, **explanation.parts}
        if explanation.counterfactual is not None:
            answer["counterfactual"] = explanation.counterfactual
        self._check(answer)
        return explanation

    def distinct(self, image: Tensor, source: Tensor) -> Tensor:
        """As the explainer does; finite."""
        assert is_decomposer(self.explainer)
        distinct = self._ask(self.explainer.distinct, image, source)
        self._check({"distinct part": distinct})
        return distinct

    def _ask(self, question: Callable[..., Any], *arguments: Tensor | None) -> Any:
        try:
            return question(*arguments)
        except torch.OutOfMemoryError:
            raise
        # Explainers are anybody's code.
        except Exception as error:
            reason = one_line(error)
            raise FaultyExplainerError(f"fails with {type(error).__name__}: {reason}") from error

    def _check(self, answer: dict[str, Tensor]) -> None:
        """Tells what is not finite, and for which image."""
        for what, value in answer.items():
            finite = value.flatten(1).isfinite().all(dim=1)
            if not finite.all():
                name = self.names[int((~finite).nonzero()[0])] if len(self.names) == len(finite) else "unknown"
                raise FaultyExplainerError(f"gave a {what} that is not finite for image {name!r}")


def is_decomposer(explainer: Explainer) -> TypeGuard[Decomposer]:
    """Whether an explainer can give the part of an image that makes it a class."""
    return callable(getattr(explainer, "distinct", None))
