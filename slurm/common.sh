# Sourced by every job of this folder: variables of a launch, filled in here alone, and a step that passes signals on.
# Set before `sbatch`, or leave: EMOSCALE_PYTHON (python with emoscale, .venv/bin/python), EMOSCALE_RECORDS (slurm/records).
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 1

python=${EMOSCALE_PYTHON:-.venv/bin/python}
[ -x "$python" ] || { echo "emoscale: $python is not there; make quickstart builds it, or set EMOSCALE_PYTHON" >&2; exit 2; }
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
records=${EMOSCALE_RECORDS:-slurm/records}/$job
mkdir -p "$records"

# The ranks meet at the first node. Its address stands in SLURM's own tables; its name need not resolve everywhere.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
EMOSCALE_OUTCOME=$PWD/$records/outcome.json
[[ $records = /* ]] && EMOSCALE_OUTCOME=$records/outcome.json
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS EMOSCALE_OUTCOME

asked=""
forward() {  # SIGNAL: note it and hand it to every task of the step
    asked=$1
    echo "emoscale: $(date -u +%FT%TZ) job $SLURM_JOB_ID got SIG$1" >&2
    [ -z "${step:-}" ] || kill -s "$1" "$step" 2>/dev/null
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

run_step() {  # COMMAND...: run it as a step of all tasks; give the exit code of the task that failed first
    rm -f "$records"/exit-* "$EMOSCALE_OUTCOME"
    # srun answers 143 for every rank it ends after a failure, so each task leaves its own code. USR1 must not end a task whose
    # Python has no handler yet; at TERM the shell waits for its Python, which saves.
    # shellcheck disable=SC2016  # expanded by the task's own shell
    srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash -c \
        'trap "" USR1; trap : TERM; records=$1; shift; "$@"; code=$?; [ $code -eq 0 ] || echo $code > "$records/exit-$SLURM_PROCID"; exit $code' \
        task "$records" "$@" &
    step=$!
    local status=0
    while kill -0 "$step" 2>/dev/null; do wait "$step"; status=$?; done  # a signal ends `wait`, not the step
    step=""
    local failed
    failed=$(find "$records" -name 'exit-*' -printf '%T@ %p\n' 2>/dev/null | sort -n | head -n 1 | cut -d' ' -f2)
    [ -z "$failed" ] || status=$(cat "$failed")
    printf '{"job": "%s", "status": %d, "first_failed_task": "%s", "signal": "%s", "restarts": %d, "time": "%s"}\n' \
        "$job" "$status" "${failed##*-}" "$asked" "${SLURM_RESTART_COUNT:-0}" "$(date -u +%FT%TZ)" >> "$records/exits.jsonl"
    return "$status"
}
