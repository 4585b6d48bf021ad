# shellcheck shell=bash
# The common part of all batch files: read the time left, check the GPUs, start torchrun on every node, requeue.
# They source this file from the project's root, with a training script and its arguments.
#
# `sbatch FILE` runs a batch file once, on the job's first node: srun then starts torchrun on each node.
# `srun FILE` runs it on every node, in a job step: torchrun starts right there. A second srun inside the step
# would wait forever for the resources that the step holds.

set -euo pipefail

script=$1
shift
: "${SLURM_JOB_ID:?start a .sbatch file with sbatch or srun}"
: "${MODEL:?give MODEL, the Hugging Face directory to start from}"
: "${TRAIN_DATA:?give TRAIN_DATA, one jsonl file or several separated by white space}"
: "${VAL_DATA:?give VAL_DATA, one jsonl file or several separated by white space}"
: "${OUTPUT:?give OUTPUT, the directory of this run, which all nodes must share}"
CONTAINER=${CONTAINER:-}               # image for pyxis, as nvcr.io#nvidia/pytorch:25.06-py3; empty: none
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-} # more mounts than this directory, as /data:/data,/models:/models
MARGIN_S=${MARGIN_S:-900}              # seconds for loading the model, the last step, the save, the export

# ------------------------------------------------------------------------------------------ batch or step
# sbatch runs its own copy of the batch file, under the name slurm_script. SLURM_STEP_ID alone does not tell: a
# job that is submitted from within a step inherits that step's. Ids of ten digits belong to salloc's shells.
in_step=0 node=0 num_nodes=${SLURM_JOB_NUM_NODES:-1} node_list=${SLURM_JOB_NODELIST:-} run_id=$SLURM_JOB_ID
if [[ ${0##*/} != slurm_script && ${SLURM_STEP_ID:-} =~ ^[0-9]{1,9}$ ]]; then
    in_step=1 node=$SLURM_NODEID num_nodes=$SLURM_STEP_NUM_NODES node_list=$SLURM_STEP_NODELIST
    run_id=$SLURM_JOB_ID.$SLURM_STEP_ID
fi

# Print a message that is the same on every node once, on the first.
say() {
    ((node)) || echo "$*" >&2
}

# -------------------------------------------------------------------------------------------- mistakes
for name in MARGIN_S PROCESSES_PER_NODE RDZV_PORT; do
    [[ -n ${!name:-} ]] || continue
    if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]]; then
        say "$name=${!name} must be a whole number"
        exit 1
    fi
    printf -v "$name" %d "$((10#${!name}))" # 10#: 08 is not octal
done
if [[ ! ${HEALTH_CHECK:-on} =~ ^(on|off)$ ]]; then
    say "HEALTH_CHECK=$HEALTH_CHECK must be on or off"
    exit 1
fi
read -rd '' -a train_data <<<"$TRAIN_DATA" || true # of all lines; the end of the text is status 1
read -rd '' -a val_data <<<"$VAL_DATA" || true
if ((!${#train_data[@]} || !${#val_data[@]})); then
    say "TRAIN_DATA='$TRAIN_DATA' VAL_DATA='$VAL_DATA': give each at least one file"
    exit 1
fi
flags=" --model --train-data --val-data --output "
for argument in "$@"; do
    [[ $argument == --[a-z]* ]] || continue
    flag=${argument%%=*} flag=${flag//_/-}
    if [[ $flags == *" $flag "* ]]; then
        variable=${flag#--} variable=${variable//-/_}
        say "$flag is given twice: leave it out of the arguments, ${variable^^} or an argument before says it"
        exit 1
    fi
    if ((!in_step)) && [[ $flag == --no-resume || $flag == --resume-from ]]; then
        say "$flag: a job that is requeued would start there again: start once with srun, or give another OUTPUT"
        exit 1
    fi
    flags+="$flag "
done
if ((in_step && SLURM_STEP_NUM_TASKS != num_nodes)); then
    ((SLURM_PROCID)) || say "$SLURM_STEP_NUM_TASKS tasks on $num_nodes nodes, but torchrun is one task per node" \
        "and starts the processes itself: give srun --nodes=$num_nodes --ntasks=$num_nodes"
    exit 1
fi
if ((in_step)) && [[ -n $CONTAINER ]]; then
    say "CONTAINER is for sbatch: give srun --container-image=$CONTAINER and --container-mounts, and unset CONTAINER"
    exit 1
fi
PROCESSES=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
if [[ -z $PROCESSES ]]; then
    say "no GPUs: give --gpus-per-node or PROCESSES_PER_NODE (srun does not read the #SBATCH lines)"
    exit 1
fi
cpus=$(env -u OMP_NUM_THREADS nproc) # nproc obeys OMP_NUM_THREADS
if ((cpus < PROCESSES)); then
    say "$PROCESSES processes share $cpus CPU cores of a node: give --exclusive or --cpus-per-task"
fi

# -------------------------------------------------------------------------------------------- environment
bare=1 # not inside a container that srun started: there Slurm's programs are missing
command -v squeue >/dev/null || bare=0
if [[ -z $CONTAINER && -d .venv ]] && ((bare)); then
    export PATH="$PWD/.venv/bin:$PATH"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Each rank compiles small kernels, by default in up to 32 processes of its own.
export TORCHINDUCTOR_COMPILE_THREADS="${TORCHINDUCTOR_COMPILE_THREADS:-4}"
# Order of the kernels with tensor parallelism. The scripts set it as well, after imports that may start CUDA.
if [[ " $* " =~ \ --tp[\ =]([2-9]|[1-9][0-9]+)\  ]]; then
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
fi
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# If a collective hangs, each rank writes what it was waiting for: which one never came can be read from that.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$OUTPUT/slurm/nccl_rank_}"
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

seconds=
if ((bare)); then
    left=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %L)
    if [[ $left =~ ^([0-9]+-)?[0-9]+(:[0-9]+)+$ ]]; then
        seconds=$(to_seconds "$left")
    elif [[ $left != UNLIMITED ]]; then
        echo "squeue gives '$left' as the time left, which is not a time" >&2
        exit 1
    fi
elif [[ -n ${SLURM_JOB_END_TIME:-} ]]; then
    seconds=$((SLURM_JOB_END_TIME - $(date +%s))) left="$seconds s"
else
    left=unknown
    say "no squeue here, and this Slurm does not set SLURM_JOB_END_TIME: give --max-time to stop before the time limit"
fi
max_time=()
if [[ -n $seconds ]]; then
    margin=$MARGIN_S
    if ((seconds <= margin)); then
        margin=$((seconds - seconds / 2))
        say "time left is $left, at most MARGIN_S=$MARGIN_S s: training stops after half of it." \
            "Raise --time, or set MARGIN_S to the seconds that loading, the longest step, a save and the export take"
    fi
    seconds=$((seconds - margin))
    printf -v clock '%02d:%02d:%02d' $((seconds / 3600)) $((seconds / 60 % 60)) $((seconds % 60))
    max_time=(--max-time "$clock")
fi

# -------------------------------------------------------------------------------------------------- nodes
# The first host name of a node list: rack[0-3]n[08-11,14],x gives rack0n08. No scontrol: a container has none.
first_host() {
    local rest=$1 host=
    while [[ $rest =~ ^([^],[]*)\[([0-9]+)[^]]*\](.*)$ ]]; do
        host+=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
        rest=${BASH_REMATCH[3]}
    done
    echo "$host${rest%%,*}"
}

srun_per_node=(srun --nodes="$num_nodes" --ntasks="$num_nodes" --ntasks-per-node=1)
first_node=$(first_host "$node_list")
mkdir -p "$OUTPUT/slurm"

check_gpus() {
    if ((in_step)); then
        bash slurm/health.sh "$PROCESSES"
    else # on all nodes to the end: one report names all that are not sound
        "${srun_per_node[@]}" --kill-on-bad-exit=0 bash slurm/health.sh "$PROCESSES" 2>&1 |
            tee "$OUTPUT/slurm/health.txt"
    fi
}

# End this step on the other nodes, where it would wait for this one; a container has no scancel.
end_step() {
    if ((bare && num_nodes > 1)); then
        scancel --signal=KILL "$run_id"
    fi
}

if [[ -n ${SLURM_GPUS_ON_NODE:-} && ${HEALTH_CHECK:-on} == on ]] && ! check_gpus; then
    echo "start again with --exclude=NODES for the nodes named above, or with HEALTH_CHECK=off" >&2
    ((!in_step)) || end_step
    exit 1
fi

# -------------------------------------------------------------------------------------------------- train
port=${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
# Ranks follow Slurm's order of the nodes: with --rdzv_backend c10d torchrun would sort them by name.
train=(
    --nnodes "$num_nodes"
    --nproc_per_node "$PROCESSES"
    --master_addr "$first_node"
    --master_port "$port"
    --rdzv_id "$run_id"
    -- # else torchrun takes the script's --monitor for its own --monitor-interval
    "$script"
    --model "$MODEL"
    --train-data "${train_data[@]}"
    --val-data "${val_data[@]}"
    --output "$OUTPUT"
    "${max_time[@]}"
    "$@"
)
if ((node == 0)); then
    touch "$OUTPUT/slurm/started"
    echo "job $run_id: $num_nodes nodes x $PROCESSES processes, time left $left"
fi
# Command of each node. After a failure it waits: the first node that ends with an error takes the others with it,
# and by then each should have printed that it failed, in the order in which they did. A SIGTERM reaches torchrun as
# well, which has 30 s to save; bash would die of it before.
# shellcheck disable=SC2016 # the variables of the bash that runs it on its node
run_node='trap : TERM; torchrun --node_rank "$SLURM_NODEID" "$@" || {
    status=$?
    echo "${SLURMD_NODENAME:-node $SLURM_NODEID}: torchrun ended with status $status" >&2
    sleep 5
    exit "$status"
}'
if ((in_step)); then
    status=0 terminated=0
    trap 'terminated=1' TERM
    bash -c "$run_node" bash "${train[@]}" || status=$?
    if ((status)); then
        ((terminated)) || end_step
        exit "$status"
    fi
    ((node == 0)) || exit 0
else
    "${srun_per_node[@]}" --cpu-bind=none --kill-on-bad-exit=1 \
        --output="$OUTPUT/slurm/%j-%n.out" --error="$OUTPUT/slurm/%j-%n.err" --open-mode=append \
        "${container[@]}" bash -c "$run_node" bash "${train[@]}"
fi

# ------------------------------------------------------------------------------------------------ requeue
# Reached only if every node ended without an error: a failure is not repeated.
# Not one that an earlier run left; a short run's may have the same time as the start, to the clock of the files.
if [[ -e $OUTPUT/hf/config.json && ! $OUTPUT/hf/config.json -ot $OUTPUT/slurm/started ]]; then
    echo "complete: $OUTPUT/hf"
    exit 0
fi
if ((!in_step)); then
    echo "stopped before the end: requeue to continue"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
echo "stopped before the end: give the same command again to continue" >&2
exit 75 # EX_TEMPFAIL: neither complete nor failed
