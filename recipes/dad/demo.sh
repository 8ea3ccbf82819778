#!/usr/bin/env bash
# The data factory with tiny models, from scratch to a pretraining run on its dataset. Run by `make demo-dad`.
set -euo pipefail
cd "$(dirname "$0")/../.."
source recipes/demo_environment.sh
DEMO=outputs/dad/demo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # such small models gain nothing from a second thread

# A target dataset: people of the sample set, with captions.
step python -m data_scripts.make_sample --output $DEMO/target --sda_pairs 10 --train_ids 300 --val_ids 20 --test_ids 20 \
    --num_proc 2
step mra prepare pedes --dataset cuhk --annotations $DEMO/target/finetune --images $DEMO/target/images \
    --output $DEMO/arrow/target --overwrite --no_size_check

# Small models in place of Stable Diffusion, BLIP-2, CLIP and Grounding DINO.
if [ ! -f $DEMO/models/done ]; then
    step python -m data_scripts.dad.tiny.make_diffusion --output $DEMO/models/diffusion --images $DEMO/target/images --steps 1200
    step python -m data_scripts.dad.tiny.make_readers --output $DEMO/models --models blip grounding clip \
        --captions $DEMO/arrow/target --steps 300
    touch $DEMO/models/done
fi

# The factory: one command, which can be resumed.
step python -m data_scripts.dad.run --config recipes/dad/demo.yaml

# Its dataset is read like SDA.
step mra prepare sda --annotations $DEMO/work/sda --images $DEMO/work/images --output $DEMO/arrow/sda \
    --overwrite --no_size_check
step accelerate launch train_pretrain.py --config recipes/sample/pretrain.yaml --dataset $DEMO/arrow/sda \
    --validation_dataset none --max_train_steps 20 --logging_steps 5 --output_dir $DEMO/pretrain

cat $DEMO/work/report/index.md
printf '\nreport: %s\n' "$DEMO/work/report/index.html"
