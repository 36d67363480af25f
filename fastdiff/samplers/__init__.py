# SPDX-License-Identifier: MIT
"""Samplers: a noise schedule, a solver and a loop put together.

The modules::

    grid.py           the steps of a loop: its levels, and the table compiled for them
    compiled.py       a schedule and a configuration, compiled to a table
    base.py           the loops over a table
    samplers.py       one class a solver
    table_sampler.py  a sampler whose table is given
    manager.py        several samplers under one configuration
"""

from .base import BaseSampler, check_fields
from .manager import AdvancedSamplingManager, create_advanced_sampling_manager
from .samplers import (
    SAMPLERS,
    DDIMSampler,
    DDPMSampler,
    DEISSampler,
    DPMSolverSampler,
    EDMEulerSampler,
    EulerAncestralSampler,
    EulerSampler,
    FlowEulerSampler,
    FlowHeunSampler,
    HeunSampler,
    IPNDMSampler,
    KDPM2AncestralSampler,
    KDPM2Sampler,
    LCMSampler,
    LMSSampler,
    PNDMSampler,
    SASolverSampler,
    TCDSampler,
    UniPCSampler,
    create_sampler,
    split_fields,
)
from .table_sampler import TableSampler

__all__ = [
    "SAMPLERS",
    "AdvancedSamplingManager",
    "BaseSampler",
    "DDIMSampler",
    "DDPMSampler",
    "DEISSampler",
    "DPMSolverSampler",
    "EDMEulerSampler",
    "EulerAncestralSampler",
    "EulerSampler",
    "FlowEulerSampler",
    "FlowHeunSampler",
    "HeunSampler",
    "IPNDMSampler",
    "KDPM2AncestralSampler",
    "KDPM2Sampler",
    "LCMSampler",
    "LMSSampler",
    "PNDMSampler",
    "SASolverSampler",
    "TCDSampler",
    "TableSampler",
    "UniPCSampler",
    "check_fields",
    "create_advanced_sampling_manager",
    "create_sampler",
    "split_fields",
]

# Classes that the registry alone names are importable like those above.
globals().update((cls.__name__, cls) for cls in SAMPLERS.values())
