"""Checks that an encoder, a trained model and an archive belong together.

Vectors are comparable only if the same weights made them from tissue read at the same scale. Every
command, job and part of the service that brings a run or an encoder to an archive asks here, so all
of them accept and refuse the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pathflip.encoders.mrplip import is_patch_model
from pathflip.errors import ArchiveError, ConfigError, EncoderError

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run, RunAbout
    from pathflip.encoders import Encoder, EncoderInfo

SCALE = ("region_um", "patch_um", "mpp")
"""Fields of the tiling that a model depends on: what a patch shows, and the slots of a region.

The other two, ``min_patch_tissue`` and ``min_region_patches``, choose which patches and regions are
kept. Models take any subset of them (missing slots are masked), so an archive of another cohort may
keep more or fewer.
"""


def check_fits(archive: Archive, run: Run | RunAbout) -> str:
    """Refuse an archive whose features are not of the kind a run's model was trained on.

    The encoder's name, revision and dimension have to agree, and the tiling in :data:`SCALE`.

    Returns:
        The archive's name of the encoder.

    Raises:
        ArchiveError: The archive lacks the encoder or holds another revision or dimension of it
            (``other_encoder``), or its slides are cut otherwise (``other_tiling``).
    """
    wanted, held = run.encoder, archive.encoders()
    name = str(wanted["name"])
    if name not in held:
        spec = "mrplip:RUN" if is_patch_model(name) else name
        raise ArchiveError(
            f"Model {run.name} reads features of {name}; the archive {archive.uri} "
            f"holds {', '.join(held) or 'none'}.",
            hint=f"Run: pathflip ingest SLIDES --archive {archive.uri} --encoder {spec} "
            "--add-encoder",
            code="other_encoder",
        )
    check_features(run.name, wanted, held[name], of=archive.uri)
    tiling = archive.tiling()
    if differing := [key for key in SCALE if run.tiling.get(key) != tiling[key]]:
        raise ArchiveError(
            f"Model {run.name} was trained on slides cut with "
            f"{', '.join(f'{key} {run.tiling.get(key)}' for key in differing)}; those of "
            f"{archive.uri} are cut with {', '.join(f'{key} {tiling[key]}' for key in differing)}.",
            hint="Use the archive it was trained on, or one cut the same way.",
            code="other_tiling",
        )
    return name


def check_features(
    model: str, wanted: Mapping[str, Any], held: Mapping[str, Any], *, of: str
) -> None:
    """Refuse features made by other weights than those a model was trained on.

    Args:
        model: Name of the model.
        wanted: Encoder it was trained on: name, revision, dim.
        held: Entry of that encoder in the archive.
        of: Holder of the features, for the message.

    Raises:
        ArchiveError: Revision or dimension differ (``other_encoder``).
    """
    for key in ("revision", "dim"):
        if wanted.get(key) != held[key]:
            raise ArchiveError(
                f"Model {model} reads features of {wanted['name']} {key} {wanted.get(key)}; those "
                f"of {of} are {key} {held[key]}.",
                hint="Use the archive it was trained on, or one made with the same weights.",
                code="other_encoder",
            )


def check_indexed(archive: Archive, run: Run | RunAbout, *, folder: str) -> None:
    """Refuse to search an archive that has no vectors of a run's model.

    Args:
        archive: The archive to search.
        run: The run whose model embeds the query.
        folder: The run as the user named it, for the hint.

    Raises:
        ArchiveError: The run does not fit (see :func:`check_fits`), or fits and is not indexed
            (``not_indexed``).
    """
    models = archive.models()
    if run.name in models:
        return
    check_fits(archive, run)
    others = ", ".join(f"{name} ({entry['fingerprint'][:12]})" for name, entry in models.items())
    raise ArchiveError(
        f"The archive {archive.uri} has no vectors of model {run.name} "
        f"({run.fingerprint[:12]}); it has those of {others or 'none'}.",
        hint=f"Run: pathflip index --archive {archive.uri} --run {folder}",
        code="not_indexed",
    )


def check_weights(archive: Archive, name: str, *, encoder: Encoder | EncoderInfo) -> None:
    """Refuse an encoder that is not the one that made the archive's features.

    Args:
        archive: The archive.
        name: The encoder in the archive whose features the query is compared with.
        encoder: The encoder at hand, loaded or described.

    Raises:
        ConfigError: Its name or revision differs (``other_encoder``).
        ArchiveError: The archive has no features of ``name`` (``unknown_encoder``).
    """
    made_with = archive.encoder(name)[1]["revision"]
    if (encoder.name, encoder.revision) == (name, made_with):
        return
    given = encoder.revision
    if encoder.name != name:
        given = f"{encoder.name} revision {encoder.revision}"
    raise ConfigError(
        f"The archive holds features of {name} revision {made_with}; this is {given}.",
        hint="Search with the weights the archive was made with.",
        code="other_encoder",
    )


def resolve_encoder(archive: Archive, spec: str | None) -> tuple[str, str]:
    """Find the encoder of an archive that a user means.

    Args:
        archive: The archive.
        spec: A name in the archive, or as for ingest where weights are local
            (``uni2=/folder``); None for the only one.

    Returns:
        Its name in the archive, and the spec to load it by. A slide encoder, whose vectors were
        imported, has a name alone: nothing loads it.

    Raises:
        ArchiveError: The archive has no features of it, or of several and none is named
            (``unknown_encoder``).
        ConfigError: The weights are not those of the archive (``other_encoder``).
    """
    from pathflip.encoders import encoder_info

    if spec in archive.slide_encoders():
        return str(spec), str(spec)
    if spec is None or spec in archive.encoders():
        name = archive.encoder(spec)[0]
        return name, spec or name
    try:
        info = encoder_info(spec, patch_um=float(archive.tiling()["patch_um"]))
    except EncoderError as error:
        if error.code != "unknown_encoder":
            raise
        held = [*archive.encoders(), *archive.slide_encoders()]
        raise ArchiveError(
            f"The archive {archive.uri} has no vectors of {spec}.",
            hint=f"It has those of {', '.join(held) or 'none'}.",
            code="unknown_encoder",
        ) from error
    name, _ = archive.encoder(info.name)
    check_weights(archive, name, encoder=info)
    return name, spec
