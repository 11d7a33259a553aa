import copy
import pickle
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from toy import ToyData, ToyExplainer, toy_classifier

from cfe_lightning.classifier import (
    ClassifierSpec,
    FrozenClassifier,
    load_classifier,
)
from cfe_lightning.classifier.file import build_network
from cfe_lightning.classifier.networks import ResNet18, SimpleCnn
from cfe_lightning.classifier.tracing import probe_image, trace_layers
from cfe_lightning.files.trust import resolve_class_path


def spec_of(**changes):
    fields = {
        "class_path": "cfe_lightning.classifier.networks.SimpleCnn",
        "init_args": {"num_classes": 3, "channels": 3, "image_size": 8},
        "head": "fc",
        "class_names": ("a", "b", "c"),
        "image_size": 8,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    return ClassifierSpec(**(fields | changes))


def simple(**changes):
    torch.manual_seed(0)
    return FrozenClassifier(SimpleCnn(num_classes=3, channels=3, image_size=8), spec_of(**changes))


def resnet():
    torch.manual_seed(0)
    names = {"head": "fc", "feature_map": "layer4", "class_names": ("a", "b"), "image_size": 32}
    path = "cfe_lightning.classifier.networks.ResNet18"
    spec = spec_of(class_path=path, init_args={"num_classes": 2, "channels": 3, "small_image": True}, **names)
    return FrozenClassifier(ResNet18(2, small_image=True), spec)


class Fixed(nn.Module):
    """Returns what it was given, whatever the image; keeps what it has seen."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.seen = None

    def forward(self, image):
        self.seen = image
        return self.logits


def fixed(logits, **changes):
    return FrozenClassifier(Fixed(logits), spec_of(**({"head": None} | changes)))


# --- what the network sees -------------------------------------------------------------------------------------------


def test_the_network_sees_its_own_normalisation():
    image = torch.stack([torch.full((8, 8), level) for level in (-1.0, 0.0, 1.0)])[None]
    prepared = simple().prepare(image)
    expected = [(0.0 - 0.1) / 0.4, (0.5 - 0.2) / 0.5, (1.0 - 0.3) / 0.6]
    assert torch.allclose(prepared, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 8, 8))


def test_blue_green_red_turns_the_normalised_channels_round():
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(simple(bgr=True).prepare(image), simple().prepare(image).flip(1))


def test_images_are_resized_to_the_network():
    classifier = simple()
    image = torch.rand(2, 3, 40, 24) * 2 - 1
    assert classifier.prepare(image).shape == (2, 3, 8, 8)
    assert classifier(image).shape == (2, 3)


def test_grey_images_are_repeated_for_a_colour_network():
    grey = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(simple()(grey), simple()(grey.expand(-1, 3, -1, -1)))


def test_colour_images_become_luminance_for_a_grey_network():
    classifier = fixed(torch.zeros(3, 3), mean=(0.5,), std=(0.5,))
    colours = torch.eye(3)[:, :, None, None].expand(3, 3, 8, 8) * 2 - 1
    classifier(colours)
    assert torch.allclose(classifier.network.seen[:, 0, 0, 0], torch.tensor([0.299, 0.587, 0.114]) * 2 - 1, atol=1e-6)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match=r"must be grey \(1 channel\) or RGB \(3 channels\), got 4 channels"):
        simple()(torch.zeros(1, 4, 8, 8))


# --- always K exclusive classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_one_logit_becomes_two_classes_whose_softmax_is_the_sigmoid(shape):
    z = torch.tensor([-30.0, -0.7, 0.0, 2.5])
    classifier = fixed(z.view(shape), class_names=("no", "yes"))
    logits = classifier(torch.zeros(4, 3, 8, 8))
    assert logits.shape == (4, 2)
    assert torch.allclose(logits.softmax(dim=1)[:, 1], z.sigmoid())
    assert torch.allclose(logits.log_softmax(dim=1)[:, 0], nn.functional.logsigmoid(-z))
    assert (classifier.class_names, classifier.num_classes) == (("no", "yes"), 2)


def test_a_label_of_a_multi_label_network_becomes_two_classes():
    logits = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    classifier = fixed(logits, label="b")
    shown = classifier(torch.zeros(2, 3, 8, 8))
    assert classifier.class_names == ("not b", "b")
    assert torch.allclose(shown.softmax(dim=1)[:, 1], logits[:, 1].sigmoid())
    other = classifier.with_label("c")
    assert other.class_names == ("not c", "c")
    assert torch.equal(other(torch.zeros(2, 3, 8, 8))[:, 1], logits[:, 2])
    assert other.network is classifier.network


def test_all_labels_of_a_multi_label_network_can_be_asked_for_at_once():
    logits = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]])
    classifier = fixed(logits, label="b")
    probabilities = classifier.label_probabilities(torch.zeros(2, 3, 8, 8))
    assert torch.equal(probabilities, logits.sigmoid())
    assert classifier.label_names == ("a", "b", "c")
    # The same whichever label is explained, and the image is prepared as for the decision.
    assert torch.equal(classifier.with_label("c").label_probabilities(torch.zeros(2, 3, 8, 8)), probabilities)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    labelled = simple(label="b")
    assert torch.allclose(labelled.label_probabilities(image)[:, 1], labelled(image).softmax(dim=1)[:, 1])
    single = fixed(torch.tensor([0.7, -0.7]), class_names=("a",), label="a")
    assert single.label_probabilities(torch.zeros(2, 3, 8, 8)).shape == (2, 1)


def test_classes_that_exclude_each_other_are_no_labels():
    with pytest.raises(ValueError, match=r"The classes \['a', 'b', 'c'\] of this classifier exclude each other, but a"):
        simple().label_probabilities(torch.zeros(2, 3, 8, 8))


def test_head_of_features_is_the_forward_pass():
    image = torch.rand(3, 3, 32, 32) * 2 - 1
    for classifier in (resnet(), FrozenClassifier(resnet().network, replace(resnet().spec, label="b"))):
        features = classifier.features(image)
        assert features.shape == (3, 512)
        assert torch.allclose(classifier.head(features), classifier(image), atol=1e-6)
        assert torch.allclose(classifier.feature_map(image).mean(dim=(2, 3)), features, atol=1e-6)


def test_the_map_is_taken_before_the_network_changes_it_in_place():
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.append(nn.Linear(2, 3))
    spec = spec_of(head="4", feature_map="0")
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    plain = FrozenClassifier(network, spec)
    with torch.no_grad():
        expected = network[0](plain.prepare(image))
    assert (expected < 0).any()
    assert torch.equal(plain.feature_map(image), expected)
    transformed = FrozenClassifier(network, replace(spec, feature_map_transform="relu"))
    assert torch.equal(transformed.feature_map(image), expected.relu())
    assert torch.allclose(transformed.feature_map(image).mean(dim=(2, 3)), transformed.features(image), atol=1e-6)


# --- frozen ----------------------------------------------------------------------------------------------------------


def test_the_largest_maps_are_found_without_a_feature_map_and_read_in_one_pass():
    spec = ClassifierSpec(
        class_path="cfe_lightning.classifier.networks.SimpleCnn",
        init_args={"num_classes": 2},
        head="fc",
        class_names=("a", "b"),
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    classifier = FrozenClassifier(SimpleCnn(2), spec)
    assert classifier.shallow_maps() == ["convolutions", "convolutions.3"]
    image = torch.rand(2, 3, 32, 32)
    maps, logits = classifier.maps(image, classifier.shallow_maps())
    assert [value.shape for value in maps] == [(2, 32, 8, 8), (2, 32, 16, 16)]
    assert torch.equal(logits, classifier(image))
    torch.testing.assert_close(torch.nn.functional.max_pool2d(maps[1], 2), maps[0])
    # All its maps are as large as the image.
    assert toy_classifier().shallow_maps() == []


def test_gradients_reach_the_image_and_no_weight():
    classifier = resnet()
    for read in (classifier, classifier.features, classifier.feature_map):
        image = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
        read(image).pow(2).sum().backward()
        assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in classifier.parameters())
    classifier.require_gradient()


def test_the_gradient_requirement_holds_in_inference_mode_too():
    classifier = resnet()
    with torch.inference_mode():
        classifier.require_gradient()


def test_eval_mode_and_frozen_weights_survive_every_request():
    parent = nn.ModuleDict({"classifier": resnet()})
    parent.train()
    # As LightningModule.unfreeze does it.
    for parameter in parent.parameters():
        parameter.requires_grad = True
    parent.train()
    assert parent.training
    assert not any(module.training for module in parent["classifier"].modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())


def test_training_an_explainer_changes_no_bit(tmp_path):
    classifier = toy_classifier()
    fingerprint = classifier.fingerprint()
    before = copy.deepcopy(classifier.state_dict())
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(ToyExplainer(classifier), datamodule=ToyData(num_images=4))
    assert classifier.fingerprint() == fingerprint
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not any(module.training for module in classifier.modules())


def test_hooks_are_gone_even_after_an_exception():
    classifier = resnet()
    classifier.features(torch.zeros(1, 3, 32, 32))
    classifier.feature_map(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="got 2 channels"):
        classifier.features(torch.zeros(1, 2, 32, 32))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in classifier.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda classifier: pickle.loads(pickle.dumps(classifier))])
def test_copies_are_the_same_classifier(copied):
    classifier = resnet()
    again = copied(classifier)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert again.spec == classifier.spec
    assert again.network is not classifier.network
    assert again.fingerprint() == classifier.fingerprint()
    assert torch.equal(again(image), classifier(image))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_compiling_changes_neither_answers_nor_names(tmp_path):
    classifier = simple()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    given_compiled = FrozenClassifier(torch.compile(classifier.network, backend="eager"), classifier.spec)
    assert given_compiled.state_dict().keys() == classifier.state_dict().keys()
    assert given_compiled.fingerprint() == classifier.fingerprint()
    assert torch.equal(given_compiled.features(image), classifier.features(image))

    def decide(image):
        return classifier(image), classifier.features(image)

    logits, features = torch.compile(decide, backend="eager")(image)
    assert torch.allclose(logits, classifier(image))
    assert torch.allclose(features, classifier.features(image))


def test_a_network_compiled_in_place_is_still_watched():
    classifier = resnet()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    features, feature_map = classifier.features(image), classifier.feature_map(image)
    classifier.network.compile(backend="eager")
    assert torch.allclose(classifier(image), classifier.head(features), atol=1e-6)
    assert torch.equal(classifier.features(image), features)
    assert torch.equal(classifier.feature_map(image), feature_map)
    with torch.no_grad():
        classifier.network(probe_image(classifier.network, 3, 32))
    assert trace_layers(classifier.network, 3, 32).feature_map == "layer4"


# --- the spec and its file -------------------------------------------------------------------------------------------


def test_a_file_brings_back_the_same_classifier(tmp_path):
    classifier = simple(feature_map="convolutions", feature_map_transform="relu", bgr=True)
    classifier.save(tmp_path / "new" / "file.pt")
    again = load_classifier(str(tmp_path / "new" / "file.pt"))
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    assert again.spec == classifier.spec
    assert torch.equal(again(image), classifier(image))
    assert torch.equal(again.feature_map(image), classifier.feature_map(image))
    assert again.fingerprint() == classifier.fingerprint()


def test_a_spec_written_before_its_newer_fields_is_read():
    data = spec_of().to_dict()
    for newer in ("feature_map_transform", "bgr", "label", "feature_map"):
        del data[newer]
    data["class_names"] = list(data["class_names"])
    assert ClassifierSpec.from_dict(data) == spec_of()


def test_every_weight_and_field_is_in_the_fingerprint():
    classifier = simple()
    others = [simple(bgr=True), simple(mean=(0.1, 0.2, 0.4)), simple(class_names=("a", "c", "b")), simple()]
    others[-1].network.fc.bias.data[0] += 1e-6
    assert len({classifier.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert simple().fingerprint() == classifier.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("a",)}, r"needs one name per logit and at least two, got \['a'\]"),
        ({"class_names": ("a", "a", "b")}, r"must differ from each other, got \['a', 'a', 'b'\]"),
        ({"label": "d"}, r"label 'd' is not one of the class names \['a', 'b', 'c'\]"),
        ({"image_size": 0}, "image_size must be positive, got 0"),
        ({"mean": (0.5, 0.5)}, r"one number per channel .* got mean \[0.5, 0.5\]"),
        ({"std": (0.5,)}, r"one number per channel .* std \[0.5\]"),
        ({"std": (0.5, 0.0, 0.5)}, "positive std"),
        ({"mean": (0.5,), "std": (0.5,), "bgr": True}, "bgr is for networks that take three channels"),
    ],
)
def test_a_contradictory_spec_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spec_of(**changes)


@pytest.mark.parametrize("field", ["head", "feature_map"])
def test_a_layer_that_is_not_there_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} names 'layer9', but SimpleCnn has no such layer"):
        simple(**{field: "layer9"})


def test_what_tracing_did_not_find_is_refused_with_the_methods_that_still_work():
    message = (
        r"^This classifier \(SimpleCnn\) has no feature map that this method could read, because none was found by "
        r"tracing: name the layer with feature_map=..., or choose a method that needs only logits \(DXAI, StylEx and "
        r"Steerable Lens, DiffExplainer\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        simple().feature_map(torch.zeros(1, 3, 8, 8))


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
        ("cfe_lightning.classifier.training.MeanMetric", "is a class of torchmetrics, which was not to be expected"),
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
    with pytest.raises(ValueError, match=r"is not a classifier file .* holds more than plain data"):
        load_classifier(str(path))


def test_weights_that_do_not_fit_their_spec_are_refused(tmp_path):
    classifier = simple()
    torch.save({"classifier": classifier.spec.to_dict(), "state_dict": {}}, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=r"The weights in .* do not fit cfe_lightning.classifier.networks.SimpleCnn"):
        load_classifier(str(tmp_path / "file.pt"))
