"""The models: PathFLIP, its instruction head, their configurations and presets."""

from __future__ import annotations

from pathflip.models.config import PRESETS, PathFLIPConfig, Preset, preset
from pathflip.models.instruct import PathFLIPInstruct
from pathflip.models.outputs import Grounding, PathFLIPOutput, SlideEmbedding
from pathflip.models.pathflip import PathFLIP
from pathflip.models.prompt_encoder import InstructConfig

__all__ = [
    "PRESETS",
    "Grounding",
    "InstructConfig",
    "PathFLIP",
    "PathFLIPConfig",
    "PathFLIPInstruct",
    "PathFLIPOutput",
    "Preset",
    "SlideEmbedding",
    "preset",
]
