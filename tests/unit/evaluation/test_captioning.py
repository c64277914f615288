"""Caption metrics against other libraries, slow references and texts whose truth is known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from pathflip.errors import CheckpointError, ConfigError
from pathflip.evaluation.captioning import (
    caption_metrics,
    evaluate_captions,
    finding_metrics,
    named_findings,
    planted,
    read_predictions,
    sentence_embedder,
    unsupported_sentences,
)
from pathflip.evaluation.encode import SlideRow
from pathflip.groundable import VERSION
from pathflip.synth import text
from pathflip.synth.cohort import sample_scenes
from tests.hub import put_in_cache

SCENES = sample_scenes(slides=60, seed=5)
REFERENCE = [" ".join(s.text for s in text.sentences(scene)) for scene in SCENES[:30]]
PREDICTED = [" ".join(s.text for s in text.sentences(scene)) for scene in SCENES[30:]]
"""Reports of other slides: some words in common, others not."""


def test_bleu_is_nltks() -> None:
    from nltk.translate.bleu_score import corpus_bleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    found = caption_metrics(PREDICTED, REFERENCE)
    cut = Tokenizer13a()
    said = [cut(one).split() for one in PREDICTED]
    right = [[cut(one).split()] for one in REFERENCE]
    for order in (1, 2, 3):
        expected = corpus_bleu(right, said, weights=[1 / order] * order)
        assert 0.05 < expected < 0.95
        assert found[f"bleu{order}"] == pytest.approx(expected, abs=1e-9)


def lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    scores = []
    for said, right in zip(PREDICTED, REFERENCE, strict=True):
        a, b = (re.findall(r"[a-z0-9]+", one.lower()) for one in (said, right))
        scores.append(2 * lcs(a, b) / (len(a) + len(b)))
    assert caption_metrics(PREDICTED, REFERENCE)["rouge_l"] == pytest.approx(np.mean(scores))


def test_equal_captions_and_captions_with_nothing_in_common() -> None:
    same = caption_metrics(REFERENCE, REFERENCE)
    for name in ("bleu1", "bleu2", "bleu3", "rouge_l", "tfidf_similarity", "length_ratio"):
        assert same[name] == pytest.approx(1)
    assert (same["n"], same["tokens"]) == (30, "13a")
    other = caption_metrics(["qq ww zz"] * 30, REFERENCE)
    for name in ("bleu1", "bleu2", "bleu3", "rouge_l", "tfidf_similarity"):
        assert other[name] == pytest.approx(0)
    silent = caption_metrics([""] * 30, REFERENCE)
    assert (silent["bleu1"], silent["tfidf_similarity"], silent["length_ratio"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("caption", "one_off", "none"),
    [
        ("浸润性癌，二级。良性结肠组织。", "浸润性癌，三级。良性结肠组织。", "脂肪"),
        ("浸潤性の癌です。断端は陰性。", "浸潤性の癌です。断端は陽性。", "リンパ"),
        ("มะเร็งเต้านม ระยะสอง", "มะเร็งเต้านม ระยะสาม", "ใจดี"),
        ("Инвазивная карцинома молочной железы.", "Инвазивная карцинома грудной железы.", "Жир."),
        ("यह स्तन कैंसर का मामला है।", "यह फेफड़े कैंसर का मामला है।", "वसा"),
        ("سرطان الثدي الغازي درجة ثانية", "سرطان الثدي الغازي درجة ثالثة", "دهن"),
        ("Muköses Karzinom mäßiger Größe.", "Muköses Karzinom geringer Größe.", "Fett"),
        ("침윤성 유방암 2등급 입니다", "침윤성 유방암 3등급 입니다", "지방"),
    ],
)
def test_captions_of_every_script_are_measured(caption: str, one_off: str, none: str) -> None:
    names = ("bleu1", "bleu2", "bleu3", "rouge_l", "tfidf_similarity", "length_ratio")
    same = caption_metrics([caption], [caption])
    assert [same[name] for name in names] == pytest.approx([1] * 6)
    near, far = (caption_metrics([said], [caption]) for said in (one_off, none))
    for name in names[:2] + names[3:5]:
        assert 0.2 < near[name] < 1, name
        assert far[name] < near[name], name


def test_tokens_of_scripts_without_spaces_are_characters() -> None:
    # By hand: 6 characters with their stop against 6, of which one differs, none at the end.
    found = caption_metrics(["浸润性癌高。"], ["浸润性癌低。"])
    assert found["tokens"] == "13a, characters"
    assert found["bleu1"] == pytest.approx(5 / 6)
    assert found["bleu2"] == pytest.approx((5 / 6 * 3 / 5) ** 0.5)
    assert found["rouge_l"] == pytest.approx(4 / 5)  # the stop is no word
    # decomposed letters are letters
    same = caption_metrics(["Karzinom ma\u0308\u00dfig"], ["Karzinom m\u00e4\u00dfig"])
    assert same["rouge_l"] == pytest.approx(same["tfidf_similarity"]) == pytest.approx(1)


def test_an_order_that_no_reference_has_is_no_zero() -> None:
    found = caption_metrics(["Adenoma.", "Lipoma."], ["Adenoma.", "Lipoma."])
    assert [found["bleu1"], found["bleu2"]] == pytest.approx([1, 1])
    assert found["bleu3"] is None
    longer = caption_metrics(["Adenoma."], ["Tubular adenoma of the colon."])
    assert longer["bleu3"] == 0


def test_similarity_has_the_name_of_what_made_it() -> None:
    def letters(texts):  # a sentence embedding that a person can check
        rows = np.array([[one.count(letter) for letter in "abc"] for one in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    found = caption_metrics(["aab", "c"], ["ab", "bc"], embed=letters)
    expected = (3 / np.sqrt(5 * 2) + 1 / np.sqrt(2)) / 2
    assert found["embedding_similarity"] == pytest.approx(expected)
    assert "tfidf_similarity" not in found


def test_no_captions_or_too_few() -> None:
    with pytest.raises(ValueError, match="1 captions for 30"):
        caption_metrics(["a"], REFERENCE)
    with pytest.raises(ValueError, match="0 captions"):
        caption_metrics([], [])


# -- findings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("finding", text.FORMS)
def test_every_wording_names_its_finding_and_no_other(finding: str) -> None:
    for form in text.FORMS[finding]:
        assert named_findings(form + ".") == {finding}
        assert named_findings(f"Sections show smooth muscle. {form}.") == {finding}
    for form in text.NEGATIONS:
        assert not named_findings(form.format(text.ABSENT_NAMES[finding]) + ".")


def test_what_is_no_finding_names_none() -> None:
    rng = np.random.default_rng(2)
    for say in text.DISTRACTORS:
        assert not named_findings(say(rng) + ".")
    for forms in text.GENE_FORMS.values():
        for form in forms:
            assert not named_findings(form.format("GENEA") + ".")
    for name in text.ORGAN_NAMES.values():
        assert not named_findings(f"Sections show {name}.")


def test_reports_of_the_cohort_name_what_is_there() -> None:
    """The captions that were planted with the findings: all named, none invented."""
    truth = [frozenset(scene.findings) for scene in SCENES]
    found = finding_metrics(REFERENCE + PREDICTED, truth, resamples=0)
    assert found["named"] == 1
    assert found["invented"] == 0
    nothing = finding_metrics(["Sections show colon."] * len(truth), truth, resamples=0)
    assert (nothing["named"], nothing["invented"]) == (0, 0)


def test_shares_of_findings_by_hand() -> None:
    truth = [frozenset({"mucin", "necrosis"}), frozenset()]
    said = ["Mucin pools are present.", "Necrosis is noted. Keratin pearls are present."]
    found = finding_metrics(said, truth, patients=["P", "Q"])
    assert found["named"] == 1 / 2
    assert found["invented"] == 2 / 14  # six are absent from the first slide, eight from the second
    assert found["by_finding"]["mucin"] == {"named": 1.0, "invented": 0.0}
    assert found["by_finding"]["necrosis"] == {"named": 0.0, "invented": 1.0}
    assert found["by_finding"]["keratin"] == {"named": None, "invented": 0.5}
    low, high = found["ci"]["invented"]
    assert 0 <= low < 2 / 14 < high <= 1


def test_sentences_that_no_image_supports() -> None:
    """They are the cohort's distractors and what is said of the control gene, no others."""
    said = [text.sentences(scene) for scene in SCENES]
    bad = sum(
        s.kind == "distractor" or (s.kind, s.subject) == ("gene", "control")
        for own in said for s in own
    )  # fmt: skip
    every = sum(map(len, said))
    patients = [scene.patient_id for scene in SCENES]
    found = unsupported_sentences(REFERENCE + PREDICTED, planted=True, patients=patients)
    assert found["sentences"] == every
    assert found["share"] == pytest.approx(bad / every)
    assert set(found["what"]) == {"distractor", "control gene"}
    assert sum(found["what"].values()) == bad
    assert found["ci"][0] < bad / every < found["ci"][1]
    other = unsupported_sentences(
        ["Pools of mucin are present. The patient had a history of hypertension.",
         "A gorgeous sunset lit the harbour."], planted=True, resamples=0,
    )  # fmt: skip
    assert other["what"] == {"distractor": 1, "unknown": 1}
    assert unsupported_sentences([""], planted=True)["share"] is None


def test_without_planted_truth_the_wording_estimates_it() -> None:
    said = ["Nests of tumour cells are seen. Margins are free of tumour.", "Nuclei are large."]
    found = unsupported_sentences(said, planted=False, patients=["P", "Q"])
    assert (found["share"], found["sentences"]) == (1 / 3, 3)
    assert found["by"] == f"rules {VERSION}"
    assert (found["what"], found["examples"]) == ({"margins": 1}, ["Margins are free of tumour."])


def slide(**labels: str) -> SlideRow:
    return SlideRow(
        slide_id="s", stem="s", patient_id="P", split="test", labels=labels, mpp=0.5, uri="",
        n_regions=1,
    )  # fmt: skip


def test_truth_is_only_taken_from_a_synthetic_cohorts_labels() -> None:
    labels = {name: "0" for name in text.FORMS} | {"mucin": "1"}
    assert planted([slide(**labels)]) == [frozenset({"mucin"})]
    assert planted([slide(**labels), slide(organ="colon")]) is None
    assert planted([slide(**(labels | {"mucin": "yes"}))]) is None
    assert planted([]) is None


# -- sentence embeddings --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text model of random weights, as transformers stores it."""
    import torch
    from transformers import BertConfig, BertModel

    from pathflip.text import train_tokenizer

    folder = tmp_path_factory.mktemp("embedder")
    tokenizer = train_tokenizer(REFERENCE, vocab_size=200)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", [None, "mean_tokens", "cls_token", "lasttoken"])
def test_embeddings_of_a_batch_are_those_of_each_text(embedder: Path, pooling: str | None) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    file = embedder / "1_Pooling" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if pooling is not None:
        modes = {f"pooling_mode_{name}": name == pooling for name in ("mean_tokens", "cls_token")}
        file.write_text(json.dumps(modes | {f"pooling_mode_{pooling}": True}))
    texts = ["Sections show lung.", REFERENCE[0], "Necrosis."]
    found = sentence_embedder(embedder)(texts)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1)
    tokenizer = AutoTokenizer.from_pretrained(embedder)
    model = AutoModel.from_pretrained(embedder).eval()
    for one, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(one, return_tensors="pt")).last_hidden_state[0]
        pooled = {"mean_tokens": states.mean(0), "cls_token": states[0]}.get(pooling, states[-1])
        expected = (pooled / pooled.norm()).numpy()
        assert vector == pytest.approx(expected, abs=1e-5)


def test_a_model_of_the_hubs_cache_pools_as_it_says(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name as from its folder; without the file that says how, it is refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = embedder / "1_Pooling" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"pooling_mode_mean_tokens": true}')
    cached = put_in_cache(tmp_path, "owner/embedder", embedder)
    (cached / "modules.json").write_text("[]")
    texts = ["Sections show lung.", REFERENCE[0]]
    found = sentence_embedder("owner/embedder")(texts)
    assert found == pytest.approx(sentence_embedder(embedder)(texts), abs=1e-6)
    (cached / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="lacks 1_Pooling") as error:
        sentence_embedder("owner/embedder")
    assert "pull it again" in error.value.hint


def test_a_model_that_pools_otherwise_or_is_not_there(embedder: Path, tmp_path: Path) -> None:
    file = embedder / "1_Pooling" / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(CheckpointError) as other:
        sentence_embedder(embedder)
    assert other.value.code == "pooling"
    with pytest.raises(CheckpointError) as missing:
        sentence_embedder(tmp_path / "nothing")
    assert missing.value.code == "missing"


# -- through a model ------------------------------------------------------------------------------


def test_captions_of_an_archive(tuned, tmp_path: Path) -> None:
    from pathflip.archive import Archive
    from pathflip.slide_qa import SlideQA

    archive, answerer = Archive(tuned.archive), SlideQA.from_run(tuned.run)
    found = evaluate_captions(
        archive, answerer.run, answerer=answerer, split="all", max_new_tokens=8
    )
    assert found["n"] == len(found["captions"]) == 8
    assert "findings" not in found, "the archive has no labels of the cohort"
    assert found["unsupported"]["by"].startswith("rules")
    for name in list(found["captions"])[:2]:
        assert found["captions"][name] == answerer.caption(archive, name, max_new_tokens=8)
    assert found["baseline"]["bleu1"] > found["bleu1"], "a random model is worse than one caption"
    file = tmp_path / "captions.jsonl"
    rows = [{"slide_id": name, "caption": said} for name, said in found["captions"].items()]
    late = {"slide_id": "slide003", "error": {"code": "damaged"}}
    file.write_text("\n".join(json.dumps(row) for row in [late, *rows]) + "\n")
    again = evaluate_captions(
        archive, answerer.run, predictions=read_predictions(file), split="all"
    )
    assert again == found
    with pytest.raises(ConfigError, match="slide007") as lost:
        evaluate_captions(
            archive, answerer.run, split="all",
            predictions={name: said for name, said in found["captions"].items() if name[-1] != "7"},
        )  # fmt: skip
    assert lost.value.code == "missing_captions"
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_predictions(file)
