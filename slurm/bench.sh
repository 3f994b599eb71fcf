#!/usr/bin/env bash
# Measure a training step on the nodes' own hardware: sbatch --gpus=1 slurm/bench.sh step size=base
#SBATCH --job-name=emoscale-bench
#SBATCH --ntasks=1
#SBATCH --output=%x-%j.log
source "${SLURM_SUBMIT_DIR:?submit this with sbatch}/slurm/common.sh"

run_step "${emoscale[@]}" bench "$@"
