# SPDX-License-Identifier: MIT
"""Reinforcement learning on samplers: rollouts with log-probabilities, their files, and differentiable replay.

The modules::

    trajectory.py  what a rollout leaves: samples, rows, seeds, log-probabilities; save and load
    rollout.py     the loop that makes one
    replay.py      the log-probabilities of a stored one under another model, and the clipped objective

The rows of the table travel with the trajectory, so training replays the steps that were taken, whatever schedule it
is configured with.
"""

from .replay import clipped_objective, replay_log_prob
from .rollout import rollout
from .trajectory import Trajectory

__all__ = ["Trajectory", "clipped_objective", "replay_log_prob", "rollout"]
