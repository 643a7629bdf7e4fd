"""Sampling trees of tokens: one driver, two engines, and environments that answer between turns."""
