"""Embeds texts and pictures by the model whose embeddings are searched."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip import tracing
from pathflip.errors import ConfigError, EncoderError
from serve.limits import RequestError

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.encoders import Encoder
    from pathflip.encoders.mrplip import PatchModel

MAX_SCALED = 32 << 20
"""Largest picture, pixels at the archive's resolution: two regions of 4096 x 4096 px."""
PROMPTS_AT_ONCE = 16
"""Prompts of classes between which a search by the same model may go first."""
MAX_PROMPTS = 10_000
"""Prompts whose vectors are kept: 30 MB at 768 numbers each."""

logger = logging.getLogger(__name__)


class Embedder:
    """Service part that embeds the texts and pictures of requests.

    Args:
        archive: URI of the archive whose encoder and tiling pictures are embedded with.
        run: Folder of the run; or the run, where another part has loaded it.
        encoder: Spec to load the patch encoder by, such as ``uni2=/path``; the name the run was
            trained with by default. Where it cannot be loaded, only pictures are refused.
        device: ``cpu``, ``cuda`` or ``auto``.
        patches: Spec of the patch model (``mrplip:RUN``) whose features are searched and segmented
            by words; None for none. Where its base encoder cannot be loaded, its pictures are
            refused.
        computing: Lock of the run, where another part has it, too.
    """

    def __init__(
        self,
        archive: str,
        run: str | Run,
        *,
        encoder: str | None = None,
        device: str = "cpu",
        patches: str | None = None,
        computing: threading.Lock | None = None,
    ) -> None:
        from pathflip.archive import Archive
        from pathflip.checkpoints import Run, load_run
        from pathflip.compat import check_fits
        from pathflip.geometry import Tiling

        opened = Archive(archive)
        self.run: Run = run if isinstance(run, Run) else load_run(run, device=device)
        self.computing = computing or threading.Lock()
        name = check_fits(opened, self.run)
        self.tiling = Tiling(**opened.tiling())
        self.encoder: Encoder | None = None
        # One call of a model at a time: tokenizers are not thread-safe. The patch model has its own
        # lock, so that nothing asked of it holds up searches for slides and regions.
        self.lock, self.patch_lock = asyncio.Lock(), asyncio.Lock()
        # Of all class lists one waits for the patch model at a time: a search waits for one step.
        self.turn = asyncio.Lock()
        self._prompts: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        self.created = int(time.time())
        try:
            self.encoder = _load_encoder(opened, name, encoder, device)
        except (EncoderError, ConfigError) as error:
            logger.warning("Pictures are not taken: %s", error)
        self.patches: PatchModel | None = None
        self.patch_encoder: Encoder | None = None
        if patches is not None:
            self._load_patches(opened, patches, device)
        # Warm-up: the first text takes longest.
        self._texts(["tissue"])

    def _load_patches(self, archive: Archive, spec: str, device: str) -> None:
        from pathflip.compat import check_weights
        from pathflip.encoders import load_encoder, patch_model
        from pathflip.encoders.mrplip import MRPLIPEncoder
        from pathflip.encoders.neural import pick_device

        model = patch_model(spec, patch_um=self.tiling.patch_um, device=str(pick_device(device)))
        check_weights(archive, model.info.name, encoder=model.info)
        self.patches = model
        try:
            base = load_encoder(model.base, device=device)
            self.patch_encoder = MRPLIPEncoder(model, base)
        except EncoderError as error:
            logger.warning("Pictures are not taken for patches: %s", error)

    async def describe(self) -> dict[str, Any]:
        """``id``, ``fingerprint`` and ``created`` (seconds since 1970) of the model.

        ``patches`` says the same of the patch model, or is None.
        """
        patches = self.patches
        return {
            "id": self.run.name,
            "fingerprint": self.run.fingerprint,
            "created": self.created,
            "patches": None if patches is None else {
                "id": patches.info.name,
                "fingerprint": patches.run.fingerprint,
                "created": self.created,
            },
        }  # fmt: skip

    async def texts(self, texts: Sequence[str]) -> dict[str, Any]:
        """Embed texts.

        Returns:
            {"model", "fingerprint", "vectors": float32 [n, d] of length 1, "tokens"}.
        """
        async with self.lock:
            with tracing.span("text tower", texts=len(texts)):
                return await asyncio.to_thread(self._texts, list(texts))

    async def patch_text(self, text: str) -> dict[str, Any]:
        """Embed a text by the patch model.

        Returns:
            {"model": the patch model's name in the archive, "vectors": float32 [1, d] of length 1}.

        Raises:
            RequestError: ``no_patches``: there is none.
        """
        async with self.patch_lock:
            with tracing.span("text tower", texts=1):
                return await asyncio.to_thread(self._patch_text, text)

    async def patch_image(self, pixels: NDArray[np.uint8], *, mpp: float) -> dict[str, Any]:
        """Embed a picture by the patch model: the mean of its patches; see :meth:`patch_text`.

        Raises:
            ConfigError: As :meth:`image`.
            RequestError: ``no_patches``, ``no_encoder``.
        """
        self._patch_model()
        self._check_size(pixels, mpp)
        if self.patch_encoder is None:
            raise RequestError("This service has no encoder for pictures.", code="no_encoder")
        async with self.patch_lock:
            with tracing.span("patch encoder"):
                return await asyncio.to_thread(self._patch_image, pixels, mpp)

    async def classes(self, classes: Mapping[str, list[str]], *, templates: str) -> dict[str, Any]:
        """Embed classes by the patch model: the means of their prompts.

        Prompts are encoded a few at a time, in turns with other requests, and those of late are
        kept: classes that come again cost nothing.

        Args:
            classes: {class: names}.
            templates: ``single`` or ``ensemble``.

        Returns:
            {"model", "vectors": float32 [C, d] of length 1, "tau"}.

        Raises:
            RequestError: ``no_patches``.
        """
        from pathflip.evaluation.patch_text import class_prompts, prompt_means
        from pathflip.evaluation.prompts import TEMPLATES

        model = self._patch_model()
        wording = TEMPLATES if templates == "ensemble" else TEMPLATES[:1]
        prompts = class_prompts(classes, templates=wording)
        vectors = await self._prompt_vectors([prompt for one in prompts for prompt in one])
        return {
            "model": model.info.name,
            "vectors": prompt_means(prompts, vectors),
            "tau": float(model.run.model.tau.detach()),
        }

    async def _prompt_vectors(self, prompts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return the vectors [d] of prompts, from memory where they are kept."""
        found: dict[str, NDArray[np.float32]] = {}
        left = list(dict.fromkeys(prompts))
        while True:
            for prompt in left:
                if prompt in self._prompts:
                    found[prompt] = self._prompts[prompt]
                    self._prompts.move_to_end(prompt)
            left = [prompt for prompt in left if prompt not in found]
            if not left:
                return found
            async with self.turn, self.patch_lock:
                # Meanwhile another request may have had the same prompts encoded.
                part = [prompt for prompt in left if prompt not in self._prompts]
                part = part[:PROMPTS_AT_ONCE]
                if not part:
                    continue
                with tracing.span("text tower", texts=len(part)):
                    vectors = await asyncio.to_thread(self._patch_texts, part)
            for prompt, vector in zip(part, vectors, strict=True):
                found[prompt] = self._prompts[prompt] = vector.copy()  # not a view of all
            while len(self._prompts) > MAX_PROMPTS:
                self._prompts.popitem(last=False)

    async def image(self, pixels: NDArray[np.uint8], *, mpp: float) -> dict[str, Any]:
        """Embed a picture, cut into one region or more, as the model embeds a slide.

        Args:
            pixels: RGB [h, w, 3].
            mpp: µm per pixel of the picture.

        Returns:
            As :meth:`texts`, one vector.

        Raises:
            ConfigError: At the archive's scale it is smaller than a patch, or larger than
                :data:`MAX_SCALED`.
            RequestError: ``no_encoder``.
        """
        if self.encoder is None:
            raise RequestError("This service has no encoder for pictures.", code="no_encoder")
        self._check_size(pixels, mpp)
        async with self.lock:
            with tracing.span("slide model"):
                return await asyncio.to_thread(self._image, pixels, mpp)

    def _check_size(self, pixels: NDArray[np.uint8], mpp: float) -> None:
        scaled = pixels.shape[0] * pixels.shape[1] * (mpp / self.tiling.mpp) ** 2
        if scaled > MAX_SCALED:
            raise ConfigError(
                f"At the archive's {self.tiling.mpp:g} µm/px the picture has {scaled:,.0f} pixels; "
                f"at most {MAX_SCALED:,} are read."
            )

    def _patch_model(self) -> PatchModel:
        if self.patches is None:
            raise RequestError(
                "This service has no patch model: it was started without --patches.",
                code="no_patches",
            )
        return self.patches

    def _patch_text(self, text: str) -> dict[str, Any]:
        model = self._patch_model()
        if not text.strip():
            raise ConfigError("A text is empty.")
        return {"model": model.info.name, "vectors": self._patch_texts([text])}

    def _patch_texts(self, texts: list[str]) -> NDArray[np.float32]:
        from pathflip.search import embed_texts

        return embed_texts(self._patch_model().run, texts)

    def _patch_image(self, pixels: NDArray[np.uint8], mpp: float) -> dict[str, Any]:
        from pathflip.image_query import picture_regions

        assert self.patch_encoder is not None
        regions = picture_regions(pixels, encoder=self.patch_encoder, tiling=self.tiling, mpp=mpp)
        mean = np.concatenate(regions).mean(axis=0, dtype=np.float64)
        vector = (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32)
        return {"model": self.patch_encoder.name, "vectors": vector[None]}

    def _texts(self, texts: list[str]) -> dict[str, Any]:
        from pathflip.search import embed_texts

        if not all(text.strip() for text in texts):
            raise ConfigError("A text is empty.")
        with self.computing:
            vectors = embed_texts(self.run, texts)
            tokens = self.run.model.tokenizer(texts, truncation=False)["input_ids"]
        return self._answer(vectors, sum(map(len, tokens)))

    def _image(self, pixels: NDArray[np.uint8], mpp: float) -> dict[str, Any]:
        from pathflip.image_query import picture_regions
        from pathflip.search import embed_regions

        assert self.encoder is not None
        regions = picture_regions(pixels, encoder=self.encoder, tiling=self.tiling, mpp=mpp)
        with self.computing:
            vector = embed_regions(self.run, regions, slots=self.tiling.slots)
        return self._answer(vector[None], 0)

    def _answer(self, vectors: NDArray[np.float32], tokens: int) -> dict[str, Any]:
        return {
            "model": self.run.name,
            "fingerprint": self.run.fingerprint,
            "vectors": vectors,
            "tokens": tokens,
        }


def _load_encoder(archive: Any, name: str, spec: str | None, device: str) -> Encoder:
    from pathflip.compat import check_weights
    from pathflip.encoders import load_encoder

    patch_um = float(archive.tiling()["patch_um"])
    encoder = load_encoder(spec or name, device=device, patch_um=patch_um)
    check_weights(archive, name, encoder=encoder)
    return encoder
