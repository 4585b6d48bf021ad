#!/usr/bin/env bash
# PPO tutorial, second half: 'PPO Training', after reward_model.sh.
#
#     bash examples/ppo.sh        # flags that follow go to train_ppo.py; variables: here and in common.sh
#
# Slurm: MODEL=... REWARD_MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/ppo.sbatch, then the flags.
STEPS=${PPO_STEPS:-4}       # tutorial: 15
PROMPTS=${PPO_PROMPTS:-8}   # 512
BATCH=${PPO_BATCH:-4}       # 64
LR=${PPO_LR:-1e-5}          # 9e-7 falling to 9e-8
PROMPT_LEN=${PROMPT_LEN:-192} # 2048 with the answer
NEW_TOKENS=${NEW_TOKENS:-64}  # 1024
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/hh run=$OUTPUT/ppo

SFT=${SFT:-$OUTPUT/sft_chat/hf} RM=${RM:-$OUTPUT/rm/hf}
[[ -d $RM ]] || SFT=$SFT bash examples/reward_model.sh

# One job in place of two: serve_ppo_critic.py (reward model and critic) and train_gpt_ppo_actor.py (policy and
# initial policy). No flag: remote_critic_rm.*, trainer.ppo.port, combine_rm_and_critic_server, sleep 30.
flags=(
    --precision "$PRECISION"         # model.megatron_amp_O2
    --deterministic                  # NCCL_ALGO=Tree; whether log-probs agree is audited in each step
    --model "$SFT"                   # pretrained_checkpoint.restore_from_path=ACTOR_NEMO_FILE
    --reward-model "$RM"             # ..=RM_NEMO_FILE; the critic starts from it as well
    --train-data "$data/train_prompts.jsonl" # model.data.data_prefix={train: ...
    --val-data "$data/test_prompts.jsonl"    # ..., validation: ...}
    --output "$run"                  # exp_manager.explicit_log_dir
    --max-steps "$STEPS"             # trainer.ppo.max_steps
    --val-interval 2 --val-batches 1 # trainer.ppo.val_check_interval=3; model.ppo.num_val_samples
    --save-interval 0
    --prompts-per-step "$PROMPTS"    # model.ppo.num_rollout_samples
    --global-batch-size "$BATCH"     # model.global_batch_size, of policy and critic
    --rollout-slots 16               # model.ppo.rollout_micro_batch_size=8
    --micro-batch-tokens 2048        # model.micro_batch_size=1, trainer.ppo.inference_micro_batch_size=4
    --max-prompt-len "$PROMPT_LEN"   # remote_critic_rm.pad_to_length=2048: nothing is padded
    --max-new-tokens "$NEW_TOKENS"   # model.ppo.length_params.max_length
    --truncated keep                   # so few tokens cut most answers off: leave this out with 1024
    --lr "$LR" --min-lr "$LR"        # model.optim.lr, sched.min_lr
    --critic-lr "$LR" --critic-min-lr "$LR" # model.optim.lr of the critic server
    --warmup-steps 1                 # model.optim.sched.warmup_steps=10
    --kl-coef 0.02                   # trainer.ppo.initial_policy_kl_penalty
    --entropy-coef 0.0               # model.ppo.entropy_bonus
    --clip 0.2                       # model.ppo.ratio_eps
    --whiten-advantages              # trainer.ppo.normalize_advantages=True; also the default
    --recompute selective            # model.activations_checkpoint_granularity
)   # ++model.offload_adam_states: --offload on, the default on GPUs. trainer.ppo.trt_llm.enable=True:
    # --generate-with trtllm. exp_manager.create_wandb_logger=True: --wandb-project ppo_run --wandb-name 2p_ppo
torchrun --standalone --nproc_per_node "$DEVICES" train_ppo.py "${flags[@]}" "$@"

# 'Once you've completed RLHF training, you can serve your model' (megatron_gpt_eval.py)
head -n 4 "$data/test_prompts.jsonl" > "$data/prompts.jsonl"
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val_rollouts/rewards val_rollouts/response_lengths train_rollouts/init_policy_kl
