"""The models: PathFLIP, its instruction head, MR-PLIP, their configurations and presets."""

from __future__ import annotations

from pathflip.models.config import PRESETS, PathFLIPConfig, Preset, preset
from pathflip.models.instruct import PathFLIPInstruct
from pathflip.models.mrplip import MRPLIP
from pathflip.models.mrplip_config import MR_PRESETS, MRPLIPConfig, mr_preset
from pathflip.models.outputs import Grounding, MRPLIPOutput, PathFLIPOutput, SlideEmbedding
from pathflip.models.pathflip import PathFLIP
from pathflip.models.prompt_encoder import InstructConfig
from pathflip.models.tree_batch import TreeBatch

__all__ = [
    "MRPLIP",
    "MR_PRESETS",
    "PRESETS",
    "Grounding",
    "InstructConfig",
    "MRPLIPConfig",
    "MRPLIPOutput",
    "PathFLIP",
    "PathFLIPConfig",
    "PathFLIPInstruct",
    "PathFLIPOutput",
    "Preset",
    "SlideEmbedding",
    "TreeBatch",
    "mr_preset",
    "preset",
]
