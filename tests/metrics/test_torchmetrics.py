"""Our numbers are those of torchmetrics where it has the metric, on images as a user of it would give them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cfe_lightning.methods.diff_explainer.agent import agreement
from cfe_lightning.metrics import localisation, path, realism, reconstruction


def unit_images(seed: int, count: int = 6, channels: int = 3) -> Tensor:
    """Noise on [0, 1], [N, C, 16, 16]."""
    return torch.rand(count, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def ours(image: Tensor) -> Tensor:
    return image * 2 - 1


class Extractor(nn.Module):
    """Features of images in [0, 1], as torchmetrics hands them to a module."""

    num_features = 3

    def forward(self, image: Tensor) -> Tensor:
        return torch.stack(
            [image[:, 0].mean(dim=(1, 2)), image.std(dim=(1, 2, 3)), image[:, 1, :8].mean(dim=(1, 2))], 1
        )


def test_psnr_of_every_image_alone() -> None:
    one, other = unit_images(0), unit_images(1)
    expected = [PeakSignalNoiseRatio(data_range=1.0)(other[i], one[i]) for i in range(6)]
    torch.testing.assert_close(reconstruction.psnr(ours(one), ours(other)), torch.stack(expected), rtol=1e-4, atol=0)
    by_hand = -10 * (one - other).square().mean(dim=(1, 2, 3)).log10()
    torch.testing.assert_close(reconstruction.psnr(ours(one), ours(other)), by_hand, rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_of_every_image_alone(channels: int) -> None:
    one, other = unit_images(0, channels=channels), unit_images(1, channels=channels)
    other = torch.lerp(one, other, torch.linspace(0, 1, 6).view(6, 1, 1, 1))
    measure = StructuralSimilarityIndexMeasure(data_range=1.0)
    expected = torch.stack([measure(other[i : i + 1], one[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(reconstruction.ssim(ours(one), ours(other)), expected, rtol=1e-4, atol=1e-5)


def test_frechet_distance_of_images_and_of_their_features() -> None:
    real, edited = unit_images(0, 40), unit_images(1, 30).pow(1.3)
    metric = FrechetInceptionDistance(feature=Extractor(), normalize=True).set_dtype(torch.float64)
    for start in range(0, 30, 10):
        metric.update(real[start : start + 10].double(), real=True)
        metric.update(edited[start : start + 10].double(), real=False)
    metric.update(real[30:].double(), real=True)
    features = [Extractor()(images.double()) for images in (real, edited)]
    found = realism.fid(*features)
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)
    # The formula: distance of the means, traces, and roots of the eigenvalues of the product.
    (first, second), (left, right) = [f.mean(dim=0) for f in features], [torch.cov(f.T) for f in features]
    roots = torch.linalg.eigvals(left @ right).real.clamp_min(0).sqrt().sum()
    assert found == pytest.approx(float((first - second).square().sum() + (left + right).trace() - 2 * roots), rel=1e-6)


def test_kernel_distance_of_images_and_of_their_features() -> None:
    real, edited = unit_images(0, 20), unit_images(1, 20).pow(1.3)
    metric = KernelInceptionDistance(feature=Extractor(), subsets=1, subset_size=20, normalize=True)
    metric.update(real.double(), real=True)
    metric.update(edited.double(), real=False)
    features = [Extractor()(images.double()) for images in (real, edited)]
    found, _ = realism.kid(*features)
    assert found == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    # The formula of the unbiased estimate: an image is not compared with itself.
    among, across = [((f @ f.T) / 3 + 1) ** 3 for f in features], ((features[0] @ features[1].T) / 3 + 1) ** 3
    inside = sum(float(k.sum() - k.trace()) / (20 * 19) for k in among)
    assert found == pytest.approx(inside - 2 * float(across.mean()), rel=1e-6)


def test_rank_correlation_with_ties_is_spearman_s() -> None:
    generator = torch.Generator().manual_seed(0)
    k, q = torch.rand(5, 12, generator=generator), torch.randint(0, 5, (5, 12), generator=generator).float()
    expected = torch.stack([spearman_corrcoef(k[i], q[i]) for i in range(5)])
    torch.testing.assert_close(path.rank_correlation(k, q), expected, rtol=0, atol=1e-5)


def test_correlation_over_pixels_is_pearson_s() -> None:
    one, other = ours(unit_images(0)), ours(unit_images(1))
    other = other + one
    found = localisation.correlation(one, other)
    maps = [localisation.magnitude(difference).flatten(1) for difference in (one, other)]
    expected = torch.stack([pearson_corrcoef(maps[0][i], maps[1][i]) for i in range(6)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_area_under_an_agent_s_roc_curve_is_that_of_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    said, wanted = (torch.randn(50, 2, generator=generator) for _ in range(2))
    said = said + wanted
    score, truth = said[:, 1] - said[:, 0], wanted.argmax(dim=1)
    found = agreement(said, wanted)["auc"]
    assert float(found) == pytest.approx(float(BinaryAUROC()(score.sigmoid(), truth)), abs=1e-6)
    won = score[truth == 1][:, None] > score[truth == 0]
    assert float(found) == pytest.approx(float(won.double().mean()), abs=1e-6)
