#!/usr/bin/env bash
# PathFLIP, Tables 1 and 2, the rows with a part left out. After pathflip-table1.sh.
set -euo pipefail
: "${WORK:=work}" "${PRESET:=pathflip/paper}" "${PRETRAIN:=}"

for part in region_encoder=mean slide_encoder=region_mean tr_attention=none; do
  name="no_${part%%_*}"
  pathflip pretrain --archive "$WORK/tcga" --preset "$PRESET" --run "$WORK/$name" \
    -o source=slideinstruct -o "model.$part" $PRETRAIN
  pathflip evaluate zeroshot --archive "$WORK/cptac" --run "$WORK/$name" --split all \
    --tasks "$WORK/cptac-tables/tasks.yaml" --json > "$WORK/table1-$name.json"
  pathflip evaluate retrieval --archive "$WORK/tcga" --run "$WORK/$name" --split test \
    --source slidebench --protocol batch64 --json > "$WORK/table2-$name.json"
done
