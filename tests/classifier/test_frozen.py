import copy
import pickle
from dataclasses import replace

import pytest
import torch
from classifiers import simple, spec_of
from torch import nn
from toy import ToyData, ToyExplainer, toy_classifier, toy_trainer

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.classifier.networks import ResNet18, SimpleCnn
from cfe_lightning.classifier.tracing import probe_image, trace_layers


def resnet():
    torch.manual_seed(0)
    names = {"head": "fc", "feature_map": "layer4", "class_names": ("a", "b"), "image_size": 32}
    path = "cfe_lightning.classifier.networks.ResNet18"
    spec = spec_of(class_path=path, init_args={"num_classes": 2, "channels": 3, "small_image": True}, **names)
    return FrozenClassifier(ResNet18(2, small_image=True), spec)


class Fixed(nn.Module):
    """Returns the same logits for every image, and keeps the last input."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits
        self.seen = None

    def forward(self, image):
        self.seen = image
        return self.logits


def fixed(logits, **changes):
    return FrozenClassifier(Fixed(logits), spec_of(**({"head": None} | changes)))


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


def test_the_largest_maps_are_found_without_a_feature_map_and_read_in_one_pass():
    classifier = FrozenClassifier(SimpleCnn(2), spec_of(class_names=("a", "b"), image_size=32))
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
    # Lightning's unfreeze does the same.
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
    toy_trainer(tmp_path).fit(ToyExplainer(classifier), datamodule=ToyData(num_images=4))
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


def test_every_weight_and_field_is_in_the_fingerprint():
    classifier = simple()
    others = [simple(bgr=True), simple(mean=(0.1, 0.2, 0.4)), simple(class_names=("a", "c", "b")), simple()]
    others[-1].network.fc.bias.data[0] += 1e-6
    assert len({classifier.fingerprint(), *(other.fingerprint() for other in others)}) == 5
    assert simple().fingerprint() == classifier.fingerprint()


@pytest.mark.parametrize("field", ["head", "feature_map"])
def test_a_layer_that_is_not_there_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} names 'layer9', but SimpleCnn has no such layer"):
        simple(**{field: "layer9"})


def test_what_tracing_did_not_find_is_refused_with_the_methods_that_still_work():
    message = (
        r"^This classifier \(SimpleCnn\) has no feature map that this method could read, because none was found by "
        r"tracing: name the layer with feature_map=..., or choose a method that needs only logits \(DXAI, StylEx, "
        r"Steerable Lens or DiffExplainer\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        simple().feature_map(torch.zeros(1, 3, 8, 8))
