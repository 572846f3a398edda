#!/bin/bash
# Trains on the GPUs of several hosts under SLURM, one process a GPU; JAX finds the others by SLURM's variables. Start it with
#     sbatch --nodes=2 configs/launch/slurm.sh configs/gsm8k_llama3.1_8b.yaml --train.run_dir /shared/runs/llama
# Settings after the YAML file override it. train.run_dir and the model must be on storage that all hosts share.
# The same command, given again, continues from the last checkpoint, also with another number of hosts.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=grpo-%j.log
set -euo pipefail

# A process that fails ends the others: by JAX's heartbeat, and by this option at once.
srun --kill-on-bad-exit=1 --label grpo-jax train --config "$@" --train.quiet true --resume
