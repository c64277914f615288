#!/usr/bin/env bash
# PathFLIP, Table 2: retrieval on SlideBench and Quilt-1M. After pathflip-train.sh.
set -euo pipefail
: "${QUILT:=quilt-1m}" "${QUILT_SPLIT:=val}" "${WORK:=work}"

pathflip evaluate retrieval --archive "$WORK/tcga" --run "$WORK/pathflip" --split test \
  --source slidebench --protocol batch64 --json > "$WORK/table2-slidebench.json"
pathflip datasets prepare quilt-1m "$QUILT" --out "$WORK/quilt" --split "$QUILT_SPLIT"
pathflip evaluate pictures "$WORK/quilt/pairs.csv" --run "$WORK/pathflip" \
  --protocol batch64 --json > "$WORK/table2-quilt.json"
