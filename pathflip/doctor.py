"""Preflight checks of the machine, with a remedy for each fault."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathflip.cpus import cpus_here
from pathflip.slides.sources import OPENSLIDE_FLOOR, version_numbers

FLOORS = {"ray": (2, 54), "torch": (2, 6), "lancedb": (0, 40), "pylance": (14, 0)}
OPTIONAL = {"ray": "jobs and services", "transformers": "hub encoders", "timm": "hub encoders"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check: its name, state and remedy."""

    name: str
    status: Literal["pass", "warn", "fail"]
    detail: str
    fix: str = ""


def examine(archive: str | None = None) -> list[Check]:
    """Run every check; the last ones only if an archive is given."""
    checks = [_python(), _openslide(), _jpeg(), *_packages(), _torch(), _memory(), _disk(archive)]
    checks.append(_ray_auth())
    if archive is not None:
        checks.append(_archive(archive))
    return checks


def _python() -> Check:
    version = sys.version.split()[0]
    good = (3, 11) <= sys.version_info < (3, 13)
    return Check(
        name="python",
        status="pass" if good else "fail",
        detail=version,
        fix="" if good else "Use Python 3.11 or 3.12.",
    )


def _openslide() -> Check:
    try:
        import openslide
    except (ImportError, OSError) as error:
        return Check(
            name="openslide", status="fail", detail=str(error), fix="pip install openslide-bin"
        )
    version = openslide.__library_version__
    good = version_numbers(version) >= OPENSLIDE_FLOOR
    return Check(
        name="openslide",
        status="pass" if good else "fail",
        detail=f"library {version}",
        fix="" if good else "pip install openslide-bin==4.0.1.2 (distribution packages are old).",
    )


def _jpeg() -> Check:
    try:
        importlib.import_module("simplejpeg")
    except ImportError as error:
        return Check(name="libjpeg-turbo", status="fail", detail=str(error), fix="make install")
    return Check(name="libjpeg-turbo", status="pass", detail=_installed("simplejpeg") or "")


def _packages() -> list[Check]:
    checks = []
    for name, floor in FLOORS.items():
        version = _installed(name)
        wanted = ".".join(str(part) for part in floor)
        if version is None:
            use = OPTIONAL.get(name)
            checks.append(
                Check(
                    name=name,
                    status="warn" if use else "fail",
                    detail=f"not installed; needed for {use or 'everything'}",
                    fix=f"pip install 'pathflip[{name}]'" if use else f"pip install {name}",
                )
            )
            continue
        good = version_numbers(version) >= floor
        checks.append(
            Check(
                name=name,
                status="pass" if good else "fail",
                detail=version,
                fix="" if good else f"Use {name} {wanted} or newer.",
            )
        )
    return checks


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name="gpu", status="fail", detail=f"torch: {error}", fix="make install")
    if not torch.cuda.is_available():
        return Check(name="gpu", status="pass", detail="none; the texture encoder needs none")
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    count = torch.cuda.device_count()
    return Check(name="gpu", status="pass", detail=f"{count} x {', '.join(sorted(names))}")


def _memory() -> Check:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cpus = cpus_here()
    need = 1.0 + 0.5 * cpus
    return Check(
        name="memory",
        status="pass" if free >= need else "warn",
        detail=f"{free:.1f} GiB free, {cpus} CPUs",
        fix="" if free >= need else f"Use fewer actors: -o actors={max(1, int(2 * (free - 1)))}.",
    )


def _disk(archive: str | None) -> Check:
    path = Path(archive or ".").absolute() if "://" not in (archive or "") else Path.cwd()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free / 2**30
    return Check(
        name="disk",
        status="pass" if free >= 5 else "warn",
        detail=f"{free:.1f} GiB free at {path}",
        fix=""
        if free >= 5
        else "An archive takes about 0.5 kB a patch with texture, 3 kB with 1536-wide features.",
    )


def _ray_auth() -> Check:
    mode = os.environ.get("RAY_AUTH_MODE", "")
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        return Check(name="ray auth", status="pass", detail="local only; nothing is reachable")
    good = mode == "token"
    return Check(
        name="ray auth",
        status="pass" if good else "warn",
        detail=f"RAY_AUTH_MODE={mode or 'unset'} for {address}",
        fix=""
        if good
        else "Anyone who reaches a head without tokens can run commands: RAY_AUTH_MODE=token.",
    )


def _archive(archive: str) -> Check:
    from pathflip.archive import Archive
    from pathflip.errors import ArchiveError

    try:
        stats = Archive(archive).stats()
    except ArchiveError as error:
        return Check(name="archive", status="fail", detail=error.message, fix=error.hint)
    return Check(
        name="archive",
        status="pass",
        detail=f"{stats['slides']} slides, {stats['regions']} regions, {stats['patches']} patches",
    )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
