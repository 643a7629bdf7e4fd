"""Readings: components that fill further fields of a rollout between its rewards and its credit.

Importing this package enters the core's readings into the registry.
"""

from mmrl.readings import baseline, contrast, monte_carlo, scorers, tree  # noqa: F401 - enter their rows
from mmrl.readings.base import Reading, ReadingContext, ReadingRecord, fill, write

__all__ = ["Reading", "ReadingContext", "ReadingRecord", "fill", "write"]
