"""Compact rendering of tissue textures: planted truth for the texture encoder.

Optical density of two stains on a torus of 256 µm at 0.5 µm/px, drawn by seed; patches are shifted,
turned crops under a given stain strength. Nuclei of one size have the same integrated density
whether or not they carry a nucleolus.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float32]
SIDE, MPP = 512, 0.5
STAIN_H, STAIN_E = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
ORGANS = ("colon", "breast", "muscle", "lung")
FINDINGS = (
    "tumour:7",
    "tumour:9.5",
    "necrosis",
    "lymphoid",
    "mucin",
    "keratin",
    "haemorrhage",
    "calcification",
    "fibrosis",
)
NUCLEOLI = ("tumour:7:nucleoli", "tumour:9.5:nucleoli")
MIXED = ("tumour:7:mixed", "tumour:9.5:mixed")
TISSUES = (*ORGANS, *FINDINGS, *NUCLEOLI, *MIXED)


class _Torus:
    def __init__(self, name: str, seed: int) -> None:
        self.rng = np.random.default_rng([seed, *name.encode()])
        self.h = np.zeros((SIDE, SIDE), np.float32)
        self.e = np.zeros((SIDE, SIDE), np.float32)
        self.y, self.x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        self.k = np.fft.rfftfreq(SIDE)[None, :], np.fft.fftfreq(SIDE)[:, None]

    def noise(self, along: float, across: float | None = None, angle: float = 0.0) -> Float:
        kx, ky = self.k
        u, v = kx * np.cos(angle) + ky * np.sin(angle), ky * np.cos(angle) - kx * np.sin(angle)
        gain = np.exp(-2 * np.pi**2 * ((along * u) ** 2 + ((across or along) * v) ** 2))
        white = np.fft.rfft2(self.rng.standard_normal((SIDE, SIDE)))
        out = np.fft.irfft2(white * gain, s=(SIDE, SIDE))
        return np.asarray((out - out.mean()) / out.std(), np.float32)

    def anywhere(self, n: int) -> NDArray[np.float64]:
        return self.rng.uniform(0, SIDE, (n, 2))

    def clustered(self, n: int, clusters: int, reach: float) -> NDArray[np.float64]:
        centre = self.anywhere(clusters)[self.rng.integers(clusters, size=n)]
        angle, r = self.rng.uniform(0, 2 * np.pi, n), reach * np.sqrt(self.rng.uniform(size=n))
        return centre + np.stack([r * np.cos(angle), r * np.sin(angle)], 1)

    def nuclei(
        self,
        xy: NDArray[np.float64],
        um: float,
        *,
        density: float = 0.9,
        aspect: float = 1.0,
        angles: NDArray[np.float64] | None = None,
        nucleoli: bool = False,
        spread: float = 0.12,
        onto: Float | None = None,
    ) -> None:
        """Stamp nuclei of a diameter in µm at (x, y) px, by maximum."""
        target = self.h if onto is None else onto
        if angles is None:
            angles = self.rng.uniform(0, np.pi, len(xy))
        sizes, strengths = np.empty(len(xy)), np.empty(len(xy))
        for i in range(len(xy)):
            sizes[i], strengths[i] = self.rng.standard_normal(), self.rng.uniform(0.85, 1.15)
        radii = np.maximum(1.0, um * (1 + spread * sizes) / MPP / 2)
        reaches = np.ceil(radii * aspect).astype(int) + 2
        for k in np.unique(reaches):  # those whose boxes are equally large, at once
            alike = reaches == k
            x, y, radius, angle = (
                value[alike][:, None, None] for value in (xy[:, 0], xy[:, 1], radii, angles)
            )
            cx, cy, near = x.astype(int), y.astype(int), np.arange(-k, k + 1)
            b, a = near[:, None] - (y - cy), near - (x - cx)
            u = (a * np.cos(angle) + b * np.sin(angle)) / (radius * aspect**0.5)
            v = (b * np.cos(angle) - a * np.sin(angle)) / (radius / aspect**0.5)
            q = np.sqrt(u * u + v * v)
            shape = np.clip((1.15 - q) * 3, 0, 1)
            if nucleoli:
                total = shape.sum((1, 2), keepdims=True)
                rim, dot = np.exp(-(((q - 0.9) / 0.18) ** 2)), np.exp(-((q / 0.28) ** 2))
                shape = shape * (0.45 + 0.9 * rim + 2.2 * dot)
                shape *= total / shape.sum((1, 2), keepdims=True)
            shape *= density * strengths[alike][:, None, None]
            places = (cy + near[:, None]) % SIDE * SIDE + (cx + near) % SIDE
            np.maximum.at(target.reshape(-1), places.ravel(), shape.ravel().astype(np.float32))


def _benign(t: _Torus, name: str) -> None:
    rng = t.rng
    if name == "colon":
        t.e += 0.25 + 0.05 * t.noise(2)
        for cy in range(64, SIDE, 128):
            for cx in range(64, SIDE, 128):
                x, y = cx + rng.normal(0, 8), cy + rng.normal(0, 8)
                t.e[np.hypot(t.x - x, t.y - y) < 26] = 0.02
                a = np.linspace(0, 2 * np.pi, 26, endpoint=False)
                ring = np.stack([x + 38 * np.cos(a), y + 38 * np.sin(a)], 1)
                t.nuclei(ring, 6, aspect=1.5, angles=a)
        t.nuclei(t.anywhere(60), 5)
    elif name == "breast":
        t.e += 0.35 + 0.08 * t.noise(30, 4, rng.uniform(0, 3))
        t.nuclei(t.clustered(330, 9, 34), 5.5)
        t.nuclei(t.anywhere(40), 4, aspect=2)
    elif name == "muscle":
        angle = rng.uniform(0, 3)
        t.e += 0.55 + 0.12 * t.noise(60, 3, angle)
        t.nuclei(t.anywhere(150), 5, aspect=2.6, angles=angle + rng.normal(0, 0.2, 150))
    elif name == "lung":
        septum = np.abs(t.noise(16)) < 0.35
        t.e += np.where(septum, 0.4, 0.02)
        xy = t.anywhere(520)
        t.nuclei(xy[septum[xy[:, 1].astype(int), xy[:, 0].astype(int)]], 5)


def _tumour(t: _Torus, um: float, options: list[str]) -> None:
    nucleoli = "nucleoli" in options
    t.e += 0.3 + 0.06 * t.noise(3)
    nested, loose = (520, 150) if um < 8 else (330, 90)
    t.nuclei(t.clustered(nested, 16, 60), um, density=0.75, nucleoli=nucleoli)
    t.nuclei(t.anywhere(loose), um, density=0.75, nucleoli=nucleoli)
    if "mixed" in options:
        t.nuclei(t.clustered(420, 8, 45), 5, density=1.1, spread=0.06)


def _finding(t: _Torus, name: str) -> None:
    rng = t.rng
    if name == "necrosis":
        t.e += 0.5 + 0.16 * t.noise(1.2) + 0.1 * t.noise(6)
        t.nuclei(t.anywhere(260), 2.2, density=0.8)
    elif name == "lymphoid":
        t.e += 0.12
        t.nuclei(t.anywhere(1700), 5, density=1.1, spread=0.06)
    elif name == "mucin":
        t.e += 0.03
        t.h += np.clip(0.12 + 0.05 * t.noise(20, 3, rng.uniform(0, 3)), 0, None)
        t.nuclei(t.anywhere(18), 6)
    elif name == "keratin":
        t.e += 0.3
        for cy in (85, 256, 427):
            for cx in (85, 256, 427):
                r = np.hypot(t.x - cx - rng.normal(0, 6), t.y - cy - rng.normal(0, 6))
                t.e[r < 70] = (0.6 + 0.35 * np.sin(r / 2.2))[r < 70]
        t.nuclei(t.anywhere(200), 6)
    elif name == "haemorrhage":
        t.e += 0.25
        cells = np.zeros_like(t.e)
        t.nuclei(t.anywhere(2600), 6, density=0.8, spread=0.05, onto=cells)
        t.e += cells
    elif name == "calcification":
        t.e += 0.3
        t.h += 0.05
        t.h[t.noise(7) > 0.9] = 1.6
        t.nuclei(t.anywhere(90), 5)
    elif name == "fibrosis":
        angle = rng.uniform(0, 3)
        t.e += 0.62 + 0.2 * t.noise(25, 1.6, angle)
        t.nuclei(t.anywhere(120), 3.5, aspect=3, angles=angle + rng.normal(0, 0.2, 120))


@lru_cache(maxsize=256)
def densities(name: str, seed: int) -> Float:
    """Haematoxylin and eosin density [512, 512, 2] of a tissue, periodic."""
    t = _Torus(name, seed)
    if name in ORGANS:
        _benign(t, name)
    elif name.startswith("tumour"):
        _, um, *options = name.split(":")
        _tumour(t, float(um), options)
    else:
        _finding(t, name)
    return np.clip(np.stack([t.h, t.e], -1), 0, 2.5)


def patches(name: str, *, seed: int, n: int, px: int = 256, mpp: float = MPP) -> NDArray[np.uint8]:
    """``n`` patches [n, px, px, 3] of one drawing under as many stain strengths and positions."""
    field, rng = densities(name, seed), np.random.default_rng([7, seed, *name.encode()])
    side = round(px * mpp / MPP)
    out = np.empty((n, px, px, 3), np.uint8)
    for i in range(n):
        crop = np.roll(field, rng.integers(SIDE, size=2), (0, 1))[:side, :side]
        crop = np.rot90(crop, rng.integers(4))
        if rng.integers(2):
            crop = crop[::-1]
        stain = crop * rng.uniform(0.8, 1.2, 2).astype(np.float32)
        stain = np.ascontiguousarray(stain).reshape(-1, 2)  # one product, not one for each row
        rgb = 244 * np.exp(-1.6 * stain @ np.array([STAIN_H, STAIN_E], np.float32))
        rgb = rgb.reshape(*crop.shape[:2], 3)
        if side != px:
            rgb = cv2.resize(rgb, (px, px), interpolation=cv2.INTER_AREA)
        noise = cv2.GaussianBlur(rng.normal(0, 5, rgb.shape).astype(np.float32), (0, 0), 0.7)
        out[i] = np.clip(np.rint(rgb + noise), 0, 255)
    return out
