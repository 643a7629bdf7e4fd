"""Readings of texts: judges' verdicts, answer probabilities, words in a step.

Importing this package enters them into the registry.
"""

from mmrl.reasoning.readings import answers, judge, texts  # noqa: F401 - enter their rows
