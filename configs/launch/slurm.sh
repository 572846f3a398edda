#!/bin/bash
# Trains on the GPUs of several hosts under SLURM, one process a GPU; JAX finds the others by what SLURM says. Start it with
#     sbatch --nodes=2 configs/launch/slurm.sh configs/gsm8k_llama3.1_8b.yaml --train.run_dir /shared/runs/llama
# Settings behind the YAML file win over it. train.run_dir and the model have to lie on storage that all hosts share.
# The same command, given again, goes on from the last checkpoint: with as many hosts, or with others.
#SBATCH --job-name=grpo
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=grpo-%j.log
set -euo pipefail

# A process that ends with an error ends the others too: by JAX's heartbeat, and here at once.
srun --kill-on-bad-exit=1 --label grpo-jax train --config "$@" --train.quiet true --resume
