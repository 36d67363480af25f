# SPDX-License-Identifier: MIT
"""The trainer: steps of an objective over a data loader, on one process or many, resumed to the bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...device_copy import to_device
from ...errors import checked_integer, error_message, require
from ...noise import sample_seeds
from ..checkpoints import checkpoint_folder, latest_checkpoint, remove_old_checkpoints
from ..config import DiffusionConfig
from ..data.batches import TrainingBatch, read_batch
from ..data.order import DataOrder, Share, seeded_draws
from ..losses.objectives import DenoisingObjective, LossTerms, Objective
from ..model.conditioning import Conditioning, TrainedModules
from ..model.text_encoder import SmallTextEncoder
from ..model.trained_parts import noise_schedule, trained_network
from .checks import (
    check_batch_size,
    check_grids,
    check_images_of_grids,
    check_learning_rate,
    check_no_later_checkpoint,
    check_validation,
    checked_precision,
)
from .monitor import Monitor
from .optimization import create_learning_rate, create_optimizer
from .out_of_memory import explained_out_of_memory
from .reports import DivergedError, Reports
from .run_options import RunOptions
from .sample_grids import write_sample_grid
from .state import load_state, save_state
from .validation import mean_loss
from .weight_averages import WeightAverages

#: Epoch of the samples that `training_step` is given, which have no place in a data set.
_DIRECT_EPOCH = 2**32
#: Number that stands for process 0 in the seeds of the model's dropout; later processes have the numbers below it.
_DROPOUT_ID = -2


class Trainer:
    """Train a diffusion model.

    One process trains on one device.  Under ``torchrun`` or ``accelerate launch`` each process computes its share of a
    batch, and gradients are averaged, so n processes with batches of B take the steps of one process with batches of
    n·B, up to the rounding of sums.

    The order of data, noise, timesteps, condition dropout and the model's dropout follow from ``config.seed``; torch's
    own generators are neither read nor changed.

    Args:
        model: a module called with ``(sample, timestep)`` or ``(sample, timestep, condition)``; or an object with
            ``unet`` and ``scheduler``, whose U-Net is trained.  Its output is a tensor, or has it as ``sample``.
        config: the configuration; the model's own if left out, else the defaults.
        options: reports, files and validation.
        schedule: the noise schedule, of fastdiff or diffusers; the model's or the configuration's if left out.
        objective: the loss; `DenoisingObjective` if left out.
        text_encoder: for prompts: a module with a method ``tokens``, which is trained along; or a callable from
            prompts to ``[B, tokens, width]``, used as it is.  If left out, a model with cross-attention gets a
            `SmallTextEncoder`.
        null_label: the label for no class; with it labels of batches are the model's condition.
        augment: changes images ``[B, C, H, W]`` by seeds ``[B]``.
        optimizer: over the model's parameters; AdamW, fused, without decay of biases and norms, if left out.
        learning_rate: the schedule of a given optimizer, one of torch's that steps without a metric; warm-up and cosine
            of the configuration if left out.
        val_dataloader: batches for validation.
        accelerator: accelerate's object; one is made if left out.

    Attributes:
        step, epoch: optimizer steps and passes over the data so far.
        skipped_steps: steps left out because their gradients were not finite.

    Raises:
        TypeError, ValueError: the configuration or an argument does not fit.
        ImportError: accelerate or diffusers is missing.
    """

    def __init__(
        self,
        model: Any,
        config: DiffusionConfig | None = None,
        options: RunOptions | None = None,
        *,
        schedule: Any = None,
        objective: Objective | None = None,
        text_encoder: Callable[[Sequence[str]], Tensor] | None = None,
        null_label: int | None = None,
        augment: Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        learning_rate: Any = None,
        val_dataloader: Any = None,
        accelerator: Any = None,
    ) -> None:
        given = config if config is not None else getattr(model, "config", None)
        self.config = (given if isinstance(given, DiffusionConfig) else DiffusionConfig()).validate()
        self.options = (options or RunOptions()).validate()
        network = trained_network(model)
        check_learning_rate(learning_rate, optimizer)
        self.accelerator = self._make_accelerator() if accelerator is None else accelerator
        self.device: torch.device = self.accelerator.device
        self.schedule = noise_schedule(model, self.config) if schedule is None else schedule
        self.objective = DenoisingObjective(self.config, self.schedule) if objective is None else objective
        if text_encoder is None and self.config.use_spatial_transformer and null_label is None:
            with seeded_draws(self.config.seed):
                text_encoder = SmallTextEncoder(self.config.context_dim)
        trained_encoder = text_encoder if hasattr(text_encoder, "tokens") else None
        self.modules = TrainedModules(network, trained_encoder).to(self.device)  # type: ignore[arg-type]
        self.conditioning = Conditioning(
            text_encoder,
            null_label,
            self.config.condition_dropout,
            self.device,
            always=self.config.use_spatial_transformer,
        )
        self._wrapped = self.accelerator.prepare_model(self.modules.train())
        self.parameters = [parameter for parameter in self.modules.parameters() if parameter.requires_grad]
        if optimizer is None:
            optimizer = create_optimizer([self.modules], self.config.learning_rate, self.config.weight_decay)
        self.optimizer = optimizer
        self.learning_rate = learning_rate or create_learning_rate(
            optimizer, self.config.lr_warmup_steps, self.config.max_train_steps
        )
        decay = self.config.ema_decay if self.config.use_ema else None
        self._averages = WeightAverages(self.modules, self.parameters, decay)
        self._precision = checked_precision(self.config, self.accelerator)
        self.scaler = torch.amp.GradScaler(self.device.type) if self._precision == torch.float16 else None
        self._augment, self._val_dataloader = augment, val_dataloader
        self._monitor = Monitor(self.device, self.config.num_train_timesteps)
        self._bad = torch.zeros((), dtype=torch.float32, device=self.device)
        self.step = self.epoch = self.batch = self.global_batch = self.direct_samples = self.skipped_steps = 0
        self.last_loss = 0.0
        self.sample_shape = torch.Size((self.config.image_size, self.config.image_size))
        self._micro_step = self._checked_step = 0

    # Steps

    def training_step(self, batch: Any) -> dict[str, Any]:
        """Take a training step on one batch.

        Args:
            batch: images ``[B, C, ...]``, ``(images, labels)``, or a dict with ``images`` and ``labels``, ``prompts``
                or ``encoder_hidden_states``.

        Returns:
            ``loss``, this process' mean, a tensor ``[]`` that is not waited for; ``step``, the optimizer steps so far.
            With gradient accumulation only each last of its batches takes an optimizer step.

        Raises:
            TypeError, ValueError: the batch does not fit.
            DivergedError: gradients are not finite: at once on the CPU, each ``log_every`` steps on an accelerator.
            MemoryError, torch.OutOfMemoryError: with what to change.
        """
        raw = read_batch(batch, "training_step", self.config.in_channels)
        count, world = len(raw.images), self.accelerator.num_processes
        first = self.direct_samples + self.accelerator.process_index * count
        share = Share(batch, torch.arange(first, first + count), count * world)
        loss = self._step_on(share, _DIRECT_EPOCH)
        self.direct_samples += count * world
        return {"loss": loss, "step": self.step}

    def train_step(self, batch: Any) -> dict[str, Any]:
        """Take a training step on one batch and return ``loss`` and ``learning_rate``; see `training_step`."""
        loss = self.training_step(batch)["loss"]
        return {"loss": loss, "learning_rate": self.learning_rate.get_last_lr()[0]}

    def train(
        self,
        dataloader: Any,
        num_epochs: int | None = None,
        max_steps: int | None = None,
        *,
        val_dataloader: Any = None,
    ) -> list[dict[str, float]]:
        """Train over a data loader, from where the trainer stands.

        Args:
            dataloader: see `DataOrder`; its batch size is that of one process.
            num_epochs: passes over the data in all, those before included; one more if both ends are left out.  Batches
                at the end that are too few for gradient accumulation take no step.
            max_steps: optimizer steps in all.
            val_dataloader: batches for validation, instead of the constructor's.

        Returns:
            the reports of this call: ``step``, ``epoch``, ``loss`` over all processes since the last report,
            ``loss/t0`` …, ``grad_norm``, ``learning_rate``, ``skipped_steps``, and ``val_loss`` where it was computed.

        Raises:
            TypeError, ValueError: the data do not fit, there are none for the validations that the options ask for, the
                grids of samples that they ask for cannot be drawn, or the output folder has a checkpoint of a later
                step, which a new run would mix with its own.
            DivergedError: gradients are not finite, and ``on_nan`` says to stop.
            OSError: a file cannot be written; the last checkpoint is whole.
            MemoryError, torch.OutOfMemoryError: with what to change.
        """
        for name, value in (("num_epochs", num_epochs), ("max_steps", max_steps)):
            if value is not None:
                checked_integer("train", name, value, 1)
        one_more = num_epochs is None and max_steps is None
        if one_more:
            num_epochs = self.epoch + 1
        if val_dataloader is not None:
            self._val_dataloader = val_dataloader
        world = self.accelerator.num_processes
        order = DataOrder(dataloader, self.config.seed, self.accelerator.process_index, world)
        check_batch_size(order, self.batch, self.global_batch)
        check_validation(self.options.validate_every, self._val_dataloader)
        unseen = self.options.sample_every > 0 and self.options.output_dir is not None
        if unseen:
            check_grids(self.schedule, self.config.in_channels)
        if self.options.output_dir is not None:
            check_no_later_checkpoint(self._checkpoints("train"), self.step)
        last = math.inf if max_steps is None else max_steps
        expected = last
        if num_epochs is not None and order.batches is not None:
            left = (num_epochs - self.epoch) * order.batches - self.batch
            expected = min(last, self.step + left // self.config.gradient_accumulation_steps)
        first = self.step
        with Reports(self, None if expected is math.inf else int(expected)) as reports:
            while self.step < last and (num_epochs is None or self.epoch < num_epochs):
                before = self.batch
                for share in order.epoch(self.epoch, self.batch):
                    if unseen:  # grids have the shape of the images
                        check_images_of_grids(read_batch(share.data, "train").images)
                        unseen = False
                    self.global_batch = order.global_batch or share.total
                    self._step_on(share, self.epoch)
                    self.batch += 1
                    if self._micro_step == 0:
                        self._after_step(reports)
                        if self.step >= last:
                            break
                else:
                    if self.batch == before == 0:
                        remedy = "give a loader that can be read again, with at least one batch a process"
                        raise ValueError(error_message("train", "dataloader", "gave no batch", "one or more", remedy))
                    if one_more and self.batch == before:  # the pass was complete before this call
                        num_epochs = self.epoch + 2
                    self.epoch, self.batch = self.epoch + 1, 0
            if self._micro_step:  # too few batches for another step
                self._micro_step = 0
                self.optimizer.zero_grad(set_to_none=True)
            if self.step > first:
                reports.write()
                if order.global_batch is not None and self.batch == order.batches:  # the pass is complete
                    self.epoch, self.batch = self.epoch + 1, 0
                if self.options.output_dir is not None:
                    self.save_checkpoint()
            return reports.written

    def _step_on(self, share: Share, seed_epoch: int) -> Tensor:
        """Compute gradients of a share of a batch, and take an optimizer step where it is due; return the loss."""
        self._averages.check_not_in_place("train")
        config, process = self.config, self.accelerator.process_index
        raw = read_batch(share.data, "train", config.in_channels).to_dtype(self.modules.data_dtype)
        count = len(raw.images)
        if count != len(share.sample_ids):
            got, expected = f"has {count} images", f"{len(share.sample_ids)}, one a sample"
            raise ValueError(
                error_message("train", "batch", got, expected, "let the collate function keep all samples")
            )
        with explained_out_of_memory(config, count):
            seeds = sample_seeds(config.seed, share.sample_ids, seed_epoch)
            condition = self.conditioning(raw, seeds, "train")
            seeds, images = to_device(seeds, self.device), to_device(raw.images, self.device)
            if self._augment is not None:
                images = self._augment(images, seeds)
            batch = TrainingBatch(images, condition, seeds, share.sample_ids, self.epoch, self.step)
            steps = config.gradient_accumulation_steps
            due = self._micro_step + 1 == steps
            number = self.step * steps + self._micro_step
            dropout = int(sample_seeds(config.seed, torch.tensor([_DROPOUT_ID - process]), number))
            alone = contextlib.nullcontext() if due else self.accelerator.no_sync(self._wrapped)
            with alone, seeded_draws(dropout, self.device):
                terms = self.objective(self._predict, batch)
                loss = terms.losses.mean()
                # The mean over processes, which DDP takes, is then the mean over all samples of the batch.
                scaled = loss * (count * self.accelerator.num_processes / share.total / steps)
                (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            self._monitor.add_losses(terms.losses, terms.timesteps)
            self._micro_step = 0 if due else self._micro_step + 1
            if due:
                self._optimizer_step()
        self.sample_shape = images.shape[2:]
        return loss.detach()

    def _optimizer_step(self) -> None:
        """Clip, update weights, learning rate and averages; a step with gradients that are not finite is left out."""
        optimizer, scaler = self.optimizer, self.scaler
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        bad = (~norm.isfinite()).float()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
            # Large gradients at the start only make the scale smaller; at 1 they are not finite by themselves.
            bad = bad * (scaler.get_scale() <= 1)
        elif optimizer.defaults.get("fused"):
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # read by fused optimizers, on the device
            optimizer.step()
        elif not bool(bad):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.learning_rate.step()
        self._averages.update()
        self._monitor.add_step(norm, bad)
        self._bad += bad
        self.step += 1
        if self.device.type == "cpu" or self.step % self.options.log_every == 0:
            self.check_finite()

    def check_finite(self) -> None:
        """Read how many steps had gradients that are not finite, which waits for the device.

        Raises:
            DivergedError: there are some, and ``on_nan`` says to stop.
        """
        bad, steps = int(self._bad), self.step - self._checked_step
        self._bad.zero_()
        self._checked_step = self.step
        self.skipped_steps += bad
        if bad and self.options.on_nan == "stop":
            got = f"are not finite in {bad} of the steps {self.step - steps + 1} to {self.step}"
            remedy = "the weights are those before; check the data, lower learning_rate, or pass on_nan='skip'"
            raise DivergedError(error_message("train", "the gradients", got, "finite numbers", remedy))

    def read_monitor(self) -> dict[str, float]:
        """Return the statistics since the last call, of all processes; this waits for the device."""
        return self._monitor.read(lambda sums: self.accelerator.reduce(sums, "sum"))

    def _after_step(self, reports: Reports) -> None:
        options, step = self.options, self.step

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        validated = {}
        if due(options.validate_every) and self._val_dataloader is not None:
            validated = {"val_loss": self.validate(self._val_dataloader)}
        if due(options.sample_every) and options.output_dir is not None:
            write_sample_grid(self, Path(options.output_dir) / "samples" / f"step-{step:08d}.png")
        saves = due(options.checkpoint_every) and options.output_dir is not None
        reports.advance()
        if due(options.log_every) or saves or validated:
            reports.write(validated)
        if saves:
            self.save_checkpoint()

    # The model

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        """Call the trained modules under autocast and the wrappers of accelerate."""
        with self.autocast():
            output: Tensor = self._wrapped(sample, timestep, condition)
        return output

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the configuration's mixed precision."""
        if self._precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._precision)

    @property
    def ema(self) -> Any:
        """diffusers' `EMAModel` of the weights; None without averages."""
        return self._averages.ema

    def averaged_weights(self) -> contextlib.AbstractContextManager[TrainedModules]:
        """Return a block in which the modules have the averaged weights, if there are any, and evaluation mode.

        Blocks may be nested.  Training steps and checkpoints within a block are refused.
        """
        return self._averages.in_place()

    def validate(self, dataloader: Any) -> float:
        """Return the mean loss of the averaged weights, with timesteps and noise that never change.

        Each sample counts once, on whichever number of processes.
        """
        world = self.accelerator.num_processes
        order = DataOrder(dataloader, self.config.seed, self.accelerator.process_index, world, complete=True)

        def loss_of(predict_batch: TrainingBatch) -> LossTerms:
            with self.autocast():
                return self.objective(self.modules, predict_batch)

        with self.averaged_weights():
            return mean_loss(
                loss_of,
                order,
                self.conditioning,
                self.config,
                lambda sums: self.accelerator.reduce(sums, "sum"),
                self.modules.data_dtype,
            )

    # Checkpoints

    def save_checkpoint(self, path: str | Path | None = None) -> Path:
        """Write the whole state, between two optimizer steps; older checkpoints of the output folder are removed.

        Args:
            path: the folder to make; ``output_dir/checkpoints/step-…`` if left out.

        Returns:
            the folder, once every process may go on.

        Raises:
            ValueError: there is no output folder, or gradients of a part of a step are accumulated.
            OSError: it cannot be written; earlier checkpoints are whole.
        """
        self._averages.check_not_in_place("save_checkpoint")
        if self._micro_step:
            got, remedy = f"{self._micro_step} batches of a step", "save after the step"
            raise ValueError(error_message("save_checkpoint", "the gradients", f"hold {got}", "none", remedy))
        parent = self._checkpoints("save_checkpoint") if path is None else None
        folder = checkpoint_folder(parent, self.step) if parent is not None else Path(str(path))
        if self.accelerator.is_main_process:
            save_state(self, folder)
            if parent is not None:
                remove_old_checkpoints(parent, self.options.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        return folder

    def load_checkpoint(self, path: str | Path | None = None) -> Path:
        """Continue from a checkpoint: the latest of the output folder if ``path`` is left out.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, pickled or of another model; the trainer is then unchanged.
        """
        folder = Path(path) if path is not None else latest_checkpoint(self._checkpoints("load_checkpoint"))
        if folder is None:
            got = f"is {self.options.output_dir!r}, which has no checkpoint"
            raise FileNotFoundError(error_message("load_checkpoint", "output_dir", got, "one or more", "train first"))
        self._averages.check_not_in_place("load_checkpoint")
        load_state(self, folder)
        self._micro_step, self._checked_step = 0, self.step
        # What was accumulated before is of another run.
        self.optimizer.zero_grad(set_to_none=True)
        self._monitor = Monitor(self.device, self.config.num_train_timesteps)
        self._bad.zero_()
        return folder

    def _checkpoints(self, operation: str) -> Path:
        if self.options.output_dir is None:
            remedy = "pass path=, or RunOptions(output_dir=...)"
            raise ValueError(error_message(operation, "path", "is left out", "a folder", remedy))
        return Path(self.options.output_dir) / "checkpoints"

    # Setting up

    def _make_accelerator(self) -> Any:
        accelerate = require("accelerate", "training", "Trainer")
        return accelerate.Accelerator(
            cpu=self.options.cpu,
            log_with=list(self.options.trackers) or None,
            project_dir=self.options.output_dir,
        )


class DiffusionTrainer(Trainer):
    """`Trainer` of a `DiffusionModel`: ``trainer.training_step(images)``, ``trainer.train(dataloader)``."""


class AdvancedDiffusionTrainer(Trainer):
    """`Trainer` of an `AdvancedUNet`: ``trainer.train_step({"images": images, "prompts": [...]})``."""
