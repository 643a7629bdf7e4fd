"""Model adapters: what differs between diffusion model families, behind one interface.

Importing this package enters them into the registry.
"""

from diffusion.adapters import blocks, dit, unet  # noqa: F401 - enter their rows
