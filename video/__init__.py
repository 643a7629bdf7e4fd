"""Video reasoning agents."""
