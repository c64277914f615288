"""Settings of an ingest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pathflip.encoders import EncoderInfo, encoder_info
from pathflip.errors import ConfigError
from pathflip.geometry import Tiling


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Settings of an ingest; every one can be given in a YAML file or with -o."""

    encoder: str = "texture"
    """Patch encoder, or several separated by commas: they share one pass over the pixels."""
    tiling: Tiling = field(default_factory=Tiling)
    mpp_csv: str | None = None
    """CSV with the columns slide,mpp: µm per pixel where a file's metadata is missing or wrong."""
    patients: str | None = None
    """CSV with the columns slide,patient_id and optionally split; other columns become labels."""
    captions: str | None = None
    """Reports: CSV with the columns slide,caption, or another format ``archive import`` reads."""
    questions: str | None = None
    """Questions about slides: a format ``archive import --questions`` reads."""
    tissue_dir: str | None = None
    """Folder of <slide name>.geojson files used as tissue instead of the computed mask."""
    tissue_classes: tuple[str, ...] = ()
    """Classes of these outlines that are tissue; without, all but QuPath's ignored ones (Ignore*)
    and areas called artifact, background, hole or fold, which are cut out either way."""
    halving: Literal["exact", "dct"] = "dct"
    """Method of halving a twice finer JPEG base: in the DCT domain, or by exact area averages,
    which take half as long again. docs/notes/performance.md has what it does to features."""
    device: str = "auto"
    """auto, cpu or cuda."""
    compile: bool = False
    """Compilation of neural encoders (torch.compile) when they first run: a minute for each
    actor, which pays over many slides on a GPU if at all."""
    actors: int | None = None
    """Embedding actors at most; None means one per CPU, or two per GPU that the encoder uses."""
    readers: int | None = None
    """Reader processes per actor; None means 1 on CPU, 2 on GPU (reading overlaps encoding)."""
    chunk_regions: int = 32
    """Regions per unit of work."""
    attempts: int = 3
    """Times a reader may die or hang on a slide before the slide is quarantined."""
    read_timeout_s: float = 60.0
    """Deadline for reading one region."""
    stage_dir: str | None = None
    """Folder of every node for copies of slides of object stores; PATHFLIP_STAGE_DIR by default."""
    stage_gb: float | None = None
    """Gigabytes that these copies may take on a node; PATHFLIP_STAGE_GB by default, or 50."""
    plan_timeout_s: float = 900.0
    """Deadline for hashing a slide, and for opening and planning it."""
    max_bad_tiles: float = 0.01
    """Share of a slide's patches that may be damaged; beyond it (and beyond 4) quarantine."""
    commit_s: float = 15.0
    """Finished slides become visible at least this often."""
    add_encoder: bool = False
    """Allow a further encoder beside those the archive already holds."""
    retry: bool = False
    """Try quarantined slides again even though nothing about them changed."""

    @property
    def specs(self) -> list[str]:
        """The encoders' specs, one by one."""
        found = [spec.strip() for spec in self.encoder.split(",") if spec.strip()]
        if not found:
            raise ConfigError("No encoder was named.", hint="Leave --encoder out for texture.")
        return found

    def infos(self) -> list[EncoderInfo]:
        """Return the encoders' descriptions.

        Raises:
            EncoderError: See :func:`pathflip.encoders.encoder_info`.
        """
        return [encoder_info(spec, patch_um=self.tiling.patch_um) for spec in self.specs]
