"""Built-in vision tasks."""
