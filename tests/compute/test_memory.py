"""Batches are explained in parts where memory is short."""

from __future__ import annotations

import pytest
import torch
import toy
from torch import Tensor

from cfe_lightning.compute.memory import BackOff, is_out_of_memory
from cfe_lightning.explanation import Explanation


class Limited:
    """Explains up to ``most`` images at a time and records the sizes of all attempts."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[int] = []
        self.explainer = toy.FixedToyExplainer(toy.toy_classifier(3)).eval()

    def __call__(self, image: Tensor, target: Tensor | None) -> Explanation:
        self.asked.append(len(image))
        torch.rand(1)
        if len(image) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return toy.FixedToyExplainer.explain(self.explainer, image, target)


def explained(back_off: BackOff, limited: Limited, image: Tensor, target: Tensor | None) -> Explanation:
    """Returns the answer of ``predict_step``, which all methods share."""
    explainer = limited.explainer
    explainer.back_off, explainer.explain = back_off, limited.__call__  # type: ignore[method-assign]
    return explainer.predict_step({"image": image} | ({} if target is None else {"target": target}), 0)


def test_parts_give_the_whole_and_the_size_is_remembered() -> None:
    image, target = toy.toy_images(11, 3), torch.arange(11) % 3
    limited, back_off = Limited(3), BackOff()
    found = explained(back_off, limited, image, target)
    assert limited.asked == [11, 6, 3, 3, 3, 2]
    assert back_off.at_once == 3
    whole = toy.FixedToyExplainer.explain(limited.explainer, image, target)
    torch.testing.assert_close(found.counterfactual, whole.counterfactual)
    torch.testing.assert_close(found.steps, whole.steps)
    torch.testing.assert_close(found.parts["distinct"], whole.parts["distinct"])
    torch.testing.assert_close(found.scores["change"], whole.scores["change"])
    assert found.target.tolist() == target.tolist()
    explained(back_off, limited, image, None)
    assert limited.asked[6:] == [3, 3, 3, 2]


def test_an_attempt_in_vain_draws_no_random_numbers() -> None:
    torch.manual_seed(5)
    explained(BackOff(), Limited(2), toy.toy_images(4, 3), None)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    # Each of the two parts has drawn one number.
    assert torch.equal(drawn, torch.rand(3)[2:])


def test_what_is_no_lack_of_memory_is_raised() -> None:
    def breaks(rows: slice) -> Explanation:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        BackOff().in_parts(4, breaks, Explanation.joined)


def test_one_image_that_does_not_fit_is_the_end() -> None:
    limited = Limited(0)
    with pytest.raises(torch.OutOfMemoryError):
        explained(BackOff(), limited, toy.toy_images(4, 3), None)
    assert limited.asked == [4, 2, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("something else"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_lack_of_memory_has_many_names(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_joined_explanations_keep_the_caveats_of_each() -> None:
    explainer = toy.FixedToyExplainer(toy.toy_classifier(3)).eval()
    first, second = (explainer.explain(toy.toy_images(2, 3)) for _ in range(2))
    second.caveats["too dark"] = torch.tensor([False, True])
    joined = Explanation.joined([first, second])
    assert joined.caveats["too dark"].tolist() == [False, False, False, True]
    assert len(joined) == 4
