#!/usr/bin/env bash
# Fine-tune by an array of jobs, one per seed and fold; a last job gathers their outcomes into one report.
#   SEEDS="1 2 3" FOLDS="0 1" sbatch slurm/finetune.sh configs/finetune/demo.yaml
# A file that names a system (configs/finetune/respond-demo.yaml) is one run of the loop of pre-training: slurm/pretrain.sh takes it.
# Outcomes lie in <output>/outcomes, so a job that is submitted again runs what is missing alone.
#SBATCH --job-name=emoscale-finetune
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/slurm/common.sh"

read -ra seeds <<< "${SEEDS:-1 2 3}"
read -ra folds <<< "${FOLDS:?name the folds, which count from 0, such as FOLDS=\"0 1 2 3 4\"}"
all=("seeds=[$(IFS=,; echo "${seeds[*]}")]" "run_folds=[$(IFS=,; echo "${folds[*]}")]")
case "${STAGE:-submit}" in
submit)
    run_step "${emoscale[@]}" finetune "$@" "${all[@]}" --check > /dev/null || exit
    same=(--parsable --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"}
        ${SLURM_GPUS_ON_NODE:+--gpus="$SLURM_GPUS_ON_NODE"})
    last=$((${#seeds[@]} * ${#folds[@]} - 1))
    array=$(STAGE=run sbatch "${same[@]}" --array="0-$last" --output=%x-%A_%a.log slurm/finetune.sh "$@") || exit
    report=$(STAGE=gather sbatch "${same[@]}" --dependency="afterok:$array" --kill-on-invalid-dep=yes slurm/finetune.sh "$@") || exit
    echo "emoscale: runs are job $array, the report is job $report"
    ;;
run)
    seed=${seeds[SLURM_ARRAY_TASK_ID / ${#folds[@]}]} fold=${folds[SLURM_ARRAY_TASK_ID % ${#folds[@]}]}
    run_step "${emoscale[@]}" finetune "$@" "seeds=[$seed]" "run_folds=[$fold]" gather=false
    ;;
gather)
    run_step "${emoscale[@]}" finetune "$@" "${all[@]}"
    ;;
*)
    echo "emoscale: STAGE=$STAGE is none of submit, run, gather" >&2
    exit 2
    ;;
esac
