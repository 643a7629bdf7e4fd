"""Model adapters: what differs between diffusion model families, behind one interface."""
