#!/usr/bin/env bash
# Pre-train on any number of nodes; saves, requeues and goes on when SLURM takes the nodes back.
#   sbatch slurm/pretrain.sh configs/pretrain/memobert.yaml data.corpora='[corpora/films]' run.output=runs/memobert
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00 slurm/pretrain.sh CONFIG [key=value …]
# One task per GPU, or per CPU rank. The signal below is also `run.signal`; SLURM may send it up to a minute early.
#SBATCH --job-name=emoscale-pretrain
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/slurm/common.sh"

run_step "$python" -m emoscale pretrain "$@"
status=$?
[ "$status" -eq 0 ] || { echo "emoscale: a task failed with exit code $status ($records/exits.jsonl)" >&2; exit "$status"; }
grep -q '"finished": false' "$EMOSCALE_OUTCOME" 2>/dev/null || exit 0

# Stopped by a signal and saved. SIGTERM means that somebody, or SLURM itself, decides what comes next.
[ "$asked" = USR1 ] || exit 0
reached=$(grep -o '"step": [0-9]*' "$EMOSCALE_OUTCOME" | grep -o '[0-9]*')
before=$(cat "$records/reached" 2>/dev/null || echo -1)
if [ "$reached" -le "$before" ]; then
    echo "emoscale: stopped at step $reached, as the time before: restarts bring no progress, so this was the last; raise --time" >&2
    exit 1
fi
echo "$reached" > "$records/reached"
echo "emoscale: saved at step $reached, requeued" >&2
scontrol requeue "$SLURM_JOB_ID"
sleep 60  # SLURM ends this script
