"""Tests of ``cfe_lightning.methods.diff_explainer.diffusion``: the library's schedule, and exact inversion."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

from cfe_lightning.methods.diff_explainer.diffusion import DiffusionProcess

_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The library computes its schedule in single precision, which random images show now and then."""
    torch.manual_seed(0)


def image(batch: int = 3) -> Tensor:
    return torch.rand(batch, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def predict(state: Tensor, step: Tensor) -> Tensor:
    """Predicts noise as a smooth, contracting function of state and step."""
    return 0.3 * torch.tanh(state + step[:, None, None, None] / 500)


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading")


def test_noise_is_added_as_by_the_library() -> None:
    clean, noise, step = image(), torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 999])
    expected = DDPMScheduler(**_SCHEDULE).add_noise(clean, noise, step)
    torch.testing.assert_close(DiffusionProcess().noised(clean, noise, step), expected, atol=1e-6, rtol=1e-5)


def test_velocity_and_noise_tell_the_same() -> None:
    process, clean, noise = DiffusionProcess(), image(), torch.randn(3, 1, 4, 4)
    step = torch.tensor([0, 500, 999])
    velocity = process.velocity(clean, noise, step)
    expected = DDPMScheduler(**_SCHEDULE).get_velocity(clean, noise, step)
    torch.testing.assert_close(velocity, expected, atol=1e-6, rtol=1e-5)
    found = process.noise_of(velocity, process.noised(clean, noise, step), step)
    torch.testing.assert_close(found, noise, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_decoding_is_the_librarys(num_steps: int) -> None:
    scheduler = ddim()
    scheduler.set_timesteps(num_steps)
    state = expected = torch.randn(3, 1, 4, 4)
    for step in scheduler.timesteps:
        noise = predict(expected, torch.full((3,), int(step)))
        expected = scheduler.step(noise, step, expected).prev_sample
    torch.testing.assert_close(DiffusionProcess().decode(predict, state, num_steps), expected, atol=1e-5, rtol=1e-4)


def test_inversion_without_refinement_is_the_librarys() -> None:
    scheduler = DDIMInverseScheduler.from_config(ddim().config)
    scheduler.set_timesteps(20)
    expected = image()
    for step in scheduler.timesteps:
        noise = predict(expected, torch.full((3,), int(step)))
        expected = scheduler.step(noise, step, expected).prev_sample
    found, residual = DiffusionProcess().invert(predict, image(), 20, refinements=0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert residual.tolist() == [0, 0, 0]


def test_a_fixed_noise_is_inverted_exactly() -> None:
    noise = torch.randn(1, 1, 4, 4)
    process = DiffusionProcess()
    state, _ = process.invert(lambda state, _step: noise.expand_as(state), image(), 20, refinements=0)
    back = process.decode(lambda state, _step: noise.expand_as(state), state, 20)
    torch.testing.assert_close(back, image(), atol=1e-4, rtol=0)


def test_refinement_makes_the_way_back_exact() -> None:
    process = DiffusionProcess()
    errors, residuals = [], []
    for refinements in (0, 1, 2, 6):
        state, residual = process.invert(predict, image(), 20, refinements)
        errors.append(float((process.decode(predict, state, 20) - image()).abs().max()))
        residuals.append(float(residual.max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[3] < 1e-5
    assert residuals[1] > residuals[2] > residuals[3]


def test_a_refinement_is_one_call_of_the_network() -> None:
    calls: list[int] = []

    def counted(state: Tensor, step: Tensor) -> Tensor:
        calls.append(int(step[0]))
        return predict(state, step)

    DiffusionProcess().invert(counted, image(), 20, refinements=2)
    assert len(calls) == 1 + 2 * 20
    calls.clear()
    DiffusionProcess().invert(counted, image(), 20, refinements=0)
    assert calls == list(range(0, 1000, 50))


def test_the_grid_begins_at_the_image_and_ends_below_pure_noise() -> None:
    grid = DiffusionProcess()._grid(20)
    assert [step for step, _, _ in grid] == list(range(0, 1000, 50))
    assert float(grid[0][1]) == 1
    assert all(float(one[2]) == float(above[1]) for one, above in itertools.pairwise(grid))
    with pytest.raises(ValueError, match="must divide 1000, got 30"):
        DiffusionProcess()._grid(30)


def test_the_preview_sampler_needs_fewer_steps() -> None:
    """Decodes Gaussian data with known noise, which scales noise to the data's spread of 0.5."""
    process, state = DiffusionProcess(), torch.randn(64, 1, 4, 4)

    def known(noisy: Tensor, step: Tensor) -> Tensor:
        level = process.alpha_bar[step + 1].float()[:, None, None, None]
        return (1 - level).sqrt() * noisy / (0.25 * level + 1 - level)

    wanted = 0.5 * state
    errors = [float((process.decode(known, state, 10, sampler) - wanted).abs().mean()) for sampler in ("dpm", "ddim")]
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 0.1


def test_decoding_twice_is_the_same() -> None:
    process, state = DiffusionProcess(), torch.randn(3, 1, 4, 4)
    assert torch.equal(process.decode(predict, state, 10), process.decode(predict, state, 10))
