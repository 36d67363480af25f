# SPDX-License-Identifier: MIT
"""Training: configuration, losses, timesteps, model and scheduler.

The modules::

    config.py             the configuration of model, training and sampling
    losses.py             losses of a prediction and its target
    weights.py            weights of the loss over timesteps
    timestep_draws.py     draws of timesteps
    variational_bound.py  terms of the variational bound, for learned variances
    scheduler.py          schedule and steps of a configuration, called as diffusers' schedulers are
    model.py              diffusers' U-Nets of a configuration, and a model that samples
    trainer.py            the trainer; trainer_state.py its checkpoints, reports.py its reports
    run_options.py        its options: files, reports, validation
    distillation.py       progressive distillation; consistency.py consistency distillation and training
    objectives.py         what is minimized; batches.py and conditioning.py what goes into it
    data.py, data_order.py   data sets, and the order of samples as a function of the seed
    augmentation.py, seeded_uniforms.py  draws that belong to a sample
    optimization.py       AdamW and the learning rate
    monitor.py            statistics that are kept on the device
    checkpoints.py        folders of safetensors and JSON
    validation.py, sample_grids.py  losses and pictures during training
    text_encoder.py       a small text encoder
    out_of_memory.py      what to try when memory is full
    job.py                a job of ``fastdiff train``; distill_job.py one with --distill
    pipeline.py           pictures from prompts: diffusers_pictures.py by diffusers, model_pictures.py by models
    picture_request.py, pictures.py, memory_options.py   what the pipeline is asked for, Pillow, memory
    analyzer.py           parameters, memory, operations and speed of a model; model_size.py, flops.py, workload.py

A name is imported when it is asked for: the losses need torch alone, the model needs diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analyzer import DiffusionAnalyzer as DiffusionAnalyzer
    from .augmentation import Jitter as Jitter
    from .batches import TrainingBatch as TrainingBatch
    from .checkpoints import load_checkpoint as load_checkpoint
    from .checkpoints import save_checkpoint as save_checkpoint
    from .config import DiffusionConfig as DiffusionConfig
    from .config import SchedulerType as SchedulerType
    from .consistency import ConsistencyObjective as ConsistencyObjective
    from .consistency import ConsistencyOptions as ConsistencyOptions
    from .data import ImageFolder as ImageFolder
    from .data import digits_dataset as digits_dataset
    from .data import fashion_mnist_dataset as fashion_mnist_dataset
    from .distillation import ProgressiveObjective as ProgressiveObjective
    from .distillation import Teacher as Teacher
    from .losses import AdvancedLossFunctions as AdvancedLossFunctions
    from .losses import debiased_loss as debiased_loss
    from .losses import huber_loss as huber_loss
    from .losses import l1_loss as l1_loss
    from .losses import l2_loss as l2_loss
    from .losses import p2_loss as p2_loss
    from .losses import snr_loss as snr_loss
    from .losses import v_prediction_loss as v_prediction_loss
    from .model import AdvancedUNet as AdvancedUNet
    from .model import DiffusionModel as DiffusionModel
    from .objectives import DenoisingObjective as DenoisingObjective
    from .objectives import LossTerms as LossTerms
    from .objectives import Objective as Objective
    from .pipeline import AdvancedDiffusionPipeline as AdvancedDiffusionPipeline
    from .reports import DivergedError as DivergedError
    from .run_options import RunOptions as RunOptions
    from .scheduler import AdvancedScheduler as AdvancedScheduler
    from .scheduler import DiffusionScheduler as DiffusionScheduler
    from .text_encoder import SmallTextEncoder as SmallTextEncoder
    from .timestep_draws import draw_timesteps as draw_timesteps
    from .timestep_draws import shift_times as shift_times
    from .trainer import AdvancedDiffusionTrainer as AdvancedDiffusionTrainer
    from .trainer import DiffusionTrainer as DiffusionTrainer
    from .trainer import Trainer as Trainer
    from .validation import validate_model as validate_model
    from .variational_bound import discretized_log_likelihood as discretized_log_likelihood
    from .variational_bound import gaussian_kl as gaussian_kl
    from .variational_bound import prior_term as prior_term
    from .variational_bound import vlb_loss as vlb_loss
    from .variational_bound import vlb_terms as vlb_terms
    from .weights import debiased_weights as debiased_weights
    from .weights import min_snr_weights as min_snr_weights
    from .weights import p2_weights as p2_weights
    from .weights import signal_to_noise_ratio as signal_to_noise_ratio
    from .weights import weight_table as weight_table
    from .workload import model_workload as model_workload

#: The public names by module.
_MODULES = {
    "validation": ("validate_model",),
    "trainer": ("AdvancedDiffusionTrainer", "DiffusionTrainer", "Trainer"),
    "text_encoder": ("SmallTextEncoder",),
    "run_options": ("RunOptions",),
    "reports": ("DivergedError",),
    "objectives": ("DenoisingObjective", "LossTerms", "Objective"),
    "distillation": ("ProgressiveObjective", "Teacher"),
    "consistency": ("ConsistencyObjective", "ConsistencyOptions"),
    "data": ("ImageFolder", "digits_dataset", "fashion_mnist_dataset"),
    "checkpoints": ("load_checkpoint", "save_checkpoint"),
    "batches": ("TrainingBatch",),
    "augmentation": ("Jitter",),
    "analyzer": ("DiffusionAnalyzer",),
    "pipeline": ("AdvancedDiffusionPipeline",),
    "workload": ("model_workload",),
    "config": ("DiffusionConfig", "SchedulerType"),
    "losses": (
        "AdvancedLossFunctions",
        "debiased_loss",
        "huber_loss",
        "l1_loss",
        "l2_loss",
        "p2_loss",
        "snr_loss",
        "v_prediction_loss",
    ),
    "model": ("AdvancedUNet", "DiffusionModel"),
    "scheduler": ("AdvancedScheduler", "DiffusionScheduler"),
    "timestep_draws": ("draw_timesteps", "shift_times"),
    "variational_bound": ("discretized_log_likelihood", "gaussian_kl", "prior_term", "vlb_loss", "vlb_terms"),
    "weights": ("debiased_weights", "min_snr_weights", "p2_weights", "signal_to_noise_ratio", "weight_table"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
