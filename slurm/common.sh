# Sourced by every job of this folder: variables of a launch, filled in here alone, and a step that passes signals on.
# Set before `sbatch`, or leave: EMOSCALE_PYTHON (python with emoscale, .venv/bin/python), EMOSCALE_RECORDS (slurm/records),
# EMOSCALE_CONTAINER (an image of emoscale.def: every task runs in it), EMOSCALE_BIND (folders it sees besides this one).
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1

job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
records=${EMOSCALE_RECORDS:-slurm/records}/$job
mkdir -p "$records"

if [ -n "${EMOSCALE_CONTAINER:-}" ]; then
    runner=$(command -v apptainer || command -v singularity) || { echo "emoscale: EMOSCALE_CONTAINER is set, and there is no apptainer on this node" >&2; exit 2; }
    emoscale=("$runner" exec --bind "$PWD,$(realpath "$records")${EMOSCALE_BIND:+,$EMOSCALE_BIND}" --pwd "$PWD")
    [ -z "${SLURM_JOB_GPUS:-${CUDA_VISIBLE_DEVICES:-}}" ] || emoscale+=(--nv)
    emoscale+=("$EMOSCALE_CONTAINER" emoscale)  # the image's own: `python -m` would find the one in this folder first
else
    python=${EMOSCALE_PYTHON:-.venv/bin/python}
    [ -x "$python" ] || { echo "emoscale: $python is not there; make quickstart builds it, or set EMOSCALE_PYTHON" >&2; exit 2; }
    emoscale=("$python" -m emoscale)
fi

# The ranks meet at the first node. Its address stands in SLURM's own tables; its name need not resolve everywhere.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
EMOSCALE_OUTCOME=$PWD/$records/outcome.json
[[ $records = /* ]] && EMOSCALE_OUTCOME=$records/outcome.json
# When the job will be ended, so that a run leaves in time though no signal comes. Older SLURMs do not say it by themselves.
ends=$(scontrol show job "$SLURM_JOB_ID" | grep -o ' EndTime=[^ ]*' | cut -d= -f2)
SLURM_JOB_END_TIME=${SLURM_JOB_END_TIME:-${ends:+$(date -d "$ends" +%s 2>/dev/null)}}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS EMOSCALE_OUTCOME SLURM_JOB_END_TIME

asked=""
forward() {  # SIGNAL: note it and hand it to every task of the step
    asked=$1
    echo "emoscale: $(date -u +%FT%TZ) job $SLURM_JOB_ID got SIG$1" >&2
    [ -z "${step:-}" ] || kill -s "$1" "$step" 2>/dev/null
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

# Exit codes: of a rank that did not move, of ranks that met a node they cannot train on, of one that lost another
HUNG=75 UNFIT=76 LOST=77
why() {  # STATUS: say in a word what an exit code means
    case $1 in
    0) echo done ;;
    2) echo configuration ;;
    "$HUNG" | 142) echo hung ;;  # 142: the kernel's alarm clock, where Python could not
    "$UNFIT") echo "unfit node" ;;
    "$LOST") echo "lost rank" ;;
    134) echo aborted ;;
    135) echo "bus error" ;;
    137) echo killed ;;
    139) echo "segmentation fault" ;;
    143) echo terminated ;;
    *) echo failure ;;
    esac
}

unfit() {  # the nodes that the ranks found not fit to train on
    grep -o '"unfit": \[[^]]*\]' "$EMOSCALE_OUTCOME" 2>/dev/null | cut -d: -f2 | tr -d '[]" '
}

first_failure() {  # give task, exit code and node of the task that failed first; one that only lost another comes behind that one
    local path code host
    for path in "$records"/exit-*; do
        [ -f "$path" ] || continue
        read -r code host < "$path"
        echo "$((code == LOST)) $(stat -c %.Y "$path") ${path##*-} $code $host"
    done | sort -n -k1,1 -k2,2 | head -n 1 | cut -d' ' -f3-
}

run_step() {  # COMMAND...: run it as a step of all tasks; give the exit code of the task that failed first
    rm -f "$records"/exit-* "$EMOSCALE_OUTCOME"
    # srun answers 143 for every rank it ends after a failure, so each task leaves its own code. USR1 must not end a task whose
    # Python has no handler yet; at TERM the shell waits for its Python, which saves.
    # shellcheck disable=SC2016  # expanded by the task's own shell
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c \
        'trap "" USR1; trap : TERM; records=$1; shift; "$@"; code=$?
        [ $code -eq 0 ] || echo "$code $SLURMD_NODENAME" > "$records/exit-$SLURM_PROCID"; exit $code' \
        task "$records" "$@" &
    step=$!
    local status=0 task="" code="" host=""
    while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done  # a signal ends `wait`, not the step
    step=""
    read -r task code host < <(first_failure) && status=$code
    [ "$status" -ne "$UNFIT" ] || host=$(unfit)  # all ranks end at once, wherever it is
    printf '{"job": "%s", "status": %d, "reason": "%s", "first_failed_task": "%s", "host": "%s", "nodes": "%s", "signal": "%s", "restarts": %d, "time": "%s"}\n' \
        "$job" "$status" "$(why "$status")" "$task" "$host" "$SLURM_JOB_NODELIST" "$asked" "${SLURM_RESTART_COUNT:-0}" "$(date -u +%FT%TZ)" \
        >> "$records/exits.jsonl"
    return "$status"
}
