"""Untrusted checkpoints are refused in one sentence, and nothing in them is executed."""

from __future__ import annotations

import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import FixedToyExplainer, ToyExplainer, save_checkpoint, toy_checkpoint, toy_classifier, toy_images

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.explainer import load_explainer, strip_checkpoint
from cfe_lightning.files.trust import resolve_class_path


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def changed(path: Path, **changes: Any) -> Path:
    """Replaces entries of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | changes, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return toy_checkpoint(tmp_path / "explainer.ckpt")


def message(path: Path, trusted: tuple[str, ...] = ("toy",)) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - every caller looks at the message
        load_explainer(path, trusted)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_good_checkpoint_loads_in_eval_mode(checkpoint: Path) -> None:
    explainer = load_explainer(str(checkpoint), ["toy"])
    assert isinstance(explainer, FixedToyExplainer)
    assert not explainer.training
    assert explainer.explain(toy_images()).flipped.all()


@pytest.mark.parametrize("write", ["torch", "pickle", "nested"])
def test_a_payload_is_refused_and_not_executed(tmp_path: Path, checkpoint: Path, write: str) -> None:
    payload = Payload(tmp_path / "executed")
    file = tmp_path / "payload.ckpt"
    if write == "torch":
        torch.save(payload, file)
    elif write == "pickle":
        file.write_bytes(pickle.dumps(payload))
    else:
        torch.save(torch.load(checkpoint, weights_only=True) | {"hyper_parameters": {"amplitude": payload}}, file)
    assert message(file).startswith(f"{file} cannot be read as a checkpoint (truncated, or not plain data)")
    assert not payload.path.exists()


def test_a_class_of_another_package_must_be_trusted(checkpoint: Path) -> None:
    text = message(checkpoint, trusted=())
    assert "'toy." in text
    assert "pass trusted=['toy'] (on the command line --trusted toy)" in text


def test_trust_in_a_package_is_not_trust_in_all_it_holds(checkpoint: Path) -> None:
    explainer = {"class_path": "os.system", "version": "0"}
    assert "'os.system' is neither" in message(changed(checkpoint, explainer=explainer), trusted=("toy", "os"))


@pytest.mark.parametrize("class_path", ["torchvision.models.resnet18", "torchvision.models.ResNet", "toy.ToyNetwork"])
def test_a_network_is_no_explainer(checkpoint: Path, class_path: str) -> None:
    changed(checkpoint, explainer={"class_path": class_path, "version": "0"})
    assert message(checkpoint) == f"{checkpoint} names {class_path}, which is not an explainer."


def test_torchvision_functions_that_download_are_no_builders(checkpoint: Path) -> None:
    # torchvision's modules import it, and torch.hub unpickles what it has downloaded.
    class_path = "torchvision.models._api.load_state_dict_from_url"
    with pytest.raises(ValueError, match=r"neither an nn\.Module class nor a torchvision\.models builder"):
        resolve_class_path(class_path)
    classifier = torch.load(checkpoint, weights_only=True)["classifier"] | {"class_path": class_path}
    assert "is neither an nn.Module class" in message(changed(checkpoint, classifier=classifier))


def test_a_class_that_does_not_exist(checkpoint: Path) -> None:
    changed(checkpoint, explainer={"class_path": "toy.Gone", "version": "0"})
    assert "'toy.Gone' cannot be imported" in message(checkpoint)


def test_a_truncated_file(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 1):
        checkpoint.write_bytes(content[:size])
        assert message(checkpoint).startswith(f"{checkpoint} cannot be read as a checkpoint (truncated")


def test_a_classifier_file_is_no_explainer(tmp_path: Path) -> None:
    file = tmp_path / "classifier.pt"
    toy_classifier().save(file)
    assert message(file) == (
        f"{file} is not an explainer checkpoint (missing: explainer, hyper_parameters): give the best.ckpt or "
        "last.ckpt that train.py wrote under checkpoints/<run>/."
    )


def test_plain_data_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert message(tmp_path / "list.ckpt").endswith("holds a list, not a checkpoint written by train.py.")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*gone\.ckpt: give a \.ckpt file"):
        load_explainer(tmp_path / "gone.ckpt")


def test_a_newer_version_is_refused_even_where_it_would_load(checkpoint: Path) -> None:
    changed(checkpoint, explainer={"class_path": "toy.FixedToyExplainer", "version": "9.1"})
    ours = importlib.metadata.version("cfe-lightning")
    assert message(checkpoint) == (
        f"{checkpoint} was written by version 9.1 of cfe_lightning, newer than this {ours}: upgrade to 9.1 or later."
    )
    changed(checkpoint, explainer={"class_path": "toy.FixedToyExplainer", "version": ["9"]})
    assert "does not say which version of cfe_lightning wrote it but ['9']" in message(checkpoint)


def test_an_older_version_with_an_option_that_is_gone(checkpoint: Path) -> None:
    changed(checkpoint, explainer={"class_path": "toy.ToyExplainer", "version": "0.0.1"}, hyper_parameters={"old": 1})
    text = message(checkpoint)
    assert "was written by version 0.0.1 of cfe_lightning and cannot be read by this one" in text
    assert "'old'" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("explainer", "toy.ToyExplainer"), ("explainer", {}), ("classifier", {"mean": 1}), ("hyper_parameters", [1])],
)
def test_entries_of_another_form(checkpoint: Path, key: str, value: Any) -> None:
    text = message(changed(checkpoint, **{key: value}))
    assert text.startswith(f"{checkpoint} is not an explainer checkpoint that train.py wrote")


def test_weights_that_do_not_fit(checkpoint: Path) -> None:
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights["class_images"] = weights["class_images"][:1]
    text = message(changed(checkpoint, state_dict=weights))
    assert "do not fit FixedToyExplainer" in text
    assert "class_images" in text


def test_a_method_without_arguments(tmp_path: Path) -> None:
    # Lightning leaves hyper_parameters out of a checkpoint when there are none.
    path = save_checkpoint(Bare(toy_classifier()), tmp_path / "bare.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {}
    assert isinstance(load_explainer(path, ["toy", __name__.partition(".")[0]]), Bare)


class Bare(ToyExplainer):
    """A method with the classifier as its only argument; arguments of its base class must not be recorded."""

    def __init__(self, classifier: FrozenClassifier) -> None:
        super().__init__(classifier, amplitude=0.3)


def test_stripping_leaves_the_earlier_file_where_the_disk_is_full(checkpoint: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    (tmp_path / "small.ckpt").write_text("earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*small\.ckpt"):
            strip_checkpoint(checkpoint, tmp_path / "small.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "small.ckpt").read_text() == "earlier"
    assert not list(tmp_path.glob(".*"))


def test_stripping_keeps_what_explaining_needs(checkpoint: Path, tmp_path: Path) -> None:
    strip_checkpoint(checkpoint, tmp_path / "small.ckpt")
    kept = torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert not {"optimizer_states", "loops", "callbacks"} & kept.keys()
    image = toy_images()
    expected = load_explainer(checkpoint, ["toy"]).explain(image)
    actual = load_explainer(tmp_path / "small.ckpt", ["toy"]).explain(image)
    assert torch.equal(expected.counterfactual, actual.counterfactual)
