#!/usr/bin/env bash
# SFT tutorial, second half: 'Fine-Tune with a Chat Dataset' (OpenAssistant). dpo.sh, reward_model.sh, ppo.sh,
# rejection_sampling.sh and self_rewarding.sh start from this model.
#
#     bash examples/sft_chat.sh   # flags that follow go to train_sft.py; variables: here and in common.sh
#
# Slurm: as sft.sh.
STEPS=${SFT_STEPS:-16}      # tutorial: trainer.sft.max_steps=-1, which is --max-epochs 1 without --max-steps
BATCH=${SFT_BATCH:-8}       # 128
LR=${SFT_LR:-5e-5}          # 5e-6
MAX_LEN=${SFT_MAX_LEN:-256} # 4096
NEW_TOKENS=${NEW_TOKENS:-64}
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/oasst run=$OUTPUT/sft_chat

# Prerequisite: Obtaining a pretrained model
obtain_model

# Step 1: Data Formatting (preprocess_openassistant_data.py --output_directory=data/oasst)
raw=(--download)
[[ -z $DATA ]] || raw=(--input "$DATA/2023-04-12_oasst_all.trees.jsonl.gz")
python prepare_data.py oasst "${raw[@]}" --output "$data"

# Step 2: SFT Training (train_gpt_sft.py)
flags=(
    --precision "$PRECISION"         # trainer.precision, model.megatron_amp_O2
    --max-steps "$STEPS"             # trainer.sft.max_steps
    --val-batches 2                  # trainer.sft.limit_val_batches=40
    --val-interval 8                 # trainer.sft.val_check_interval=1000
    --save-interval 0                # trainer.sft.save_interval; 0: at the end only
    --model "$MODEL"                 # model.restore_from_path
    --lr "$LR" --min-lr "$LR"        # model.optim.lr
    --warmup-steps 2                 # model.optim.sched.warmup_steps=10
    --chat-tokens '\x00' '\x11' '\x12' '\n' '\n' # model.data.chat_prompt_tokens; also the default.
                                     # model.data.chat=True has no flag: the rows have "conversations"
    --micro-batch-tokens 4096        # model.data.train_ds.micro_batch_size=1: rows are packed, so count tokens
    --global-batch-size "$BATCH"     # model.data.train_ds.global_batch_size
    --max-seq-len "$MAX_LEN"         # model.data.train_ds.max_seq_length
    --train-data "$data/train.jsonl" # model.data.train_ds.file_path
    --val-data "$data/val.jsonl"     # model.data.validation_ds.file_path
    --output "$run"                  # exp_manager.explicit_log_dir; a run there is continued (resume_if_exists)
)   # monitor=validation_loss, save_nemo_on_train_end: always so. exp_manager.create_wandb_logger=True:
    # --wandb-project sft_run --wandb-name chat_sft_run
torchrun --standalone --nproc_per_node "$DEVICES" train_sft.py "${flags[@]}" "$@"

# Step 3: Inference in the trained format: its markers, default system text and label are in $run/hf.
echo "What is machine learning?" | python generate.py --model "$run/hf" --chat --max-new-tokens "$NEW_TOKENS"
head -n 4 "$data/val.jsonl" > "$data/prompts.jsonl" # the last answer of a row is left out
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val/loss # tutorial: final val loss 1.201 (7B)
