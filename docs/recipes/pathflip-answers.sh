#!/usr/bin/env bash
# PathFLIP, the table of captions, and Table 4 (questions). After pathflip-train.sh.
set -euo pipefail
: "${SLIDECHAT:=SlideChat}" "${BCNB:=BCNB}" "${BCNB_MPP:=0.5}" "${WORK:=work}" "${ENCODER:=conch}"
: "${EMBEDDER=Qwen/Qwen3-Embedding-0.6B}" "${LLM:=Qwen/Qwen3-0.6B}" "${TUNE:=instruct/paper}"
: "${INGEST:=}" "${TUNING:=}" "${TOKENS:=512}"

pathflip evaluate caption --archive "$WORK/tcga" --run "$WORK/answers" --split test \
  --source slidebench --max-new-tokens "$TOKENS" ${EMBEDDER:+--embedder "$EMBEDDER"} \
  --json > "$WORK/captions.json"
pathflip tune --archive "$WORK/tcga" --run "$WORK/pathflip" --llm "$LLM" --preset "$TUNE" \
  --out "$WORK/answers-frozen" -o source=slideinstruct -o instruct.llm_tuning=freeze $TUNING
pathflip evaluate caption --archive "$WORK/tcga" --run "$WORK/answers-frozen" --split test \
  --source slidebench --max-new-tokens "$TOKENS" ${EMBEDDER:+--embedder "$EMBEDDER"} \
  --json > "$WORK/captions-frozen.json"

pathflip evaluate vqa --archive "$WORK/tcga" --run "$WORK/answers" --split test \
  --source slidebench --json > "$WORK/table4-tcga.json"
pathflip datasets prepare bcnb "$BCNB" --out "$WORK/bcnb-tables" --mpp "$BCNB_MPP"
pathflip ingest "$WORK/bcnb-tables/slides" --archive "$WORK/bcnb" --encoder "$ENCODER" \
  --patients "$WORK/bcnb-tables/labels.csv" $INGEST
pathflip archive import --archive "$WORK/bcnb" --source bcnb \
  --questions "$SLIDECHAT/SlideBench-VQA-BCNB.csv"
pathflip evaluate vqa --archive "$WORK/bcnb" --run "$WORK/answers" --split all \
  --source bcnb --json > "$WORK/table4-bcnb.json"
