#!/usr/bin/env bash
# SFT tutorial with LoRA: adapters on the rows of sft.sh (Dolly), the model itself frozen.
#
#     bash examples/lora.sh       # flags that follow go to train_sft.py; variables: here and in common.sh
#
# Slurm: MODEL=... TRAIN_DATA=... VAL_DATA=... OUTPUT=... sbatch slurm/sft.sbatch, then the flags below.
STEPS=${LORA_STEPS:-16}     # tutorial: trainer.sft.max_steps=-1
BATCH=${SFT_BATCH:-8}       # 128
LR=${LORA_LR:-5e-4}         # ten times that of all weights
RANK=${LORA_RANK:-16}
MAX_LEN=${SFT_MAX_LEN:-256} # the model's 4096
NEW_TOKENS=${NEW_TOKENS:-64}
# shellcheck source=examples/common.sh
source "$(dirname "$0")/common.sh"
data=$OUTPUT/data/dolly run=$OUTPUT/lora

obtain_model
raw=(--download)
[[ -z $DATA ]] || raw=(--input "$DATA/databricks-dolly-15k.jsonl")
[[ -f $data/val.jsonl ]] || python prepare_data.py dolly "${raw[@]}" --output "$data"

# train_gpt_sft.py model.peft.peft_scheme=lora
flags=(
    --precision "$PRECISION"
    --max-steps "$STEPS" --val-batches 2 --val-interval 8 --save-interval 0
    --model "$MODEL"                   # model.restore_from_path; it is frozen
    --lora-rank "$RANK"                # model.peft.lora_tuning.adapter_dim=32
    --lora-alpha "$((2 * RANK))"       # model.peft.lora_tuning.alpha; also the default
    --lora-targets q_proj k_proj v_proj o_proj # model.peft.lora_tuning.target_modules; by default the MLP's, too
    --lr "$LR" --min-lr "$LR" --warmup-steps 2
    --micro-batch-tokens 4096 --global-batch-size "$BATCH" --max-seq-len "$MAX_LEN"
    --train-data "$data/train.jsonl" --val-data "$data/val.jsonl"
    --output "$run"
)
torchrun --standalone --nproc_per_node "$DEVICES" train_sft.py "${flags[@]}" "$@"

# $run/adapter is a directory of peft: PeftModel.from_pretrained(model, "$run/adapter") loads it, --adapter goes
# on from it. $run/hf is the merged model (merge_lora_weights/merge.py), as `python -m tools.prepare_model merge
# --model MODEL --adapter $run/adapter --output DIR` makes it.
head -n 4 "$data/val.jsonl" | sed 's/^{"input": /{"prompt": /' > "$data/prompts.jsonl"
python generate.py --model "$run/hf" --input "$data/prompts.jsonl" --output "$run/answers.jsonl" \
    --max-new-tokens "$NEW_TOKENS"
cat "$run/answers.jsonl"
metrics "$run" val/loss
