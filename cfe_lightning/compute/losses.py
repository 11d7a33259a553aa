"""Loss terms and distances that several methods share, as pure functions.

Shapes: B images, C channels, H, W pixels.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio

from cfe_lightning.compute.precision import to_float32

#: Largest reported ratio in dB; that of identical images is infinite.
PSNR_CAP = 100.0


def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
    """Returns the non-saturating logistic loss of a critic's logits for real (or fake) images, any shape -> []."""
    logits = to_float32(logits)
    return F.softplus(-logits if real else logits).mean()


def r1_penalty(logits: Tensor, image: Tensor) -> Tensor:
    """Returns half the squared gradient norm of a critic's logits [B] at real images [B, C, H, W], averaged, [].

    Source: R1 of Mescheder et al. 2018 (arXiv 1801.04406). The images must require gradients.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def path_length_penalty(length: Tensor, mean: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Returns the mean squared deviation of path lengths [B] from their running mean, and the updated mean, [] each.

    A length is the change of a picture per unit of the latent; ``decay`` is the weight of this batch in the mean.
    Source: StyleGAN2 (arXiv 1912.04958), equation 4.
    """
    mean = torch.lerp(mean, length.mean(), decay)
    return (length - mean).square().mean(), mean.detach()


def relative_distance(features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Returns the mean squared difference of feature maps over the reference's mean square, averaged over maps, []."""
    terms = [
        F.mse_loss(mine, other) / other.detach().square().mean().clamp_min(1e-8)
        for mine, other in zip(map(to_float32, features), map(to_float32, reference), strict=True)
    ]
    return torch.stack(terms).mean()


class Lpips:
    """Perceptual distance LPIPS (arXiv 1801.03924), built once and frozen; no module, so that no checkpoint holds it.

    Args:
        pretrained: Uses torchvision's weights, downloaded at first use; otherwise random ones, for tests and for
            ``load_backbone``. The weights per channel always come from the package ``lpips``.
        net: Backbone network: AlexNet, VGG16 or SqueezeNet 1.1.
    """

    def __init__(self, pretrained: bool = True, net: Literal["alex", "vgg", "squeeze"] = "alex") -> None:
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips uses deprecated names of torchvision
            network = lpips.LPIPS(net=net, pnet_rand=not pretrained, verbose=False)
        self.network = network.eval().requires_grad_(False)

    def __call__(self, image: Tensor, other: Tensor) -> Tensor:
        """Returns the mean distance of images [B, C, H, W] in [-1, 1], C 1 or 3 and sides of at least 32 pixels, []."""
        return self.per_image(image, other).mean()

    def per_image(self, image: Tensor, other: Tensor) -> Tensor:
        """Returns the distance of each pair of images, [B]."""
        self.network.to(image.device)
        shape = (-1, 3, -1, -1)
        return to_float32(self.network(image.expand(shape), other.expand(shape)).flatten())

    def load_backbone(self, weights: Mapping[str, Tensor]) -> None:
        """Loads the backbone from the state dictionary of torchvision's ``features``: ``0.weight``, ``0.bias``, ...

        Raises:
            ValueError: If the weights belong to another network; nothing is changed then.
        """
        own = self.network.net.state_dict()
        # Below the name of their stage, layers keep torchvision's numbers: slice1.0.weight.
        theirs = {name: name.partition(".")[2] for name in own}
        expected = {theirs[name]: value.shape for name, value in own.items()}
        given = {name: value.shape for name, value in weights.items()}
        if differing := [name for name in expected | given if expected.get(name) != given.get(name)]:
            named = f"{', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}"
            kind = type(self.network.net).__name__
            raise ValueError(f"the layers are not those of torchvision's {kind}: {named} differ")
        self.network.net.load_state_dict({name: weights[other] for name, other in theirs.items()})


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Returns the peak signal-to-noise ratio of each image [B, C, H, W] in [-1, 1], in dB, at most ``PSNR_CAP``, [B].

    The error is averaged over one image, never pooled over the batch. Values outside the range count as they are.
    """
    ratio = peak_signal_noise_ratio(reconstruction, image, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return torch.as_tensor(ratio).clamp_max(PSNR_CAP)
