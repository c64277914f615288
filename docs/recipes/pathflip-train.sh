#!/usr/bin/env bash
# Trains PathFLIP on SlideInstruction, and a language model to read its slides. The recipes of the
# tables start from here. Run it again to go on where it stopped. See docs/howto/reproduce.md.
set -euo pipefail
: "${TCGA:=tcga}" "${MANIFEST:=gdc_manifest.txt}" "${SLIDECHAT:=SlideChat}"
: "${WORK:=work}" "${ENCODER:=conch}" "${PRESET:=pathflip/paper}" "${TUNE:=instruct/paper}"
: "${LLM:=Qwen/Qwen3-0.6B}" "${INGEST:=}" "${PRETRAIN:=}" "${TUNING:=}"

pathflip datasets prepare slidechat "$SLIDECHAT" --out "$WORK/slidechat"
pathflip ingest "$TCGA" --archive "$WORK/tcga" --encoder "$ENCODER" $INGEST
pathflip archive import --archive "$WORK/tcga" --manifest "$MANIFEST"
pathflip archive import --archive "$WORK/tcga" --labels "$WORK/slidechat/splits.csv"
pathflip archive import --archive "$WORK/tcga" --source slideinstruct \
  --captions "$SLIDECHAT/SlideInstruct_train_stage1_caption.json"
pathflip archive import --archive "$WORK/tcga" --source slideinstruct \
  --questions "$SLIDECHAT/SlideInstruct_train_stage2_vqa.json"
pathflip archive import --archive "$WORK/tcga" --source slidebench \
  --captions "$SLIDECHAT/SlideBench-Caption-TCGA.csv"
pathflip archive import --archive "$WORK/tcga" --source slidebench \
  --questions "$SLIDECHAT/SlideBench-VQA-TCGA.csv"

pathflip pretrain --archive "$WORK/tcga" --preset "$PRESET" --run "$WORK/pathflip" \
  -o source=slideinstruct $PRETRAIN
pathflip tune --archive "$WORK/tcga" --run "$WORK/pathflip" --llm "$LLM" --preset "$TUNE" \
  --out "$WORK/answers" -o source=slideinstruct $TUNING
