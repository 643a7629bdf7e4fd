"""Rewards: calling them safely, weighing them, and writing them into the tree."""

from mmrl.rewards.scoring import RewardError, Scored, score

__all__ = ["RewardError", "Scored", "score"]
