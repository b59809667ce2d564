#!/usr/bin/env bash
# A GPU cluster under SLURM: sbatch tpu_setup/slurm.sh train dpo --model ... --out /shared/runs/dpo
#SBATCH --job-name=dpo-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is up every process is asked to save and end; submit the same line again to go on.
#SBATCH --signal=TERM@120
set -euo pipefail

# One process for each GPU. --distributed calls jax.distributed.initialize, which reads SLURM's own variables: each task
# takes the GPU of its local number, so all GPUs of a node must be visible to all its tasks (no --gpus-per-task).
: "${VENV:=.venv}"
exec srun --kill-on-bad-exit=1 "$VENV/bin/dpo-jax" "$@" --distributed
