#!/usr/bin/env bash
# One task of srun: sets the rank for torch (env:// rendezvous), then runs the command.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
