# shellcheck shell=bash
# What all batch files do: read the time left, start torchrun on every node, requeue. They source this file
# from the project's root, with a training script and its arguments.

set -euo pipefail

script=$1
shift
: "${SLURM_JOB_ID:?submit a .sbatch file with sbatch}"
: "${MODEL:?give MODEL, the Hugging Face directory to start from}"
: "${TRAIN_DATA:?give TRAIN_DATA, one jsonl file or several separated by spaces}"
: "${VAL_DATA:?give VAL_DATA, one jsonl file or several separated by spaces}"
: "${OUTPUT:?give OUTPUT, the directory of this run, which all nodes must share}"
CONTAINER=${CONTAINER:-}               # image for pyxis, as nvcr.io#nvidia/pytorch:25.06-py3; empty: none
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-} # more mounts than this directory, as /data:/data,/models:/models
MARGIN_S=${MARGIN_S:-900}              # seconds for loading the model, the last step, the save, the export
PROCESSES=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs: give --gpus-per-node or PROCESSES_PER_NODE}}

# -------------------------------------------------------------------------------------------- environment
if [[ -z $CONTAINER && -d .venv ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# If a collective hangs, each rank writes what it was waiting for: which one never came can be read from that.
export TORCH_NCCL_TRACE_BUFFER_SIZE="${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$OUTPUT/slurm/nccl_rank_}"
# If nodes have several networks, name the one for the start-up traffic:
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0
# If Transformer Engine finds no attention kernel for your GPU, leave it its plain one:
# export NVTE_FLASH_ATTN=0 NVTE_FUSED_ATTN=0 NVTE_MASKED_SOFTMAX_FUSION=0

container=()
if [[ -n $CONTAINER ]]; then
    container=(
        --container-image="$CONTAINER"
        --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
        --container-workdir="$PWD"
    )
fi

# ---------------------------------------------------------------------------------------------- time left
# Slurm's D-HH:MM:SS, HH:MM:SS or MM:SS in seconds.
to_seconds() {
    local days=0 time=$1 seconds=0 part
    if [[ $time == *-* ]]; then
        days=${time%%-*}
        time=${time#*-}
    fi
    for part in ${time//:/ }; do
        seconds=$((seconds * 60 + 10#$part)) # 10#: 08 is not octal
    done
    echo $((days * 86400 + seconds))
}

left=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %L)
max_time=()
if [[ $left =~ ^([0-9]+-)?[0-9]+(:[0-9]+)+$ ]]; then
    seconds=$(($(to_seconds "$left") - MARGIN_S))
    if ((seconds <= 0)); then
        echo "time left is $left, at most MARGIN_S=$MARGIN_S s: raise --time or lower MARGIN_S" >&2
        exit 1
    fi
    printf -v clock '%02d:%02d:%02d' $((seconds / 3600)) $((seconds / 60 % 60)) $((seconds % 60))
    max_time=(--max-time "$clock")
elif [[ $left != UNLIMITED ]]; then
    echo "squeue gives '$left' as the time left, which is not a time" >&2
    exit 1
fi

# -------------------------------------------------------------------------------------------------- nodes
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_node=${nodes%%$'\n'*} # `| head -n 1` would end scontrol by a broken pipe if the list is long
mkdir -p "$OUTPUT/slurm"
if [[ -n ${SLURM_GPUS_ON_NODE:-} && ${HEALTH_CHECK:-on} == on ]]; then
    # on all nodes to the end: one report names all that are not sound
    if ! srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        bash slurm/health.sh "$PROCESSES" 2>&1 | tee "$OUTPUT/slurm/health.txt"; then
        echo "submit again with sbatch --exclude=NODES for the nodes named above, or with HEALTH_CHECK=off" >&2
        exit 1
    fi
fi

# -------------------------------------------------------------------------------------------------- train
port=${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
read -ra train_data <<<"$TRAIN_DATA"
read -ra val_data <<<"$VAL_DATA"

touch "$OUTPUT/slurm/started"
echo "job $SLURM_JOB_ID: $SLURM_JOB_NUM_NODES nodes x $PROCESSES processes, time left $left"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    --output="$OUTPUT/slurm/%j-%t.out" --error="$OUTPUT/slurm/%j-%t.err" --open-mode=append \
    "${container[@]}" \
    torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node "$PROCESSES" \
    --rdzv_backend c10d \
    --rdzv_endpoint "$first_node:$port" \
    --rdzv_id "$SLURM_JOB_ID" \
    "$script" \
    --model "$MODEL" \
    --train-data "${train_data[@]}" \
    --val-data "${val_data[@]}" \
    --output "$OUTPUT" \
    "${max_time[@]}" \
    "$@"

# ------------------------------------------------------------------------------------------------ requeue
# Reached only if every node ended without an error: a failure is not repeated.
if [[ $OUTPUT/hf/config.json -nt $OUTPUT/slurm/started ]]; then # not one that an earlier run left
    echo "complete: $OUTPUT/hf"
else
    echo "stopped before the end: requeue to continue"
    scontrol requeue "$SLURM_JOB_ID"
fi
