"""Trained step rewards: loading them, the labels that they learn from, their measures and aggregates."""
