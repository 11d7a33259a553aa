"""Loss terms and measures that more than one method uses, as pure functions.

Shapes: B images, C channels, H, W pixels, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio

from cfe_lightning.compute.precision import to_float32


def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
    """Non-saturating logistic loss of critic logits that should say real (or fake): mean softplus, any shape -> []."""
    logits = to_float32(logits)
    return F.softplus(-logits if real else logits).mean()


def r1_penalty(logits: Tensor, image: Tensor) -> Tensor:
    """Half the squared gradient norm at real images (Mescheder et al. 2018, R1): mean over samples, sum over pixels.

    Args:
        logits: The critic's judgement of each image, [B].
        image: The real images that ``logits`` were computed from, requiring grad, [B, C, H, W].
    """
    (gradient,) = torch.autograd.grad(logits.sum(), image, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()


def path_length_penalty(length: Tensor, mean: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """How unequal the paths are (StyleGAN2, equation 4), and the running mean of their length.

    Args:
        length: How far pictures move per unit of the latent, [B].
        mean: Running mean, [].
        decay: Share of this batch in it.
    """
    mean = torch.lerp(mean, length.mean(), decay)
    return (length - mean).square().mean(), mean.detach()


def relative_distance(features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of feature maps in units of the reference's mean square, averaged over the maps, []."""
    terms = [
        F.mse_loss(mine, other) / other.detach().square().mean().clamp_min(1e-8)
        for mine, other in zip(map(to_float32, features), map(to_float32, reference), strict=True)
    ]
    return torch.stack(terms).mean()


class Lpips:
    """Perceptual distance by a network (Zhang et al. 2018), built once and frozen; no module, so in no checkpoint.

    Args:
        pretrained: The network as torchvision offers it, downloaded at first use; else random, for tests and for
            ``load_backbone``. What weighs its channels comes with the package ``lpips`` either way.
        net: AlexNet, VGG16 or SqueezeNet 1.1.
    """

    def __init__(self, pretrained: bool = True, net: Literal["alex", "vgg", "squeeze"] = "alex") -> None:
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision by older names
            network = lpips.LPIPS(net=net, pnet_rand=not pretrained, verbose=False)
        self.network = network.eval().requires_grad_(False)

    def __call__(self, image: Tensor, other: Tensor) -> Tensor:
        """Mean over the batch, images [B, C, H, W] in [-1, 1] with C 1 or 3 and sides from 32 on, []."""
        return self.per_image(image, other).mean()

    def per_image(self, image: Tensor, other: Tensor) -> Tensor:
        """As the call, of every image, [B]."""
        self.network.to(image.device)
        shape = (-1, 3, -1, -1)
        return to_float32(self.network(image.expand(shape), other.expand(shape)).flatten())

    def load_backbone(self, weights: Mapping[str, Tensor]) -> None:
        """Fills the network from the state dictionary of torchvision's ``features``: ``0.weight``, ``0.bias``, ...

        Raises:
            ValueError: If it is that of another network; nothing is changed then.
        """
        own = self.network.net.state_dict()
        # The layers keep torchvision's numbers below the stage that they are in: slice1.0.weight.
        theirs = {name: name.partition(".")[2] for name in own}
        expected = {theirs[name]: value.shape for name, value in own.items()}
        if expected != {name: value.shape for name, value in weights.items()}:
            kind = type(self.network.net).__name__
            raise ValueError(f"the layers are not those of torchvision's {kind}: {_differing(expected, weights)}")
        self.network.net.load_state_dict({name: weights[other] for name, other in theirs.items()})


def _differing(expected: Mapping[str, torch.Size], weights: Mapping[str, Tensor]) -> str:
    names = [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]
    names += [name for name in weights if name not in expected]
    return f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''} differ"


def psnr(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Of images [B, C, H, W] in [-1, 1], each in dB with a peak of 2, at most 100 (identical images), [B]."""
    ratio = peak_signal_noise_ratio(reconstruction, image, data_range=2.0, reduction="none", dim=(1, 2, 3))
    return torch.as_tensor(ratio).clamp_max(100.0)
