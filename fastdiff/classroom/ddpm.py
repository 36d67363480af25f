# SPDX-License-Identifier: MIT
"""DDPM as it is taught, on the fused step.

A step's numbers come from the table of `fastdiff.solvers.ddpm`, and the step itself is `fastdiff.ops.step`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .. import ops
from ..device_copy import to_device
from ..errors import checked_callable, checked_integer, error_message, unknown_name
from ..guidance.gradients import gradient_at
from ..guidance.guided_model import Model, unwrap
from ..noise.generators import Generators, draw
from ..row_layout import COLUMNS, PREV_SAMPLE, Variance
from ..sampling.loop import progress_bar
from ..sampling.model_mode import evaluating
from ..schedules import LinearNoiseScheduler
from ..schedules.levels import Levels, levels_from_timesteps
from ..schedules.timesteps import timestep_schedule
from ..solvers import Prediction, PredictionType, VarianceType, ddpm
from ..solvers.table import StepTable
from .models import device_of, is_noise_scheduler, restored_on_error, shape_of

#: Timestep spacings by their names in the classroom.
SCHEDULES = {"linear": "linspace", "cosine": "cosine"}

_SHIFT, _NOISE = (PREV_SAMPLE + COLUMNS.index(name) for name in ("history_0", "noise"))


class DDPMSampler:
    """Ancestral sampling of DDPM (arXiv 2006.11239, algorithm 2); the first argument decides between two forms.

    With a **noise scheduler** (fastdiff's, diffusers', or any object with `alphas_cumprod` and `add_noise`), the
    sampler visits a few timesteps, and the model is an argument of the loop::

        sampler = DDPMSampler(noise_scheduler, 50)
        images = sampler(model, batch_size=4, schedule="cosine")

    With a **model**, it makes its own linear schedule and visits every timestep::

        sampler = DDPMSampler(model, n_timesteps=100, beta_start=1e-4, beta_end=0.02, device="cpu")
        samples = sampler.sample((500, 2))

    A model is any callable ``(x, t)``, x ``[B, ...]`` and t int64 ``[B]``, that returns its prediction like x: a
    tensor, a tuple that begins with one, a dict with "sample" or an object with .sample.

    A noise scheduler's `config` is followed in `prediction_type`, `clip_sample`, `clip_sample_range` and
    `variance_type`, where it has them.  Steps take any floating dtype.

    Args:
        noise_scheduler, num_inference_steps: of the first form; 50 steps unless said.
        model, n_timesteps, beta_start, beta_end: of the second form.
        device: of the schedule's arrays, and of the samples where a call names none.
        prediction_type: instead of the scheduler's: ``epsilon``, ``v_prediction`` or ``sample``.

    Attributes:
        betas, alphas, alphas_cumprod: the training schedule, float32 ``[T]`` on `device`, rounded from float64.
        alphas_cumprod_prev: ᾱ_{t−1}, 1 at t = 0.
        sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod: of the forward process.
        posterior_var, posterior_variance: β_t·(1 − ᾱ_{t−1})/(1 − ᾱ_t), the variance of a step from t to t − 1.
        timesteps: the visited timesteps, int64 ``[n]`` on `device`, descending.

    Raises:
        TypeError, ValueError: the first argument is neither, or a number is out of range.
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    posterior_var: Tensor
    posterior_variance: Tensor
    timesteps: Tensor

    @overload
    def __init__(
        self,
        noise_scheduler: Any,
        num_inference_steps: int = 50,
        device: torch.device | str | None = None,
        *,
        prediction_type: str | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        model: Model,
        n_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        device: torch.device | str | None = None,
        *,
        prediction_type: str | None = None,
    ) -> None: ...

    def __init__(self, *args: Any, **options: Any) -> None:
        first = args[0] if args else options.get("noise_scheduler", options.get("model"))
        (self._from_scheduler if is_noise_scheduler(first) else self._from_model)(*args, **options)

    def _from_scheduler(
        self,
        noise_scheduler: Any,
        num_inference_steps: int = 50,
        device: torch.device | str | None = None,
        *,
        prediction_type: str | None = None,
    ) -> None:
        self.model: Model | None = None
        self._use_schedule(noise_scheduler, device, prediction_type)
        self.set_timesteps(num_inference_steps)

    def _from_model(
        self,
        model: Model,
        n_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        device: torch.device | str | None = None,
        *,
        prediction_type: str | None = None,
    ) -> None:
        checked_callable("DDPMSampler", "model", model, "a noise scheduler or a model", "pass one of them first")
        self.model = model
        scheduler = LinearNoiseScheduler(num_train_timesteps=n_timesteps, beta_start=beta_start, beta_end=beta_end)
        self._use_schedule(scheduler, device or device_of(model), prediction_type)
        self.set_timesteps(n_timesteps)

    def _use_schedule(self, scheduler: Any, device: torch.device | str | None, prediction_type: str | None) -> None:
        config = getattr(scheduler, "config", None)
        if getattr(config, "thresholding", False):
            got, remedy = "has thresholding=True", "use fastdiff.DDPMSampler, which takes it"
            raise ValueError(error_message("DDPMSampler", "noise_scheduler", got, "one without it", remedy))
        self.prediction_type = PredictionType.parse(
            prediction_type or getattr(config, "prediction_type", None) or "epsilon"
        )
        self.variance_type = VarianceType.parse(getattr(config, "variance_type", None) or "fixed_small")
        clips = getattr(config, "clip_sample", False)
        self.clip_range = float(getattr(config, "clip_sample_range", 1.0)) if clips else math.inf

        self.device = torch.device(device or "cpu")
        self._alphas_cumprod = signal = scheduler.alphas_cumprod.detach().double().cpu()
        previous = torch.cat([torch.ones_like(signal[:1]), signal[:-1]])
        betas = scheduler.betas.detach().double().cpu() if hasattr(scheduler, "betas") else 1 - signal / previous
        posterior = betas * (1 - previous) / (1 - signal)
        arrays = {
            "betas": betas,
            "alphas": 1 - betas,
            "alphas_cumprod": signal,
            "alphas_cumprod_prev": previous,
            "sqrt_alphas_cumprod": signal.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - signal).sqrt(),
            "posterior_var": posterior,
            "posterior_variance": posterior,
        }
        for name, values in arrays.items():
            setattr(self, name, values.float().to(self.device))

    def set_timesteps(self, num_inference_steps: int, schedule: str = "linear") -> None:
        """Choose the timesteps to visit, from T − 1 down to 0.

        Args:
            num_inference_steps: 1 to T; a single one is T − 1.
            schedule: ``linear``, evenly spaced and rounded; ``cosine``, dense at both ends
                (`fastdiff.schedules.timesteps.timestep_schedule`).

        Raises:
            TypeError, ValueError: one of them is out of range.  The sampler stays as it was.
        """
        if schedule not in SCHEDULES:
            raise unknown_name("set_timesteps", "schedule", schedule, SCHEDULES)
        spacing = SCHEDULES[schedule] if num_inference_steps != 1 else "trailing"  # a linspace of one is its low end
        timesteps = timestep_schedule(spacing, num_inference_steps, len(self._alphas_cumprod))
        levels = levels_from_timesteps(self._alphas_cumprod, timesteps.tolist())
        tables = {self.clip_range: self._compile(levels, self.clip_range)}
        self.schedule, self.timesteps = schedule, timesteps.to(self.device)
        self._levels, self._tables = levels, tables
        self._rows = {t: row for row, t in enumerate(timesteps.tolist())}

    def _compile(self, levels: Levels, clip_range: float) -> StepTable:
        """Compile the rows of a loop: row i goes from level i to level i + 1, the next *visited* one."""
        return ddpm(levels, Prediction(self.prediction_type, clip_range), variance_type=self.variance_type)

    def _table(self, clip_range: float) -> StepTable:
        if clip_range not in self._tables:
            self._tables[clip_range] = self._compile(self._levels, clip_range)
        return self._tables[clip_range]

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, *, generator: Generators = None
    ) -> Tensor:
        """Take the step from a visited timestep to the next visited one, in one pass.

        Args:
            model_output: the model's prediction at `timestep`, like `sample`; twice its channels with a learned
                variance.
            timestep: a number or a tensor of one for all samples, or ``[B]``, one a sample.
            sample: x_t, ``[B, ...]``.
            generator: of the noise, one or one a sample.  The last step adds none.

        Returns:
            The previous sample, like `sample`.

        Raises:
            TypeError, ValueError: a tensor does not fit, or the timestep is not visited.
        """
        row = self._row("step", timestep, sample.device)
        return self._step(sample, model_output, row, self.clip_range, generator)

    @torch.no_grad()
    def p_sample(
        self, x_t: Tensor, t: int | Tensor, clip_denoised: bool = True, *, generator: Generators = None
    ) -> Tensor:
        """Call the model that the sampler was made with, and take its step: x_{t−1} ~ p(x_{t−1} | x_t).

        Args:
            x_t: ``[B, ...]``.
            t: a number for all samples, or ``[B]``, one a sample.
            clip_denoised: clamp the predicted x0 to [−1, 1]; False for data that is not scaled to it.
            generator: as in `step`.

        Returns:
            x_{t−1}, like `x_t`.

        Raises:
            TypeError, ValueError: as `step`; or the sampler was made from a noise scheduler.
        """
        row, model = self._row("p_sample", t, x_t.device), self._own_model("p_sample")
        times = torch.as_tensor(t, dtype=torch.int64, device=x_t.device).expand(len(x_t))
        with evaluating(model):
            return self._step(x_t, unwrap(model(x_t, times)), row, 1.0 if clip_denoised else math.inf, generator)

    def sample(
        self,
        shape: Sequence[int],
        return_trajectory: bool = False,
        show_progress: bool = True,
        *,
        clip_denoised: bool = True,
        generator: Generators = None,
    ) -> Any:
        """Draw samples with the model that the sampler was made with, from noise.

        Args:
            shape: of the samples, batch first.
            return_trajectory: return the samples on the way too.
            show_progress: show a progress bar where tqdm is installed.
            clip_denoised, generator: as in `p_sample`.

        Returns:
            The samples, float32 ``[*shape]``; or the samples and the trajectory: n + 1 tensors on the CPU, from the
            noise to the samples.

        Raises:
            TypeError, ValueError: as `p_sample`.
        """
        clip_range = 1.0 if clip_denoised else math.inf
        model = self._own_model("sample")
        return self._loop(model, shape, self.device, clip_range, return_trajectory, show_progress, generator)

    def sample_with_guidance(
        self,
        shape: Sequence[int],
        guidance_fn: Callable[[Tensor, Tensor], Tensor],
        guidance_scale: float = 1.0,
        return_trajectory: bool = False,
        show_progress: bool = True,
        *,
        clip_denoised: bool = True,
        generator: Generators = None,
    ) -> Any:
        """Draw samples that a function of the noisy sample steers (arXiv 2105.05233, algorithm 1).

        The mean of each step is shifted by ``guidance_scale · variance · ∇ guidance_fn(x_t, t)``, in the step's pass.
        The last step has variance 0 and is not shifted.

        Args:
            guidance_fn: ``(x, t)``, x ``[B, ...]`` and t int64 ``[B]``, to one number a sample ``[B]``, such as the
                classifier's log p(y | x_t).  A sample's number must depend on that sample alone.
            guidance_scale: s; 1 samples p(x)·p(y | x), 0 does not guide.
            shape, return_trajectory, show_progress, clip_denoised, generator: as in `sample`.

        Returns:
            As `sample`.

        Raises:
            TypeError, ValueError: as `sample`; or guidance_fn returns something else.
        """
        checked_callable("sample_with_guidance", "guidance_fn", guidance_fn, "a callable (x, t)", "pass a function")
        clip_range = 1.0 if clip_denoised else math.inf
        coefficients = self._table(clip_range).coefficients.clone()
        coefficients[:, _SHIFT] = guidance_scale * coefficients[:, _NOISE] ** 2
        coefficients = coefficients.to(self.device, torch.float32)

        def guided_step(x: Tensor, output: Tensor, row: int) -> Tensor:
            times = self.timesteps[row].expand(len(x))
            shift = gradient_at(
                lambda leaf: guidance_fn(leaf, times.clone()), x, "sample_with_guidance", "guidance_fn", sums=True
            )
            return self._step(x, output, row, clip_range, generator, coefficients, shift)

        model = self._own_model("sample_with_guidance")
        return self._loop(
            model, shape, self.device, clip_range, return_trajectory, show_progress, generator, guided_step
        )

    def __call__(
        self,
        model: Model,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        schedule: str | None = None,
        device: torch.device | str | None = None,
        return_trajectory: bool = False,
        *,
        sample_shape: Sequence[int] | None = None,
        show_progress: bool = False,
        generator: Generators = None,
    ) -> Any:
        """Draw a batch of images with a model, from noise.

        Args:
            model: as in the class.
            batch_size: B.
            num_inference_steps, schedule: as in `set_timesteps`, which is called where one is given; the other keeps
                its last value.
            device: of the samples; where None, that of the model's parameters, else the sampler's.
            return_trajectory: return the samples on the way too.
            sample_shape: of one sample, ``[C, H, W]``.  Where None, what the model or its `config` says by
                `in_channels` and `sample_size` or `image_size`, else ``[3, 32, 32]``.
            show_progress: show a progress bar where tqdm is installed.
            generator: as in `step`.

        Returns:
            The samples, float32 ``[B, *sample_shape]``, with the trajectory as in `sample`.

        Raises:
            TypeError, ValueError: an argument is out of range, or the model's output does not fit.
        """
        checked_callable("DDPMSampler", "model", model, "a callable (x, t)", "pass a function or a torch.nn.Module")
        checked_integer("DDPMSampler", "batch_size", batch_size, 1)
        if num_inference_steps is not None or schedule is not None:
            count = len(self.timesteps) if num_inference_steps is None else num_inference_steps
            self.set_timesteps(count, schedule or self.schedule)
        shape = (batch_size, *(shape_of(model) if sample_shape is None else sample_shape))
        place = torch.device(device or device_of(model) or self.device)
        return self._loop(model, shape, place, self.clip_range, return_trajectory, show_progress, generator)

    @torch.no_grad()
    def _loop(
        self,
        model: Model,
        shape: Sequence[int],
        device: torch.device,
        clip_range: float,
        return_trajectory: bool,
        show_progress: bool,
        generator: Generators,
        step: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    ) -> Any:
        """Walk from noise to samples; see `sample`."""
        bar = progress_bar(len(self.timesteps), None if show_progress else False)
        with restored_on_error(generator, device), evaluating(model), bar:
            x = draw(shape, generator, dtype=torch.float32, device=device)
            trajectory = [x.cpu()] if return_trajectory else []
            for row, t in enumerate(to_device(self.timesteps, device)):
                output = unwrap(model(x, t.expand(len(x))))
                x = step(x, output, row) if step else self._step(x, output, row, clip_range, generator)
                if return_trajectory:
                    trajectory.append(x.cpu())
                bar.update()
        return (x, trajectory) if return_trajectory else x

    def _step(
        self,
        x: Tensor,
        output: Tensor,
        row: int | Tensor,
        clip_range: float,
        generator: Generators,
        coefficients: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """Take the step of a row, or of one row a sample; `shift` is added with a coefficient of its own."""
        table = self._table(clip_range)
        if coefficients is None:
            coefficients = table.shared_coefficients(x.dtype, x.device)
        variance = None
        if table.variance is not Variance.FIXED:
            output, variance = output.chunk(2, dim=1)
        if output.shape != x.shape:  # before noise is drawn
            got, expected = f"returned {list(output.shape)}", f"{list(x.shape)} like the sample"
            raise ValueError(error_message("DDPMSampler", "the model", got, expected, "return one prediction a sample"))
        noise = None
        if not isinstance(row, int) or table.draws_noise[row]:  # the last step adds none
            noise = draw(x.shape, generator, dtype=x.dtype, device=x.device)
        kind = int(table.variance)
        history = [shift]
        return ops.step(
            x, output, coefficients, row, noise=noise, variance=variance, variance_kind=kind, history=history
        )[0]

    def _row(self, operation: str, timestep: int | Tensor, device: torch.device) -> int | Tensor:
        """Return the table's row of a visited timestep, or one row a sample."""
        asked = torch.as_tensor(timestep).reshape(-1).tolist()
        for t in asked:
            if t not in self._rows:
                got, expected = f"is {t}", f"one of the {len(self._rows)} visited timesteps"
                remedy = "take them from sampler.timesteps, or call set_timesteps"
                raise ValueError(error_message(operation, "timestep", got, expected, remedy))
        rows = [self._rows[t] for t in asked]
        return rows[0] if len(rows) == 1 else torch.tensor(rows, dtype=torch.int64, device=device)

    def _own_model(self, operation: str) -> Model:
        if self.model is None:
            got, expected = "was made from a noise scheduler", "one made from a model"
            remedy = "call sampler(model, batch_size=...), or make DDPMSampler(model, n_timesteps=...)"
            raise ValueError(error_message(operation, "the sampler", got, expected, remedy))
        return self.model
