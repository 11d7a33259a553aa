import pytest
import torch
from torch import nn
from torchvision import models

from cfe_lightning.networks.classifiers import DenseNet121, ResNet18, SimpleCnn


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
