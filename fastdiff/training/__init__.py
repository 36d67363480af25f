# SPDX-License-Identifier: MIT
"""Training: configuration, data, losses, models, the trainer, few-step students, pictures and analysis.

The folders and modules::

    config.py         the configuration of model, training and sampling
    config_checks.py  names and ranges of its fields
    checkpoints.py    folders of safetensors and JSON
    state_tensors.py  tensors of modules and optimizers by name
    seeded_uniforms.py  uniform numbers that belong to a sample
    data/             data sets, batches, augmentation, and the order of samples as a function of the seed
    losses/           losses and their weights, timesteps, the variational bound, the objective that a trainer minimizes
    model/            diffusers' U-Nets of a configuration, a model that samples, its scheduler, conditions; models of
                      checkpoints
    trainer/          the trainer: steps, reports, validation, state; the job of ``fastdiff train``
    few_steps/        progressive distillation, consistency distillation and training; their job
    pictures/         pictures from prompts, by a pipeline of diffusers or a trained model; images of sampling jobs
    analyzer/         parameters, memory, operations and speed of a model

A name is imported when it is asked for: the losses need torch alone, the model needs diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analyzer.analyzer import DiffusionAnalyzer as DiffusionAnalyzer
    from .analyzer.workload import model_workload as model_workload
    from .checkpoints import load_checkpoint as load_checkpoint
    from .checkpoints import save_checkpoint as save_checkpoint
    from .config import DiffusionConfig as DiffusionConfig
    from .config import SchedulerType as SchedulerType
    from .data.augmentation import Jitter as Jitter
    from .data.batches import TrainingBatch as TrainingBatch
    from .data.datasets import ImageFolder as ImageFolder
    from .data.datasets import digits_dataset as digits_dataset
    from .data.datasets import fashion_mnist_dataset as fashion_mnist_dataset
    from .few_steps.consistency import ConsistencyObjective as ConsistencyObjective
    from .few_steps.consistency import ConsistencyOptions as ConsistencyOptions
    from .few_steps.progressive import ProgressiveObjective as ProgressiveObjective
    from .few_steps.progressive import Teacher as Teacher
    from .losses.functions import AdvancedLossFunctions as AdvancedLossFunctions
    from .losses.functions import debiased_loss as debiased_loss
    from .losses.functions import huber_loss as huber_loss
    from .losses.functions import l1_loss as l1_loss
    from .losses.functions import l2_loss as l2_loss
    from .losses.functions import p2_loss as p2_loss
    from .losses.functions import snr_loss as snr_loss
    from .losses.functions import v_prediction_loss as v_prediction_loss
    from .losses.objectives import DenoisingObjective as DenoisingObjective
    from .losses.objectives import LossTerms as LossTerms
    from .losses.objectives import Objective as Objective
    from .losses.timestep_draws import draw_timesteps as draw_timesteps
    from .losses.timestep_draws import shift_times as shift_times
    from .losses.variational_bound import discretized_log_likelihood as discretized_log_likelihood
    from .losses.variational_bound import gaussian_kl as gaussian_kl
    from .losses.variational_bound import prior_term as prior_term
    from .losses.variational_bound import vlb_loss as vlb_loss
    from .losses.variational_bound import vlb_terms as vlb_terms
    from .losses.weights import debiased_weights as debiased_weights
    from .losses.weights import min_snr_weights as min_snr_weights
    from .losses.weights import p2_weights as p2_weights
    from .losses.weights import signal_to_noise_ratio as signal_to_noise_ratio
    from .losses.weights import weight_table as weight_table
    from .model.diffusion_model import AdvancedUNet as AdvancedUNet
    from .model.diffusion_model import DiffusionModel as DiffusionModel
    from .model.scheduler import AdvancedScheduler as AdvancedScheduler
    from .model.scheduler import DiffusionScheduler as DiffusionScheduler
    from .model.text_encoder import SmallTextEncoder as SmallTextEncoder
    from .pictures.pipeline import AdvancedDiffusionPipeline as AdvancedDiffusionPipeline
    from .trainer.reports import DivergedError as DivergedError
    from .trainer.run_options import RunOptions as RunOptions
    from .trainer.trainer import AdvancedDiffusionTrainer as AdvancedDiffusionTrainer
    from .trainer.trainer import DiffusionTrainer as DiffusionTrainer
    from .trainer.trainer import Trainer as Trainer
    from .trainer.validation import validate_model as validate_model

#: The public names by module.
_MODULES = {
    "trainer.validation": ("validate_model",),
    "trainer.trainer": ("AdvancedDiffusionTrainer", "DiffusionTrainer", "Trainer"),
    "model.text_encoder": ("SmallTextEncoder",),
    "trainer.run_options": ("RunOptions",),
    "trainer.reports": ("DivergedError",),
    "losses.objectives": ("DenoisingObjective", "LossTerms", "Objective"),
    "few_steps.progressive": ("ProgressiveObjective", "Teacher"),
    "few_steps.consistency": ("ConsistencyObjective", "ConsistencyOptions"),
    "data.datasets": ("ImageFolder", "digits_dataset", "fashion_mnist_dataset"),
    "checkpoints": ("load_checkpoint", "save_checkpoint"),
    "data.batches": ("TrainingBatch",),
    "data.augmentation": ("Jitter",),
    "analyzer.analyzer": ("DiffusionAnalyzer",),
    "pictures.pipeline": ("AdvancedDiffusionPipeline",),
    "analyzer.workload": ("model_workload",),
    "config": ("DiffusionConfig", "SchedulerType"),
    "losses.functions": (
        "AdvancedLossFunctions",
        "debiased_loss",
        "huber_loss",
        "l1_loss",
        "l2_loss",
        "p2_loss",
        "snr_loss",
        "v_prediction_loss",
    ),
    "model.diffusion_model": ("AdvancedUNet", "DiffusionModel"),
    "model.scheduler": ("AdvancedScheduler", "DiffusionScheduler"),
    "losses.timestep_draws": ("draw_timesteps", "shift_times"),
    "losses.variational_bound": ("discretized_log_likelihood", "gaussian_kl", "prior_term", "vlb_loss", "vlb_terms"),
    "losses.weights": ("debiased_weights", "min_snr_weights", "p2_weights", "signal_to_noise_ratio", "weight_table"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
