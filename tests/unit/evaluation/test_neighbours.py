from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pathflip.archive.commit import Committer
from pathflip.cli import main
from pathflip.errors import ArchiveError, ConfigError
from pathflip.evaluation.neighbours import neighbours, precision_at
from pathflip.interop.features.slide_importing import SlideFeatureImport, import_slide_features
from tests.unit.archive import cohort, models

SLIDES = range(10)


def test_a_case_by_hand():
    """Angles on a circle; b is of a's patient, and d alone has its label."""
    angles = np.radians([0, 5, 20, 90, 100])
    space = np.stack([np.cos(angles), np.sin(angles)], 1) * [[1], [2], [3], [4], [5]]
    labels, patients = ["x", "y", "x", "z", "y"], ["P", "P", "Q", "R", None]
    found, chance = precision_at(space, labels, patients, (1, 2))
    # a sees c, d, e; b the same; c sees a, b, d, e; e sees all others.
    nan = math.nan
    np.testing.assert_array_equal(found, [[1, 0.5], [0, 0], [0, 0.5], [nan, nan], [0, 0]])
    np.testing.assert_allclose(chance, [1 / 3, 1 / 3, 1 / 4, nan, 1 / 4])


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    """Ten slides of two labels, in a space where labels lie apart and in one of noise."""
    folder = tmp_path_factory.mktemp("near")
    uri = folder / "a"
    cohort.build(uri, *SLIDES)
    with Committer(uri) as committer:
        models.add(committer, *SLIDES)
        committer.update_slides(
            {
                f"slide{n:03d}": {
                    "labels": json.dumps({"site": "colon" if n < 5 else "lung"}),
                    "patient_id": f"P{n // 2}",
                }
                for n in SLIDES[:9]  # the last has no label
            }
        )
    rng = np.random.default_rng(3)
    for name, apart in (("apart", 9.0), ("noise", 0.0)):
        values = rng.normal(size=(9, 16))
        values[:5, 0] += apart
        values[5:, 1] += apart
        rows = ["slide," + ",".join(f"d{n}" for n in range(16))]
        rows += [f"slide{n:03d}," + ",".join(map(str, row)) for n, row in enumerate(values)]
        (folder / f"{name}.csv").write_text("\n".join(rows))
        config = SlideFeatureImport(encoder=name)
        import_slide_features(str(uri), folder / f"{name}.csv", config)
    return str(uri)


def test_spaces_over_the_same_slides(uri):
    from pathflip import Archive

    document = neighbours(Archive(uri), "site", resamples=200)
    assert set(document["spaces"]) == {"tex", models.MODEL, "apart", "noise"}
    assert (document["n"], document["alone"]) == (9, 0)
    assert document["classes"] == {"colon": 5, "lung": 4}
    assert document["spaces"]["apart"]["p@1"] == 1
    # Slides 6 and 7 are of one patient, and two other lungs are left for each.
    assert document["spaces"]["apart"]["p@3"] == pytest.approx((7 + 2 * 2 / 3) / 9)
    assert document["spaces"]["noise"]["p@3"] < 0.8
    low, high = document["spaces"]["apart"]["ci"]["p@1"]
    assert low < 1 == high
    # Slide 4 shares its patient with 5, of the other label: candidates are 7, of which 4 match.
    assert document["chance"] == pytest.approx(
        np.mean([3 / 7] * 4 + [4 / 7] + [3 / 7] + [2 / 7] * 2 + [3 / 8])
    )
    only = neighbours(Archive(uri), "site", ["noise"], split="train", resamples=200)
    assert (list(only["spaces"]), only["n"]) == (["noise"], 5)


def test_what_cannot_be_measured(uri, capsys):
    from pathflip import Archive

    with pytest.raises(ArchiveError, match="no vectors of titan") as refused:
        neighbours(Archive(uri), "site", ["titan"])
    assert "apart" in refused.value.hint
    with pytest.raises(ConfigError, match="same label grade") as refused:
        neighbours(Archive(uri), "grade")
    assert refused.value.hint == "The archive has the labels site."
    with pytest.raises(ConfigError, match="of split trian") as refused:
        neighbours(Archive(uri), "site", split="trian")
    assert "train" in refused.value.hint
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "neighbours", "--archive", uri, "--label", "site", "--space", "apart"])
    assert ended.value.code in (0, None)
    assert "apart" in capsys.readouterr().out
