"""Diffusion: step kernels, one branch sampler, model adapters, image rewards."""
