"""Agents over both transports, on slides with pixels: they see what is there, and find it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from mcp import MCPError
from numpy.typing import NDArray

from pathflip import Archive, Slide
from pathflip.slide_qa import SlideQA
from pathflip.synth.atlas import Atlas
from pathflip.synth.scene import lay_out, polygons, render, sample_scenes
from pathflip.synth.tiff import write_slide
from serve.auth import read_tokens
from serve.ingress import make_app
from serve.mcp import TOOLS
from serve.reader_pool import ReadingConfig
from serve.routing import Parts
from serve.search import Search
from serve.tiles import Tiles
from tests.agents import MODES, fault, listening, over_http, over_stdio, pictures, result, texts
from tests.serving import Service, Tuned
from tests.unit.serve.service_fixture import bearer, write_tokens

pytestmark = pytest.mark.timeout(300)

LESION = "lymphoid"
PATIENT_S = 120
"""Seconds a reader has on a machine that does much else."""
SCENES = (4, 7, 11)
"""Scenes of the slides: the second has pen strokes darker than its lesion, the third is finer."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Slides of the synthetic cohort in an archive.

    Attributes:
        archive: The archive.
        slides: {slide id: its file}.
        outlines: {slide id: rings of its lymphoid aggregate, level-0 px}.
    """

    archive: Path
    slides: dict[str, Path]
    outlines: dict[str, list[NDArray[np.float32]]]


@pytest.fixture(scope="module")
def planted(job_here: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Planted:
    home = tmp_path_factory.mktemp("planted")
    (home / "slides").mkdir()
    scenes, atlas = sample_scenes(slides=max(SCENES) + 1, seed=5), Atlas()
    files, outlines = {}, {}
    for scene in (scenes[number] for number in SCENES):
        layout = lay_out(scene)
        file = home / "slides" / f"{scene.slide}.tif"
        write_slide(file, render(scene, atlas, layout=layout), mpp=scene.mpp, aperio=False)
        masks = zip(scene.lesions, layout.masks, strict=True)
        files[scene.slide] = file
        outlines[scene.slide] = [
            np.array(shape[0], np.float32)
            for lesion, mask in masks
            if lesion.finding == LESION
            for shape in polygons(mask, mpp=scene.mpp)
        ]
    made = job_here(home / "slides", home / "archive", "encoder=texture")
    assert made.slides["ready"] == len(SCENES)
    ids = {name: Archive(home / "archive").resolve(name) for name in files}
    return Planted(
        archive=home / "archive",
        slides={ids[name]: path for name, path in files.items()},
        outlines={ids[name]: rings for name, rings in outlines.items()},
    )


def parts_of(archive: Path) -> Parts:
    """The parts of a service without a trained run."""
    return Parts(
        search=Search(str(archive)),
        tiles=Tiles(str(archive), config=ReadingConfig(timeout_s=PATIENT_S)),
        redactions={str(archive): "the archive"},
    )


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_a_view_is_the_slides_pixels(planted: Planted, tmp_path: Path, transport: str) -> None:
    """Whatever the square and the scale; and whatever else prints on standard output."""
    rng = np.random.default_rng(0)

    async def use(client: Any) -> None:
        named = [tool.name for tool in (await client.list_tools()).tools]
        assert named == ["list_slides", "describe_slide", "view", "measure"]
        listed = await result(client, "list_slides")
        assert [row["slide_id"] for row in listed["slides"]] == sorted(planted.slides)
        for slide_id, path in planted.slides.items():
            with Slide(path) as slide:
                about = await result(client, "describe_slide", slide=slide_id)
                assert (about["width"], about["height"]) == (slide.width, slide.height)
                assert about["mpp"] == slide.mpp
                for size0, px in ((64, 64), (512, 256), (1000, 64), (slide.width, 512)):
                    reach = slide.width - size0 + 1
                    x0, y0 = (int(value) for value in rng.integers(0, reach, 2))
                    asked = {"x0": x0, "y0": y0, "size_um": size0 * slide.mpp, "px": px}
                    answer = await client.call_tool("view", {"slide": slide_id, **asked})
                    (seen,) = pictures(answer)
                    place = answer.structured_content["picture"]
                    assert (place["x0"], place["y0"], place["width"]) == (x0, y0, px)
                    assert place["px0"] == pytest.approx(size0 / px)
                    assert answer.structured_content["inside"] == 1
                    expected = slide.read(x0, y0, px, mpp=size0 * slide.mpp / px)
                    error = np.abs(seen.astype(float) - expected).mean()
                    assert error < 6, (slide_id, asked, error)  # it is a JPEG

    run(planted.archive, transport, use, tmp_path)


def run(archive: Path, transport: str, use: Callable[[Any], Any], folder: Path) -> Any:
    """Run ``use(client)`` over a transport."""

    async def main() -> Any:
        if transport == "stdio":
            slow = "-o", f"reading.timeout_s={PATIENT_S}"
            async with over_stdio("--archive", str(archive), *slow) as client:
                return await use(client)
        parts = parts_of(archive)
        app = make_app(parts, tokens=read_tokens(write_tokens(folder / "tokens")))
        try:
            async with listening(app) as url, over_http(url, bearer("reader")) as client:
                return await use(client)
        finally:
            await parts.tiles.close()

    return asyncio.run(main())


def test_places_off_the_slide(planted: Planted, tmp_path: Path) -> None:
    slide_id, path = next(iter(planted.slides.items()))

    async def use(client: Any) -> None:
        with Slide(path) as slide:
            width, mpp = slide.width, slide.mpp
            corner = slide.read(0, 0, 128, mpp=mpp)
        size = {"size_um": 256 * mpp, "px": 256}
        answer = await client.call_tool(
            "view", {"slide": slide_id, "x0": -128, "y0": -128.4, **size}
        )
        (seen,) = pictures(answer)
        assert answer.structured_content["inside"] == 0.25
        assert answer.structured_content["picture"]["x0"] == -128
        assert seen[:120, :120].min() > 250  # white, but for what JPEG makes of the edge
        assert np.abs(seen[128:, 128:].astype(float) - corner).mean() < 6
        # Of a small square there are only so many pixels.
        answer = await client.call_tool(
            "view", {"slide": slide_id, "x0": 0, "y0": 0, "size_um": 40 * mpp, "px": 1024}
        )
        assert pictures(answer)[0].shape == (40, 40, 3)
        assert answer.structured_content["picture"]["px0"] == 1
        for asked, code in (
            ({"x0": width, "y0": 0}, "outside_slide"),
            ({"x0": 0, "y0": -128.0 - 2 * width}, "outside_slide"),
            ({"x0": 0, "y0": 0, "size_um": 3 * mpp}, "too_small"),
            ({"x0": 0, "y0": 0, "size_um": 1e5}, "bad_view"),
            ({"x0": 0, "y0": 0, "px": 1025}, "invalid"),
            ({"x0": 0, "y0": 0, "px": 10.5}, "invalid"),
            ({"x0": 0, "y0": 0, "size_um": 0}, "invalid"),
            ({"x0": 1e300, "y0": 0}, "invalid"),
            ({"x0": "0", "y0": 0}, "invalid"),
            ({"x0": 0}, "invalid"),
            ({"x0": 0, "y0": 0, "level": 3}, "invalid"),
        ):
            found, text = await fault(client, "view", slide=slide_id, **{**size, **asked})
            assert found == code, (asked, text)
        code, _ = await fault(client, "view", slide=f"../{slide_id}", x0=0, y0=0, **size)
        assert code == "unknown_slide"

    run(planted.archive, "http", use, tmp_path)


def test_a_slide_that_is_gone_is_an_error_of_that_slide(
    planted: Planted, job_here: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "slides").mkdir()
    copies = [tmp_path / "slides" / path.name for path in planted.slides.values()][:2]
    for path, copy in zip(planted.slides.values(), copies, strict=False):
        copy.write_bytes(path.read_bytes())
    job_here(tmp_path / "slides", tmp_path / "archive", "encoder=texture")
    gone, there = (Archive(tmp_path / "archive").resolve(copy.name) for copy in copies)
    copies[0].unlink()

    async def use(client: Any) -> None:
        square = {"x0": 0, "y0": 0, "size_um": 100, "px": 64}
        for _ in range(3):
            code, text = await fault(client, "view", slide=gone, **square)
            assert code == "source_changed"
            assert str(tmp_path) not in text
            assert copies[0].name not in text
        await result(client, "view", slide=there, **square)

    run(tmp_path / "archive", "http", use, tmp_path)


# -- an agent that finds a lesion -----------------------------------------------------------------


@dataclass(kw_only=True)
class Pathologist:
    """A scripted agent. It knows one thing: lymphocytes side by side are blue, and not pink.

    It sees pictures alone. In one of 64 pixels for the whole slide it notes the bluest places,
    looks at each ever closer, and outlines what is blue at the bluest. All it knows of places is
    told by the pictures.

    Attributes:
        client: The agent's connection.
        said: Every step, for people.
    """

    client: Any
    said: list[str] = field(default_factory=list)

    async def find(self, slide: str) -> dict[str, float]:
        """Find the lymphoid aggregate: its centre in level-0 px, and its area in µm²."""
        about = await result(self.client, "describe_slide", slide=slide)
        mpp, side_um = about["mpp"], max(about["width_um"], about["height_um"])
        middle = about["width"] / 2, about["height"] / 2
        whole, place = await self._look(slide, *middle, size_um=side_um, px=64, mpp=mpp)
        ends = []
        for x, y in bluest(whole, place, um=64, most=3):
            for size_um in (side_um / 2, side_um / 4, 200):
                seen, place = await self._look(slide, x, y, size_um=size_um, px=200, mpp=mpp)
                ((x, y),) = bluest(seen, place, um=64, most=1, near_um=size_um / 4)
            ends.append((float(blue(seen, place, um=64).max()), x, y))
        _, x, y = max(ends)
        seen, place = await self._look(slide, x, y, size_um=250, px=500, mpp=mpp)
        smooth = blue(seen, place, um=16)
        mask = (smooth > smooth.max() / 2).astype(np.uint8)
        shapes, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        largest = max(shapes, key=cv2.contourArea)
        corners = cv2.approxPolyDP(largest, 3, True)[:, 0].tolist()
        points = [list(on_slide(place, u, v)) for u, v in corners]
        area = await result(self.client, "measure", slide=slide, points=points, what="area")
        moment = cv2.moments(largest)
        x0, y0 = on_slide(place, moment["m10"] / moment["m00"], moment["m01"] / moment["m00"])
        self.said.append(f"measure: {area['area_um2']:,.0f} µm² around ({x0:.0f}, {y0:.0f})")
        return {"x0": x0, "y0": y0, "area_um2": area["area_um2"]}

    async def _look(
        self, slide: str, x: float, y: float, *, size_um: float, px: int, mpp: float
    ) -> tuple[NDArray[np.uint8], dict[str, float]]:
        """View a square around a place."""
        x0, y0 = x - size_um / mpp / 2, y - size_um / mpp / 2
        asked = {"slide": slide, "x0": x0, "y0": y0, "size_um": size_um, "px": px}
        answer = await self.client.call_tool("view", asked)
        assert not answer.is_error, texts(answer)
        seen, place = pictures(answer)[0], answer.structured_content["picture"]
        ((u, v),) = bluest(seen, place, um=64, most=1)
        self.said.append(
            f"view: {size_um:.0f} µm at ({x0:.0f}, {y0:.0f}), bluest at ({u:.0f}, {v:.0f})"
        )
        return seen, place


def blue(seen: NDArray[np.uint8], place: dict[str, float], *, um: float) -> NDArray[np.float32]:
    """Optical density in red less that in blue, the mean of so many µm around each pixel.

    Haematoxylin absorbs red, eosin does not; a black pen absorbs both.
    """
    density = -np.log(np.maximum(seen, 1).astype(np.float32) / 244)
    side = max(1, round(um / place["mpp"]))
    return np.asarray(cv2.blur(density[..., 0] - density[..., 2], (side, side)), np.float32)


def bluest(
    seen: NDArray[np.uint8], place: dict[str, float], *, um: float, most: int, near_um: float = 1e9
) -> list[tuple[float, float]]:
    """Level-0 places of the bluest parts of a picture, not next to each other.

    Args:
        seen: The picture.
        place: Its place.
        um: Size of a part.
        most: Number of places.
        near_um: Distance from the middle within which they are looked for.
    """
    density = blue(seen, place, um=um)
    v, u = np.mgrid[: len(seen), : len(seen[0])]
    away = np.hypot(v - len(seen) / 2, u - len(seen[0]) / 2) * place["mpp"]
    density[away > near_um] = -np.inf
    found = []
    for _ in range(most):
        v, u = np.unravel_index(density.argmax(), density.shape)
        found.append(on_slide(place, float(u), float(v)))
        cv2.circle(density, (int(u), int(v)), max(1, round(1.5 * um / place["mpp"])), -np.inf, -1)
    return found


def on_slide(place: dict[str, float], u: float, v: float) -> tuple[float, float]:
    """Level-0 place of a pixel of a picture, its middle."""
    return place["x0"] + (u + 0.5) * place["px0"], place["y0"] + (v + 0.5) * place["px0"]


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_an_agent_finds_the_lesion_by_zooming(
    planted: Planted, tmp_path: Path, transport: str
) -> None:
    async def use(client: Any) -> None:
        for slide_id, rings in planted.outlines.items():
            agent = Pathologist(client=client)
            found = await agent.find(slide_id)
            story = "\n".join(agent.said)
            place = (found["x0"], found["y0"])
            inside = max(cv2.pointPolygonTest(ring, place, False) for ring in rings)
            assert inside > 0, story
            with Slide(planted.slides[slide_id]) as slide:
                area = max(cv2.contourArea(ring) for ring in rings) * slide.mpp**2
            assert 0.5 < found["area_um2"] / area < 2, (story, area)

    run(planted.archive, transport, use, tmp_path)


# -- the whole service ----------------------------------------------------------------------------


@pytest.mark.ray
def test_agents_come_through_the_proxy(service: Service) -> None:
    """Through HAProxy to parts that are other processes, and every call is audited."""
    asked = {"slide_id": "slide001", "text": "mucin"}
    with httpx.Client(base_url=service.url, timeout=60) as http:
        listed = http.get("/v1/slides").json()["data"]
        score = http.post("/v1/ground", json=asked).json()["score"]
        told = http.post("/v1/chat/completions", json=service.body(slide_id="slide001")).json()

    async def use(mode: str) -> None:
        async with over_http(service.url, mode=mode) as agent:
            named = {tool.name for tool in (await agent.list_tools()).tools}
            assert named == {tool.name for tool in TOOLS}
            assert (await result(agent, "list_slides"))["slides"] == listed
            grounded = await result(agent, "ground", slide="slide001", text="mucin")
            assert grounded["score"] == score
            answer = await result(agent, "ask", slide="slide001", question="What is seen?")
            assert answer["answer"] == told["choices"][0]["message"]["content"]
            assert (await result(agent, "describe_slide", slide="slide001"))["mpp"] == 0.5
            code, _ = await fault(agent, "describe_slide", slide="slide999")
            assert code == "unknown_slide"

    for mode in MODES:
        asyncio.run(use(mode))
        files = (service.tuned.run / "audit").glob("*.jsonl")
        newest = max(files, key=lambda file: file.stat().st_mtime_ns)
        lines = [json.loads(line) for line in newest.read_text().splitlines()]
        calls = [line for line in lines if line["action"] == "POST /mcp" and "tool" in line]
        seen = [(line["who"], line["tool"], line.get("error")) for line in calls[-5:]]
        assert seen == [
            ("local", "list_slides", None), ("local", "ground", None), ("local", "ask", None),
            ("local", "describe_slide", None), ("local", "describe_slide", "unknown_slide"),
        ]  # fmt: skip


# -- stdio ----------------------------------------------------------------------------------------


def test_answers_over_stdio_are_those_of_the_library(tuned: Tuned) -> None:
    """With a tuned run an agent asks the slide's model: the same answer as in this process."""
    question = "What is seen?"
    qa = SlideQA.from_run(tuned.run)
    archive = Archive(tuned.archive)
    whole = qa.ask(archive, "slide001", question, max_new_tokens=40)
    part = qa.ask(archive, "slide001", question, region=(0, 512, 512), max_new_tokens=40)
    chosen = qa.ask(archive, "slide001", question, ("mucin", "necrosis"))
    mpp = archive.slide("slide001")["mpp"]

    async def main() -> None:
        arguments = ("--archive", str(tuned.archive), "--run", str(tuned.run))
        async with over_stdio(*arguments, "-o", "limits.max_tokens=40", mode="legacy") as client:
            named = {tool.name for tool in (await client.list_tools()).tools}
            assert named >= {"search", "ground", "classify", "ask"}
            asked = {"slide": "slide001", "question": question}
            assert (await result(client, "ask", **asked))["answer"] == whole.answer
            square = {"x0": 0, "y0": 512, "size_um": 512 * mpp}
            assert (await result(client, "ask", **asked, **square))["answer"] == part.answer
            found = await result(client, "ask", **asked, choices=["mucin", "necrosis"])
            assert (found["answer"], found["choice"]) == (chosen.answer, chosen.choice)
            assert found["scores"] == pytest.approx(chosen.scores, abs=1e-4)
            code, _ = await fault(client, "ask", slide="slide001.svs", question=question)
            assert code == "unknown_slide"

    asyncio.run(main())


def test_only_messages_are_on_standard_output(planted: Planted, tmp_path: Path) -> None:
    """Handlers and children print on standard error; a closed input ends the process."""
    import subprocess

    noisy = tmp_path / "sitecustomize.py"
    noisy.write_text("import os, sys\nos.write(2, b'started\\n')\n")
    messages = [
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
            "protocolVersion": "2025-06-18", "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"}}},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": {
            "name": "view", "arguments": {
                "slide": next(iter(planted.slides)), "x0": 0, "y0": 0, "size_um": 200}}},
        {"jsonrpc": "2.0", "id": 3, "method": "tools/call", "params": {
            "name": "list_slides", "arguments": {}}},
    ]  # fmt: skip
    command = [sys.executable, "-m", "pathflip.cli", "mcp", "--archive", str(planted.archive)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tmp_path}"},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        for message in messages:
            process.stdin.write(f"{json.dumps(message)}\n")
        process.stdin.write("{ not a message\n")
        process.stdin.flush()
        answers: dict[int, Any] = {}
        while len(answers) < 3:
            answer = json.loads(process.stdout.readline())
            if answer.get("id") is not None:
                answers[answer["id"]] = answer
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 0
    assert all(json.loads(line)["jsonrpc"] == "2.0" for line in rest.splitlines())
    assert answers[1]["result"]["serverInfo"]["name"] == "pathflip"
    kinds = [block["type"] for block in answers[2]["result"]["content"]]
    assert kinds == ["text", "text", "image"]
    assert len(answers[3]["result"]["structuredContent"]["slides"]) == len(SCENES)


def test_a_wrong_start_says_why(tmp_path: Path) -> None:
    errors = tmp_path / "errors"

    async def main() -> None:
        with errors.open("w") as handle:
            async with over_stdio("--archive", str(tmp_path / "none"), errors=handle) as client:
                await client.list_tools()

    with pytest.raises((MCPError, ExceptionGroup)):
        asyncio.run(main())
    assert "pathflip: There is no archive" in errors.read_text()
