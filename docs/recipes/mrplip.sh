#!/usr/bin/env bash
# MR-PLIP: patch trees, their captions, the model, and its zero-shot tables of tiles and slides.
# Run it again to go on where it stopped. See docs/howto/reproduce.md.
set -euo pipefail
: "${TCGA:=tcga}" "${TILES:=tiles}" "${NSCLC:=nsclc}" "${NSCLC_LABELS:=nsclc.csv}" "${WORK:=work}"
: "${UNI:=uni}" "${MR_PRESET:=mrplip/paper}" "${VLM:=quilt-llava}" "${TREE_CAPTIONS:=}"
: "${MR_INGEST:=}" "${TREES:=}" "${MR_PRETRAIN:=}"

pathflip ingest "$TCGA" --archive "$WORK/mrplip" --encoder "$UNI" $MR_INGEST
pathflip trees --archive "$WORK/mrplip" --encoder "$UNI" $TREES
if [[ -n "$TREE_CAPTIONS" ]]; then # written before, by any program
  pathflip archive import --archive "$WORK/mrplip" --tree-captions "$TREE_CAPTIONS"
else
  pathflip trees caption --archive "$WORK/mrplip" --vlm "$VLM"
fi
pathflip pretrain --archive "$WORK/mrplip" --preset "$MR_PRESET" --run "$WORK/patches" $MR_PRETRAIN

for set in nct-crc:nct-crc:test pcam:pcam:test LC25000:lc25000-lung:all mhist:mhist:test \
  digestpath:digestpath:all sicap:sicap:test; do
  IFS=: read -r folder task split <<< "$set"
  pathflip evaluate tiles "$TILES/$folder" --task "$task" --run "$WORK/patches" \
    --split "$split" --json > "$WORK/tiles-$task.json"
done

pathflip ingest "$NSCLC" --archive "$WORK/nsclc" --encoder "$UNI" --patients "$NSCLC_LABELS" $MR_INGEST
pathflip evaluate wsi --archive "$WORK/nsclc" --run "$WORK/patches" --label subtype \
  --classes "${BASH_SOURCE[0]%/*}/nsclc.yaml" --split test --json > "$WORK/wsi-nsclc.json"
