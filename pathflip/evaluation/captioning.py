"""Evaluation of generated captions against the slides' own.

BLEU-1/2/3 are sacrebleu's over the corpus on its 13a tokens, without smoothing; ROUGE-L is the mean
F of rouge_score without stemming; similarity is the mean cosine of a sentence-embedding model, or,
under its own name, of TF-IDF vectors where no such model is given.

In scripts that put no space between words (Chinese, Japanese, Thai, …) each character is a token,
as in sacrebleu's ``zh``; in all others words are, with their accents. English is measured as ever.

Overlap of words says little of whether a finding is right. Where the truth is known, as in the
synthetic cohort, ``named`` and ``invented`` count findings instead: of those that are there, the
share a caption names; of those that are not, the share it names all the same. ``unsupported`` is
the share of sentences that no image could support: by the planted truth there, elsewhere estimated
by the rules that tuning leaves sentences out by (:mod:`pathflip.groundable`).

Shapes: n captions, d width of an embedding.
"""

from __future__ import annotations

import json
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pathflip import groundable, hub_cache
from pathflip.errors import CheckpointError, ConfigError
from pathflip.evaluation.bootstrap import interval, patient_weights, support
from pathflip.evaluation.encode import SlideRow, captions_of, list_slides
from pathflip.packaged import text_model
from pathflip.progress import Progress, Report
from pathflip.slide_qa import tuned_name
from pathflip.text import denies, split_sentences

if TYPE_CHECKING:
    from pathflip.archive import Archive
    from pathflip.checkpoints import Run
    from pathflip.slide_qa import SlideQA

SLIDES_AT_ONCE = 16
_MOST_TOKENS = 512
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts to vectors [n, d] of length 1."""


def caption_metrics(
    predicted: Sequence[str], reference: Sequence[str], *, embed: Embed | None = None
) -> dict[str, Any]:
    """Measure captions against references, text i against text i.

    Args:
        predicted: Captions of the model [n].
        reference: Captions of the slides [n].
        embed: Sentence embeddings; without, ``tfidf_similarity`` takes their place.

    Returns:
        {"n", "bleu1", "bleu2", "bleu3": None where no reference has so many tokens, "rouge_l",
        "embedding_similarity" or "tfidf_similarity", "length_ratio": words written per word of the
        references, "tokens": the tokeniser}.

    Raises:
        ValueError: There is none, or the lists differ in length.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    if not predicted or len(predicted) != len(reference):
        raise ValueError(f"{len(predicted)} captions for {len(reference)} references")
    found: dict[str, Any] = {"n": len(predicted)}
    spaced = [[_spaced(text) for text in texts] for texts in (predicted, reference)]
    tokens = "13a" if spaced == [list(predicted), list(reference)] else "13a, characters"
    predicted, reference = spaced
    cut: Any = Tokenizer13a()  # type: ignore[no-untyped-call]
    longest = max(len(cut(text).split()) for text in reference)
    for order in (1, 2, 3):
        bleu = BLEU(
            max_ngram_order=order, tokenize="13a", smooth_method="none", effective_order=False
        )
        score = bleu.corpus_score(predicted, [reference]).score / 100
        found[f"bleu{order}"] = score if order <= max(longest, 1) else None
    rouge = RougeScorer(["rougeL"], tokenizer=_Words())
    found["rouge_l"] = float(
        np.mean(
            [
                rouge.score(right, said)["rougeL"].fmeasure
                for said, right in zip(predicted, reference, strict=True)
            ]
        )
    )
    if embed is None:
        found["tfidf_similarity"] = _tfidf_similarity(predicted, reference)
    else:
        found["embedding_similarity"] = float((embed(predicted) * embed(reference)).sum(1).mean())
    words = [sum(len(text.split()) for text in texts) for texts in (predicted, reference)]
    return found | {"length_ratio": words[0] / max(words[1], 1), "tokens": tokens}


_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3000-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff65\U00020000-\U0003ffff])"
)
"""Characters of scripts without spaces between words, and their punctuation."""


def _spaced(text: str) -> str:
    """Return a text with spaces around each character of a script that puts none between words."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text)
    return " ".join(_UNSPACED.sub(r" \1 ", text).split()) if _UNSPACED.search(text) else text


class _Words:
    """Tokenizer of rouge_score: what its own makes of English, and the words of other scripts."""

    def tokenize(self, text: str) -> list[str]:
        return _tokens(text)


def _tokens(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, their marks and digits."""
    kept = (char if unicodedata.category(char)[0] in "LMN" else " " for char in text.lower())
    return "".join(kept).split()


def evaluate_captions(
    archive: Archive,
    run: Run,
    *,
    answerer: SlideQA | None = None,
    predictions: Mapping[str, str] | None = None,
    split: str = "test",
    source: str | None = None,
    embed: Embed | None = None,
    max_new_tokens: int = 256,
    resamples: int = 1000,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Caption the slides of a split that have a caption, and measure.

    Args:
        archive: Archive with slides, features and captions.
        run: Run whose captions are measured.
        answerer: Model that writes them, greedily; may be left out where they are given.
        predictions: {slide: caption} that was written already, by ``pathflip caption --out`` or
            under other names of the slides.
        split: Split to measure; ``all`` for every slide.
        source: Source of the reference captions; by default the first each slide has.
        embed: See :func:`caption_metrics`.
        max_new_tokens: Maximum length of a caption, in tokens.
        resamples: Number of bootstrap resamples of patients, 0 for no intervals.
        seed: Seed of the bootstrap.
        progress: Called while captions are written.

    Returns:
        As :func:`caption_metrics`, with "split", "model", "captions" {slide_id: text}, "baseline":
        the same metrics of one caption for all slides, the reference that is most like the others;
        "unsupported", see :func:`unsupported_sentences`; and where the truth is known "findings",
        see :func:`finding_metrics`.

    Raises:
        ConfigError: No slide of the split has a caption, or one has none among ``predictions``.
    """
    slides = list_slides(archive, run, splits=None if split == "all" else (split,))
    texts = captions_of(archive, slides, source=source)
    slides = [slide for slide in slides if slide.slide_id in texts]
    reference = [texts[slide.slide_id] for slide in slides]
    if predictions is not None:
        predictions = _by_slide(archive, predictions)
        if lost := [slide.slide_id for slide in slides if slide.slide_id not in predictions]:
            raise ConfigError(
                f"{len(lost)} slides of split {split} have no caption there, {lost[0]} for one.",
                hint="Run the same pathflip caption --out command again: it adds what is missing.",
                code="missing_captions",
            )
        predicted = [predictions[slide.slide_id] for slide in slides]
    elif answerer is not None:
        predicted = _write(archive, answerer, slides, max_new_tokens, progress)
    else:
        raise ValueError("neither an answerer nor predictions")
    found = caption_metrics(predicted, reference, embed=embed)
    typical = [_most_typical(reference)] * len(reference)
    found["baseline"] = caption_metrics(typical, reference, embed=embed)
    patients = [slide.patient_id or f"slide {slide.slide_id}" for slide in slides]
    truth = planted(slides)
    found["unsupported"] = unsupported_sentences(
        predicted, planted=truth is not None, patients=patients, resamples=resamples, seed=seed
    )
    if truth is not None:
        found["findings"] = finding_metrics(
            predicted, truth, patients=patients, resamples=resamples, seed=seed
        )
        found["baseline"]["findings"] = finding_metrics(typical, truth, resamples=0)
    said = {slide.slide_id: text for slide, text in zip(slides, predicted, strict=True)}
    return found | {"split": split, "model": tuned_name(run), "captions": said}


def unsupported_sentences(
    captions: Sequence[str],
    *,
    planted: bool,
    patients: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the share of sentences that no image could support.

    Args:
        captions: Captions to measure [n].
        planted: Whether they are of the synthetic cohort, where it is known; otherwise it is an
            estimate by the wording, which sees no claim that sounds like a finding.
        patients: Patient of each caption [n], for an interval by resampling patients.
        resamples: Number of resamples; 0 for no interval.
        seed: Seed of the resamples.

    Returns:
        {"share", "sentences": number, "by": "planted" or "rules VERSION", "what": {reason:
        sentences}, "examples", "ci"}; the share is None without a sentence.
    """
    from pathflip.synth.claims import unsupported_kind

    reason = unsupported_kind if planted else groundable.unsupported
    sentences = [split_sentences(caption) for caption in captions]
    reasons = [[reason(text) for text in own] for own in sentences]
    counts = np.array([[sum(why is not None for why in own), len(own)] for own in reasons])
    said, of = counts.sum(axis=0).tolist()
    bad = [
        (why, text)
        for own, its in zip(reasons, sentences, strict=True)
        for why, text in zip(own, its, strict=True)
        if why is not None
    ]
    found: dict[str, Any] = {
        "share": said / of if of else None,
        "sentences": of,
        "by": "planted" if planted else f"rules {groundable.VERSION}",
        "what": dict(Counter(why for why, _ in bad).most_common()),
        "examples": [text for text, _ in Counter(text for _, text in bad).most_common(5)],
    }
    if resamples and patients is not None and of:
        weights = patient_weights(patients, resamples=resamples, seed=seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = (weights @ counts[:, 0]) / (weights @ counts[:, 1])
        owners = [p for p, n in zip(patients, counts[:, 1], strict=True) for _ in range(int(n))]
        found["ci"] = interval(drawn, found["share"], support(owners))
    return found


def _by_slide(archive: Archive, predictions: Mapping[str, str]) -> dict[str, str]:
    """Return {slide_id: caption}; captions of slides that are not in the archive are left out."""
    matches = archive.names().match(predictions.items(), lambda item: (item[0], False))
    if matches.ambiguous:
        raise ConfigError(
            f"{len(matches.ambiguous)} captions match several slides of {archive.uri} each, "
            f"{matches.ambiguous[0]} for one.",
            hint="Name slides by slide_id, or by a path that only one of them has.",
        )
    found: dict[str, str] = {}
    for (name, text), (slide,) in matches.found:
        if found.setdefault(slide, text) != text:
            raise ConfigError(
                f"Slide {slide} has two captions, {name} for one.", hint="Keep one of them."
            )
    return found


def read_predictions(path: str | Path) -> dict[str, str]:
    """Read captions that ``pathflip caption --out`` wrote: {name of a slide: caption}.

    Raises:
        ConfigError: The file cannot be read, or a line of it is something else.
    """
    from pathflip.interop.tables import bad_line, read_text

    found = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            row = json.loads(line)
            if "error" not in row:
                found[str(row["slide_id"])] = str(row["caption"])
        except (ValueError, KeyError, TypeError):
            raise bad_line(path, number, "no caption of a slide") from None
    return found


def sentence_embedder(model: str | Path, *, device: str = "cpu") -> Embed:
    """Load a sentence-embedding model (safetensors only), also one of sentence-transformers.

    Pooling is what its ``1_Pooling/config.json`` says (mean, first or last token), else the last
    token, as Qwen3-Embedding wants it. Texts are cut at its ``max_seq_length``, 512 tokens at most.

    Args:
        model: ``minilm``, where its package is installed, ``owner/name`` on the hub, or a folder.
        device: Device it runs on.

    Raises:
        CheckpointError: The model cannot be loaded, or pools in another way.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = text_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, padding_side="right", trust_remote_code=False
        )
        network = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"The embedding model {model} cannot be loaded: {str(error).splitlines()[0]}",
            hint="Give minilm, a folder or hub id of a text model, or leave --embedder out.",
            code="missing",
        ) from error
    network = network.to(device).eval()
    how, most = _pooling(source), _longest(source)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = []
        for at in range(0, len(texts), SLIDES_AT_ONCE):
            batch = tokenizer(
                list(texts[at : at + SLIDES_AT_ONCE]), padding=True, truncation=True,
                max_length=most, return_tensors="pt",
            ).to(device)  # fmt: skip
            with torch.no_grad():
                states = network(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            if how == "mean":
                pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            else:  # padding is on the right, so that positions are those of the text alone
                last = batch["attention_mask"].sum(1) - 1
                place = torch.zeros_like(last) if how == "cls" else last
                pooled = states[torch.arange(len(states)), place]
            vectors.append(torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy())
        return np.concatenate(vectors)

    return embed


def _settings(source: str, name: str) -> dict[str, Any] | None:
    """Return a file of settings of a model in a folder or on the hub; None where it has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    found: dict[str, Any] | None = None if path is None else json.loads(Path(path).read_bytes())
    return found


def _longest(source: str) -> int:
    """Return the number of tokens a model's texts are cut at."""
    settings = _settings(source, "sentence_bert_config.json") or {}
    return min(settings.get("max_seq_length") or _MOST_TOKENS, _MOST_TOKENS)


def _pooling(source: str) -> str:
    settings = _settings(source, hub_cache.POOLING)
    if settings is None:
        if _settings(source, "modules.json") is not None:
            raise CheckpointError(
                f"The embedding model {source} lacks {hub_cache.POOLING}, which says how it pools.",
                hint="Copy the whole model, or pull it again: pathflip models pull.",
                code="pooling",
            )
        return "lasttoken"
    on = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    known = {f"pooling_mode_{name}": name for name in ("lasttoken", "cls")}
    known["pooling_mode_mean_tokens"] = "mean"
    known["pooling_mode_cls_token"] = "cls"
    if len(on) != 1 or on[0] not in known:
        raise CheckpointError(
            f"The pooling of {source} is not supported: {', '.join(on) or 'none'}.",
            hint="Use a model that pools by the mean, the first or the last token.",
            code="pooling",
        )
    return known[on[0]]


def _write(
    archive: Archive,
    answerer: SlideQA,
    slides: Sequence[SlideRow],
    max_new_tokens: int,
    progress: Report | None,
) -> list[str]:
    from pathflip.models.chat_template import CAPTION_INSTRUCTION

    written: list[str] = []
    start = time.monotonic()
    for at in range(0, len(slides), SLIDES_AT_ONCE):
        prompts = []
        for slide in slides[at : at + SLIDES_AT_ONCE]:
            _, prefix = answerer.visual_prefix(archive, slide.slide_id)
            prompts.append(answerer.model.embed_prompt(prefix, CAPTION_INSTRUCTION, kind="caption"))
        written += answerer.model.generate(prompts, max_new_tokens=max_new_tokens)
        if progress is not None:
            seconds = time.monotonic() - start
            done = Progress(what="caption", done=len(written), total=len(slides), seconds=seconds)
            progress(done)
    return written


def _vectors(fit: Sequence[str], *texts: Sequence[str]) -> list[Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(tokenizer=_tokens, token_pattern=None).fit(map(_spaced, fit))
    return [vectorizer.transform(map(_spaced, own)) for own in texts]


def _tfidf_similarity(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """Return the mean cosine of TF-IDF vectors weighted by the references; empty texts count 0."""
    if not any(re.search(r"\w", text) for text in reference):
        return 0.0
    said, right = _vectors(reference, predicted, reference)
    return float(said.multiply(right).sum(axis=1).mean())


def _most_typical(reference: Sequence[str]) -> str:
    """Return the reference with the largest mean cosine to all of them."""
    if not any(re.search(r"\w", text) for text in reference):
        return reference[0]
    (rows,) = _vectors(reference, reference)
    return reference[int(np.asarray(rows @ rows.mean(axis=0).T).argmax())]


# -- findings of the synthetic cohort -------------------------------------------------------------


def planted(slides: Sequence[SlideRow]) -> list[frozenset[str]] | None:
    """Return the findings of each slide; None unless all have the synthetic cohort's labels."""
    from pathflip.synth.text import FORMS

    if not slides or any(
        slide.labels.get(name) not in ("0", "1") for name in FORMS for slide in slides
    ):
        return None
    return [frozenset(name for name in FORMS if slide.labels[name] == "1") for slide in slides]


def named_findings(caption: str) -> frozenset[str]:
    """Return the findings of the synthetic cohort that a caption affirms.

    A sentence names a finding when it has a word that captions use for this finding and for nothing
    else; sentences that deny name none.
    """
    found: set[str] = set()
    for sentence in split_sentences(caption):
        if not denies(sentence):
            words = _words(sentence)
            found |= {name for name, own in _own_words().items() if words & own}
    return frozenset(found)


def finding_metrics(
    captions: Sequence[str],
    truth: Sequence[frozenset[str]],
    *,
    patients: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the findings that captions name, miss and invent.

    Args:
        captions: Captions to measure [n].
        truth: The findings that are there [n].
        patients: Patient of each caption [n], for 95 % intervals by resampling patients.
        resamples: Number of resamples; 0 for no intervals.
        seed: Seed of the resamples.

    Returns:
        {"named", "invented": shares over all findings of all slides; "by_finding": {name: {"named",
        "invented"}}; "ci": {"named", "invented"}}; None where nothing of the kind was planted.
    """
    from pathflip.synth.text import FORMS

    said = [named_findings(caption) for caption in captions]
    there = np.array([[name in own for name in FORMS] for own in truth], np.float64)  # [n, F]
    told = np.array([[name in own for name in FORMS] for own in said], np.float64)
    absent = 1 - there

    def share(part: NDArray[np.float64]) -> float | None:
        return float((told * part).sum() / part.sum()) if part.any() else None

    found: dict[str, Any] = {
        "named": share(there),
        "invented": share(absent),
        "by_finding": {
            name: {
                kind: float(told[part[:, i] > 0, i].mean()) if part[:, i].any() else None
                for kind, part in (("named", there), ("invented", absent))
            }
            for i, name in enumerate(FORMS)
        },
    }
    if resamples and patients is not None:
        weights = patient_weights(patients, resamples=resamples, seed=seed)
        found["ci"] = {}
        for kind, part in (("named", there), ("invented", absent)):
            count = part.sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn = (weights @ (told * part).sum(1)) / (weights @ count)
            asked = [p for p, n in zip(patients, count, strict=True) for _ in range(int(n))]
            found["ci"][kind] = interval(drawn, found[kind], support(asked))
    return found


_ABOUT = {
    "grade": "tumour", "nuclei": "tumour", "pattern": "tumour", "til": "lymphoid",
    "extent": "necrosis",
}  # fmt: skip
"""Which finding the details of a caption are about."""


@cache
def _own_words() -> dict[str, frozenset[str]]:
    """Return {finding: words of its wordings that captions use for nothing else}."""
    from pathflip.synth import text

    rng = np.random.default_rng(0)
    said = {name: _words(*text.FORMS[name], text.ABSENT_NAMES[name]) for name in text.FORMS}
    other = _words(
        "sections show", *text.ORGAN_NAMES.values(), *text.GENES.values(),
        *(form for forms in text.GENE_FORMS.values() for form in forms),
        *(say(rng) for say in text.DISTRACTORS),
    )  # fmt: skip
    details = {
        kind: _words(*(form for forms in values.values() for form in forms))
        for kind, values in text.DETAILS.items()
    }
    return {
        name: words.difference(
            other,
            *(said[one] for one in said if one != name),
            *(details[kind] for kind in details if _ABOUT[kind] != name),
        )
        for name, words in said.items()
    }


def _words(*texts: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", " ".join(texts).lower()))
