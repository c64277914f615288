"""Geometry against exact fractions, a brute-force planner and closed forms."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathflip.errors import ConfigError
from pathflip.geometry import (
    LEVEL_OF,
    TREE_OFFSETS,
    Regions,
    Tiling,
    TreeSpec,
    choose_parents,
    edge,
    patch_at,
    patch_rects,
    patch_tree,
    plan_regions,
    tree_levels,
    tree_node,
    tree_tissue,
)
from pathflip.slides.tissue import TissueMask

MPP = st.one_of(
    st.sampled_from([0.25, 0.5, 0.2738, 0.499, 0.2527]), st.floats(0.05, 4.0, allow_nan=False)
)
SMALL = Tiling(region_um=512, patch_um=128, min_patch_tissue=0.5, min_region_patches=0.1)


class Everywhere:
    """All tissue, also beyond the slide."""

    def coverage(
        self, x_edges0: NDArray[np.float64], y_edges0: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        return np.ones((len(y_edges0) - 1, len(x_edges0) - 1), np.float32)


def area_of(rects: NDArray[np.int64]) -> int:
    return int((rects[:, 2] * rects[:, 3]).sum())


@pytest.mark.parametrize(
    ("index", "mpp", "expected"),
    [(0, 0.25, 0), (1, 0.5, 256), (1, 0.2738, 467), (2, 0.2738, 935), (16, 0.499, 4104)],
)
def test_edge_is_the_nearest_pixel_to_the_physical_line(
    index: int, mpp: float, expected: int
) -> None:
    assert edge(index, unit_um=128.0, mpp=mpp) == expected


@given(index=st.integers(0, 5000), mpp=MPP)
def test_edge_lies_within_half_a_pixel_of_its_line(index: int, mpp: float) -> None:
    exact = Fraction(index) * 128 / Fraction(mpp)
    assert abs(Fraction(int(edge(index, unit_um=128.0, mpp=mpp))) - exact) <= Fraction(
        500001, 10**6
    )


@given(rx=st.integers(0, 60), ry=st.integers(0, 60), mpp=MPP, side=st.integers(1, 16))
def test_patches_tile_their_region_exactly(rx: int, ry: int, mpp: float, side: int) -> None:
    tiling = Tiling(region_um=side * 128.0, patch_um=128.0)
    rects = patch_rects(tiling, rx=rx, ry=ry, mpp=mpp)
    x0, y0 = (int(edge(i * side, unit_um=128.0, mpp=mpp)) for i in (rx, ry))
    x1, y1 = (int(edge((i + 1) * side, unit_um=128.0, mpp=mpp)) for i in (rx, ry))

    # Inside, of the right total area, and pairwise disjoint by their corners: a tiling.
    assert rects[:, 0].min() == x0
    assert rects[:, 1].min() == y0
    assert (rects[:, 0] + rects[:, 2]).max() == x1
    assert (rects[:, 1] + rects[:, 3]).max() == y1
    assert area_of(rects) == (x1 - x0) * (y1 - y0)
    grid = rects.reshape(side, side, 4)
    assert (grid[:, 1:, 0] == grid[:, :-1, 0] + grid[:, :-1, 2]).all()
    assert (grid[1:, :, 1] == grid[:-1, :, 1] + grid[:-1, :, 3]).all()
    assert np.ptp(rects[:, 2:]) <= 1
    # The neighbour to the right begins where this region ends.
    assert patch_rects(tiling, rx=rx + 1, ry=ry, mpp=mpp)[0, 0] == x1


@given(
    rx=st.integers(0, 60),
    ry=st.integers(0, 60),
    mpp=MPP,
    downsample=st.floats(1.0, 3.9, allow_nan=False),
)
def test_patch_centres_round_trip_through_a_level(
    rx: int, ry: int, mpp: float, downsample: float
) -> None:
    tiling = Tiling()
    rects = patch_rects(tiling, rx=rx, ry=ry, mpp=mpp)
    centres = rects[:, :2] + rects[:, 2:] / 2
    on_level = np.rint(centres / downsample)  # nearest pixel of a coarser level, and back
    back = on_level * downsample
    assert np.abs(back - centres).max() <= downsample / 2 + 1e-6
    got = patch_at(tiling, x0=back[:, 0], y0=back[:, 1], mpp=mpp)
    assert (got[0] == rx).all()
    assert (got[1] == ry).all()
    assert (got[2] == np.arange(tiling.slots)).all()


@given(position=st.integers(0, 500_000), mpp=MPP)
def test_locate_agrees_with_the_rectangles_at_every_pixel(position: int, mpp: float) -> None:
    tiling = Tiling(region_um=512.0)
    rx, ry, slot = patch_at(tiling, x0=position, y0=0, mpp=mpp)
    x0, y0, w0, _ = patch_rects(tiling, rx=int(rx), ry=int(ry), mpp=mpp)[int(slot)]
    assert x0 <= position < x0 + w0
    assert y0 == 0


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 6000),
    height=st.integers(1, 6000),
    mpp=st.sampled_from([0.25, 0.2738, 0.499, 0.5, 1.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_plan_equals_a_loop_over_all_patches(
    width: int, height: int, mpp: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    h, w = math.ceil(height * mpp / 8), math.ceil(width * mpp / 8)
    tissue = TissueMask(rng.random((h, w)) < rng.random((h, 1)), 8.0, mpp)
    plan = plan_regions(SMALL, width=width, height=height, mpp=mpp, tissue=tissue)

    expected: dict[tuple[int, int], dict[int, float]] = {}
    row = 0
    while (bottom := math.floor((row + 1) * 128 / mpp + 0.5)) <= height:
        column = 0
        while (right := math.floor((column + 1) * 128 / mpp + 0.5)) <= width:
            assert right <= width
            assert bottom <= height
            block = tissue.mask[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            share = np.count_nonzero(block) / 256  # 128 µm are 16 pixels of the mask
            if share >= 0.5:
                slots = expected.setdefault((column // 4, row // 4), {})
                slots[row % 4 * 4 + column % 4] = share
            column += 1
        row += 1
    if max(map(len, expected.values()), default=0) >= 2:  # 1.6 of 16
        expected = {key: slots for key, slots in expected.items() if len(slots) >= 2}

    assert list(zip(plan.rx.tolist(), plan.ry.tolist(), strict=True)) == sorted(
        expected, key=lambda key: (key[1], key[0])
    )
    for i, key in enumerate(zip(plan.rx.tolist(), plan.ry.tolist(), strict=True)):
        slots = expected[key]
        assert np.flatnonzero(plan.patch_mask[i]).tolist() == sorted(slots)
        assert plan.patch_tissue[i, sorted(slots)].tolist() == pytest.approx(
            [slots[s] for s in sorted(slots)]
        )
        assert (plan.patch_tissue[i][~plan.patch_mask[i]] == 0).all()
        block = tissue.mask[key[1] * 64 : key[1] * 64 + 64, key[0] * 64 : key[0] * 64 + 64]
        assert plan.tissue_fraction[i] == pytest.approx(np.count_nonzero(block) / 4096)
        assert plan.x0[i] == patch_rects(SMALL, rx=key[0], ry=key[1], mpp=mpp)[0, 0]
        assert plan.y0[i] == patch_rects(SMALL, rx=key[0], ry=key[1], mpp=mpp)[0, 1]
    assert plan.n_patches.tolist() == [
        len(expected[key]) for key in zip(plan.rx.tolist(), plan.ry.tolist(), strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 70), rows=st.integers(1, 70))
def test_the_same_slide_at_three_resolutions_is_cut_the_same(
    seed: int, columns: int, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.55  # pixels of 64 µm: shares of 1/4, ties at 1/2
    plans = {}
    for mpp in (0.25, 0.5, 0.2738):
        width, height = (math.ceil(n * 64 / mpp) for n in (columns, rows))
        tissue = TissueMask(mask, 64.0, mpp)
        plan = plan_regions(SMALL, width=width, height=height, mpp=mpp, tissue=tissue)
        plans[mpp] = plan
        for um, at0 in ((plan.rx * 512.0, plan.x0), (plan.ry * 512.0, plan.y0)):
            assert (np.abs(at0 * mpp - um) <= mpp / 2 + 1e-9).all()
    first, *others = plans.values()
    for other in others:
        for name in ("rx", "ry", "patch_mask", "patch_tissue"):
            assert np.array_equal(getattr(first, name), getattr(other, name)), name
        assert other.tissue_fraction == pytest.approx(first.tissue_fraction, abs=1e-6)


@pytest.mark.parametrize("mpp", [0.25, 0.2738, 0.499, 0.5])
@pytest.mark.parametrize("patches", [1, 4, 5])
def test_a_slide_of_exactly_n_patches_has_n_and_one_pixel_less_has_one_fewer(
    mpp: float, patches: int
) -> None:
    tiling = Tiling(region_um=512, min_region_patches=0)
    full = int(edge(patches, unit_um=128.0, mpp=mpp))
    for width, expected in ((full, patches), (full - 1, patches - 1), (full + 1, patches)):
        plan = plan_regions(tiling, width=width, height=full, mpp=mpp, tissue=Everywhere())
        assert int(plan.n_patches.sum()) == expected * patches


def test_a_slide_smaller_than_a_region_still_has_one() -> None:
    plan = plan_regions(Tiling(), width=2220, height=2967, mpp=0.499, tissue=Everywhere())
    assert len(plan) == 1
    assert plan.size0 == 4104
    mask = plan.patch_mask[0].reshape(16, 16)
    assert mask[:11, :8].all()
    assert mask.sum() == 88
    rects = patch_rects(Tiling(), rx=0, ry=0, mpp=0.499)[plan.patch_mask[0]]
    assert (rects[:, 0] + rects[:, 2]).max() <= 2220
    assert (rects[:, 1] + rects[:, 3]).max() <= 2967


@pytest.mark.parametrize("size", [1, 16, 255])
def test_a_slide_smaller_than_a_patch_has_no_region(size: int) -> None:
    plan = plan_regions(Tiling(), width=size, height=size, mpp=0.5, tissue=Everywhere())
    assert len(plan) == 0
    assert plan.patch_mask.shape == (0, 256)
    assert plan.patch_tissue.shape == (0, 256)
    assert plan.x0.dtype == np.int64


def test_no_tissue_no_region() -> None:
    tissue = TissueMask(np.zeros((512, 512), np.bool_), 8.0, 0.5)
    assert len(plan_regions(Tiling(), width=8192, height=8192, mpp=0.5, tissue=tissue)) == 0


@pytest.mark.parametrize("kept", [25, 26])
def test_a_region_needs_26_of_256_patches_unless_none_has_them(kept: int) -> None:
    def plan(patches: list[int]) -> Regions:
        mask = np.zeros((256, 256 * len(patches)), np.bool_)
        for region, count in enumerate(patches):
            for slot in range(count):
                row, col = divmod(slot, 16)
                left = 256 * region + col * 16
                mask[row * 16 : row * 16 + 16, left : left + 8] = True  # exactly half of each
        tissue = TissueMask(mask, 8.0, 0.2738)
        width = 7480 * len(patches)
        return plan_regions(Tiling(), width=width, height=7480, mpp=0.2738, tissue=tissue)

    assert plan([kept, 200]).n_patches.tolist() == ([26, 200] if kept == 26 else [200])
    assert plan([kept, 3]).n_patches.tolist() == ([26] if kept == 26 else [25, 3])
    assert Tiling().min_patches == 26


@given(
    tx=st.integers(0, 100),
    ty=st.integers(0, 100),
    mpp=MPP,
    spec=st.sampled_from([TreeSpec(), TreeSpec(parent_um=256, node_px=128)]),
)
def test_children_tile_their_parent_exactly(tx: int, ty: int, mpp: float, spec: TreeSpec) -> None:
    tree = patch_tree(tx, ty, mpp=mpp, spec=spec)
    rects = tree.rects[0]
    assert rects.shape == (85, 4)
    assert tree.edges.shape == (84, 2)
    for parent in range(21):
        children = tree.edges[tree.edges[:, 0] == parent, 1]
        assert len(children) == 4
        nw, ne, sw, se = rects[children]
        x0, y0, w0, h0 = rects[parent]
        assert (nw[:2] == (x0, y0)).all()
        assert ne[0] == se[0] == nw[0] + nw[2] == sw[0] + sw[2]
        assert sw[1] == se[1] == nw[1] + nw[3] == ne[1] + ne[3]
        assert ne[0] + ne[2] == se[0] + se[2] == x0 + w0
        assert sw[1] + sw[3] == se[1] + se[3] == y0 + h0
    assert abs(rects[0] - np.array([tx, ty, 1, 1]) * spec.parent_um / mpp).max() <= 1
    if spec != TreeSpec():
        return
    # Leaves of four trees are the patches of the default tiling.
    region = patch_rects(Tiling(), rx=tx // 2, ry=ty // 2, mpp=mpp).reshape(16, 16, 4)
    r, c = ty % 2 * 8, tx % 2 * 8
    assert (rects[21:].reshape(8, 8, 4) == region[r : r + 8, c : c + 8]).all()


def test_tree_indices_follow_the_formula() -> None:
    tree = patch_tree([0, 3], [2, 1], mpp=0.25)
    assert tree.rects.shape == (2, 85, 4)
    assert TREE_OFFSETS == (0, 1, 5, 21)
    assert tree.rects[1, 0].tolist() == [3 * 4096, 4096, 4096, 4096]
    assert tree.level.tolist() == LEVEL_OF.tolist()
    assert LEVEL_OF.tolist() == [
        sum(node >= first for first in TREE_OFFSETS) - 1 for node in range(85)
    ]
    assert tree.mpp[[0, 1, 5, 21]].tolist() == [2, 1, 0.5, 0.25]
    for node, (level, row, col) in enumerate(zip(tree.level, tree.row, tree.col, strict=True)):
        assert tree_node(int(level), int(row), int(col)) == node
        if level:
            assert tree.parent[node] == tree_node(int(level) - 1, int(row) // 2, int(col) // 2)
    assert tree.parent[0] == -1
    with pytest.raises(ValueError, match="no node"):
        tree_node(1, 2, 0)


def test_the_84_edges_of_a_tree_by_hand() -> None:
    """The quarters of the root, their quarters, and the quarters of the first and last of those."""
    edges = [tuple(edge) for edge in patch_tree(0, 0, mpp=0.25).edges.tolist()]
    assert edges[:4] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    # Level 2 is a 4 x 4 grid from node 5: its first two rows lie in nodes 1 and 2.
    two = {1: (5, 6, 9, 10), 2: (7, 8, 11, 12), 3: (13, 14, 17, 18), 4: (15, 16, 19, 20)}
    assert sorted(edges[4:20]) == [(p, child) for p, all_four in two.items() for child in all_four]
    # Level 3 is an 8 x 8 grid from node 21: rows of node 5 + i begin at 21, 37, 53 and 69.
    three = {
        5 + 4 * row + col: [first + 2 * col + at for at in (0, 1, 8, 9)]
        for row, first in enumerate((21, 37, 53, 69))
        for col in range(4)
    }
    assert three[5] == [21, 22, 29, 30]
    assert three[20] == [75, 76, 83, 84]
    assert sorted(edges[20:]) == [(p, child) for p, all_four in three.items() for child in all_four]


def test_tree_sizes() -> None:
    small = TreeSpec(parent_um=256, node_px=128)
    assert small.level_mpp == TreeSpec().level_mpp == (2, 1, 0.5, 0.25)
    assert patch_tree(1, 0, mpp=0.25, spec=small).rects[0, 84].tolist() == [1920, 896, 128, 128]
    assert small.fingerprint() == TreeSpec(parent_um=256.0, node_px=128).fingerprint()
    assert small.fingerprint() != TreeSpec().fingerprint()
    assert tree_levels(0.5, spec=TreeSpec(parent_um=512, node_px=512)) == 2
    for wrong in ({"parent_um": 0.0}, {"parent_um": math.inf}, {"node_px": 8}):
        with pytest.raises(ConfigError):
            TreeSpec(**wrong)  # type: ignore[arg-type]


def parents(
    mask: NDArray[np.bool_], *, count: int, seed: int = 0, slide: str = "s", min_tissue: float = 0.5
) -> list[tuple[int, int]]:
    tissue = TissueMask(mask, 8.0, 0.25)
    chosen = choose_parents(
        tissue, width=mask.shape[1] * 32, height=mask.shape[0] * 32, mpp=0.25, spec=TreeSpec(),
        count=count, seed=seed, slide_id=slide, min_tissue=min_tissue,
    )  # fmt: skip
    assert chosen.dtype == np.int32
    return [(tx, ty) for tx, ty in chosen.tolist()]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), counts=st.tuples(st.integers(0, 20), st.integers(0, 40)))
def test_more_parents_keep_those_chosen_before(seed: int, counts: tuple[int, int]) -> None:
    """128 px of mask at 8 µm are one root; the last column and row are not whole."""
    cells = np.random.default_rng(seed).random((6, 5)) < 0.7
    mask = np.kron(cells, np.ones((128, 128), np.bool_))[:-1, :-1]
    enough = {(int(x), int(y)) for y, x in np.argwhere(cells[:5, :4])}
    few, many = (parents(mask, count=count, seed=seed) for count in sorted(counts))
    assert set(few) <= set(many) <= enough
    assert len(many) == min(max(counts), len(enough))
    assert many == sorted(many, key=lambda root: (root[1], root[0]))


def test_parents_are_chosen_by_seed_and_slide_and_have_tissue() -> None:
    mask = np.ones((128 * 9, 128 * 9), np.bool_)
    assert parents(mask, count=8) == parents(mask, count=8)
    others = [parents(mask, count=8, seed=1), parents(mask, count=8, slide="t")]
    assert all(len(other) == 8 and other != parents(mask, count=8) for other in others)
    times = sum(np.array(parents(mask, count=8, slide=str(n))).mean() for n in range(200)) / 200
    assert times == pytest.approx(4, abs=0.25)  # uniform over 0 to 8: standard error 0.05
    mask[:, :64] = mask[:, 128:192] = False
    mask[0, 64] = False  # a pixel less than half
    assert parents(mask[:128, :256], count=9) == [(1, 0)]
    assert parents(mask[:128, :256], count=9, min_tissue=0.49) == [(0, 0), (1, 0)]
    assert parents(mask[:100, :100], count=9) == []


def test_tissue_of_nodes_is_that_of_their_rectangles() -> None:
    mask = np.random.default_rng(3).random((256, 256)) < 0.5
    share = tree_tissue(TissueMask(mask, 8.0, 0.25), tx=1, ty=1, mpp=0.25, spec=TreeSpec())
    rects = patch_tree(1, 1, mpp=0.25).rects[0] // 32
    expected = [mask[y : y + h, x : x + w].mean() for x, y, w, h in rects.tolist()]
    np.testing.assert_allclose(share, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mpp", "levels"), [(0.25, 4), (0.2527, 4), (0.2738, 4), (0.3, 3), (0.499, 3), (1.0, 2), (3, 0)]
)
def test_levels_a_scan_can_fill(mpp: float, levels: int) -> None:
    assert tree_levels(mpp) == levels
    if levels:
        n = patch_tree(0, 0, mpp=mpp, levels=levels).rects.shape[1]
        assert n == (4**levels - 1) // 3


@pytest.mark.parametrize(
    "fields",
    [
        {"region_um": 2000.0},
        {"region_um": 128.0 * 65},
        {"region_um": 64.0},
        {"patch_um": 0.0},
        {"mpp": math.nan},
        {"mpp": 0.3},
        {"mpp": 16.0},
        {"min_patch_tissue": 1.1},
        {"min_region_patches": -0.1},
    ],
)
def test_a_tiling_that_does_not_divide_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as caught:
        Tiling(**fields)
    assert caught.value.hint


def test_fingerprint_tells_tilings_apart_and_nothing_else() -> None:
    assert Tiling(region_um=2048).fingerprint() == Tiling().fingerprint()
    others = [Tiling(min_patch_tissue=0.4), Tiling(mpp=1.0), Tiling(region_um=1024)]
    assert len({t.fingerprint() for t in (Tiling(), *others)}) == 4
    assert Tiling().fingerprint() == "aa738698034f"


def test_programmer_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="below one pixel"):
        edge(1, unit_um=128.0, mpp=0.0)
    with pytest.raises(ValueError, match="slide side"):
        plan_regions(Tiling(), width=0, height=5, mpp=0.5, tissue=Everywhere())
    with pytest.raises(ValueError, match="levels"):
        patch_tree(0, 0, mpp=0.25, levels=5)
