"""The diffusion of a diffusion autoencoder: noising, deterministic decoding (DDIM) and its exact inversion.

Source: Song et al., "Denoising Diffusion Implicit Models", ICLR 2021, arXiv 2010.02502. The state stays float32 and is
never clipped: clipping in only one of the two directions destroys the inversion.

Shapes: B images, C channels, H, W pixels.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor, nn

#: Predicts the noise in a state [B, C, H, W] at diffusion steps [B] int64.
NoisePredictor = Callable[[Tensor, Tensor], Tensor]
#: "ddim" is exactly inverted by ``invert``; "dpm" (DPM-Solver++, second order) is for previews.
Sampler = Literal["ddim", "dpm"]

#: Diffusion steps of the schedule, fixed by the method.
NUM_TRAINING_STEPS = 1000
#: Variance of the noise added at the first and at the last step.
_BETAS = (1e-4, 0.02)


def check_steps(num_steps: int) -> int:
    """Returns the number of diffusion steps.

    Raises:
        ValueError: If it does not divide ``NUM_TRAINING_STEPS``.
    """
    if num_steps < 1 or NUM_TRAINING_STEPS % num_steps:
        raise ValueError(f"The number of diffusion steps must divide {NUM_TRAINING_STEPS}, got {num_steps}.")
    return num_steps


class DiffusionProcess(nn.Module):
    """The linear schedule of 1,000 steps, numbered 0 to 999.

    A grid of T steps (T divides 1,000) uses the diffusion steps 0, 1000/T, ...; below step 0 stands the clean image.
    """

    alpha_bar: Tensor

    def __init__(self) -> None:
        super().__init__()
        betas = torch.linspace(*_BETAS, NUM_TRAINING_STEPS, dtype=torch.float64)
        # One more entry: the clean image before step 0.
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        #: ``alpha_bar`` as Python numbers: scalar arithmetic is too small for a GPU.
        self._levels: list[float] = alpha_bar.tolist()

    def noised(self, image: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Mixes images and Gaussian noise [B, C, H, W] in the shares of diffusion steps [B]."""
        of_image, of_noise = self._shares(step, image)
        return of_image * image + of_noise * noise

    def velocity(self, image: Tensor, noise: Tensor, step: Tensor) -> Tensor:
        """Returns the target of "velocity" networks: noise at early steps, minus the image at late ones.

        Source: Salimans and Ho, "Progressive Distillation", ICLR 2022, arXiv 2202.00512, appendix D.
        """
        of_image, of_noise = self._shares(step, image)
        return of_image * noise - of_noise * image

    def noise_of(self, velocity: Tensor, state: Tensor, step: Tensor) -> Tensor:
        """Returns the noise in states [B, C, H, W] at diffusion steps [B], given their velocity."""
        of_image, of_noise = self._shares(step, state)
        return of_image * velocity + of_noise * state

    def _shares(self, step: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the factors of image and noise at diffusion steps [B], [B, 1, 1, 1] each."""
        level = self.alpha_bar[step + 1][:, None, None, None]
        return level.sqrt().to(like), (1 - level).sqrt().to(like)

    def decode(self, predict: NoisePredictor, state: Tensor, num_steps: int, sampler: Sampler = "ddim") -> Tensor:
        """Turns states of pure noise [B, C, H, W] into images, which are not clipped."""
        if sampler == "dpm":
            return self._decode_dpm(predict, state, num_steps)
        for step, below, level in reversed(self._grid(num_steps)):
            noise = predict(state, torch.full((len(state),), step, device=state.device))
            state = self._moved(state, noise, level, below)
        return state

    def invert(
        self, predict: NoisePredictor, image: Tensor, num_steps: int, refinements: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Turns images into the states from which ``decode`` restores them.

        Every step is solved by a fixed-point iteration towards the exact inverse of the decoding step. It starts from
        the linearly extrapolated noise of the two previous steps: nearer than the network's first guess, and free.

        Args:
            predict: Noise predictor that will also decode.
            image: Images in [-1, 1], [B, C, H, W].
            num_steps: Number of diffusion steps T, a divisor of 1,000; the same as for decoding.
            refinements: Iterations per step; 0 is the plain inversion of DDIM, which takes the noise of the state
                before the step.

        Returns:
            The states [B, C, H, W], and the largest last correction over all steps, [B] (root mean square over pixels;
            0 without refinements). Where it is not small, the reconstruction is not exact.
        """
        state, residual = image, image.new_zeros(len(image))
        known: list[Tensor] = []
        for step, below, level in self._grid(num_steps):
            # First guess.
            steps = torch.full((len(state),), step, device=state.device)
            if refinements == 0 or not known:
                noise = predict(state, steps)
            else:
                noise = known[-1] if len(known) == 1 else 2 * known[-1] - known[-2]
            moved = self._moved(state, noise, below, level)

            # Fixed-point iteration.
            for iteration in range(refinements):
                noise = predict(moved, steps)
                refined = self._moved(state, noise, below, level)
                if iteration == refinements - 1:
                    residual = torch.maximum(residual, (refined - moved).square().mean(dim=(1, 2, 3)).sqrt())
                moved = refined
            state, known = moved, [*known[-1:], noise]
        return state, residual

    def _grid(self, num_steps: int) -> list[tuple[int, float, float]]:
        """Lists the diffusion steps from the image upwards, each with ``alpha_bar`` before and at the step."""
        stride = NUM_TRAINING_STEPS // check_steps(num_steps)
        levels = [self._levels[0], *self._levels[1::stride]]
        return list(zip(range(0, NUM_TRAINING_STEPS, stride), levels, levels[1:], strict=False))

    @staticmethod
    def _moved(state: Tensor, noise: Tensor, level: float, to: float) -> Tensor:
        """Moves a state with known noise to another ``alpha_bar``; the coefficients are computed in float64."""
        keep = math.sqrt(to / level)
        add = math.sqrt(1 - to) - keep * math.sqrt(1 - level)
        return keep * state + add * noise.to(state)

    def _decode_dpm(self, predict: NoisePredictor, state: Tensor, num_steps: int) -> Tensor:
        # fmt: off
        scheduler: Any = DPMSolverMultistepScheduler(
            num_train_timesteps=NUM_TRAINING_STEPS, beta_start=_BETAS[0], beta_end=_BETAS[1], beta_schedule="linear",
            algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="leading",
        )
        # fmt: on
        scheduler.set_timesteps(num_steps)
        # Steps stay on the CPU: a look-up by a GPU scalar would wait for the GPU every time.
        for step in scheduler.timesteps:
            noise = predict(state, torch.full((len(state),), int(step), device=state.device))
            state = scheduler.step(noise, step, state).prev_sample
        return state
