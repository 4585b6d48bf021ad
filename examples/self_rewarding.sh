#!/usr/bin/env bash
# Self-rewarding tutorial: 'Model Alignment by Self-Rewarding Language Models', on the data of sft_chat.sh.
#
#     bash examples/self_rewarding.sh # flags that follow go to train_self_reward.py; variables: here, common.sh
#
# Slurm: MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/self_reward.sbatch, then the flags below.
STEPS=${SELF_STEPS:-2}       # of an iteration; tutorial: one epoch
BATCH=${SELF_BATCH:-4}       # 64 prompts
LR=${SELF_LR:-5e-6}          # 3e-7 to 1e-7 from an aligned model, 3e-6 to 9e-7 from a base model
SAMPLES=${SELF_SAMPLES:-4}   # model.spin.num_responses_to_gen
MAX_LEN=${SELF_MAX_LEN:-256} # 4096
NEW_TOKENS=${NEW_TOKENS:-64} # 2048
JUDGE_STEPS=${JUDGE_STEPS:-16} JUDGE_LR=${JUDGE_LR:-5e-5}
JUDGE_TEMPLATE=${JUDGE_TEMPLATE:-examples/judge.txt} # for a model that can judge: assets/judge.txt
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/oasst run=$OUTPUT/self_rewarding

# 'Please see the data formatting section of SFT'; 'we will use the SFT model trained in the previous step'
SFT=${SFT:-$OUTPUT/sft_chat/hf}
[[ -d $SFT ]] || bash examples/sft_chat.sh

# Not in the tutorial, whose model judges by itself: teach a small one the form of a judgement.
if [[ ! -d $OUTPUT/judge_sft/hf ]]; then
    python prepare_data.py judge --input "$data/train.jsonl" --output "$data/judge.jsonl" --limit 2000 \
        --judge-template "$JUDGE_TEMPLATE"
    torchrun --standalone --nproc_per_node "$DEVICES" train_sft.py --model "$SFT" --precision "$PRECISION" \
        --train-data "$data/train.jsonl" "$data/judge.jsonl" --output "$OUTPUT/judge_sft" --max-steps "$JUDGE_STEPS" \
        --global-batch-size 8 --max-seq-len 256 --lr "$JUDGE_LR" --warmup-steps 2 --save-interval 0
fi

# Self-Rewarding Model Training (train_gpt_self_rewarding.py)
flags=(
    --precision "$PRECISION"
    --micro-batch-tokens 2048          # model.micro_batch_size=1: pairs are packed, so count tokens
    --global-batch-size "$BATCH"       # model.global_batch_size
    --model "$OUTPUT/judge_sft/hf"     # pretrained_checkpoint.restore_from_path=megatron_gpt_sft.nemo
    --train-data "$data/train.jsonl"   # model.data.train_ds.file_path
    --val-data "$data/val.jsonl"       # model.data.validation_ds.file_path
    --output "$run"                    # exp_manager.explicit_log_dir
    --iterations 3                     # trainer.self_rewarding.max_iterations
    --steps-per-iteration "$STEPS"     # trainer.self_rewarding.max_epochs=1 of an iteration: --max-epochs 1
    --beta 0.1                         # model.spin.ref_policy_kl_penalty
    --samples-per-prompt "$SAMPLES"
    --judgements 2                     # model.spin.num_evals_to_average=3
    --judge-template "$JUDGE_TEMPLATE"
    --no-meta-judge                    # model.spin.use_meta_judge=false; also the default
    --length-control 0 0 0.1           # model.spin.length_control=[0,0,0.1], the tutorial's advice
    --loss dpo                         # model.spin.preference_loss; also the default
    --max-seq-len "$MAX_LEN"           # model.data.train_ds.max_seq_length
    --max-new-tokens "$NEW_TOKENS"     # model.spin.length_params.max_length
    --lr "$LR" --min-lr "$LR" --warmup-steps 1
    --val-batches 1 --save-interval 0
)   # ++model.sequence_parallel=false: the default; ++model.apply_rope_fusion=false: no flag, chosen by itself.
    # NVTE_ALLOW_NONDETERMINISTIC_ALGO=0: --deterministic. trt_llm.enable: --generate-with trtllm.
    # exp_manager.create_wandb_logger=True: --wandb-project self_rewarding_training --wandb-name NAME
torchrun --standalone --nproc_per_node "$DEVICES" train_self_reward.py "${flags[@]}" "$@"

# The table of prompts, chosen and rejected responses of each validation: val_pairs in $run/samples.jsonl
head -n 4 "$data/val.jsonl" > "$data/prompts.jsonl"
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val/acc val/{rewards_chosen_mean,rewards_rejected_mean,chosen_lengths,reject_lengths} \
    val/{chosen_generated_rewards,rejected_generated_rewards,judge_unparsed} \
    {train,val}/bad_ends_per_GBS val/bad_samples_per_GBS
