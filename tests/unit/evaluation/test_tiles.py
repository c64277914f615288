"""Zero-shot classification and probes of tiles, with a model whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pathflip.errors import ConfigError
from pathflip.evaluation.classification import scores_of
from pathflip.evaluation.probe import draw_test, probe, strength
from pathflip.evaluation.prompts import TileTask, read_tile_task, tile_tasks
from pathflip.evaluation.tiles import (
    EncodedTiles,
    encode_tiles,
    list_tiles,
    write_sheet,
    zero_shot,
)
from pathflip.interop.tile_sets import LAYOUTS, Tile
from tests.unit.evaluation.planted_patches import AXES, ColourModel, colour_reader

TASK = TileTask(
    name="colours",
    classes={"r": ("red", "reddish red"), "g": ("green",), "b": ("blue",)},
    mpp=0.5,
)
COLOUR = {"r": (230, 100, 100), "g": (100, 230, 100), "b": (100, 100, 230)}


def make_set(
    folder: Path, labels: str, *, drawn: str = "", side: int = 40, split: str = ""
) -> Path:
    """Tiles of classes ``labels``; ``drawn`` says what colour each really has."""
    for i, label in enumerate(labels):
        rgb = COLOUR[(drawn or labels)[i]]
        rng = np.random.default_rng(i)
        pixels = np.clip(rng.normal(rgb, 8, size=(side, side, 3)), 0, 255).astype(np.uint8)
        path = folder / split / label / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels[..., ::-1])
    return folder


def measured(folder: Path, *, model: ColourModel | None = None, **options: Any) -> dict[str, Any]:
    reader = colour_reader(model)
    encoded = encode_tiles(list_tiles(folder, TASK), reader, TASK)
    return zero_shot(encoded, reader, TASK, **options)


def test_a_model_that_sees_is_right_and_its_errors_are_the_planted_ones(tmp_path: Path) -> None:
    perfect = measured(make_set(tmp_path / "right", "rrggggbb"))
    assert perfect["npe"]["weighted_f1"] == perfect["pe"]["weighted_f1"] == 1
    low, high = perfect["pe"]["ci"]["weighted_f1"]
    assert 0.5 < low < high == 1  # eight tiles
    assert perfect["pe"]["confusion"] == [[2, 0, 0], [0, 4, 0], [0, 0, 2]]
    assert perfect["majority"]["accuracy"] == 0.5
    assert perfect["chance"]["balanced_accuracy"] == pytest.approx(1 / 3)
    found = measured(make_set(tmp_path / "wrong", "rrggggbb", drawn="rbggggbb"))
    assert found["pe"]["confusion"] == [[1, 0, 1], [0, 4, 0], [0, 0, 2]]
    assert found["pe"]["accuracy"] == 7 / 8
    assert found["pe"]["balanced_accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["pe"]["weighted_f1"] == pytest.approx((2 * 2 / 3 + 4 + 2 * 0.8) / 8)


def test_levels_are_told_apart_and_pooled(tmp_path: Path) -> None:
    """At 20x nobody sees red or blue; 10x and 5x do, and pooled the tile is right."""
    folder = make_set(tmp_path, "rgbrgb", side=128)
    found = measured(folder, model=ColourModel(blind={2: (0, 2)}), resamples=0)
    assert set(found["levels"]) == {"5x", "10x", "20x"}
    assert found["levels"]["10x"]["pe"]["accuracy"] == 1
    assert found["levels"]["20x"]["pe"]["accuracy"] < 1
    assert found["pe"]["accuracy"] == 1
    assert found["by_field"] == 0


def test_one_prompt_is_the_first_name_in_the_first_template(tmp_path: Path) -> None:
    """The ensemble of r holds a name for blue, too: only npe tells blue from it."""
    folder = make_set(tmp_path, "rrbb", side=32)
    task = TileTask(name="t", classes={"r": ("red", "blue", "blue tint"), "b": ("blue",)}, mpp=0.5)
    reader = colour_reader()
    encoded = encode_tiles(list_tiles(folder, task), reader, task)
    assert zero_shot(encoded, reader, task)["npe"]["accuracy"] == 1
    assert task.one_prompt() == {"r": ("red",), "b": ("blue",)}


def test_labels_permuted_score_at_chance(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "rgb" * 10, side=32)
    reader = colour_reader()
    encoded = encode_tiles(list_tiles(folder, TASK), reader, TASK)
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(60):
        shuffled = EncodedTiles(
            tiles=encoded.tiles, truth=rng.permutation(encoded.truth), found=encoded.found,
            by_field=0, refused=[],
        )  # fmt: skip
        document = zero_shot(shuffled, reader, TASK, resamples=0)
        scores.append(document["pe"]["balanced_accuracy"])
    assert np.mean(scores) == pytest.approx(document["chance"]["balanced_accuracy"], abs=0.05)


def test_a_class_without_tiles_may_be_answered_and_counts_for_nothing(tmp_path: Path) -> None:
    found = measured(make_set(tmp_path, "rrgg", drawn="rbgg"))
    assert found["without_tiles"] == ["b"]
    assert found["pe"]["balanced_accuracy"] == 0.75
    assert found["pe"]["classes"]["b"]["n"] == 0


def test_equal_scores_go_to_the_first_class(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "rrg", side=32)
    task = TileTask(name="t", classes={"g": ("tissue",), "r": ("tissue",)}, mpp=0.5)
    reader = colour_reader()
    encoded = encode_tiles(list_tiles(folder, task), reader, task)
    found = zero_shot(encoded, reader, task, resamples=0)
    assert found["pe"]["confusion"] == [[1, 0], [2, 0]]


def test_bad_pictures_are_told_and_the_rest_is_measured(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "rgb")
    (folder / "r" / "damaged.png").write_bytes(b"\x89PNG nothing")
    found = measured(folder)
    assert found["n"] == 3
    (refused,) = found["refused"]
    assert (refused["tile"], refused["code"]) == ("r/damaged.png", "unreadable")
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ConfigError, match="None of 4 tiles") as none:
        measured(folder)
    assert none.value.code == "no_tiles"


def test_values_that_are_not_finite_cost_the_tile(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "rgb")
    reader = colour_reader()

    class Sometimes:
        def __call__(self, patches: Any) -> Any:
            values = patches.mean(axis=(1, 2)).astype(np.float32)
            values[values[:, 0] > 200] = np.nan
            return values

    reader = colour_reader(encoder=Sometimes())
    encoded = encode_tiles(list_tiles(folder, TASK), reader, TASK)
    assert [tile.label for tile in encoded.tiles] == ["b", "g"]
    assert encoded.refused[0]["code"] == "bad_features"


def test_unknown_labels_missing_scales_and_empty_splits_are_refused(tmp_path: Path) -> None:
    folder = make_set(tmp_path, "rgb")
    reader = colour_reader()
    two = TileTask(name="t", classes={"r": ("red",), "g": ("green",)})
    with pytest.raises(ConfigError, match="tiles of b"):
        list_tiles(folder, two)
    without = TileTask(name="t", classes=two.classes, leave_out=("b",))
    assert len(list_tiles(folder, without)) == 2
    with pytest.raises(ConfigError) as unscaled:
        encode_tiles(list_tiles(folder, without), reader, without)
    assert unscaled.value.code == "needs_mpp"
    with pytest.raises(ConfigError, match="no tile of split test"):
        list_tiles(folder, TASK, split="test")


def test_patients_are_resampled_whole(tmp_path: Path) -> None:
    make_set(tmp_path, "rrrrgggg", drawn="rrggggrr")
    names = sorted(tmp_path.rglob("*.png"), key=lambda path: path.name)
    rows = [f"{p.relative_to(tmp_path)},{p.parent.name},P{i // 2 % 2}" for i, p in enumerate(names)]
    table = tmp_path / "tiles.csv"
    table.write_text("image,label,patient\n" + "\n".join(rows) + "\n")
    found = measured(table)
    assert found["groups"] == 2
    # One patient's tiles are all right, the other's half wrong: two patients say hardly anything.
    low, high = found["pe"]["ci"]["accuracy"]
    assert 0 <= low < 0.1 < 0.9 < high <= 1
    apart = measured(tmp_path)["pe"]["ci"]["accuracy"]  # the same tiles, of no known patient
    assert apart[1] - apart[0] < 0.7


def test_the_sheet_frames_right_tiles_green_and_wrong_ones_red(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set", "rg", drawn="rr")
    reader = colour_reader()
    encoded = encode_tiles(list_tiles(folder, TASK), reader, TASK)
    path = write_sheet(tmp_path / "sheet.png", encoded, reader, TASK, columns=2, px=32)
    sheet = cv2.imread(str(path))[..., ::-1]
    assert sheet.shape == (3 * 40, 220 + 2 * 40, 3)
    frames = {tuple(sheet[1, 220 + x].tolist()) for x in (1, 41)}
    assert (sheet[1, 220 + 39] == 255).all()  # a gap between them
    assert frames == {(40, 150, 60), (200, 50, 40)}
    assert (sheet[41, 221] == 255).all()  # nothing was called g


# -- tasks ----------------------------------------------------------------------------------------


def test_every_task_that_comes_along_can_be_read_and_has_two_names_a_class() -> None:
    assert len(tile_tasks()) == 8
    for name in tile_tasks():
        task = read_tile_task(name)
        assert task.name == name
        assert task.layout in LAYOUTS
        assert task.mpp is not None
        assert all(len(names) >= 2 for names in task.classes.values())
        assert len({name for names in task.classes.values() for name in names}) == sum(
            map(len, task.classes.values())
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("classes: {a: x}", "two classes"),
        ("classes: {a: x, b: []}", "two classes"),
        ("classes: [a, b]", "no classes"),
        ("classes: {a: x, b: y}\nmpp: far", "mpp is 'far'"),
        ("classes: {a: x, b: y}\nscale: 1", "no setting 'scale'"),
    ],
)
def test_a_wrong_task_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "t.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_tile_task(file)
    with pytest.raises(ConfigError, match="There is no task 'nct'"):
        read_tile_task("nct")


# -- probes ---------------------------------------------------------------------------------------


def planted_tiles(n: int, *, noise: float, split: bool = True, groups: int = 0) -> EncodedTiles:
    """Tiles whose unit vectors lie around the axis of their class."""
    from pathflip.evaluation.patch_text import mean_vectors

    rng = np.random.default_rng(5)
    truth = np.arange(n) % 3
    vectors = np.eye(4)[truth] + noise * rng.normal(size=(n, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    tiles = [
        Tile(
            name=f"{i:03d}", label="rgb"[i % 3], path=Path("x"),
            split=("train", "test")[i // 3 % 2] if split else None,
            group=f"P{i // 3 % groups}" if groups else None,
        )
        for i in range(n)
    ]  # fmt: skip
    found = mean_vectors(
        vectors.astype(np.float32), item=np.arange(n), level=np.zeros(n, np.int64), count=n
    )
    return EncodedTiles(tiles=tiles, truth=truth, found=found, by_field=0, refused=[])


def test_the_strength_of_a_probe_is_width_times_classes_over_a_hundred() -> None:
    assert strength(256, 9) == pytest.approx(23.04)
    assert 1 / strength(256, 9) == pytest.approx(100 / (256 * 9))


def test_a_probe_is_scikit_learns_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    encoded = planted_tiles(120, noise=0.7)
    found = probe(encoded, list(AXES), shots=(1, 4), seeds=5, resamples=50)
    x, y = encoded.found.whole(), encoded.truth
    train = np.array([tile.split == "train" for tile in encoded.tiles])
    model = LogisticRegression(C=4 * 3 / 100, max_iter=1000).fit(x[train], y[train])
    assert found["C"] == 0.12
    assert (found["train"], found["test"], found["split"]) == (60, 60, "given")
    assert found["linear"]["accuracy"] == pytest.approx(model.score(x[~train], y[~train]))
    assert 0.4 < found["linear"]["accuracy"] < 1
    low, high = found["linear"]["ci"]["weighted_f1"]
    assert low < found["linear"]["weighted_f1"] < high


def test_more_shots_are_better_and_all_shots_are_the_linear_probe() -> None:
    encoded = planted_tiles(240, noise=0.5)
    found = probe(encoded, list(AXES), shots=(1, 8, 40), seeds=6, resamples=0)
    kshot = found["kshot"]
    assert kshot["1"]["weighted_f1"]["mean"] < kshot["8"]["weighted_f1"]["mean"]
    assert kshot["40"]["weighted_f1"]["sd"] == pytest.approx(0, abs=0.02)  # all 40 of each class
    assert kshot["40"]["weighted_f1"]["mean"] == pytest.approx(
        found["linear"]["weighted_f1"], abs=0.02
    )


def test_a_probe_of_permuted_labels_is_at_chance() -> None:
    encoded = planted_tiles(300, noise=0.2)
    rng = np.random.default_rng(1)
    shuffled = EncodedTiles(
        tiles=encoded.tiles, truth=rng.permutation(encoded.truth), found=encoded.found,
        by_field=0, refused=[],
    )  # fmt: skip
    found = probe(shuffled, list(AXES), shots=(), resamples=200)
    low, high = found["linear"]["ci"]["balanced_accuracy"]
    assert low - 0.03 < 1 / 3 < high + 0.03


def test_test_tiles_are_drawn_by_patient_or_by_class() -> None:
    with_patients = planted_tiles(120, noise=0.1, split=False, groups=10)
    held = draw_test(with_patients.tiles)
    groups = {tile.group for tile, out in zip(with_patients.tiles, held, strict=True) if out}
    assert len(groups) == 3
    assert not groups & {
        tile.group for tile, out in zip(with_patients.tiles, held, strict=True) if not out
    }
    without = planted_tiles(120, noise=0.1, split=False)
    held = draw_test(without.tiles)
    assert [int(held[without.truth == c].sum()) for c in range(3)] == [12, 12, 12]
    assert probe(without, list(AXES), shots=(), resamples=0)["split"] == "drawn"
    # More tiles of other classes move none between the sides.
    assert (draw_test([t for t in without.tiles if t.label != "b"]) ==
            held[[t.label != "b" for t in without.tiles]]).all()  # fmt: skip


def test_a_class_missing_in_training_is_never_answered_and_one_class_alone_is_refused() -> None:
    encoded = planted_tiles(60, noise=0.1)
    lacking = [
        Tile(name=t.name, label=t.label, path=t.path, split="test" if t.label == "b" else t.split)
        for t in encoded.tiles
    ]
    part = EncodedTiles(
        tiles=lacking, truth=encoded.truth, found=encoded.found, by_field=0, refused=[]
    )
    found = probe(part, list(AXES), shots=(), resamples=0)
    assert found["linear"]["classes"]["blue"]["recall"] == 0
    counts = np.array(found["linear"]["confusion"])
    assert counts[:, 2].sum() == 0
    assert scores_of(counts)["accuracy"] == pytest.approx(found["linear"]["accuracy"])
    only = EncodedTiles(
        tiles=encoded.tiles, truth=np.zeros(60, np.int64), found=encoded.found, by_field=0,
        refused=[],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="two classes"):
        probe(only, list(AXES))
