#!/usr/bin/env bash
# SFT tutorial, first half: 'Fine-Tune with a Prompt-Response Dataset' (Dolly).
#
#     bash examples/sft.sh        # flags that follow go to train_sft.py; variables: here and in common.sh
#
# Slurm: MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/sft.sbatch, then the flags below.
STEPS=${SFT_STEPS:-16}      # tutorial: trainer.sft.max_steps=-1, which is --max-epochs 1 without --max-steps
BATCH=${SFT_BATCH:-8}       # 128
LR=${SFT_LR:-5e-5}          # 5e-6
MAX_LEN=${SFT_MAX_LEN:-256} # the model's 4096
NEW_TOKENS=${NEW_TOKENS:-64}
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/dolly run=$OUTPUT/sft

# Prerequisite: Obtaining a pretrained model
obtain_model

# Step 1: Data Formatting (wget databricks-dolly-15k.jsonl; preprocess.py --input databricks-dolly-15k.jsonl)
raw=(--download)
[[ -z $DATA ]] || raw=(--input "$DATA/databricks-dolly-15k.jsonl")
python prepare_data.py dolly "${raw[@]}" --output "$data"

# Step 2: SFT Training (train_gpt_sft.py)
flags=(
    --precision "$PRECISION"           # trainer.precision, model.megatron_amp_O2
    --max-steps "$STEPS"               # trainer.sft.max_steps
    --val-batches 2                    # trainer.sft.limit_val_batches=40
    --val-interval 8                   # trainer.sft.val_check_interval=1000
    --save-interval 0                  # trainer.sft.save_interval=100; 0: at the end only
    --model "$MODEL"                   # model.restore_from_path
    --lr "$LR" --min-lr "$LR"          # model.optim.lr
    --warmup-steps 2                   # model.optim.sched.warmup_steps=10
    --loss-on answer                   # model.answer_only_loss=True; also the default
    --prompt-template "{input} {output}" # model.data.train_ds.prompt_template; also the default
    --micro-batch-tokens 4096          # model.data.train_ds.micro_batch_size=1: rows are packed, so count tokens
    --global-batch-size "$BATCH"       # model.data.train_ds.global_batch_size
    --max-seq-len "$MAX_LEN"           # model.data.train_ds.max_seq_length
    --train-data "$data/train.jsonl"   # model.data.train_ds.file_path
    --val-data "$data/val.jsonl"       # model.data.validation_ds.file_path; the tutorial's is the training file
    --output "$run"                    # exp_manager.explicit_log_dir; a run there is continued (resume_if_exists)
)   # monitor=validation_loss, save_nemo_on_train_end: always so. exp_manager.create_wandb_logger=True:
    # --wandb-project sft_run --wandb-name dolly_sft_run
torchrun --standalone --nproc_per_node "$DEVICES" train_sft.py "${flags[@]}" "$@"

# Step 3: Inference. --raw: continue the text of the template up to its answer, whatever chat template MODEL has.
python generate.py --model "$run/hf" --raw --prompt "What is machine learning?" --max-new-tokens "$NEW_TOKENS"
head -n 4 "$data/val.jsonl" | sed 's/^{"input": /{"prompt": /' > "$data/prompts.jsonl"
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val/loss # tutorial: final train loss 1.536 (2B)
