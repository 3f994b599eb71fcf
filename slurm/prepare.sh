#!/usr/bin/env bash
# Prepare a corpus by an array of jobs over its films: the expression teacher first, then the shares, then one corpus of them.
#   TASKS=16 sbatch --cpus-per-task=4 slurm/prepare.sh configs/prepare/films.yaml source=/data/films output=corpora/films
# This job trains the teacher and submits the other two; each can be submitted again and goes on where it stopped.
#SBATCH --job-name=emoscale-prepare
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/slurm/common.sh"

workers="workers=${SLURM_CPUS_PER_TASK:-1}"
case "${STAGE:-teacher}" in
teacher)
    run_step "${emoscale[@]}" prepare "$@" "$workers" stage=teacher || exit
    same=(--parsable --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"})
    array=$(STAGE=extract sbatch "${same[@]}" --array="0-$((${TASKS:-8} - 1))" --output=%x-%A_%a.log slurm/prepare.sh "$@") || exit
    last=$(STAGE=assemble sbatch "${same[@]}" --dependency="afterany:$array" slurm/prepare.sh "$@") || exit
    echo "emoscale: shares are job $array, the corpus is job $last"
    ;;
extract)
    run_step "${emoscale[@]}" prepare "$@" "$workers" stage=extract task="$SLURM_ARRAY_TASK_ID" tasks="$SLURM_ARRAY_TASK_COUNT"
    ;;
assemble)  # runs whatever became of the shares: what is missing is named, and skipped inputs stand in the ledger
    run_step "${emoscale[@]}" prepare "$@" "$workers" stage=assemble
    ;;
*)
    echo "emoscale: STAGE=$STAGE is none of teacher, extract, assemble" >&2
    exit 2
    ;;
esac
