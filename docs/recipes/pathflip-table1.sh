#!/usr/bin/env bash
# PathFLIP, Table 1: zero-shot AUC of twelve gene mutations on CPTAC. After pathflip-train.sh.
set -euo pipefail
: "${CPTAC_SLIDES:=cptac-slides}" "${CPTAC:=cptac}" "${WORK:=work}" "${ENCODER:=conch}"
: "${INGEST:=}"

pathflip datasets prepare cptac "$CPTAC" --out "$WORK/cptac-tables"
pathflip ingest "$CPTAC_SLIDES" --archive "$WORK/cptac" --encoder "$ENCODER" $INGEST
pathflip archive import --archive "$WORK/cptac" --labels "$WORK/cptac-tables/labels.csv"
pathflip evaluate zeroshot --archive "$WORK/cptac" --run "$WORK/pathflip" --split all \
  --tasks "$WORK/cptac-tables/tasks.yaml" --json > "$WORK/table1.json"
