#!/bin/bash
#SBATCH --nodes=4 --ntasks-per-node=1 --cpus-per-task=16 --gpus-per-node=4 --time=2-00:00:00

# Runs a grid with Ray on all nodes of a job. Submit it in the root of the checkout.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --nodes=1 --ntasks=1 --nodelist="$head" .venv/bin/ray start --head --port=6379 --block &
sleep 20
srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
  .venv/bin/ray start --address="$head:6379" --block &
sleep 20
srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
  .venv/bin/python sweep.py config/sweep/leaderboard.yaml --address="$head:6379" --cpus 4 --gpus 0.5
