"""The command line: instant help, one error sentence, exit codes."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from pathflip.cli import main
from pathflip.cli.options import show_document
from tests.archives import make_archive

COMMANDS = [
    ["ingest"], ["demo"], ["synth"], ["search"], ["doctor"], ["slides", "list"],
    ["slides", "check"], ["slides", "show"], ["slides", "retry"], ["archive", "stats"],
    ["archive", "verify"],
    ["archive", "repair"], ["archive", "maintain"], ["archive", "export"], ["archive", "import"],
    ["pretrain"], ["tune"], ["make-llm"], ["index"], ["caption"], ["ask"], ["decompose"],
    ["classify"], ["ground"], ["evaluate", "all"], ["evaluate", "ablations"], ["serve"],
    ["audit", "verify"], ["annotations", "list"], ["annotations", "export"],
    ["annotations", "import"], ["annotations", "remove"],
    ["datasets", "list"], ["datasets", "show"], ["datasets", "check"],
    ["datasets", "prepare"], ["evaluate", "pictures"], ["evaluate", "compare"],
]  # fmt: skip


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    return caught.value.code, output.out, output.err


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert "Usage: pathflip" in out


def test_help_imports_nothing_heavy():
    heavy = "{'torch', 'lancedb', 'lance', 'ray', 'numpy', 'pyarrow', 'cv2', 'rich.console'}"
    program = (
        "import sys\nfrom pathflip.cli import main\ntry: main(['--help'])\n"
        f"except SystemExit: print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["archive", "stats", "--archive", "{tmp}/none"], "There is no archive at"),
        (["slides", "list", "--archive", "{tmp}"], "is not a pathflip archive"),
        (["search", "--archive", "{tmp}/none"], "Say what to look for"),
        (["search", "--archive", "{tmp}/none", "--slide", "a"], "There is no archive at"),
        (["search", "--archive", "x", "--slide", "a", "--level", "cell"], "'cell' is not one of"),
        (["search", "--archive", "x", "--slide", "a", "--level", "patch"], "Patches are found by"),
        (["ingest", "{tmp}/none", "--archive", "{tmp}/a"], "does not exist"),
        (["synth", "{tmp}/c", "--mention", "0.5"], "--mention is of captions of patch trees"),
        (["ingest", "{tmp}", "--archive", "{tmp}/a"], "holds no slides"),
        (["ingest", "{tmp}", "--archive", "{tmp}/a", "--encoder", "textur"], "texture"),
        (["ingest", "{tmp}", "--archive", "{tmp}/a", "-o", "encodr=x"], "Did you mean encoder"),
        (["ingest", "{tmp}", "--archive", "{tmp}/a", "-o", "tiling.mpp=0.3"], "px"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(capsys, tmp_path, arguments, words):
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []  # nothing touched


def test_errors_as_json(capsys, tmp_path):
    code, out, _ = run(capsys, "archive", "stats", "--archive", str(tmp_path / "a"), "--json")
    assert code == 2
    assert json.loads(out)["error"]["code"] == "missing_archive"


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    document = json.loads(out)
    assert code == (0 if document["ok"] else 1)
    assert {check["name"] for check in document["checks"]} >= {"openslide", "ray", "disk", "gpu"}


@pytest.mark.parametrize(("version", "good"), [("3.4.1", False), ("4.0.0", False), ("4.0.1", True)])
def test_openslide_of_known_faults_is_refused(capsys, monkeypatch, tmp_path, version, good):
    """By doctor, and by whatever opens a slide."""
    import openslide

    from pathflip import Slide
    from pathflip.errors import SlideError
    from pathflip.synth import make_slide

    path = make_slide(tmp_path / "a.tif", width=256, height=256, mpp=0.5)
    monkeypatch.setattr(openslide, "__library_version__", version)
    _, out, _ = run(capsys, "doctor", "--json")
    (check,) = (one for one in json.loads(out)["checks"] if one["name"] == "openslide")
    assert check["status"] == ("pass" if good else "fail")
    if good:
        Slide(path).close()
    else:
        with pytest.raises(SlideError, match="CVE-2026-48977") as caught:
            Slide(path)
        assert caught.value.code == "unsupported"


def test_a_table_counts_what_is_too_long_to_show(capsys):
    names = [f"s{i:03}" for i in range(944)]
    show_document({"patients": {"unmatched": names, "ambiguous": []}}, as_json=False)
    told = capsys.readouterr().out
    assert "944: s000, s001, s002, s003, s004 …" in told
    assert "s005" not in told
    show_document({"unmatched": names}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"unmatched": names}


def test_unknown_command_is_usage(capsys):
    assert run(capsys, "ingset")[0] == 2


@pytest.mark.parametrize("device", ["gpu", "cuda:9"])
@pytest.mark.parametrize(
    "command",
    [
        ["classify", "--classes", "lung,colon"],
        ["ground", "slide000", "necrosis"],
        ["evaluate", "retrieval"],
        ["caption", "slide000"],
    ],
    ids=" ".join,
)
def test_a_device_that_is_not_there_is_one_sentence(capsys, tmp_path, command, device):
    uri = make_archive(tmp_path / "archive", slides=1)
    more = ["--archive", str(uri), "--run", str(tmp_path / "run"), "--device", device]
    code, _, err = run(capsys, *command, *more)
    assert code == 2
    assert device in err
    assert err.startswith("pathflip: ")


def test_slides_check_says_what_would_be_refused(capsys, tmp_path):
    for name, options in (("fine.tif", {}), ("turned.tif", {"extratags": [(274, 3, 1, 3, True)]})):
        tifffile.imwrite(
            tmp_path / name, np.full((256, 256, 3), 200, np.uint8), tile=(128, 128),
            photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **options,
        )  # fmt: skip
    code, out, _ = run(capsys, "slides", "check", str(tmp_path), "--json")
    fine, turned = json.loads(out)
    assert code == 3
    assert (fine["reason"], fine["width"], fine["levels"], fine["mpp"]) == (None, 256, 1, 0.5)
    assert turned["reason"] == "orientation"
    assert "turned.tif" in turned["message"]
    code, out, _ = run(capsys, "slides", "check", str(tmp_path / "fine.tif"))
    assert code == 0
    assert "fine.tif" in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from pathflip import __version__

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{__version__}\n"
