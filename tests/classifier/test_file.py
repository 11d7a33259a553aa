import importlib.util
import sys

import pytest
import torch
from classifiers import simple, spec_of
from torch import nn

from cfe_lightning.classifier import exported, load_classifier
from cfe_lightning.classifier.file import build_network
from cfe_lightning.files.trust import resolve_class_path


class Subclass(exported.ExportedNetwork):
    """An exported network under another name."""


class Marked(nn.Module):
    """A network that is no ``ExportedNetwork``, but says that it runs foreign code."""

    runs_foreign_code = True


def test_a_file_brings_back_the_same_classifier(tmp_path):
    classifier = simple(feature_map="convolutions", feature_map_transform="relu", bgr=True)
    classifier.save(tmp_path / "new" / "file.pt")
    again = load_classifier(str(tmp_path / "new" / "file.pt"))
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    assert again.spec == classifier.spec
    assert torch.equal(again(image), classifier(image))
    assert torch.equal(again.feature_map(image), classifier.feature_map(image))
    assert again.fingerprint() == classifier.fingerprint()


def test_unusable_files_are_refused(tmp_path):
    path = tmp_path / "file.pt"
    with pytest.raises(FileNotFoundError, match=r"There is no classifier file .*: train one with `python train.py"):
        load_classifier(str(path))
    for content in (b"", b"not a file of torch"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a classifier file of cfe_lightning"):
            load_classifier(str(path))
    torch.save(simple().network.state_dict(), path)
    with pytest.raises(ValueError, match=r"is not a classifier file .*: for a plain state dict use .*wrap_classifier"):
        load_classifier(str(path))
    torch.save(simple().network, path)
    with pytest.raises(
        ValueError, match=r"is not a classifier file .*, but a pickle of more than tensors \(.*SimpleCnn\)"
    ):
        load_classifier(str(path))


def test_weights_that_do_not_fit_their_spec_are_refused(tmp_path):
    classifier = simple()
    torch.save({"classifier": classifier.spec.to_dict(), "state_dict": {}}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"The weights in .* do not fit cfe_lightning.classifier.networks.SimpleCnn"):
        load_classifier(str(tmp_path / "file.pt"))


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"SimpleCnn cannot be built with init_args \{'depth': 3\}: .*depth"):
        build_network(spec_of(init_args={"depth": 3}))


@pytest.mark.parametrize("argument", ["weights", "pretrained", "weights_backbone", "pretrained_backbone"])
def test_a_spec_does_not_make_torchvision_download(argument, monkeypatch):
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    spec = spec_of(class_path="torchvision.models.resnet18", init_args={argument: "IMAGENET1K_V1"})
    with pytest.raises(ValueError, match=rf"with {argument} 'IMAGENET1K_V1', which would download"):
        build_network(spec)


def test_torchvision_may_be_told_to_take_no_weights():
    arguments = {"weights": None, "num_classes": 2}
    network = build_network(spec_of(class_path="torchvision.models.resnet18", init_args=arguments))
    assert network.fc.out_features == 2


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("os.system", r"'os.system', which is not part of cfe_lightning or torchvision: .* trusted=\['os'\]"),
        ("torch.nn.Linear", r"trusted=\['torch'\]"),
        ("torchvision.io.read_file", "neither an nn.Module class nor a torchvision.models builder"),
        ("torchvision.models.list_models.x", "cannot be imported"),
        ("cfe_lightning.no_such_module.Net", "cannot be imported: No module named"),
        ("torchvision.models.resnet.resnet18", "neither an nn.Module class nor a torchvision.models builder"),
        ("torchvision.models._api.load_state_dict_from_url", "neither an nn.Module class nor"),
        ("torchvision._internally_replaced_utils.load_state_dict_from_url", "neither an nn.Module class nor"),
        ("cfe_lightning.classifier.training.MeanMetric", "is a class of torchmetrics, not of cfe_lightning."),
        ("cfe_lightning.files.trust.ALLOWED_PACKAGES", "neither an nn.Module class nor"),
        ("cfe_lightning.classifier.load_classifier", "neither an nn.Module class nor"),
        ("cfe_lightning", "cannot be imported"),
        ("cfe_lightning.classifier.exported.ExportedNetwork", r"pass trusted=\['exported_program'\]"),
        ("cfe_lightning.classifier.sources.ExportedNetwork", r"pass trusted=\['exported_program'\]"),
    ],
)
def test_a_file_cannot_name_what_is_not_allowed(class_path, message):
    with pytest.raises(ValueError, match=message):
        resolve_class_path(class_path)


def test_a_package_that_is_not_found_says_where_it_would_be():
    message = r"'my_package.MyNet' cannot be imported: No module .* \(put the folder that holds it on PYTHONPATH\)"
    with pytest.raises(ValueError, match=message):
        resolve_class_path("my_package.MyNet", trusted=["my_package"])


def test_trust_is_for_one_package():
    assert resolve_class_path("torch.nn.Linear", trusted=["torch"]) is nn.Linear
    with pytest.raises(ValueError, match="which is not part of"):
        resolve_class_path("torch.nn.Linear", trusted=["tor", "torch.nn"])


@pytest.mark.parametrize("kind", [Subclass, Marked])
def test_foreign_code_needs_trust_under_every_name(kind, tmp_path):
    package, _, _ = __name__.partition(".")
    path = f"{__name__}.{kind.__name__}"
    for trusted in ([package], [package, "toy"]):
        with pytest.raises(ValueError, match=r"can do anything on this machine .* trusted=\['exported_program'\]"):
            resolve_class_path(path, trusted)
    assert resolve_class_path(path, [package, "exported_program"]) is kind
    # The same at the door of a file.
    torch.save({"classifier": spec_of(class_path=path, init_args={}).to_dict(), "state_dict": {}}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"trusted=\['exported_program'\]"):
        load_classifier(str(tmp_path / "file.pt"), trusted=[package])


def test_a_moved_file_of_exported_networks_still_needs_trust(monkeypatch):
    name = "cfe_lightning.classifier.programs"
    spec = importlib.util.spec_from_file_location(name, exported.__file__)
    moved = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, moved)
    spec.loader.exec_module(moved)
    with pytest.raises(ValueError, match=r"trusted=\['exported_program'\]"):
        resolve_class_path(f"{name}.ExportedNetwork")
    assert resolve_class_path(f"{name}.ExportedNetwork", ["exported_program"]) is moved.ExportedNetwork
