"""Analytic tests of ``cfe_lightning.methods.stylex.generator`` (StyleGAN2, arXiv 1912.04958)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.rows import rows_of
from cfe_lightning.methods.stylex.critic import StyleCritic
from cfe_lightning.methods.stylex.generator import (
    Conditioning,
    MappingNetwork,
    StyledConv,
    StyleEncoder,
    StyleGenerator,
    Styles,
    Synthesis,
    ToImage,
)
from cfe_lightning.methods.stylex.layers import activate, channel_table

#: Different everywhere, so that no layer can be taken for another.
WIDTHS = {4: 6, 8: 5, 16: 3}
SLOTS, CONVOLUTIONS, BLOCKS = 6, 5, 3
#: Convolution and channel of every style.
ADDRESSES = [(layer, channel) for layer, size in enumerate([6, 6, 5, 5, 3]) for channel in range(size)]
MODES: list[Conditioning] = ["none", "const_concat", "w_concat"]


def generator(conditioning: Conditioning = "none", **changes: Any) -> StyleGenerator:
    """Builds a toy whose zero-initialised parameters are not zero, as after some training."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"channels": 1, "num_classes": 2, "z_dim": 6, "w_dim": 7, "mapping_layers": 2}
    network = StyleGenerator(conditioning=conditioning, widths=WIDTHS, **sizes | changes).eval()
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.5)
    return network


def drawn(network: StyleGenerator, batch: int = 2) -> tuple[Tensor, Styles]:
    """Draws latents in every slot and computes their styles."""
    w = torch.randn(batch, network.num_slots, network.w_dim)
    return w, network.styles(w, torch.eye(2)[torch.arange(batch) % 2])


def styled_conv(up: bool, in_channels: int = 5, size: int = 8) -> StyledConv:
    torch.manual_seed(0)
    layer = StyledConv(in_channels, 4, 3, size, up=up)
    nn.init.normal_(layer.bias)
    nn.init.constant_(layer.noise_strength, 0.3)
    return layer


def kernels(layer: StyledConv, style: Tensor) -> Tensor:
    """Computes every image's own kernel before demodulation, [B, out, in, 3, 3]."""
    return layer.weight / math.sqrt(layer.weight.shape[1] * 9) * style[:, None, :, None, None]


def grouped(layer: StyledConv, x: Tensor, style: Tensor) -> Tensor:
    """Computes the layer as StyleGAN2's own code does: one convolution with a group for every image."""
    kernel = kernels(layer, style)
    kernel = kernel / (kernel.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    batch, together = len(x), x.flatten(0, 1)[None]
    if layer.up:
        spread = F.conv_transpose2d(together, kernel.transpose(1, 2).flatten(0, 1), stride=2, groups=batch)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        blur = (taps[:, None] * taps).expand(spread.shape[1], 1, 4, 4)
        convolved = F.conv2d(spread, blur, padding=1, groups=spread.shape[1])
    else:
        convolved = F.conv2d(together, kernel.flatten(0, 1), padding=1, groups=batch)
    convolved = convolved[0].unflatten(0, (batch, -1))
    return activate(convolved + 0.3 * layer.noise + layer.bias[:, None, None])


# One layer


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_demodulated_kernels_have_unit_norm(scale: float) -> None:
    layer = styled_conv(up=False)
    style = torch.randn(6, 5) * scale
    norm = (kernels(layer, style) * layer.demodulation(style)[..., None]).flatten(2).norm(dim=2)
    torch.testing.assert_close(norm, torch.ones(6, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("up", [False, True])
def test_one_shared_kernel_equals_one_kernel_for_every_image(up: bool) -> None:
    layer = styled_conv(up)
    x = torch.randn(3, 5, 4 if up else 8, 4 if up else 8, requires_grad=True)
    style = torch.randn(3, 5, requires_grad=True)
    shared, single = layer(x, style), grouped(layer, x, style)
    assert shared.shape == (3, 4, 8, 8)
    torch.testing.assert_close(shared, single, atol=1e-4, rtol=0)
    probe = torch.randn_like(shared)
    of_shared, of_single = (
        torch.autograd.grad((out * probe).sum(), [x, style, layer.weight]) for out in (shared, single)
    )
    for mine, expected in zip(of_shared, of_single, strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("up", [False, True])
def test_a_styled_convolution_can_be_differentiated_twice(up: bool) -> None:
    layer = styled_conv(up, in_channels=2, size=4).double()
    size = 2 if up else 4
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, size, size, dtype=torch.float64, generator=generator).requires_grad_()
    style = torch.randn(2, 2, dtype=torch.float64, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(layer, [x, style])
    assert torch.autograd.gradgradcheck(layer, [x, style])


@torch.no_grad()
def test_half_precision_leaves_demodulation_and_pictures_alone() -> None:
    network = generator()
    _, styles = drawn(network)
    layer, style = network.synthesis.convs[1], styles.conv[1]
    exact, picture = layer.demodulation(style), network.synthesis(styles)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.demodulation(style), exact)
        rough, entering = network.synthesis.trace(styles)
    torch.testing.assert_close(layer.demodulation(style.bfloat16()), exact, atol=0, rtol=0.02)
    assert all(step.picture is None or step.picture.dtype == torch.float32 for step in entering)
    assert rough.dtype == torch.float32
    assert 0 < (rough - picture).abs().max() < 0.1 * picture.abs().max()


def test_what_paints_is_not_demodulated() -> None:
    torch.manual_seed(0)
    layer = ToImage(5, 3, 4)
    nn.init.normal_(layer.bias)
    x, style = torch.randn(2, 5, 4, 4), torch.randn(2, 5)
    weight = layer.weight[:, :, 0, 0] / math.sqrt(5)
    expected = torch.einsum("oi,bi,bihw->bohw", weight, style, x) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x, style), expected)


def test_styles_start_around_one() -> None:
    torch.manual_seed(0)
    layer = StyledConv(400, 2, 100, 4, up=False)
    styles = layer.affine(torch.randn(50, 100))
    assert styles.mean().item() == pytest.approx(1, abs=0.05)
    assert styles.std().item() == pytest.approx(1, abs=0.05)


# Sizes and addresses


@pytest.mark.parametrize(
    ("size", "base", "maximum", "conv", "rgb", "slots", "noise_maps"),
    [
        (32, 32768, 512, 3584, 2048, 8, 7),
        (64, 32768, 512, 4608, 2560, 10, 9),
        (128, 32768, 512, 5376, 2816, 12, 11),
        (256, 32768, 512, 5760, 2944, 14, 13),
        (256, 16384, 512, 4928, 2496, 14, 13),
        (1024, 32768, 512, 6048, 3040, 18, 17),
        (32, 4096, 128, 896, 512, 8, 7),
        (64, 2048, 64, 544, 288, 10, 9),
    ],
)
def test_sizes_of_the_style_space(
    size: int, base: int, maximum: int, conv: int, rgb: int, slots: int, noise_maps: int
) -> None:
    with torch.device("meta"):
        synthesis = Synthesis(channels=3, widths=channel_table(size, base, maximum), style_dim=512)
        noise = synthesis.draw_noise(2, torch.empty(0))
    assert sum(synthesis.layer_sizes) == conv
    assert sum(layer.affine.weight.shape[0] for layer in synthesis.to_image) == rgb
    assert synthesis.num_slots == slots
    expected = [(2, 1, 4, 4)] + [(2, 1, r, r) for power in range(3, size.bit_length()) for r in [2**power] * 2]
    assert len(noise) == noise_maps
    assert [tuple(noise_map.shape) for noise_map in noise] == expected
    assert [tuple(layer.noise.shape[2:]) for layer in synthesis.layers()] == [shape[2:] for shape in expected]


@pytest.mark.parametrize(("extra", "first"), [(0, 512), (20, 532)])
def test_styles_of_every_layer_at_256_pixels(extra: int, first: int) -> None:
    with torch.device("meta"):
        synthesis = Synthesis(channels=3, widths=channel_table(256), style_dim=512, start_extra=extra)
    assert synthesis.layer_sizes == [first] + [512] * 9 + [256, 256, 128]


def test_parameter_counts_are_the_published_ones() -> None:
    published: dict[str, Any] = {"channels": 3, "widths": channel_table(256)}
    with torch.device("meta"):
        networks = [
            StyleGenerator(num_classes=2, conditioning="none", **published),
            StyleGenerator(num_classes=2, conditioning="const_concat", **published),
            StyleCritic(num_classes=2, label_entry="planes", **published),
            StyleEncoder(w_dim=512, **published),
        ]
    counts = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    assert counts == pytest.approx([30.0, 30.1, 29.0, 28.9], abs=0.05)


def test_flat_styles_go_back_to_their_layers() -> None:
    network = generator()
    _, styles = drawn(network)
    flat = network.synthesis.flatten_styles(styles)
    assert flat.shape == (2, 25)
    assert network.synthesis.layer_sizes == [6, 6, 5, 5, 3]
    for index, (layer, channel) in enumerate(ADDRESSES):
        assert torch.equal(flat[:, index], styles.conv[layer][:, channel])
    back = network.synthesis.replace_styles(styles, flat + 1)
    assert all(torch.equal(new, old + 1) for new, old in zip(back.conv, styles.conv, strict=True))
    assert back.rgb is styles.rgb
    assert back.start is styles.start


def test_rows_of_styles_may_repeat() -> None:
    network = generator()
    _, styles = drawn(network, 3)
    index = torch.tensor([2, 0, 2])
    with torch.no_grad():
        torch.testing.assert_close(network.synthesis(rows_of(styles, index)), network.synthesis(styles)[index])


@pytest.mark.parametrize("slot", range(SLOTS))
def test_who_reads_a_slot(slot: int) -> None:
    network = generator()
    w, styles = drawn(network)
    changed_w = w.clone()
    changed_w[:, slot] += 1
    changed = network.styles(changed_w, torch.eye(2))
    convolutions = [i for i in range(CONVOLUTIONS) if not torch.equal(changed.conv[i], styles.conv[i])]
    painting = [i for i in range(BLOCKS) if not torch.equal(changed.rgb[i], styles.rgb[i])]
    # The last slot is read by what paints alone; block b paints with slot 2 b + 1.
    assert convolutions == ([slot] if slot < CONVOLUTIONS else [])
    assert painting == ([slot // 2] if slot % 2 else [])


# Locality and edits


@pytest.mark.parametrize("layer", range(CONVOLUTIONS))
@torch.no_grad()
def test_a_style_changes_nothing_in_front_of_its_layer(layer: int) -> None:
    network = generator()
    _, styles = drawn(network)
    conv = [style.clone() for style in styles.conv]
    conv[layer][:, 1] += 0.5
    picture, before = network.synthesis.trace(styles)
    changed, after = network.synthesis.trace(styles._replace(conv=conv))
    assert len(before) == CONVOLUTIONS
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old.features, new.features) == (index <= layer)
        if index <= layer and old.picture is not None:
            assert torch.equal(old.picture, new.picture)
    assert not torch.allclose(picture, changed)


@pytest.mark.parametrize("block", range(BLOCKS))
@torch.no_grad()
def test_a_painting_style_changes_only_the_picture(block: int) -> None:
    network = generator()
    _, styles = drawn(network)
    rgb = [style.clone() for style in styles.rgb]
    rgb[block][:, 1] += 0.5
    picture, before = network.synthesis.trace(styles)
    changed, after = network.synthesis.trace(styles._replace(rgb=rgb))
    assert all(torch.equal(old.features, new.features) for old, new in zip(before, after, strict=True))
    assert not torch.allclose(picture, changed)


@pytest.mark.parametrize("layer", range(CONVOLUTIONS))
@torch.no_grad()
def test_synthesis_can_start_at_any_layer(layer: int) -> None:
    network = generator()
    _, styles = drawn(network)
    noise = network.synthesis.draw_noise(2, styles.start)
    for given in (None, noise):
        picture, entering = network.synthesis.trace(styles, given)
        torch.testing.assert_close(picture, network.synthesis(styles, given), atol=0, rtol=0)
        # Whatever stands in front of the layer is not read.
        forgotten = [torch.full_like(s, torch.nan) if i < layer else s for i, s in enumerate(styles.conv)]
        late = network.synthesis.synthesize_from(layer, entering[layer], styles._replace(conv=forgotten), given)
        torch.testing.assert_close(late, picture, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pictures_are_summed_over_resolutions() -> None:
    network = generator()
    _, styles = drawn(network)
    picture, entering = network.synthesis.trace(styles)
    shapes = [None if step.picture is None else step.picture.shape[2] for step in entering]
    assert shapes == [None, 4, 4, 8, 8]
    assert [step.features.shape[1:] for step in entering[1:]] == [(6, 4, 4), (5, 8, 8), (5, 8, 8), (3, 16, 16)]
    dark = styles._replace(rgb=[*styles.rgb[:-1], torch.zeros_like(styles.rgb[-1])])
    enlarged = F.interpolate(entering[-1].picture, scale_factor=2, mode="bilinear", align_corners=False)
    expected = enlarged + network.synthesis.to_image[-1].bias[:, None, None]
    torch.testing.assert_close(network.synthesis(dark)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    assert picture.shape == (2, 1, 16, 16)


@pytest.mark.parametrize("index", [0, 6, 12, 18, 24])
@torch.no_grad()
def test_adding_to_a_style_equals_adding_to_the_affine_map(index: int) -> None:
    network = generator()
    w, styles = drawn(network)
    flat = network.synthesis.flatten_styles(styles)
    flat[:, index] += 0.7
    added = network.synthesis(network.synthesis.replace_styles(styles, flat))
    layer, channel = ADDRESSES[index]
    network.synthesis.convs[layer].affine.bias[channel] += 0.7
    torch.testing.assert_close(network(w, torch.eye(2)), added, atol=1e-5, rtol=0)
    assert not torch.allclose(network.synthesis(styles), added, atol=1e-3)


# Noise


@torch.no_grad()
def test_stored_noise_gives_the_same_picture_again() -> None:
    network = generator()
    w, styles = drawn(network)
    assert torch.equal(network(w, torch.eye(2)), network(w, torch.eye(2)))
    noise = network.synthesis.draw_noise(2, w)
    assert torch.equal(network(w, torch.eye(2), noise), network.synthesis(styles, noise))
    assert not torch.allclose(network(w, torch.eye(2), noise), network(w, torch.eye(2)), atol=1e-3)
    stored = [layer.noise for layer in network.synthesis.layers()]
    assert torch.equal(network(w, torch.eye(2), stored), network(w, torch.eye(2)))


@pytest.mark.parametrize("layer", range(CONVOLUTIONS))
@torch.no_grad()
def test_every_layer_has_noise_of_its_own(layer: int) -> None:
    network = generator()
    w, _ = drawn(network)
    noise = network.synthesis.draw_noise(2, w)
    other = [value.flip(3) if index == layer else value for index, value in enumerate(noise)]
    assert not torch.allclose(network(w, torch.eye(2), noise), network(w, torch.eye(2), other), atol=1e-3)


@torch.no_grad()
def test_noise_is_without_effect_at_first() -> None:
    network = generator()
    w, _ = drawn(network)
    for layer in network.synthesis.layers():
        nn.init.zeros_(layer.noise_strength)
    noise = network.synthesis.draw_noise(2, w)
    assert torch.equal(network(w, torch.eye(2), noise), network(w, torch.eye(2)))
    fresh = StyleGenerator(channels=1, num_classes=2, conditioning="none", widths=WIDTHS, z_dim=2, w_dim=2)
    assert all(layer.noise_strength == 0 for layer in fresh.synthesis.layers())


# Class


@pytest.mark.parametrize("conditioning", MODES)
def test_the_label_changes_the_picture_if_there_is_conditioning(conditioning: Conditioning) -> None:
    network = generator(conditioning)
    w = torch.randn(2, 7)
    labels = torch.tensor([[1.0, 0.0], [0.2, 0.8]], requires_grad=True)
    pictures = network(w, labels)

    # Pictures and gradients of the labels.
    unlike = (pictures - network(w, labels.flip(0))).abs().amax(dim=(1, 2, 3))
    if conditioning == "none":
        assert unlike.tolist() == [0, 0]
        assert network.embedding is None
    else:
        assert (unlike > 1e-3).all()
        (gradient,) = torch.autograd.grad(pictures.square().sum(), labels, retain_graph=True)
        assert (gradient != 0).all()

    # Every weight has a gradient.
    pictures.square().sum().backward()
    synthesis = {name: value for name, value in network.named_parameters() if not name.startswith("mapping")}
    assert [name for name, value in synthesis.items() if value.grad is None or value.grad.abs().max() == 0] == []
    assert (network.embedding is not None) == (conditioning == "const_concat")


@pytest.mark.parametrize("num_classes", [2, 3])
def test_an_embedded_label_stands_beside_the_constant(num_classes: int) -> None:
    network = generator("const_concat", num_classes=num_classes)
    assert network.embedding is not None
    start = network.styles(torch.randn(num_classes, 7), torch.eye(num_classes)).start
    assert start.shape == (num_classes, 6 + 10 * num_classes, 4, 4)
    assert network.synthesis.layer_sizes[0] == 6 + 10 * num_classes
    torch.testing.assert_close(start[:, :6], network.synthesis.constant.expand(num_classes, -1, -1, -1))
    off, on = network.embedding
    rows = [torch.cat([on if i == k else off for i in range(num_classes)]) for k in range(num_classes)]
    torch.testing.assert_close(start[:, 6:], torch.stack(rows)[:, :, None, None].expand(-1, -1, 4, 4))


def test_a_label_beside_the_latent_moves_every_style() -> None:
    network = generator("w_concat")
    w = torch.zeros(2, 7)
    styles = network.styles(w, torch.eye(2))
    layers = [*network.synthesis.layers(), *network.synthesis.to_image]
    for style, layer in zip([*styles.conv, *styles.rgb], layers, strict=True):
        expected = layer.affine.weight[:, 7:].T / 3 + layer.affine.bias
        torch.testing.assert_close(style, expected)


# Latents


def test_scaling_noise_changes_no_latent() -> None:
    torch.manual_seed(0)
    network = MappingNetwork(6, 7, 3)
    z = torch.randn(4, 6)
    assert network(z).shape == (4, 7)
    torch.testing.assert_close(network(50 * z), network(z), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(network(-z), network(z))


def test_latents_have_the_size_of_the_specification() -> None:
    torch.manual_seed(0)
    network = MappingNetwork(512, 512, 8)
    w = network(torch.randn(64, 512))
    assert w.norm(dim=1).mean().item() == pytest.approx(24, abs=6)
    assert all(layer.lr_mul == 0.01 for layer in network.layers)


def test_mixing_begins_at_the_cut() -> None:
    network = generator()
    first, second = torch.randn(3, 6), torch.randn(3, 6)
    mixed = network.mixed(first, second, torch.tensor([SLOTS, 1, 4]))
    assert mixed.shape == (3, SLOTS, 7)
    of_first, of_second = network.mapping(first), network.mapping(second)
    for image, cut in enumerate([SLOTS, 1, 4]):
        expected = [of_first[image]] * cut + [of_second[image]] * (SLOTS - cut)
        torch.testing.assert_close(mixed[image], torch.stack(expected), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_one_latent_is_copied_to_all_slots() -> None:
    network = generator()
    w = torch.randn(2, 7)
    copies = w[:, None].repeat(1, SLOTS, 1)
    assert torch.equal(network.spread(w), copies)
    assert network.spread(copies) is copies
    assert torch.equal(network(w, torch.eye(2)), network(copies, torch.eye(2)))


@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("layers", [None, [1], [4, 2]])
@torch.no_grad()
def test_affine_weights_say_how_the_latent_moves_the_styles(
    conditioning: Conditioning, layers: list[int] | None
) -> None:
    network = generator(conditioning)
    weights = network.affine_weights(layers)
    sizes = network.synthesis.layer_sizes
    chosen = [i for i in range(CONVOLUTIONS) if layers is None or i in layers]
    assert weights.shape == (sum(sizes[i] for i in chosen), 7)
    w, direction = torch.randn(2, 7), torch.randn(7)
    before, after = (network.styles(latent, torch.eye(2)).conv for latent in (w, w + direction))
    moved = torch.cat([after[i] - before[i] for i in chosen], dim=1)
    root = 3 if conditioning == "w_concat" else math.sqrt(7)
    torch.testing.assert_close(moved, (weights @ direction / root).expand(2, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("space", "shape"), [("w", (3, 7)), ("w+", (3, SLOTS, 7))])
@torch.no_grad()
def test_every_image_is_encoded_by_itself(space: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = StyleEncoder(channels=1, widths=WIDTHS, w_dim=7, space=space)
    images = torch.rand(3, 1, 16, 16) * 2 - 1
    latents = encoder(images)
    assert latents.shape == shape
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(latents, alone, atol=1e-5, rtol=1e-5)
    assert generator()(latents, torch.eye(2)[[0, 1, 0]]).shape == (3, 1, 16, 16)
