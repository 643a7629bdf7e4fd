"""Imported by the server of `processes`, so that no command needs to: libraries and modules that most commands use."""

import diffusers.models.transformers.dit_transformer_2d  # noqa: F401
import peft  # noqa: F401
import transformers.generation  # noqa: F401

import diffusion.policy  # noqa: F401
import mmrl.reasoning.annotate.verb
import mmrl.search.verb
import mmrl.trainers.branch_grpo  # noqa: F401
import vision.policy  # noqa: F401
