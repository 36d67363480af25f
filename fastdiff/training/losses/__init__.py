# SPDX-License-Identifier: MIT
"""What training minimizes: losses, weights, timesteps, the variational bound, the denoising objective."""
