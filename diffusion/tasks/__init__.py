"""Built-in diffusion tasks."""
