"""Losses: pure functions, tensors in, tensors out."""
