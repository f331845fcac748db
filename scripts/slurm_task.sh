#!/usr/bin/env bash
# One task of srun: tells torch which rank it is (the env:// rendezvous), then runs the command.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
exec "$@"
