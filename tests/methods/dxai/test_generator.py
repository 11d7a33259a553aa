"""Tests of ``cfe_lightning.methods.dxai.generator``: shapes, parameter counts, independence of the branches."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cfe_lightning.methods.dxai.generator import MappingNetwork, MultiBranchGenerator, concat_per_branch, initialise


def tiny(**changes) -> MultiBranchGenerator:
    arguments = {"image_size": 32, "num_branches": 3, "branch_width": 4, "min_resolution": 8, "blocks_per_stage": 1}
    return MultiBranchGenerator(**{**arguments, "style_dim": 8, **changes})


def noisy(generator: MultiBranchGenerator) -> MultiBranchGenerator:
    """Moves every parameter away from its initial value, norms and zero heads included."""
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return generator


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("size", "expected"), [(32, 165_315), (64, 591_265), (128, 2_125_245), (256, 3_717_925)])
def test_parameter_count_of_the_published_network(size, expected):
    assert count(MultiBranchGenerator(image_size=size, stem_norm="instance", head_norm="instance")) == expected


def test_parameter_count_of_the_published_mapping_network():
    assert count(MappingNetwork(num_classes=3, num_styles=6)) == 3_751_552


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("size", "min_resolution"), [(28, 8), (32, 16), (64, 16), (96, 16), (128, 16), (256, 16)])
def test_shapes(size, min_resolution, channels):
    generator = tiny(image_size=size, channels=channels, num_branches=2, branch_width=2, min_resolution=min_resolution)
    styles = torch.randn(2, generator.num_styles, 8)
    assert generator(torch.rand(2, channels, size, size), styles).shape == (2, 2, channels, size, size)


def test_too_small_an_image_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"image_size must be at least 32 .*got 16: lower min_resolution"):
        MultiBranchGenerator(image_size=16)


@pytest.mark.parametrize("norm", ["none", "instance"])
@pytest.mark.parametrize("image_skip", [False, True])
def test_changing_one_branch_changes_no_other(norm, image_skip):
    generator = noisy(tiny(stem_norm=norm, head_norm=norm, image_skip=image_skip))
    image, styles = torch.rand(2, 3, 32, 32), torch.randn(2, generator.num_styles, 8)
    before = generator(image, styles)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            rows = parameter.unflatten(0, (2 if ".affine." in name else 1, 3, -1))
            rows[:, 1].add_(torch.randn_like(rows[:, 1]))
    after = generator(image, styles)
    assert torch.equal(before[:, 0], after[:, 0])
    assert torch.equal(before[:, 2], after[:, 2])
    assert not torch.allclose(before[:, 1], after[:, 1])


def test_a_branch_sends_no_gradient_to_the_parameters_of_another():
    generator = noisy(tiny())
    generator(torch.rand(2, 3, 32, 32), torch.randn(2, generator.num_styles, 8))[:, 2].square().sum().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None
        rows = parameter.grad.unflatten(0, (2 if ".affine." in name else 1, 3, -1))
        assert rows[:, :2].abs().max() == 0, name
    assert generator.head.weight.grad[6:].abs().max() > 0


def test_encoding_once_equals_encoding_twice():
    generator = noisy(tiny(image_skip=True))
    image, styles = torch.rand(2, 3, 32, 32), torch.randn(4, generator.num_styles, 8)
    once = generator.decode(generator.encode(image), styles, image)
    twice = torch.cat([generator(image, styles[:2]), generator(image, styles[2:])])
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=0)


def test_autocast_does_not_widen_what_is_enlarged(monkeypatch):
    generator, seen = tiny(), []
    interpolate = F.interpolate

    def watched(x, **options):
        # On a GPU autocast would take single precision for it.
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return interpolate(x, **options)

    monkeypatch.setattr(F, "interpolate", watched)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        generator(torch.rand(2, 3, 32, 32), torch.rand(2, generator.num_styles, 8))
    assert seen == [(torch.bfloat16, False)] * 2


def test_concatenation_keeps_branches_together():
    first = torch.arange(2 * 3.0).view(1, 6, 1, 1)
    second = 10 + torch.arange(3.0).view(1, 3, 1, 1)
    assert concat_per_branch(first, second, 3).flatten().tolist() == [0, 1, 10, 2, 3, 11, 4, 5, 12]


def test_published_norms_hide_brightness_and_contrast_and_without_them_they_are_seen():
    image = torch.rand(2, 3, 32, 32)
    changed = 0.4 * image + 0.3
    published = noisy(tiny(stem_norm="instance", head_norm="instance"))
    styles = torch.randn(2, published.num_styles, 8)
    original = published(image, styles)
    assert (published(changed, styles) - original).norm() / original.norm() < 0.01
    ours = noisy(tiny())
    original = ours(image, styles)
    assert (ours(changed, styles) - original).norm() / original.norm() > 0.05


def test_image_skip_starts_as_the_image_itself():
    generator = tiny(image_skip=True)
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    branches = generator(image, torch.randn(2, generator.num_styles, 8))
    assert branches[:, 0].abs().max() == 0
    torch.testing.assert_close(branches[:, 1:].sum(dim=1), image)


def test_mapping_uses_the_tower_of_each_class():
    mapping = MappingNetwork(num_classes=3, num_styles=2, latent_dim=4, style_dim=5, width=8)
    latent, label = torch.randn(4, 4), torch.tensor([0, 2, 1, 2])
    styles = mapping(latent, label)
    assert styles.shape == (4, 2, 5)
    with torch.no_grad():
        for layer in mapping.towers:
            layer.weight[1].add_(1.0)
    changed = mapping(latent, label)
    assert torch.equal(changed[[0, 1, 3]], styles[[0, 1, 3]])
    assert not torch.allclose(changed[2], styles[2])


def test_initial_weights_have_the_published_spread():
    layer = nn.Conv2d(16, 256, 3, groups=2)
    initialise(nn.Sequential(layer))
    fan_in = 8 * 9
    assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    assert layer.bias.abs().max() == 0
