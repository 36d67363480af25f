# SPDX-License-Identifier: MIT
"""Configurations of the guiders, and loops of them."""

import inspect

import torch

from fastdiff.diffusers.guiders import GUIDERS

STEPS = 8
OPTIONS = [
    {},
    {"use_original_formulation": True},
    {"guidance_rescale": 0.7},
    {"guidance_rescale": 1.0, "use_original_formulation": True, "guidance_scale": 3.0},
    {"start": 0.3, "stop": 0.8, "guidance_rescale": 0.5},
    {"guidance_scale": 1.0},
    {"enabled": False},
]
#: What one class has besides.
OWN = {
    "AdaptiveProjectedGuidance": [
        {"adaptive_projected_guidance_momentum": -0.5, "eta": 0.3},
        {"adaptive_projected_guidance_momentum": 0.9, "adaptive_projected_guidance_rescale": 2.0, "eta": 0.0},
        {"adaptive_projected_guidance_rescale": 0.0, "eta": 0.5},
        {"adaptive_projected_guidance_norm_dim": [-1, -2], "eta": 0.5, "adaptive_projected_guidance_rescale": 1.0},
    ],
    "AdaptiveProjectedMixGuidance": [
        {"adaptive_projected_guidance_start_step": 2, "guidance_rescale": 0.4},
        {"adaptive_projected_guidance_momentum": None, "adaptive_projected_guidance_start_step": 1, "eta": 1.5},
    ],
    "ClassifierFreeZeroStarGuidance": [{"zero_init_steps": 3}, {"zero_init_steps": 0, "guidance_scale": 12.0}],
    "MagnitudeAwareGuidance": [{"alpha": 1.0, "guidance_scale": 20.0}],
    "PerturbedAttentionGuidance": [
        {"perturbed_guidance_scale": 1.7, "perturbed_guidance_stop": 0.8, "guidance_rescale": 0.6},
        {"perturbed_guidance_stop": 1.0, "guidance_scale": 1.0},
    ],
    "SkipLayerGuidance": [
        {"skip_layer_guidance_scale": 4.0, "skip_layer_guidance_stop": 1.0, "use_original_formulation": True},
        {"skip_layer_guidance_stop": 1.0, "guidance_scale": 1.0, "guidance_rescale": 0.4},
    ],
    "SmoothedEnergyGuidance": [{"seg_guidance_scale": 1.3, "seg_guidance_stop": 0.5}],
}
CASES = [
    (name, options)
    for name in GUIDERS
    for options in OPTIONS + OWN.get(name, [])
    if options.keys() <= inspect.signature(GUIDERS[name].original).parameters.keys()
]


#: What a class has to be given.
NEEDED = {
    "AutoGuidance": {"auto_guidance_layers": [1], "dropout": 0.5},
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": [1]},
    "SkipLayerGuidance": {"skip_layer_guidance_layers": [1]},
    "SmoothedEnergyGuidance": {"seg_guidance_layers": [1]},
}


def options_of(name, options):
    return {**NEEDED.get(name, {}), **options}


def pair(name, options):
    options = options_of(name, options)
    return GUIDERS[name](**options), GUIDERS[name].original(**options)


def shape_of(name):
    # diffusers' norm of a difference takes two dimensions and no more.
    return (3, 24, 40) if name == "MagnitudeAwareGuidance" else (3, 4, 12, 20)


def outputs(shape, dtype, seed, double=False):
    """Return two similar outputs of a model."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(shape, generator=generator)
    pair = [(both + 0.4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]
    return [tensor.double() for tensor in pair] if double else pair


def given(guider, cond, uncond):
    """Return the arguments of a guider's `forward`, by name, as diffusers' pipelines pass them."""
    perturbed = guider._input_predictions[2:]
    if not perturbed:
        return {"pred_cond": cond, "pred_uncond": uncond if guider.num_conditions == 2 else None}
    is_on = guider._is_seg_enabled() if perturbed == ["pred_cond_seg"] else guider._is_slg_enabled()
    return {
        "pred_cond": cond,
        "pred_uncond": uncond if guider._is_cfg_enabled() else None,
        perturbed[0]: 0.5 * uncond.flip(-1) if is_on else None,  # exact in every dtype
    }


def walk(guider, shape, dtype, double=False):
    """Return the results of a loop of STEPS steps, step by step."""
    results = []
    for step in range(STEPS):
        guider.set_state(step, STEPS, torch.tensor(STEPS - step))
        guider.prepare_inputs({})
        cond, uncond = outputs(shape, dtype, 100 + step, double)
        results.append(guider.forward(**given(guider, cond, uncond)))
    return results
