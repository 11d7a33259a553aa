"""A diffusion autoencoder: an image as a semantic code and a noise map, decoded without visible loss.

It knows no classifier: one is trained per image domain and serves every classifier of that domain.

Source: Preechakul et al., "Diffusion Autoencoders", CVPR 2022, arXiv 2111.15640; DiffExplainer, arXiv 2406.15182.

Shapes: B images, C channels, H, W pixels, D entries of the code.
"""

import inspect
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_lightning.compute.losses import psnr
from cfe_lightning.compute.precision import cast_once, to_float32
from cfe_lightning.compute.processes import log_training, log_validation
from cfe_lightning.explainer import load_checkpoint
from cfe_lightning.files.text import VERSION, one_line
from cfe_lightning.methods.diff_explainer import diffusion
from cfe_lightning.methods.diff_explainer.diffusion import DiffusionProcess, NoisePredictor, Sampler
from cfe_lightning.methods.diff_explainer.unet import CodeMode, CodePool, SemanticEncoder, SemanticUnet

#: Images that one validation reconstructs.
_RECONSTRUCTED = 16


class DiffusionAutoencoder(pl.LightningModule):
    """Trains an encoder and a noise predictor together on the noise that was added to images.

    Args:
        image_size: Side of the images in pixels; divisible by 2 once for every halving of the resolution.
        channels: Number of channels of the images: 1 for grey, 3 for RGB.
        code_dim: Length of the semantic code, D.
        width: Channels at full resolution.
        multipliers: Channels of the U-Net at every resolution in units of ``width``, finest resolution first; None
            takes those published for 256 pixels, [1, 1, 2, 2, 4, 4].
        encoder_multipliers: Channels of the encoder at every resolution in units of ``width``; None takes
            ``multipliers`` and repeats the last one for one more resolution.
        blocks: Residual blocks per resolution.
        attention_sizes: Resolutions in pixels with self-attention after every block; None takes [16].
        time_dim: Length of the embedding of the diffusion step.
        dropout: Dropout rate inside the blocks of the U-Net.
        groups: Number of normalisation groups; at least two channels should share a group.
        code_mode: How the code enters the U-Net: "adagn" scales every block, "sum" is added to the step's embedding.
        pool: How the encoder's last map becomes one code: "mean" (published), or "mean_max", mean and maximum.
        noise_loss: Distance between prediction and truth: "mse" estimates the mean noise, which DDIM assumes; "l1"
            (DiffExplainer's) estimates the median.
        prediction: Quantity that the U-Net predicts: the "noise" (published), or the "velocity". The velocity's error
            counts most where an image is almost pure noise and only the code knows the image, so codes learn faster.
        learning_rate: Learning rate of Adam.
        validation_steps: Diffusion steps of the reconstructions in validation.

    Raises:
        ValueError: If sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int = 3,
        code_dim: int = 512,
        width: int = 128,
        multipliers: list[int] | None = None,
        encoder_multipliers: list[int] | None = None,
        blocks: int = 2,
        attention_sizes: list[int] | None = None,
        time_dim: int = 512,
        dropout: float = 0.1,
        groups: int = 32,
        code_mode: CodeMode = "adagn",
        pool: CodePool = "mean",
        noise_loss: Literal["mse", "l1"] = "mse",
        prediction: Literal["noise", "velocity"] = "velocity",
        learning_rate: float = 1e-4,
        validation_steps: int = 20,
    ) -> None:
        super().__init__()
        # By name: Lightning walks up the calling frames and would also record the arguments of a DiffExplainer.
        self.save_hyperparameters(*inspect.signature(type(self)).parameters)

        # Networks.
        multipliers = [1, 1, 2, 2, 4, 4] if multipliers is None else multipliers
        encoder_multipliers = [*multipliers, multipliers[-1]] if encoder_multipliers is None else encoder_multipliers
        attention_sizes = [16] if attention_sizes is None else attention_sizes
        sizes: dict[str, Any] = dict(image_size=image_size, channels=channels, code_dim=code_dim, width=width)
        sizes |= dict(blocks=blocks, groups=groups, attention_sizes=attention_sizes)
        self.encoder = SemanticEncoder(multipliers=encoder_multipliers, pool=pool, **sizes)
        self.unet = SemanticUnet(
            multipliers=multipliers, time_dim=time_dim, dropout=dropout, code_mode=code_mode, **sizes
        )

        # Settings.
        self.process = DiffusionProcess()
        self.image_size, self.channels, self.code_dim = image_size, channels, code_dim
        self.noise_loss, self.prediction, self.learning_rate = noise_loss, prediction, learning_rate
        self.validation_steps = diffusion.check_steps(validation_steps)
        # For DDP: every weight has a gradient and no buffer ever changes.
        self.ddp_options = {"find_unused_parameters": False, "broadcast_buffers": False}

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of encoder and U-Net, to be compiled or recomputed one by one."""
        return [*self.encoder.blocks(), *self.unet.blocks()]

    # Encoding and decoding

    def encode(self, image: Tensor) -> Tensor:
        """Encodes images [B, C, H, W] in [-1, 1] as semantic codes [B, D]."""
        return self.encoder(image)

    def invert(self, image: Tensor, code: Tensor, num_steps: int, refinements: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the noise maps [B, C, H, W] that ``decode`` turns back into the images, and residuals [B]."""
        with cast_once(self.unet.blocks(), image):
            return self.process.invert(self._noise_predictor(code), image, num_steps, refinements)

    def decode(self, noise_map: Tensor, code: Tensor, num_steps: int, sampler: Sampler = "ddim") -> Tensor:
        """Decodes noise maps [B, C, H, W] and codes [B, D] to images in [-1, 1]."""
        with cast_once(self.unet.blocks(), noise_map):
            return self.process.decode(self._noise_predictor(code), noise_map, num_steps, sampler).clamp(-1, 1)

    def _noise_predictor(self, code: Tensor) -> NoisePredictor:
        def predict(state: Tensor, step: Tensor) -> Tensor:
            output = self.unet(state, step, code)
            return output if self.prediction == "noise" else self.process.noise_of(output.to(state), state, step)

        return predict

    def _reconstructed(self, image: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Inverts and decodes images [B, C, H, W]; returns them with the residuals of the inversion [B]."""
        noise_map, residual = self.invert(image, code, self.validation_steps)
        return self.decode(noise_map, code, self.validation_steps), residual

    def samples(self, image: Tensor) -> tuple[dict[str, Tensor], list[str]]:
        """Draws the columns and row labels of ``SampleGrid``: images, reconstructions, and codes with random noise."""
        code = self.encode(image)
        reconstruction, _ = self._reconstructed(image, code)
        columns, generator = {"image": image, "reconstruction": reconstruction}, torch.Generator().manual_seed(0)
        for index in range(2):
            noise = torch.randn(image.shape, generator=generator).to(image)
            columns[f"code, noise {index}"] = self.decode(noise, code, self.validation_steps)
        whole, alone = (psnr(image, columns[name]).tolist() for name in ("reconstruction", "code, noise 0"))
        return columns, [f"{a:.1f} dB\ncode {b:.1f} dB" for a, b in zip(whole, alone, strict=True)]

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predicts the noise that was added to a batch at random diffusion steps; returns the loss, []."""
        image = batch["image"]
        # Drawn by shape: the memory layout of the images must not change the numbers.
        noise = torch.randn(image.shape, device=image.device, dtype=image.dtype)
        step = torch.randint(diffusion.NUM_TRAINING_STEPS, (len(image),), device=image.device)
        loss = self._noise_error(image, noise, step)
        log_training(self, {"loss": loss}, len(image))
        return loss

    def _noise_error(self, image: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        predicted = to_float32(self.unet(self.process.noised(image, noise, step), step, self.encode(image)))
        wanted = noise if self.prediction == "noise" else self.process.velocity(image, noise, step)
        return F.mse_loss(predicted, wanted) if self.noise_loss == "mse" else F.l1_loss(predicted, wanted)

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Measures the loss with noise that every epoch repeats, and reconstructs images of the first batch.

        ``val/psnr`` judges the reconstruction from code and noise map. ``val/psnr_code`` starts from random noise: it
        measures the information in the code alone, which is all that a classifier's agent can read.
        """
        # Loss.
        image = batch["image"]
        generator = torch.Generator().manual_seed(batch_idx)
        noise = torch.randn(image.shape, generator=generator).to(image)
        step = torch.randint(diffusion.NUM_TRAINING_STEPS, (len(image),), generator=generator).to(image.device)
        log_validation(self, {"loss": self._noise_error(image, noise, step)}, len(image))

        # Reconstructions.
        if batch_idx == 0:
            image, noise = image[:_RECONSTRUCTED], noise[:_RECONSTRUCTED]
            code = self.encode(image)
            reconstruction, residual = self._reconstructed(image, code)
            values = {
                "psnr": psnr(image, reconstruction).mean(),
                "psnr_code": psnr(image, self.decode(noise, code, self.validation_steps)).mean(),
                "inversion_residual": residual.mean(),
                "code_spread": code.std(dim=0).mean(),
            }
            log_validation(self, values, len(image))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam without decay or warm-up, as published."""
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Marks the checkpoint so that ``load_autoencoder`` recognises it."""
        checkpoint["autoencoder"] = {"version": VERSION}


def load_autoencoder(path: str | Path) -> DiffusionAutoencoder:
    """Rebuilds a diffusion autoencoder from a checkpoint of ``train.py``, in eval mode on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no diffusion autoencoder.
    """
    checkpoint = load_checkpoint(Path(path))
    if "autoencoder" not in checkpoint:
        raise ValueError(
            f"{path} is no diffusion autoencoder: give the best.ckpt or last.ckpt of a run of "
            "diffusion_autoencoder_<data>.yaml."
        )
    try:
        autoencoder = DiffusionAutoencoder(**checkpoint["hyper_parameters"])
        autoencoder.load_state_dict(checkpoint["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a diffusion autoencoder: {one_line(error)}.") from error
    return autoencoder.eval()
