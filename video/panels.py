"""Panels of a video agent's page."""

from mmrl.registry import declares
from mmrl.report.panels import curves

manipulations = declares(place=20, compares=True)(
    curves("Manipulations on the evaluation prompts", "eval/manipulation_f1")
)
