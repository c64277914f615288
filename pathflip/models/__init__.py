"""The models: PathFLIP, its configuration and its presets."""

from __future__ import annotations

from pathflip.models.config import PRESETS, PathFLIPConfig, Preset, preset
from pathflip.models.outputs import Grounding, PathFLIPOutput, SlideEmbedding
from pathflip.models.pathflip import PathFLIP

__all__ = [
    "PRESETS",
    "Grounding",
    "PathFLIP",
    "PathFLIPConfig",
    "PathFLIPOutput",
    "Preset",
    "SlideEmbedding",
    "preset",
]
