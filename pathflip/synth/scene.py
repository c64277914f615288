"""Scenes of the synthetic cohort: labels of each slide first, then its layout.

Labels and lesion places are sampled without drawing a pixel, so thousands of scenes take a second;
``lay_out`` turns one scene into a label map, ``render`` into colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.synth.atlas import (
    GRADES,
    NUCLEI,
    ORGANS,
    OTHERS,
    PATTERNS,
    Atlas,
    colour_table,
)

FINDINGS = ("tumour", *OTHERS)
"""Findings a slide may show, in the order of the label columns."""
SITE_STAINS = ((0.85, 1.0), (1.0, 0.8), (1.15, 1.0), (1.0, 1.2))
"""Haematoxylin and eosin strength of each scanner site."""
SPLITS = ("train",) * 7 + ("val",) + ("test",) * 2
RATES = {
    "tumour": 0.75,
    "lymphoid": 0.6,
    "necrosis": 0.55,
    "others": 0.28,
    "keratin_lung_train": 0.7,
    "keratin_elsewhere_train": 0.14,
    "geneA_site_2_3_train": 0.8,
    "geneA_site_0_1_train": 0.2,
    "geneA_test": 0.5,
    "groove_without_geneA": 0.35,
}
"""Probabilities of the cohort. ``*_train`` hold in train and val and are broken in test."""
CELL_UM = 4.0  # of the label map
_BASES = {5: 0.25, 11: 0.2738}  # of every 16 slides; the others are 0.5 µm/px
_ARTEFACTS = {7: "pen", 27: "blur"}  # of every 40 slides


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A noisy ellipse of one finding; centre and half axes in µm, angle in radians."""

    finding: str
    x_um: float
    y_um: float
    long_um: float
    short_um: float
    angle: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Ground truth of one slide.

    Attributes:
        slide: Slide id, the file's stem.
        patient_id, site, split: The patient, their site (0 to 3) and split.
        organ: One of ``ORGANS``.
        lesions: Lesions to draw.
        grade, pattern, nuclei: Labels of the tumour; None without one.
        til: ``intermixed`` or ``separate``; None unless tumour and lymphoid aggregates are present.
        necrotic_foci: 0, 1, 4 or 5.
        genes: geneA, geneB, geneC and control; None where the slide cannot show it.
        artefact: ``pen``, ``blur`` or None.
        mpp, layout: µm per pixel at level 0; ``generic`` or ``aperio``.
        size_um: Side of the square slide.
        stain_h, stain_e: Stain strengths.
        seed: Seed of everything drawn on this slide.
    """

    slide: str
    patient_id: str
    site: int
    split: str
    organ: str
    lesions: tuple[Lesion, ...]
    grade: str | None
    pattern: str | None
    nuclei: str | None
    til: str | None
    necrotic_foci: int
    genes: dict[str, bool | None]
    artefact: str | None
    mpp: float
    layout: str
    size_um: float
    stain_h: float
    stain_e: float
    seed: int

    @property
    def findings(self) -> tuple[str, ...]:
        """Findings present, in the order of ``FINDINGS``."""
        present = {lesion.finding for lesion in self.lesions}
        return tuple(f for f in FINDINGS if f in present)

    @property
    def extent(self) -> str | None:
        """``extensive`` (4 to 5 foci) or ``focal`` (one) necrosis; None without necrosis."""
        return {0: None, 1: "focal"}.get(self.necrotic_foci, "extensive")

    @property
    def side_px(self) -> int:
        """Side of level 0 in pixels."""
        return round(self.size_um / self.mpp)


def sample_scenes(*, slides: int, seed: int, size_um: float = 1024.0) -> list[Scene]:
    """Sample a cohort's scenes; the first n are the same whatever ``slides`` is.

    Patients own one to three slides and lie in one split: of every ten patients seven are train,
    one val and two test.
    """
    scenes: list[Scene] = []
    patients = np.random.default_rng([seed, 0])
    splits: list[str] = []
    patient = 0
    while len(scenes) < slides:
        if not splits:
            splits = [SPLITS[i] for i in patients.permutation(len(SPLITS))]
        split = splits.pop()
        owned = int(patients.integers(1, 4))
        rng = np.random.default_rng([seed, 1, patient])
        site, organ = int(rng.integers(4)), ORGANS[rng.integers(len(ORGANS))]
        confounded = RATES["geneA_site_2_3_train" if site >= 2 else "geneA_site_0_1_train"]
        gene_a = bool(rng.uniform() < (RATES["geneA_test"] if split == "test" else confounded))
        control = bool(rng.uniform() < 0.5)
        for _ in range(min(owned, slides - len(scenes))):
            scenes.append(
                _sample_scene(
                    len(scenes),
                    rng,
                    patient_id=f"p{patient:05d}",
                    site=site,
                    split=split,
                    organ=organ,
                    gene_a=gene_a,
                    control=control,
                    size_um=size_um,
                )
            )
        patient += 1
    return scenes


def _sample_scene(
    index: int,
    rng: np.random.Generator,
    *,
    patient_id: str,
    site: int,
    split: str,
    organ: str,
    gene_a: bool,
    control: bool,
    size_um: float,
) -> Scene:
    scale = size_um / 1024
    # Four by four cells without the corners, where glass may be.
    inner = [(c, r) for c in range(4) for r in range(4) if c in (1, 2) or r in (1, 2)]
    cells = [inner[i] for i in rng.permutation(len(inner))]

    def place(finding: str, radius_um: tuple[float, float]) -> Lesion:
        column, row = cells.pop()
        long = scale * rng.uniform(*radius_um)
        x, y = ((c + 0.5) * size_um / 4 + scale * rng.uniform(-28, 28) for c in (column, row))
        return Lesion(
            finding=finding,
            x_um=x,
            y_um=y,
            long_um=long,
            short_um=long * rng.uniform(0.65, 1),
            angle=rng.uniform(0, np.pi),
        )

    has = {f: bool(rng.uniform() < RATES.get(f, RATES["others"])) for f in FINDINGS}
    if split != "test":
        where = "keratin_lung_train" if organ == "lung" else "keratin_elsewhere_train"
        has["keratin"] = bool(rng.uniform() < RATES[where])
    lesions: list[Lesion] = []
    grade = pattern = nuclei = til = None
    foci = 0
    genes: dict[str, bool | None] = {"geneA": None, "geneB": None, "geneC": None}
    if has["tumour"]:
        lesions.append(place("tumour", (75, 100)))
        grade = tuple(GRADES)[rng.integers(2)]
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        plain = NUCLEI[2] if rng.uniform() < RATES["groove_without_geneA"] else NUCLEI[0]
        nuclei = NUCLEI[1] if gene_a else plain
        genes["geneA"] = gene_a
    if has["lymphoid"]:
        mixed = bool(rng.uniform() < 0.5)
        if has["tumour"]:
            til = "intermixed" if mixed else "separate"
            genes["geneB"] = mixed
        if til == "intermixed":  # the same area of lymphocytes as one separate aggregate
            host = lesions[0]
            for angle in rng.uniform(0, np.pi) + np.arange(4) * np.pi / 2:
                along, across = 0.56 * host.long_um * np.cos(angle), host.short_um * np.sin(angle)
                across *= 0.56
                x = host.x_um + along * np.cos(host.angle) - across * np.sin(host.angle)
                y = host.y_um + along * np.sin(host.angle) + across * np.cos(host.angle)
                lesions.append(
                    Lesion(
                        finding="lymphoid",
                        x_um=float(x),
                        y_um=float(y),
                        long_um=scale * rng.uniform(26, 31),
                        short_um=scale * rng.uniform(20, 25),
                        angle=rng.uniform(0, np.pi),
                    )
                )
        else:
            lesions.append(place("lymphoid", (52, 65)))
    if has["necrosis"]:
        extensive = bool(rng.uniform() < 0.5)
        genes["geneC"] = extensive
        foci = int(rng.integers(4, 6)) if extensive else 1
        area = 85.0 / np.sqrt(foci)  # about the same area however many: only counting tells
        radius = (0.9 * area, 1.1 * area)
        lesions += [place("necrosis", radius) for _ in range(foci)]
    for finding in FINDINGS:
        if has[finding] and finding not in ("tumour", "lymphoid", "necrosis"):
            lesions.append(place(finding, (45, 95)))
    if has["tumour"] and cells and rng.uniform() < 0.4:
        lesions.append(place("tumour", (45, 80)))
    stain_h, stain_e = (s * rng.uniform(0.93, 1.07) for s in SITE_STAINS[site])
    return Scene(
        slide=f"s{index:05d}",
        patient_id=patient_id,
        site=site,
        split=split,
        organ=organ,
        lesions=tuple(lesions),
        grade=grade,
        pattern=pattern,
        nuclei=nuclei,
        til=til,
        necrotic_foci=foci,
        genes={**genes, "control": control},
        artefact=_ARTEFACTS.get(index % 40),
        mpp=_BASES.get(index % 16, 0.5),
        layout=("generic", "aperio")[rng.integers(2)],
        size_um=size_um,
        stain_h=stain_h,
        stain_e=stain_e,
        seed=int(rng.integers(1 << 40)),
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Label map of one slide, with the mask of each lesion.

    Attributes:
        labels: uint8 [n, n], one cell per 4 µm: 0 glass, 1 and 2 the organ, 3 + i lesion i.
        masks: Cells of each lesion, bool [n, n]; lesions inside it included.
    """

    labels: NDArray[np.uint8]
    masks: tuple[NDArray[np.bool_], ...]

    @property
    def tissue(self) -> NDArray[np.bool_]:
        """Mask of cells that are not glass."""
        return self.labels > 0


def blotches(rng: np.random.Generator, side: int, lumps: int) -> NDArray[np.float32]:
    """Return smooth noise [side, side] with about ``lumps`` lumps across, deviation about 1."""
    coarse = rng.standard_normal((lumps + 3, lumps + 3), dtype=np.float32)
    step = (lumps + 3) / (lumps + 1)
    wide = round(side * step)
    fine = cv2.resize(coarse, (wide, wide), interpolation=cv2.INTER_CUBIC)
    cut = (wide - side) // 2
    return np.asarray(fine[cut : cut + side, cut : cut + side] * np.float32(1.4), np.float32)


def outline(rng: np.random.Generator, side: int, *, fill: float) -> NDArray[np.float32]:
    """Return an irregular outline over a square [side, side]: negative inside, 0 at the edge."""
    at = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    power = np.abs(at) ** 3.4
    radius = (power[None, :] + power[:, None]) ** (1 / 3.4)
    ragged = 0.055 * blotches(rng, side, 5) + 0.02 * blotches(rng, side, 19)
    return np.asarray(radius - fill + ragged, np.float32)


def lay_out(scene: Scene) -> Layout:
    """Place a scene's tissue and lesions on the label map."""
    rng = np.random.default_rng([scene.seed, 3])
    side = round(scene.size_um / CELL_UM)
    tissue = outline(rng, side, fill=0.91) < 0
    organ = np.where(blotches(rng, side, 6) > 0, 2, 1).astype(np.uint8)  # two draws of it
    at = (np.arange(side, dtype=np.float32) + 0.5) * CELL_UM
    for _ in range(int(rng.integers(3))):  # tears
        x, y, angle = (*rng.uniform(0.2, 0.8, 2) * scene.size_um, rng.uniform(0, np.pi))
        tissue &= ~_ellipse(at, x, y, 60, 7, angle, blotches(rng, side, 24))
    shapes = [
        _ellipse(at, x.x_um, x.y_um, x.long_um, x.short_um, x.angle, blotches(rng, side, 24))
        for x in scene.lesions
    ]
    for shape in shapes:
        tissue |= shape  # the outline bulges round a lesion, so that none is lost
    labels = np.where(tissue, organ, 0).astype(np.uint8)
    masks = []
    free = tissue.copy()
    hosts = np.zeros_like(tissue)
    for i, (lesion, shape) in enumerate(zip(scene.lesions, shapes, strict=True)):
        inside = scene.til == "intermixed" and lesion.finding == "lymphoid"
        mask = shape & (hosts if inside else free)
        labels[mask] = 3 + i
        free &= ~mask
        if lesion.finding == "tumour":
            hosts |= mask
        masks.append(mask)
    return Layout(labels=labels, masks=tuple(masks))


def _ellipse(
    at: NDArray[np.float32],
    x: float,
    y: float,
    long: float,
    short: float,
    angle: float,
    ragged: NDArray[np.float32],
) -> NDArray[np.bool_]:
    dx, dy = (at - np.float32(x))[None, :], (at - np.float32(y))[:, None]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u, v = (dx * cos + dy * sin) / np.float32(long), (dy * cos - dx * sin) / np.float32(short)
    return np.asarray(u * u + v * v + np.float32(0.16) * ragged < 1)


def polygons(mask: NDArray[np.bool_], *, mpp: float) -> list[list[list[tuple[int, int]]]]:
    """Return outlines of a mask of 4 µm cells: closed rings (outer first) in level-0 px."""
    fine = 4
    big = np.pad(mask, 1).astype(np.uint8).repeat(fine, 0).repeat(fine, 1)
    contours, tree = cv2.findContours(big, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found: dict[int, list[list[tuple[int, int]]]] = {}
    order = sorted(range(len(contours)), key=lambda i: tree[0][i][3] >= 0)  # outer rings first
    for i in order:
        ring = cv2.approxPolyDP(contours[i], fine * 0.4, True)[:, 0].astype(float)
        if len(ring) < 3:
            continue
        px = np.rint(((ring + 0.5) / fine - 1) * CELL_UM / mpp).astype(int)
        points = [(int(x), int(y)) for x, y in px]
        parent = int(tree[0][i][3])
        owner = found.setdefault(i, []) if parent < 0 else found.get(parent)
        if owner is not None:
            owner.append([*points, points[0]])
    return list(found.values())


def render(scene: Scene, atlas: Atlas, *, layout: Layout | None = None) -> NDArray[np.uint8]:
    """Draw level 0 as uint8 RGBX [side, side, 4].

    Codes come from the atlas by integer look-ups, label by label where it lies; the label map's
    edges are bent by a noise tile so that they do not follow its 4 µm cells.
    """
    layout = lay_out(scene) if layout is None else layout
    rng = np.random.default_rng([scene.seed, 4])
    side, mpp = scene.side_px, scene.mpp
    names = ["", scene.organ, scene.organ, *(_texture(scene, x.finding) for x in scene.lesions)]
    strips: dict[int, NDArray[np.uint16]] = {}
    shifts = rng.integers(0, 1 << 16, (len(names), 2)).tolist()
    turns = rng.integers(0, 8, len(names)).tolist()
    zooms = rng.uniform(0.92, 1.08, len(names)).tolist()
    gains = rng.uniform(0.9, 1.1, (len(names), 2))  # the section is not equally thick everywhere
    for label in np.flatnonzero(np.bincount(layout.labels.ravel())[1:]) + 1:
        texture = atlas(names[label], mpp=mpp)
        if turns[label] & 4:
            texture = texture.T
        texture = texture[:: (-1, 1)[turns[label] & 1], :: (-1, 1)[turns[label] >> 1 & 1]]
        texture = _varied(texture, zoom=zooms[label], gains=gains[label])
        columns = (np.arange(side) + shifts[label][0]) % len(texture)
        strips[int(label)] = texture[:, columns]
    cell, bend = _bent_cells(side, mpp, len(layout.labels))
    remap: Any = cv2.remap  # its stub demands a second map, which this form has none of
    label_px = remap(layout.labels, cell, None, cv2.INTER_NEAREST)
    code = np.zeros((side, side), np.uint16)
    for label, strip in strips.items():
        rows, columns = _extent(layout.labels == label, side, bend)
        for top in range(rows.start, rows.stop, _BAND):
            band = slice(top, min(top + _BAND, rows.stop)), columns
            drawn = strip[(np.arange(band[0].start, band[0].stop) + shifts[label][1]) % len(strip)]
            np.copyto(code[band], drawn[:, columns], where=label_px[band] == label)
    table = colour_table(scene.stain_h, scene.stain_e)
    out = np.empty((side, side), np.uint32)
    for top in range(0, side, _BAND):
        np.take(table, code[top : top + _BAND], out=out[top : top + _BAND], mode="clip")
    pixels = out.view(np.uint8).reshape(side, side, 4)
    if scene.artefact == "pen":
        _draw_pen(pixels, rng, mpp)
    elif scene.artefact == "blur":
        _defocus(pixels, rng, mpp)
    return pixels


def _varied(
    texture: NDArray[np.uint16], *, zoom: float, gains: NDArray[np.float64]
) -> NDArray[np.uint16]:
    """Resize a whole period and scale its stain densities (H, E); it stays periodic."""
    pair = np.ascontiguousarray(texture).view(np.uint8).reshape(*texture.shape, 2)
    side = round(len(texture) * zoom)
    how = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
    sized = cv2.resize(pair, (side, side), interpolation=how)
    table = np.clip(np.arange(256)[:, None] * gains[::-1], 0, 255).round().astype(np.uint8)
    out = cv2.LUT(sized, table.reshape(256, 1, 2))  # E is the low byte and comes first
    return np.asarray(out).view(np.uint16)[..., 0]


def _texture(scene: Scene, finding: str) -> str:
    if finding != "tumour":
        return finding
    return f"tumour:{scene.pattern}:{scene.nuclei}:{scene.grade}"


_BAND = 64  # rows at a time, so that what is between two passes stays in the cache


@lru_cache(maxsize=3)
def _bent_cells(side: int, mpp: float, cells: int) -> tuple[NDArray[np.int16], int]:
    """Return the cell (x, y) of each pixel, int16 [side, side, 2], and the most cells of a bend.

    Edges are bent alike on all slides of one size and scale, so this is kept.
    """
    where = ((np.arange(side) + 0.5) * (mpp / CELL_UM) * 256).astype(np.int32)
    bend_x, bend_y = _bends(side, mpp)
    cell = np.empty((side, side, 2), np.int16)
    for top in range(0, side, len(bend_x)):
        part = slice(top, min(top + len(bend_x), side))
        count = part.stop - top
        cell[part, :, 0] = np.clip((where[None, :] + bend_x[:count]) >> 8, 0, cells - 1)
        cell[part, :, 1] = np.clip((where[part, None] + bend_y[:count]) >> 8, 0, cells - 1)
    most = max(int(np.abs(bend).max()) for bend in (bend_x, bend_y))
    return cell, most // 256 + 1


def _extent(mask: NDArray[np.bool_], side: int, bend: int) -> tuple[slice, slice]:
    """Return the rows and columns of pixels that may show a label, given its cells."""
    scale = side / len(mask)
    found = []
    for axis in (1, 0):
        there = np.flatnonzero(mask.any(axis))
        start = max(0, int((there[0] - bend) * scale) - 1)
        found.append(slice(start, min(side, int((there[-1] + 1 + bend) * scale) + 2)))
    return found[0], found[1]


def _bends(side: int, mpp: float) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return displacements of label edges in 1/256 cells, int32 [512 rows, side]."""
    rng = np.random.default_rng(11)
    tiles = []
    for _ in range(2):
        noise = np.pad(rng.standard_normal((512, 512), dtype=np.float32), 128, mode="wrap")
        smooth = cv2.GaussianBlur(noise, (0, 0), 2.2 / mpp)
        smooth = smooth[128:-128, 128:-128] / smooth.std()
        tile = np.rint(smooth * 0.55 * 256).astype(np.int32)
        tiles.append(tile[:, np.arange(side) % 512])
    return tiles[0], tiles[1]


def _draw_pen(pixels: NDArray[np.uint8], rng: np.random.Generator, mpp: float) -> None:
    side = len(pixels)
    centre, reach = rng.uniform(0.3, 0.7, 2) * side, rng.uniform(0.22, 0.36, 2) * side
    turn = np.linspace(0, rng.uniform(3.5, 6), 60) + rng.uniform(0, 6)
    line = (
        centre + np.stack([np.cos(turn), np.sin(turn)], 1) * reach + rng.normal(0, 2 / mpp, (60, 2))
    )
    thick = int(rng.uniform(14, 24) / mpp)
    drawn = np.zeros((side, side), np.uint8)
    cv2.polylines(drawn, [line.astype(np.int32)], False, 255, thick, cv2.LINE_AA)
    ink = np.asarray(cv2.GaussianBlur(drawn, (0, 0), 1.5 / mpp))
    colour = ((40, 60, 170), (25, 120, 70), (45, 45, 50))[rng.integers(3)]
    top, bottom = np.flatnonzero(ink.any(1))[[0, -1]]
    for y in range(top, bottom + 1):  # row by row: no float copy of the whole slide
        share = (ink[y] * (0.85 / 255)).astype(np.float32)
        for c in range(3):
            pixels[y, :, c] = pixels[y, :, c] * (1 - share * np.float32(1 - colour[c] / 255))


def _defocus(pixels: NDArray[np.uint8], rng: np.random.Generator, mpp: float) -> None:
    side = len(pixels)
    size = int(rng.uniform(0.25, 0.4) * side)
    x, y = (int(v) for v in rng.uniform(0.15, 0.85 - size / side, 2) * side)
    view = pixels[y : y + size, x : x + size]
    soft = cv2.GaussianBlur(view, (0, 0), 3.5 / mpp)
    at = np.linspace(-1, 1, size, dtype=np.float32)
    share = np.clip((1 - np.hypot(at[None, :], at[:, None])) * 6, 0, 1)[..., None]
    view[:] = np.rint(view * (1 - share) + soft * share)
