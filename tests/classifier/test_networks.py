import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torchvision import models
from toy import ToyData, toy_trainer

from cfe_lightning.classifier import load_classifier
from cfe_lightning.classifier.networks import DenseNet121, ResNet18, SimpleCnn, SliceStack
from cfe_lightning.classifier.tracing import trace_layers
from cfe_lightning.classifier.training import ClassifierTraining
from cfe_lightning.images import cut_montage, tile_montage


@pytest.mark.parametrize(("image_size", "inputs"), [(28, 1568), (32, 2048), (64, 8192), (256, 25_088)])
def test_simple_cnn_has_the_papers_sizes(image_size, inputs):
    network = SimpleCnn(num_classes=2, channels=1, image_size=image_size)
    assert network.hidden.in_features == inputs
    assert network.hidden.out_features == 128
    assert network(torch.zeros(3, 1, image_size, image_size)).shape == (3, 2)


def test_simple_cnn_has_no_activation_after_the_second_pool():
    network = SimpleCnn(num_classes=2, image_size=32)
    kinds = [type(layer) for layer in network.convolutions]
    assert kinds == [nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.Conv2d, nn.MaxPool2d]


def test_simple_cnn_refuses_images_without_a_pixel_left():
    with pytest.raises(ValueError, match="at least 4 pixels, got 3"):
        SimpleCnn(num_classes=2, image_size=3)


def test_resnet18_is_torchvisions_with_other_inputs_and_outputs():
    ours, theirs = ResNet18(num_classes=1000), models.resnet18(weights=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours.eval()(image), theirs.eval()(image))


def test_densenet121_is_torchvisions_with_other_inputs_and_outputs():
    ours, theirs = DenseNet121(num_classes=1000), models.densenet121(weights=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(("kind", "map_name"), [(ResNet18, "layer4"), (DenseNet121, "features")])
@pytest.mark.parametrize(("small_image", "side"), [(False, 1), (True, 4)])
def test_small_image_stem_keeps_a_map_of_more_than_one_cell(kind, map_name, small_image, side):
    network = kind(num_classes=2, channels=1, small_image=small_image).eval()
    shapes = []
    network.get_submodule(map_name).register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 2)
    assert shapes[0][-2:] == (side, side)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("num_slices", "channels", "side", "small_image"),
    # Of 35 pixels an odd number of cells is halved: rounded within each slice, not within the montage.
    [(1, 3, 16, True), (4, 1, 16, True), (9, 3, 8, True), (4, 3, 35, False)],
)
def test_slice_stack_averages_the_pooled_features_of_a_densenet(num_slices, channels, side, small_image, training):
    pl.seed_everything(0)
    stack = SliceStack(num_classes=3, channels=channels, num_slices=num_slices, small_image=small_image)
    densenet = DenseNet121(num_classes=3, channels=channels, small_image=small_image)
    densenet.load_state_dict(stack.state_dict())
    features = []
    densenet.classifier.register_forward_pre_hook(lambda _m, inputs: features.append(inputs[0]))
    slices = torch.randn(2, num_slices, channels, side, side)
    with torch.no_grad():
        densenet.train(training)(slices.flatten(0, 1))
        expected = densenet.classifier(features[0].unflatten(0, (2, num_slices)).mean(dim=1))
        logits = stack.train(training)(tile_montage(slices))
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert (logits[0] - logits[1]).abs().max() > 1e-3  # what is compared depends on the image


def test_slice_stack_does_not_see_the_order_of_the_slices():
    pl.seed_everything(0)
    stack = SliceStack(num_classes=2, channels=1, num_slices=4, small_image=True).eval()
    image = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        mixed = stack(tile_montage(cut_montage(image, 4)[:, [2, 0, 3, 1]]))
        torch.testing.assert_close(stack(image), mixed)
        assert (stack(image) - stack(image.flip(-2))).abs().max() > 1e-4  # but what is in them


def test_slice_stack_shows_a_head_and_a_map_that_lies_on_the_montage():
    stack = SliceStack(num_classes=2, channels=1, num_slices=4, small_image=True).eval()
    layers = trace_layers(stack, 1, 32)
    assert (layers.head, layers.feature_map, layers.feature_map_transform) == ("classifier", "features", "relu")
    image = torch.randn(1, 1, 32, 32)
    changed = image.clone()
    changed[..., :16, 16:] += 1  # the second slice
    with torch.no_grad():
        moved = (stack.features(changed) - stack.features(image)).abs().amax(dim=(0, 1))
    assert moved.shape == (4, 4)
    assert moved[:2, 2:].max() > 1e-4
    moved[:2, 2:] = 0
    assert moved.max() == 0


def test_slice_stack_shows_one_map_per_image_in_every_layer():
    stack = SliceStack(num_classes=2, channels=1, num_slices=9, small_image=True).eval()
    sizes = set()
    for layer in stack.modules():
        layer.register_forward_hook(lambda _m, _i, output: sizes.add(len(output)))
    with torch.no_grad():
        stack(torch.zeros(2, 1, 24, 24))
    assert sizes == {2}


def test_slice_stack_can_be_sent_to_another_process():
    stack = SliceStack(num_classes=2, channels=1, num_slices=4, small_image=True).eval()
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(stack))(image), stack(image))


def test_slice_stack_refuses_what_is_no_montage():
    with pytest.raises(ValueError, match=r"needs 1, 4, 9, 16, \.\.\. slices, got 3"):
        SliceStack(num_classes=2, num_slices=3)
    with pytest.raises(ValueError, match="needs a height and width that 3 divides, got 32 x 32"):
        SliceStack(num_classes=2, num_slices=9)(torch.zeros(1, 3, 32, 32))


def test_slice_stack_is_trained_by_its_import_path(tmp_path):
    pl.seed_everything(0)
    arguments = {"num_classes": 2, "channels": 1, "num_slices": 4, "small_image": True}
    module = ClassifierTraining(
        output=str(tmp_path / "stack.pt"),
        architecture="cfe_lightning.classifier.networks.SliceStack",
        init_args=arguments,
    )
    data = ToyData(channels=1, num_images=4, batch_size=4)
    toy_trainer(tmp_path, max_epochs=1).fit(module, data)
    classifier = load_classifier(str(tmp_path / "stack.pt"))
    assert classifier.spec.init_args == arguments
    assert (classifier.spec.head, classifier.spec.feature_map) == ("classifier", "features")
    image = torch.randn(2, 1, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(classifier(image), module.classifier()(image))
