#!/usr/bin/env bash
# Search the sample set's test images by text, with the model trained by `make demo`. Run by `make demo-search`.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/demo_environment.sh
DATA=data/sample/arrow/pedes
MODEL=outputs/sample/finetune/best
OUT=outputs/sample/search
GALLERY=$OUT/gallery.db
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # for this small model one thread is faster than two

for needed in $MODEL/config.json $DATA/README.md; do
    test -f $needed || { echo "demo_search.sh: there is no $needed: run 'make demo' first" >&2; exit 1; }
done

mkdir -p $OUT
rm -rf $GALLERY
# Searches run this export, which needs neither PyTorch nor transformers to start.
step mra export --model $MODEL --overwrite
step mra index build --model $MODEL --images $DATA --split test --gallery $GALLERY

# Choose threshold and matching weight quickly on a quarter of the validation split, with 16 re-ranked images.
step mra index calibrate --gallery $GALLERY --dataset $DATA --split "validation[:200]" --rerank 16
step mra index stats --gallery $GALLERY

step mra search --gallery $GALLERY --top 10 --rerank 16 --save $OUT/ranking.png \
    "A woman with a blond ponytail in a long open orange coat over a white shirt, black jeans and a yellow cap." \
    "A man wearing a red coat and grey trousers with a white backpack." \
    "A person in a green skirt with purple boots, pushing a bicycle."
step mra search --gallery $GALLERY --top 5 --rerank 16 --where 'camera in ["cam_a", "cam_b"]' \
    --phrase "orange coat" --phrase "yellow cap" "A woman in a long orange coat with a yellow cap."

printf '\nranked pictures: %s\n' "$OUT/ranking.png"
