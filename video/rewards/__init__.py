"""Rewards for video agents: pure functions of answers, calls and groups, and small classes that recipes name.

answers        the final answer by its type, formats, DeepEyes
calls          the calls of a turn, and the items of a reference that they hit
manipulations  Video-CoM, F1, one number per turn
coverage       right, redundant, erroneous (ViRL)
progress       longest common subsequences (ProgRM)
groups         T-GRPO, curiosity
plans          ordered matching (REVER)
recorded       actions beside an expert's (UI-S1, Mobile-R1)
"""

from video.rewards.answers import DeepEyes, VideoAnswer, VideoAnswerStep, VideoFormat
from video.rewards.coverage import VideoViRL
from video.rewards.groups import Curiosity, TemporalContrast
from video.rewards.manipulations import Manipulations, VideoComReward, manipulation_f1
from video.rewards.plans import PlanOverlap
from video.rewards.progress import LcsProgress
from video.rewards.recorded import ScreenAction

__all__ = [
    "Curiosity",
    "DeepEyes",
    "LcsProgress",
    "Manipulations",
    "PlanOverlap",
    "ScreenAction",
    "TemporalContrast",
    "VideoAnswer",
    "VideoAnswerStep",
    "VideoComReward",
    "VideoFormat",
    "VideoViRL",
    "manipulation_f1",
]
