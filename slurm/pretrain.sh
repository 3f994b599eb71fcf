#!/usr/bin/env bash
# Pre-train on any number of nodes; saves, requeues and goes on when SLURM takes the nodes back.
#   sbatch slurm/pretrain.sh configs/pretrain/memobert-demo.yaml run.output=runs/demo                             one rank on a CPU
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00 slurm/pretrain.sh \
#     configs/pretrain/memobert.yaml data.corpora='[corpora/films]' run.output=runs/memobert
# One task per GPU, or per CPU rank. The signal below is also `run.signal`; SLURM may send it up to a minute early, and a run that
# knows its job's end leaves in time without it. `emoscale launch` writes such lines.
# Set before `sbatch`, or leave: EMOSCALE_MAX_RESTARTS (100: how often the job may start again, for whatever reason).
#SBATCH --job-name=emoscale-pretrain
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${EMOSCALE_SLURM:-${SLURM_SUBMIT_DIR:?submit this with sbatch}/slurm}/common.sh"

TRIES=3  # of a job that a fault ended, in a row without a checkpoint newer than before
restarts=${SLURM_RESTART_COUNT:-0} most=${EMOSCALE_MAX_RESTARTS:-100}
if [ "$restarts" -gt "$most" ]; then  # SLURM itself requeues after a lost node
    echo "emoscale: started again $restarts times, EMOSCALE_MAX_RESTARTS allows $most; this was the last" >&2
    exit 1
fi

field() { grep -o "\"$1\": [^,}]*" "$EMOSCALE_OUTCOME" 2>/dev/null | head -n 1 | cut -d' ' -f2-; }

progress() {  # STEP TRIES: whether more steps are done than at any stop before, or it may be tried again nevertheless
    local before stalls
    before=$(cat "$records/reached" 2>/dev/null || echo -1)
    if [ "$1" -gt "$before" ]; then
        echo "$1" > "$records/reached"
        rm -f "$records/stalls"
        return 0
    fi
    stalls=$(($(cat "$records/stalls" 2>/dev/null || echo 0) + 1))
    echo "$stalls" > "$records/stalls"
    [ "$stalls" -lt "$2" ]
}

requeue() {  # WHAT [NODES]: start this job again, without these nodes, unless that was done too often
    if [ "$restarts" -ge "$most" ]; then
        echo "emoscale: $1, started again $restarts times, which EMOSCALE_MAX_RESTARTS allows; this was the last" >&2
        exit 1
    fi
    echo "emoscale: $1, requeued${2:+ without $2}" >&2
    trap '' TERM  # sent as soon as the job is requeued
    scontrol requeue "$SLURM_JOB_ID" || exit 1
    if [ -n "${2:-}" ]; then
        local before
        before=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^ ]*' | cut -d= -f2)
        [ "$before" != "(null)" ] || before=""
        scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$2" || echo "emoscale: $2 could not be excluded" >&2
    fi
    exit 0
}

saved() {  # the step of the newest checkpoint
    local run  # a name may hold commas and braces
    run=$(sed -n 's/.*"output": "\([^"]*\)".*/\1/p' "$EMOSCALE_OUTCOME" 2>/dev/null)
    grep -o '[1-9][0-9]*$' "$run/checkpoints/latest" 2>/dev/null || echo -1
}

run_step "${emoscale[@]}" pretrain "$@"
status=$?
reached=$(field step)
case $status in
0) ;;
"$HUNG" | "$UNFIT" | "$LOST" | 134 | 135 | 137 | 139 | 142 | 143)  # a node's or the network's fault, as far as can be told from here
    what="$(why "$status") (exit code $status)"
    [ "$asked" != TERM ] && progress "$(saved)" "$TRIES" && requeue "$what" "$(unfit)"
    echo "emoscale: $what; $([ "$asked" = TERM ] && echo "ended from outside" || echo "$TRIES times in a row without a new checkpoint")" >&2
    exit "$status"
    ;;
*)
    echo "emoscale: a task failed with exit code $status ($records/exits.jsonl)" >&2
    exit "$status"
    ;;
esac
[ "$(field finished)" = false ] || exit 0

# Stopped and saved. SIGTERM means that somebody, or SLURM itself, decides what comes next.
case $asked:$(field reason) in
TERM:*) exit 0 ;;
USR1:* | :\"deadline*) ;;
*) exit 0 ;;
esac
progress "$reached" 1 && requeue "saved at step $reached"
echo "emoscale: stopped at step $reached, as the time before: restarts bring no progress, so this was the last; raise --time" >&2
exit 1
