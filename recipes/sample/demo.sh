#!/usr/bin/env bash
# The sample set from scratch to a picture of rankings, in ordinary commands of this project. Run by `make demo`.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/demo_environment.sh
DATA=data/sample
OUT=outputs/sample
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}  # accelerate would use fewer

# The fusion of scores is chosen on the validation split: in training, or here for the untrained model.
evaluate() {  # model folder, name of the result
    step mra evaluate --model "$1" --dataset $DATA/arrow/pedes --split test --output_dir "$OUT/$2" \
        --rerank_k 16 --attn_implementation eager
}

step python -m data_scripts.make_sample --output $DATA --num_proc 2
step mra prepare sda --annotations $DATA/sda --images $DATA/images/SDA --output $DATA/arrow/sda --overwrite
step mra prepare pedes --dataset cuhk --annotations $DATA/finetune --images $DATA/images --output $DATA/arrow/pedes --overwrite

# Results of the untrained weights: a training run without epochs.
step accelerate launch train_pretrain.py --config recipes/sample/pretrain.yaml --num_train_epochs 0 --output_dir $OUT/untrained
step accelerate launch train_pretrain.py --config recipes/sample/pretrain.yaml
step accelerate launch train_finetune.py --config recipes/sample/finetune.yaml

evaluate $OUT/untrained/final eval_untrained
evaluate $OUT/pretrain/final eval_pretrained
evaluate $OUT/finetune/best eval_finetuned

printf '\n'
step mra compare "before pretraining=$OUT/eval_untrained" \
    "after pretraining=$OUT/eval_pretrained" "after fine-tuning=$OUT/eval_finetuned"
printf '\nranked pictures: %s\n' "$OUT/eval_finetuned/ranking.png"
