"""Built-in video tasks."""
