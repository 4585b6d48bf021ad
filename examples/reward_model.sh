#!/usr/bin/env bash
# PPO tutorial, first half: HH-RLHF data and 'Reward Model Training'. ppo.sh and rejection_sampling.sh use this
# model.
#
#     bash examples/reward_model.sh # flags that follow go to train_rm.py; variables: here and in common.sh
#
# Slurm: MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/rm.sbatch, then the flags below.
STEPS=${RM_STEPS:-8}        # tutorial: one epoch
BATCH=${RM_BATCH:-8}        # 512 pairs
LR=${RM_LR:-2e-5}           # 9e-6
MAX_LEN=${RM_MAX_LEN:-256}  # the model's 4096
HH_SETS=${HH_SETS:-harmless-base} # all four: leave --sets out
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/hh run=$OUTPUT/rm

# 'We should first follow the Prerequisite guide and the SFT guide'
SFT=${SFT:-$OUTPUT/sft_chat/hf}
[[ -d $SFT ]] || bash examples/sft_chat.sh

# python download_and_process.py: {train,test}_comparisons.jsonl and {train,test}_prompts.jsonl, here as messages;
# --style text writes 'User: ... Assistant: ...' as the tutorial's example has it
raw=(--download --sets "$HH_SETS")
[[ -z $DATA ]] || raw=(--input "$DATA"/hh_*_train.jsonl.gz --test-input "$DATA"/hh_*_test.jsonl.gz)
[[ -f $data/test_prompts.jsonl ]] || python prepare_data.py hh "${raw[@]}" --output "$data"
head -n 64 "$data/test_comparisons.jsonl" > "$data/test.jsonl"

# train_reward_model.py
flags=(
    --precision "$PRECISION"
    --loss ranking                   # model.reward_model_type: binary_ranking; also the default
    --micro-batch-tokens 4096        # model.micro_batch_size=1: pairs are packed, so count tokens
    --global-batch-size "$BATCH"     # model.global_batch_size
    --max-seq-len "$MAX_LEN"         # model.encoder_seq_length; a longer pair is left out
    --model "$SFT"                   # pretrained_checkpoint.restore_from_path=megatron_gpt_sft.nemo
    --train-data "$data/train_comparisons.jsonl" # model.data.data_prefix={train: ...
    --val-data "$data/test_comparisons.jsonl"    # ..., validation: ...
    --test-data "$data/test.jsonl"   # ..., test: ...}; evaluated at the end, the tutorial's is not
    --output "$run"                  # exp_manager.explicit_log_dir
    --max-steps "$STEPS"             # trainer.rm.max_steps
    --val-interval 4                 # trainer.rm.val_check_interval=100
    --val-batches 2                  # trainer.rm.limit_val_batches=100000
    --save-interval 0                # trainer.rm.save_interval=500; 0: at the end only
    --lr "$LR" --min-lr "$LR"        # model.optim.lr, sched.min_lr
    --warmup-steps 2                 # model.optim.sched.warmup_steps=10
)   # exp_manager.create_wandb_logger=True: --wandb-project rm_training --wandb-name rm_training
torchrun --standalone --nproc_per_node "$DEVICES" train_rm.py "${flags[@]}" "$@"

metrics "$run" val/loss val/acc test/acc # tutorial: validation accuracy 69.57 %
