#!/usr/bin/env bash
# DPO tutorial: 'Model Alignment by Direct Preference Optimisation', on the HH-RLHF pairs.
#
#     bash examples/dpo.sh        # flags that follow go to train_dpo.py; variables: here and in common.sh
#
# Slurm: MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/dpo.sbatch, then the flags below.
STEPS=${DPO_STEPS:-8}       # tutorial: one epoch
BATCH=${DPO_BATCH:-8}       # 512 pairs; 256 or 512 are its advice
LR=${DPO_LR:-2e-5}          # 1e-6 falling to 9e-7 or 5e-7
MAX_LEN=${DPO_MAX_LEN:-256} # the model's 4096
HH_SETS=${HH_SETS:-harmless-base} # of Anthropic's four
NEW_TOKENS=${NEW_TOKENS:-64}
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/hh run=$OUTPUT/dpo

# Instruction Following Taught by Supervised Fine-Tuning
SFT=${SFT:-$OUTPUT/sft_chat/hf}
[[ -d $SFT ]] || bash examples/sft_chat.sh

# DPO Model Training: data. Pairs of messages get the template of SFT (with '<extra_id_1>' or other markers)
# from the model, so no text is formatted by hand.
raw=(--download --sets "$HH_SETS")
[[ -z $DATA ]] || raw=(--input "$DATA"/hh_*_train.jsonl.gz --test-input "$DATA"/hh_*_test.jsonl.gz)
[[ -f $data/test_prompts.jsonl ]] || python prepare_data.py hh "${raw[@]}" --output "$data"

# DPO Model Training (train_gpt_dpo.py)
flags=(
    --precision "$PRECISION"
    --micro-batch-tokens 4096        # model.micro_batch_size=1: pairs are packed, so count tokens
    --global-batch-size "$BATCH"     # model.global_batch_size
    --max-seq-len "$MAX_LEN"         # model.encoder_seq_length; a longer pair is left out
    --model "$SFT"                   # pretrained_checkpoint.restore_from_path=megatron_gpt_sft.nemo
    --train-data "$data/train_comparisons.jsonl" # model.data.data_prefix={train: ...
    --val-data "$data/test_comparisons.jsonl"    # ..., validation: ...}
    --output "$run"                  # exp_manager.explicit_log_dir
    --max-epochs 1                   # trainer.dpo.max_epochs
    --max-steps "$STEPS"             # trainer.dpo.max_steps
    --beta 0.1                       # model.dpo.ref_policy_kl_penalty
    --lr "$LR" --min-lr "$LR"        # model.optim.lr, sched.min_lr
    --warmup-steps 2                 # model.optim.sched.warmup_steps=10
    --val-interval 4 --val-batches 2 --save-interval 0
)   # exp_manager.create_wandb_logger=True: --wandb-project dpo_training --wandb-name dpo_training
torchrun --standalone --nproc_per_node "$DEVICES" train_dpo.py "${flags[@]}" "$@"

# What to watch: acc, and that rewards_chosen_mean stays above rewards_rejected_mean. Then answers.
head -n 4 "$data/test_prompts.jsonl" > "$data/prompts.jsonl"
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val/loss val/acc val/rewards_chosen_mean val/rewards_rejected_mean
