# SPDX-License-Identifier: MIT
"""Pictures from prompts: a pipeline of diffusers with fused steps, or a trained model."""
