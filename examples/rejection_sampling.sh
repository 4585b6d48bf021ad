#!/usr/bin/env bash
# Rejection sampling tutorial, after reward_model.sh.
#
#     bash examples/rejection_sampling.sh # flags that follow go to train_rs.py; variables: here, common.sh
#
# Slurm: MODEL=... REWARD_MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/rs.sbatch, then the flags.
STEPS=${RS_STEPS:-3}          # tutorial: 313
PROMPTS=${RS_PROMPTS:-8}      # 32 (16 on Slurm)
LR=${RS_LR:-1e-5}             # 1e-6
SAMPLES=${RS_SAMPLES:-4}      # 8
PROMPT_LEN=${PROMPT_LEN:-192}
NEW_TOKENS=${NEW_TOKENS:-64}
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/hh run=$OUTPUT/rs

# 'We should first follow the Prerequisite guide and the SFT guide ... train a reward model as in PPO guide'
SFT=${SFT:-$OUTPUT/sft_chat/hf} RM=${RM:-$OUTPUT/rm/hf}
[[ -d $RM ]] || SFT=$SFT bash examples/reward_model.sh

# One job in place of two: serve_reward_model.py and train_gpt_rs_actor.py. No flag: remote_rm.*, inference.port.
flags=(
    --precision "$PRECISION"
    --model "$SFT"                   # pretrained_checkpoint.restore_from_path=ACTOR_NEMO_FILE
    --reward-model "$RM"             # rm_model_file
    --train-data "$data/train_prompts.jsonl" # model.data.data_prefix={train: ...
    --val-data "$data/test_prompts.jsonl"    # ..., validation: ...}
    --output "$run"                  # exp_manager.explicit_log_dir
    --save-top-k 1                   # exp_manager.checkpoint_callback_params.save_top_k
    --max-epochs 1                   # trainer.rs.max_epochs
    --max-steps "$STEPS"             # trainer.rs.max_steps
    --val-interval 4 --val-batches 2 # trainer.rs.val_check_interval; model.rs.num_val_samples
    --save-interval 0
    --prompts-per-step "$PROMPTS"    # model.rs.num_rollout_samples
    --samples-per-prompt "$SAMPLES"  # model.rs.num_rollouts_per_prompt
    --keep-top 1                     # model.rs.top_n_rollouts
    --global-batch-size "$PROMPTS"   # model.global_batch_size: kept responses of one optimizer step
    --rollout-slots 32               # model.rs.rollout_micro_batch_size=16, val_rollout_micro_batch_size=8
    --micro-batch-tokens 2048        # model.micro_batch_size=1, rs.forward_micro_batch_size=16
    --max-prompt-len "$PROMPT_LEN"
    --max-new-tokens "$NEW_TOKENS"   # model.rs.length_params.max_length
    --truncated keep                   # so few tokens cut most answers off: leave this out with 1024
    --lr "$LR" --min-lr "$LR"        # model.optim.lr=1.001 times sched.min_lr, to be constant
    --warmup-steps 0                 # model.optim.sched.warmup_steps; constant_steps=312 is not needed
    --weight-decay 0.01              # model.optim.weight_decay; also the default
)
torchrun --standalone --nproc_per_node "$DEVICES" train_rs.py "${flags[@]}" "$@"

# Rejection Sampling Results (megatron_gpt_eval.py)
head -n 4 "$data/test_prompts.jsonl" > "$data/prompts.jsonl"
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val_rollouts/rewards val_rollouts/response_lengths
