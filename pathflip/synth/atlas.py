"""Periodic textures of synthetic tissues, in two stains' density.

A texture is drawn once at 0.25 µm/px on a torus (its edges join), as two optical density maps, and
packed into one uint16 per pixel (H in the high byte, E in the low one, both in hundredths). Coarser
scales are area averages of the density. A slide is then composed by integer look-ups, and a table
per stain strength turns codes into colours (Beer-Lambert).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pathflip.files import replacing

Float = NDArray[np.float32]
Code = NDArray[np.uint16]

MASTER_MPP = 0.25
ORGANS = ("colon", "breast", "muscle", "lung")
PATTERNS = ("trabecular", "nested", "cribriform", "solid")
"""Tumour architectures, periods 38 to 48 µm: readable at 5x to 10x, of equal cell density."""
NUCLEI = ("plain", "nucleolus", "groove")
"""Nuclear types of equal integrated optical density and extent: best read at 10x and finer."""
GRADES = {"low": 7.0, "high": 9.5}
"""Tumour nuclear diameter in µm."""
OTHERS = (
    "necrosis",
    "lymphoid",
    "mucin",
    "keratin",
    "haemorrhage",
    "calcification",
    "fibrosis",
)
TEXTURES = (
    *ORGANS,
    *OTHERS,
    *(f"tumour:{p}:{n}:{g}" for p in PATTERNS for n in NUCLEI for g in GRADES),
)
"""Every texture name."""

GLASS_LEVEL = 244
_STAIN_H = (0.65, 0.70, 0.29)
_STAIN_E = (0.09, 0.93, 0.36)  # redder than Ruifrok's eosin, which renders magenta on a screen
_DENSITY = 1.6
_GRAIN = 0.022  # sensor and section grain; sets the JPEG size of tissue tiles


def colour_table(stain_h: float = 1.0, stain_e: float = 1.0) -> NDArray[np.uint32]:
    """Return colours of all 65,536 codes as packed RGBX at stain strengths (Beer-Lambert)."""
    level = np.arange(256) / 100.0
    table = np.full((256, 256, 4), 255, np.uint8)
    for c in range(3):
        absorbed_h = np.exp(-_DENSITY * _STAIN_H[c] * stain_h * level)
        absorbed_e = np.exp(-_DENSITY * _STAIN_E[c] * stain_e * level)
        table[..., c] = np.rint(GLASS_LEVEL * absorbed_h[:, None] * absorbed_e[None, :])
    return table.reshape(-1, 4).view(np.uint32).ravel()


def period_um(name: str) -> float:
    """Return the period of a texture in µm."""
    return 512.0 if name in ORGANS else 256.0


class Atlas:
    """Textures by name and scale, built when first asked for.

    Args:
        directory: Folder that shares built textures between processes as memory-mapped files; None
            keeps them in this process.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._directory = Path(directory) if directory is not None else None
        self._held: dict[tuple[str, float], Code] = {}

    def __call__(self, name: str, *, mpp: float) -> Code:
        """Return the texture's codes, uint16 [n, n], n = period / mpp.

        Raises:
            KeyError: No such texture.
        """
        key = (name, mpp)
        if key not in self._held:
            self._held[key] = self._load(name, mpp)
        return self._held[key]

    def _load(self, name: str, mpp: float) -> Code:
        if self._directory is None or name not in TEXTURES:
            return _scaled(_master(name), period_um(name), mpp)
        path = self._directory / f"{name.replace(':', '-')}@{mpp:g}.npy"
        if not path.exists():
            drawn = _master(name) if mpp == MASTER_MPP else self(name, mpp=MASTER_MPP)
            with replacing(path) as part, part.open("wb") as file:
                np.save(file, _scaled(drawn, period_um(name), mpp))
        loaded: Code = np.load(path, mmap_mode="r")
        return loaded


def _scaled(code: Code, period: float, mpp: float) -> Code:
    """Return a texture drawn at ``MASTER_MPP`` at another scale."""
    side = round(period / mpp)
    if side != len(code):
        how = cv2.INTER_AREA if side < len(code) else cv2.INTER_LINEAR
        pair = np.ascontiguousarray(code).view(np.uint8).reshape(*code.shape, 2)
        code = np.ascontiguousarray(cv2.resize(pair, (side, side), interpolation=how))
        code = code.view(np.uint16)[..., 0]
    return code


@lru_cache(maxsize=4)
def _master(name: str) -> Code:
    if name not in TEXTURES:
        raise KeyError(name)
    base, _, rest = name.partition(":")
    field = _Field(period_um(name), seed=f"{base}:{rest.split(':')[0]}:{rest.rpartition(':')[2]}")
    if base == "tumour":
        pattern, nuclei, grade = rest.split(":")
        _tumour(field, pattern, nuclei, GRADES[grade])
    else:
        _DRAW[base](field)
    return field.code()


def nucleus(
    kind: str,
    diameter_um: float,
    *,
    mpp: float = MASTER_MPP,
    aspect: float = 1.0,
    angle: float = 0.0,
    chromatin: Float | None = None,
) -> Float:
    """Draw the optical density of one nucleus [k, k].

    For one shape every ``kind`` has the same integral and the same second moments, so that kinds
    differ only in what is finer than a nucleus.

    Args:
        kind: One of ``NUCLEI``: evenly filled; pale with a rim and a central dot; with a pale
            groove along its length.
        diameter_um: Mean diameter.
        mpp: µm per pixel.
        aspect: Length over width at equal area.
        angle: Angle of the long axis, radians.
        chromatin: Relative variation of the density, cropped to the stamp.
    """
    if kind not in NUCLEI:
        raise ValueError(f"nucleus kind {kind!r} is none of {NUCLEI}")
    radius = diameter_um / mpp / 2
    long, short = radius * aspect**0.5, radius / aspect**0.5
    k = int(np.ceil(max(long, short) * 1.15)) + 1
    y, x = np.mgrid[-k : k + 1, -k : k + 1].astype(np.float64)
    u = (x * np.cos(angle) + y * np.sin(angle)) / long
    v = (y * np.cos(angle) - x * np.sin(angle)) / short
    q = np.hypot(u, v)
    body = np.clip((1.08 - q) * radius * 0.8, 0, 1)
    rim = np.exp(-(((q - 0.92) / 0.13) ** 2))
    plain = body * (0.9 + 0.25 * rim)
    shape = plain
    if kind == "nucleolus":
        shape = body * (0.6 + 0.55 * rim + 1.1 * np.exp(-((q / 0.27) ** 2)))
    elif kind == "groove":
        shape = body * (1 - 0.85 * np.exp(-((v / 0.16) ** 2)) * (np.abs(u) < 0.8))
    if chromatin is not None:
        shape = shape * np.maximum(0, 1 + chromatin[: 2 * k + 1, : 2 * k + 1])
    powers = np.stack([np.ones_like(u), u * u, v * v]).reshape(3, -1)
    gain = np.linalg.solve((powers * shape.ravel()) @ powers.T, powers @ plain.ravel())
    return np.asarray(shape * np.maximum(0, gain @ powers).reshape(shape.shape), np.float32)


class _Field:
    """The two density maps of one texture while it is drawn, on a torus at 0.25 µm/px."""

    def __init__(self, side_um: float, *, seed: str) -> None:
        self.rng = np.random.default_rng(list(seed.encode()))
        self.um = side_um
        self.n = round(side_um / MASTER_MPP)
        self.h = np.zeros((self.n, self.n), np.float32)
        self.e = np.zeros((self.n, self.n), np.float32)
        frequency = np.fft.rfftfreq(self.n, MASTER_MPP), np.fft.fftfreq(self.n, MASTER_MPP)
        self._kx, self._ky = (f.astype(np.float32) for f in frequency)

    def noise(self, sigma_um: float, across_um: float | None = None, angle: float = 0.0) -> Float:
        """Draw smooth periodic noise, mean 0, deviation 1; streaks when ``across_um`` is given."""
        across = sigma_um if across_um is None else across_um
        white = self.rng.standard_normal((self.n, self.n), dtype=np.float32)
        kx, ky = self._kx[None, :], self._ky[:, None]
        along = kx * np.cos(angle) + ky * np.sin(angle)
        side = ky * np.cos(angle) - kx * np.sin(angle)
        gain = np.exp(-2 * np.pi**2 * ((sigma_um * along) ** 2 + (across * side) ** 2))
        spectrum = np.fft.rfft2(white) * gain.astype(np.float32)
        out = np.fft.irfft2(spectrum, s=white.shape)
        return np.asarray((out - out.mean()) / out.std(), np.float32)

    def wave(self, kx: int, ky: int, bend: Float) -> Float:
        """Draw a periodic plane wave of whole cycles per side, its phase bent by ``bend`` (µm)."""
        at = np.arange(self.n, dtype=np.float32) * MASTER_MPP
        pull = bend * np.float32(np.hypot(kx, ky))
        phase = kx * at[None, :] + ky * at[:, None] + pull
        return np.asarray(np.cos(phase * np.float32(2 * np.pi / self.um)), np.float32)

    def grid(self, pitch_um: float, jitter: float = 0.3) -> NDArray[np.float64]:
        """Return points [n, 2] (x, y) in µm, about one per pitch², never on top of each other."""
        count = max(1, round(self.um / pitch_um))
        pitch = self.um / count
        x, y = np.meshgrid(np.arange(count, dtype=float), np.arange(count, dtype=float))
        x += 0.5 * (y % 2) * (count % 2 == 0)
        xy = np.stack([x.ravel(), y.ravel()], 1) + self.rng.uniform(-jitter, jitter, (count**2, 2))
        out = (xy + 0.5) * pitch % self.um
        return np.asarray(out[self.rng.permutation(len(out))])

    def at(self, points: NDArray[np.float64], values: Float) -> Float:
        """Return values of a map at points in µm."""
        index = (points / MASTER_MPP).astype(np.int64) % self.n
        return np.asarray(values[index[:, 1], index[:, 0]])

    def stamp(
        self,
        points: NDArray[np.float64],
        diameter_um: float,
        *,
        kind: str = "plain",
        density: float = 0.85,
        aspect: float = 1.25,
        angles: NDArray[np.float64] | None = None,
        onto: Float | None = None,
        spread: float = 0.1,
    ) -> None:
        """Stamp nuclei at points in µm, by maximum, from a bank of shapes."""
        target = self.h if onto is None else onto
        rng, directions = self.rng, 16
        texture = 0.16 * rng.standard_normal((80, 80), dtype=np.float32)
        texture = cv2.GaussianBlur(texture, (0, 0), 1.4) * 2.5
        bank = []
        for d in diameter_um * (1 + spread * np.linspace(-1.5, 1.5, 4)):
            for direction in range(directions):
                wide = max(1.0, aspect * rng.uniform(0.9, 1.1))
                chromatin = np.roll(texture, rng.integers(80, size=2), (0, 1))
                angle = np.pi * direction / directions
                bank.append(
                    density
                    * rng.uniform(0.85, 1.1)
                    * nucleus(kind, d, aspect=wide, angle=angle, chromatin=chromatin)
                )
        size = rng.integers(4, size=len(points))
        if angles is None:
            angles = rng.uniform(0, np.pi, len(points))
        turn = np.rint(angles / np.pi * directions).astype(int) % directions
        pad = max(len(b) for b in bank)
        wide_map = np.pad(target, pad, mode="wrap")
        corners = (points / MASTER_MPP).astype(np.int64) % self.n + pad
        for (x, y), which in zip(
            corners.tolist(), (size * directions + turn).tolist(), strict=True
        ):
            shape = bank[which]
            k = len(shape) // 2
            view = wide_map[y - k : y + k + 1, x - k : x + k + 1]
            np.maximum(view, shape, out=view)
        _fold(wide_map, pad)
        target[:] = wide_map[pad:-pad, pad:-pad]

    def near(
        self, centres: NDArray[np.float64], reach_um: float
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Float, Float]]:
        """Yield for each centre rows, columns, distance and angle of the pixels within reach."""
        k = int(reach_um / MASTER_MPP)
        y, x = np.mgrid[-k : k + 1, -k : k + 1].astype(np.float32) * MASTER_MPP
        r, a = np.hypot(x, y), np.arctan2(y, x)
        span = np.arange(-k, k + 1)
        for cx, cy in (centres / MASTER_MPP).astype(np.int64).tolist():
            yield (cy + span)[:, None] % self.n, (cx + span)[None, :] % self.n, r, a

    def code(self) -> Code:
        """Pack both maps, with grain."""
        grain = self.rng.standard_normal((2, self.n, self.n), dtype=np.float32) * _GRAIN
        grain = cv2.GaussianBlur(grain.transpose(1, 2, 0), (0, 0), 0.6) * 1.6
        h = np.clip(self.h * (1 + grain[..., 0]) + 0.35 * grain[..., 1], 0, 2.55) * 100
        e = np.clip(self.e * (1 + grain[..., 1]) + 0.35 * grain[..., 0], 0, 2.55) * 100
        return np.asarray(np.rint(h).astype(np.uint16) << 8 | np.rint(e).astype(np.uint16))


def _fold(wide: Float, pad: int) -> None:
    """Add values stamped into the padding to the other side of the torus."""
    for _ in range(2):
        np.maximum(wide[pad : 2 * pad], wide[-pad:], out=wide[pad : 2 * pad])
        np.maximum(wide[-2 * pad : -pad], wide[:pad], out=wide[-2 * pad : -pad])
        wide = wide.T


def _stroma(field: _Field, *, angle: float, density: float = 0.42, fibre_um: float = 1.3) -> None:
    """Draw collagen: wavy pink fibres with thin clefts."""
    fibres = 0.65 * field.noise(14, fibre_um, angle) + 0.35 * field.noise(9, 1.0, angle + 0.35)
    field.e += np.maximum(0.04, density + 0.15 * fibres + 0.05 * field.noise(12))
    field.e[fibres < -1.75] = 0.03
    field.h += 0.05


def _colon(field: _Field) -> None:
    _stroma(field, angle=0.4, density=0.3)
    field.h += 0.04
    rng, centres = field.rng, field.grid(64, 0.09)
    field.stamp(field.grid(8.5), 4.6, density=0.8, aspect=1.4)
    wobble = field.noise(9)
    nuclei, turns = [], []
    for rows, cols, r, _ in field.near(centres, 36):
        d = r + 1.8 * wobble[rows, cols]
        wall, lumen = d < 29, d < 7
        goblet = (d > 8) & (d < 21)
        crop_e, crop_h = field.e[rows, cols], field.h[rows, cols]
        crop_e = np.where(wall, np.where(goblet, 0.16, 0.42), crop_e)
        crop_h = np.where(wall, np.where(goblet, 0.13, 0.12), crop_h)
        field.e[rows, cols] = np.where(lumen, 0.02, crop_e)
        field.h[rows, cols] = np.where(lumen, 0.02, crop_h)
    for cx, cy in centres:
        angles = np.linspace(0, 2 * np.pi, 29, endpoint=False) + rng.normal(0, 0.05, 29)
        radius = 25 + rng.normal(0, 0.9, 29)
        nuclei.append(np.stack([cx + radius * np.cos(angles), cy + radius * np.sin(angles)], 1))
        turns.append(angles)
        vacuoles = rng.uniform(0, 2 * np.pi, 12)
        spot = np.stack([cx + 15 * np.cos(vacuoles), cy + 15 * np.sin(vacuoles)], 1)
        for rows, cols, r, _ in field.near(spot, 4.5):
            pale = 1 - 0.75 * np.clip(3.8 - r, 0, 1)
            field.e[rows, cols] *= pale
    field.stamp(
        np.concatenate(nuclei) % field.um, 5.6, aspect=1.9, angles=np.concatenate(turns) % np.pi
    )


def _breast(field: _Field) -> None:
    _stroma(field, angle=field.rng.uniform(0, np.pi), density=0.44)
    rng = field.rng
    field.stamp(field.grid(24), 4.2, aspect=2.6, density=0.75)
    acini = []
    for cx, cy in field.grid(128, 0.2):
        ring = rng.uniform(0, 2 * np.pi)
        for count, radius in ((1, 0.0), (6, 19.0), (7, 37.0)):
            a = ring + np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.normal(0, 0.08, count)
            keep = rng.uniform(size=count) < (1 if radius < 30 else 0.6)
            acini.append(np.stack([cx + radius * np.cos(a), cy + radius * np.sin(a)], 1)[keep])
    centres = np.concatenate(acini) % field.um
    wobble = field.noise(5)
    for rows, cols, r, _ in field.near(centres, 14):
        d = r + 0.9 * wobble[rows, cols]
        cuff = d < 12
        field.e[rows, cols] = np.where(cuff, 0.26, field.e[rows, cols])
        field.h[rows, cols] = np.where(cuff, np.where(d < 8.5, 0.16, 0.07), field.h[rows, cols])
        field.e[rows, cols] = np.where(d < 2.4, 0.02, field.e[rows, cols])
        field.h[rows, cols] = np.where(d < 2.4, 0.02, field.h[rows, cols])
    points, turns = [], []
    for cx, cy in centres:
        a = np.linspace(0, 2 * np.pi, 8, endpoint=False) + rng.normal(0, 0.12, 8)
        points.append(np.stack([cx + 6.2 * np.cos(a), cy + 6.2 * np.sin(a)], 1))
        turns.append(a + np.pi / 2)
    field.stamp(
        np.concatenate(points) % field.um, 4.6, aspect=1.3, angles=np.concatenate(turns) % np.pi
    )


def _muscle(field: _Field) -> None:
    angle, bend = 0.5, field.noise(22) * 5
    bundles = field.wave(9, 16, bend)
    field.e += 0.52 + 0.12 * field.noise(40, 1.2, angle - 1.55 + 0.5) + 0.06 * field.noise(10)
    field.h += 0.06
    gaps = np.abs(bundles + 0.35 * field.noise(8)) < 0.05
    field.e[gaps] = 0.12
    points = field.grid(14)
    slope = field.rng.normal(2.6, 0.13, len(points)) % np.pi
    field.stamp(points, 4.6, aspect=4.2, density=0.75, angles=slope)


def _lung(field: _Field) -> None:
    coarse = field.n // 4
    step = field.um / coarse
    centres = field.grid(42.6, 0.36)
    first = np.full((coarse, coarse), 1e9, np.float32)
    second = first.copy()
    at = (np.arange(coarse, dtype=np.float32) + 0.5) * np.float32(step)
    half = np.float32(field.um / 2)
    for cx, cy in centres.astype(np.float32):
        dx = np.abs((at - cx + half) % np.float32(field.um) - half)
        dy = np.abs((at - cy + half) % np.float32(field.um) - half)
        d = np.hypot(dx[None, :], dy[:, None])
        np.minimum(second, np.maximum(first, d), out=second)
        np.minimum(first, d, out=first)
    border = np.pad(second - first, 4, mode="wrap")
    border = cv2.resize(border, None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR)[16:-16, 16:-16]
    border = border + 2.0 * field.noise(5) + 0.8 * field.noise(1.5)
    septum = np.asarray(np.clip((8.5 - border) / 1.5, 0, 1), np.float32)
    field.e += 0.025 + septum * np.maximum(0.1, 0.42 + 0.12 * field.noise(1.5))
    field.h += 0.05 * septum
    points = field.grid(7.2)
    inside = field.at(points, border.astype(np.float32)) < 5.5
    field.stamp(points[inside], 4.9, aspect=1.5)
    loose = points[~inside][:25]
    field.stamp(loose, 6, density=0.55)
    for rows, cols, r, _ in field.near(loose, 7):
        field.e[rows, cols] = np.maximum(field.e[rows, cols], 0.3 * (r < 6))


def _tumour(field: _Field, pattern: str, kind: str, diameter_um: float) -> None:
    bend = field.noise(22) * 2.2
    hexes = field.wave(6, 0, bend) + field.wave(3, 5, bend) + field.wave(-3, 5, bend)
    form = {
        "trabecular": field.wave(4, 4, bend * 1.6),
        "nested": hexes,
        "cribriform": -hexes,
        "solid": field.noise(11),
    }[pattern]
    cells = form > np.median(form)  # half of the area whatever the pattern
    edge = cv2.GaussianBlur(cells.astype(np.float32), (0, 0), 3)
    _stroma(field, angle=0.8, density=0.44)
    body = 0.30 + 0.04 * field.noise(2) + 0.03 * field.noise(8)
    field.e = np.asarray(field.e * (1 - edge) + body * edge, np.float32)
    field.h = np.asarray(field.h * (1 - edge) + 0.14 * edge, np.float32)
    pitch = diameter_um * 1.1 + 0.6
    points = field.grid(pitch, 0.22)
    inside = field.at(points, cells.astype(np.float32)) > 0.5
    area = 0.5 * field.um**2
    wanted = int(0.86 * area / pitch**2)  # the same number for every pattern
    field.stamp(points[inside][:wanted], diameter_um, kind=kind, density=0.72, aspect=1.15)
    outside = points[~inside]
    field.stamp(outside[: wanted // 7], 3.8, aspect=2.6, density=0.75)


def _necrosis(field: _Field) -> None:
    field.e += np.maximum(
        0.1, 0.52 + 0.16 * field.noise(0.7) + 0.1 * field.noise(2.5) + 0.1 * field.noise(9)
    )
    field.h += np.maximum(0, 0.05 + 0.04 * field.noise(5))
    ghosts = field.grid(11, 0.4)
    for rows, cols, r, _ in field.near(ghosts, 6):
        field.e[rows, cols] *= 1 - 0.35 * np.exp(-(((r - 4.2) / 0.6) ** 2))
    debris = field.rng.uniform(0, field.um, (1500, 2))
    field.stamp(debris[:1100], 1.3, density=0.8, spread=0.3)
    field.stamp(debris[1100:], 2.3, density=0.9, spread=0.3)


def _lymphoid(field: _Field) -> None:
    field.e += 0.16 + 0.04 * field.noise(3)
    field.h += 0.10
    points = field.grid(5.7, 0.36)
    keep = field.rng.uniform(size=len(points)) < 0.9
    field.stamp(points[keep], 4.9, density=1.15, aspect=1.05, spread=0.06)


def _mucin(field: _Field) -> None:
    wisps = np.clip(0.09 + 0.06 * field.noise(12, 1.6, 1.0) + 0.04 * field.noise(18), 0.015, None)
    field.h += wisps
    field.e += 0.03 + 0.25 * wisps
    for cx, cy in field.grid(85, 0.35):
        count = int(field.rng.integers(3, 9))
        points = np.array([cx, cy]) + field.rng.normal(0, 6, (count, 2))
        for rows, cols, r, _ in field.near(points % field.um, 8):
            field.e[rows, cols] = np.maximum(field.e[rows, cols], 0.32 * np.clip(7 - r, 0, 1))
        field.stamp(points % field.um, 5.5, density=0.8)


def _keratin(field: _Field) -> None:
    field.e += 0.40 + 0.05 * field.noise(3)
    field.h += 0.10
    field.stamp(field.grid(10.5), 6.2, density=0.65, aspect=1.2)
    wobble = field.noise(6)
    centres = field.grid(64, 0.12)
    for rows, cols, r, a in field.near(centres, 33):
        d = r + 2.6 * wobble[rows, cols]
        layers = 0.78 + 0.30 * np.sin(d * 1.9 + 0.8 * np.sin(2 * a))
        pearl = np.clip((27 - d) / 2, 0, 1)
        field.e[rows, cols] = field.e[rows, cols] * (1 - pearl) + layers * pearl
        field.h[rows, cols] = field.h[rows, cols] * (1 - pearl) + 0.05 * pearl
    points, turns = [], []
    for cx, cy in centres:
        round_it = np.linspace(0, 2 * np.pi, 26, endpoint=False)
        edge = 28.5 * np.stack([np.cos(round_it), np.sin(round_it)], 1)
        points.append(np.array([cx, cy]) + edge)
        turns.append(round_it + np.pi / 2)
    field.stamp(
        np.concatenate(points) % field.um, 4.6, aspect=2.4, angles=np.concatenate(turns) % np.pi
    )


def _haemorrhage(field: _Field) -> None:
    field.e += 0.10 + 0.03 * field.noise(6)
    cells = np.zeros_like(field.e)
    points = field.grid(6.0, 0.42)
    field.stamp(points, 6.4, density=0.85, aspect=1.08, onto=cells, spread=0.05)
    for rows, cols, r, _ in field.near(points[: len(points) // 2], 2.5):
        cells[rows, cols] *= 1 - 0.25 * np.exp(-((r / 1.3) ** 2))
    field.e += cells
    field.h += 0.02
    field.stamp(points[:24], 5.2, density=0.9)


def _calcification(field: _Field) -> None:
    _stroma(field, angle=1.9, density=0.36)
    field.stamp(field.grid(19), 4.4, aspect=2.0, density=0.75)
    lumps = field.noise(6.5) + 0.25 * field.noise(1.5)
    crystal = np.clip((lumps - 0.75) * 6, 0, 1)
    cracked = np.where(np.abs(field.noise(3.5)) < 0.06, 0.5, 1.0)
    rings = 0.25 * np.sin(lumps * 18)
    field.h = np.asarray(np.maximum(field.h, crystal * (1.35 + rings) * cracked), np.float32)
    field.e = np.asarray(field.e * (1 - crystal) + 0.35 * crystal, np.float32)


def _fibrosis(field: _Field) -> None:
    bands = field.noise(13, 0.75, 0.6)
    field.e += np.maximum(0.15, 0.64 + 0.2 * bands + 0.12 * field.noise(20, 4, 0.6))
    field.h += 0.02
    points = field.grid(21)
    slope = field.rng.normal(0.6, 0.12, len(points)) % np.pi
    field.stamp(points, 3.6, aspect=4.5, density=0.8, angles=slope)


_DRAW: dict[str, Callable[[_Field], None]] = {
    "colon": _colon,
    "breast": _breast,
    "muscle": _muscle,
    "lung": _lung,
    "necrosis": _necrosis,
    "lymphoid": _lymphoid,
    "mucin": _mucin,
    "keratin": _keratin,
    "haemorrhage": _haemorrhage,
    "calcification": _calcification,
    "fibrosis": _fibrosis,
}
