import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from cfe_lightning.classifier.tracing import (
    as_feature_map,
    probe_image,
    trace_layers,
    trace_levels,
    why_no_feature_map,
)


def traced(network, channels=3, image_size=64, **names):
    layers = trace_layers(network, channels, image_size, **names)
    return layers.head, layers.feature_map, layers.feature_map_transform


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ("fc", "layer4", "none")),
        ("regnet_y_400mf", ("fc", "trunk_output", "none")),
        ("shufflenet_v2_x0_5", ("fc", "conv5", "none")),
        ("densenet121", ("classifier", "features", "relu")),
        ("efficientnet_b0", ("classifier.1", "features", "none")),
        ("mobilenet_v2", ("classifier.1", "features", "none")),
        ("mnasnet0_5", ("classifier.1", "layers", "none")),
        # A hidden layer between pooling and the last linear layer: the block of both is the head.
        ("mobilenet_v3_small", ("classifier", "features", "none")),
        ("squeezenet1_1", (None, None, "none")),
    ],
)
def test_torchvision_families(name, expected):
    network = models.get_model(name, weights=None, num_classes=7)
    assert traced(network) == expected


def test_inception_family():
    arguments = {"init_weights": False, "aux_logits": False, "num_classes": 5}
    assert traced(models.googlenet(**arguments)) == ("fc", "inception5b", "none")


def test_transformers_and_plain_stacks_have_a_head_but_no_map():
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
    vit = models.VisionTransformer(**sizes, num_classes=3)
    # torchvision starts this head at zero; a trained one is not.
    assert traced(vit, image_size=32) == ("heads.head", None, "none")
    nn.init.normal_(vit.heads.head.weight)
    assert traced(vit, image_size=32) == ("heads.head", None, "none")
    vgg = models.VGG(models.vgg.make_layers([8, "M", 8, "M"]), num_classes=3, init_weights=False)
    vgg.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.ReLU(), nn.Linear(16, 3))
    assert traced(vgg) == ("classifier.2", None, "none")


def test_a_head_with_a_norm_takes_pooled_cells():
    block = models.convnext.CNBlockConfig(8, None, 2)
    network = models.ConvNeXt([block], num_classes=3).eval()
    layers = trace_layers(network, 3, 32)
    assert (layers.head, layers.feature_map, layers.head_on_cells) == ("classifier", "features", True)
    image = probe_image(network, 3, 32)
    pooled = network.features(image).mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(network.classifier(pooled), network(image))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_levels_of_a_resnet_are_its_stages(name):
    network = models.get_model(name, weights=None, num_classes=4)
    levels = trace_levels(network, 3, 64, torch.zeros(1, 1, 2, 2))
    assert list(levels) == ["layer3", "layer2", "layer1"]
    assert [level.size[1] for level in levels.values()] == [4, 8, 16]
    assert all(level.non_negative and not level.channels_last for level in levels.values())
    assert list(trace_levels(network, 3, 64, torch.zeros(1, 1, 2, 2), names=["layer1"])) == ["layer1"]
    with pytest.raises(ValueError, match="'layer9', which is no layer that returns a map"):
        trace_levels(network, 3, 64, torch.zeros(1, 1, 2, 2), names=["layer9"])
    with pytest.raises(ValueError, match="not shrink"):
        trace_levels(network, 3, 64, torch.zeros(1, 1, 2, 2), names=["layer1", "layer3"])


def test_levels_with_channels_last_say_so():
    swin = models.SwinTransformer([4, 4], 16, [1, 1], [1, 1], [4, 4], num_classes=3)
    (level,) = trace_levels(swin, 3, 32, torch.zeros(1, 1, 4, 4)).values()
    assert (level.size, level.channels_last, level.non_negative) == ((16, 8, 8), True, False)


def test_swin_keeps_its_channels_last_until_the_map():
    swin = models.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [4, 4], num_classes=3)
    assert traced(swin, image_size=32) == ("head", "permute", "none")


class Tiny(nn.Module):
    """Pools four features from a map of a chosen layout and puts them through a linear head."""

    def __init__(self, layout, classes=3):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.last = nn.Identity()
        self.fc = nn.Linear(4, classes)
        self.layout = layout

    def forward(self, image):
        body = self.body(image)
        # Pooled features of the layer ``last``.
        match self.layout:
            case "none":
                features = self.last(body).mean(dim=(2, 3))
            case "relu":
                features = F.relu(self.last(body)).mean(dim=(2, 3))
            case "relu_in_place":
                features = F.relu(self.last(body), inplace=True).mean(dim=(2, 3))
            case "channels_last":
                features = self.last(body.permute(0, 2, 3, 1)).mean(dim=(1, 2))
            case "tokens":
                features = self.last(body.flatten(2).transpose(1, 2)).mean(dim=1)
            case "tokens_without_first":
                tokens = F.pad(body.flatten(2).transpose(1, 2), (0, 0, 1, 0), value=9.0)
                features = self.last(tokens)[:, 1:].mean(dim=1)
            case "maximum":
                features = self.last(body).amax(dim=(2, 3))
        return self.fc(features)


@pytest.mark.parametrize("layout", ["none", "relu", "relu_in_place", "channels_last", "tokens", "tokens_without_first"])
def test_every_layout_of_the_map_is_recognised_and_averages_to_the_features(layout):
    network = Tiny(layout)
    head, feature_map, transform = traced(network, channels=1, image_size=8)
    assert (head, feature_map) == ("fc", "last")
    assert transform == ("relu" if layout == "relu_in_place" else layout)
    image = probe_image(network, 1, 8)
    seen = []
    network.last.register_forward_hook(lambda _module, _inputs, output: seen.append(output.clone()))
    network.fc.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    network(image)
    assert as_feature_map(seen[0], transform).shape == (2, 4, 4, 4)
    assert torch.allclose(as_feature_map(seen[0], transform).mean(dim=(2, 3)), seen[1], atol=1e-6)


def test_tokens_become_rows_of_the_map_in_reading_order():
    tokens = torch.arange(9.0).view(1, 9, 1)
    assert as_feature_map(tokens, "tokens")[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_other_pooling_has_no_map():
    assert traced(Tiny("maximum"), channels=1, image_size=8) == ("fc", None, "none")


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten()), "Sequential has no linear layer that could be watched"),
        (nn.Sequential(nn.Linear(8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "layer, 0, does not return the logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), r"linear layer is 1 \(64 inputs\), but no layer returns a map"),
        (Tiny("maximum"), r"fc \(4 inputs\), but no layer's output averages to them \(closest: (body|last), relative"),
    ],
)
def test_the_reason_for_a_missing_map_is_named(network, reason):
    assert re.search(reason, why_no_feature_map(network, 1, 8))


def test_a_dead_network_claims_no_map():
    network = Tiny("none")
    nn.init.zeros_(network.body.weight)
    nn.init.zeros_(network.body.bias)
    assert traced(network, channels=1, image_size=8) == ("fc", None, "none")


def test_a_map_of_one_cell_is_found_at_a_larger_size():
    assert traced(models.resnet18(weights=None, num_classes=2), image_size=32) == ("fc", "layer4", "none")


def test_a_map_of_one_cell_in_a_network_of_one_size_is_not_claimed():
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 2))
    assert traced(network, channels=1, image_size=8) == ("2", None, "none")


@pytest.mark.parametrize("shape", [(2, 1), (2,)])
def test_one_output_may_be_squeezed(shape):
    class One(Tiny):
        def forward(self, image):
            return super().forward(image).view(shape)

    assert traced(One("none", classes=1), channels=1, image_size=8) == ("fc", "last", "none")


def test_scaled_logits_have_no_head():
    class Scaled(Tiny):
        def forward(self, image):
            return super().forward(image) * 2

    assert traced(Scaled("none"), channels=1, image_size=8) == (None, None, "none")


def test_a_named_layer_is_taken_and_its_transform_found():
    network = Tiny("relu")
    assert traced(network, channels=1, image_size=8, feature_map="body") == ("fc", "body", "relu")
    assert traced(network, channels=1, image_size=8, head="fc") == ("fc", "last", "relu")


def test_a_named_head_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"head names .body., but that layer does not turn features .* logits of Tiny"):
        trace_layers(Tiny("none"), 1, 8, head="body")


def test_dropout_and_batch_norm_do_not_disturb_and_stay_as_they_are():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)
    )
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    assert traced(network, channels=1, image_size=8) == ("5", "1", "none")
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_nothing_stays_on_the_network_after_an_exception():
    class Fails(Tiny):
        def forward(self, image):
            super().forward(image)
            raise RuntimeError("broken")

    network = Fails("none")
    with pytest.raises(RuntimeError, match="broken"):
        trace_layers(network, 1, 8)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    assert all(module.training for module in network.modules())


def test_the_global_random_state_is_left_alone():
    network = Tiny("none")
    before = torch.get_rng_state()
    trace_layers(network, 1, 8)
    assert torch.equal(torch.get_rng_state(), before)
