#!/usr/bin/env bash
# usage: ./launch.sh NAME [section.key=value ...] [--resume auto|none|PATH] [--dry-run] [-- LAUNCHER OPTIONS]
#        ./launch.sh --list
#
# Trains NAME, one of the runs of experiments/*.yaml. Makes the Python environment first if there is none.
# Everything after -- goes to the deepspeed launcher, or to srun.
# NUM_GPUS    GPUs to use on each node (default: all; 0: run on the CPU)
# CPU_RANKS   processes where there is no GPU (default: 2)
# HOSTFILE    nodes, one 'name slots=N' a line: multi-node training over ssh
# Inside a SLURM allocation the run starts itself with srun, one task per GPU.
# FOVLM_DATA, FOVLM_MODELS, FOVLM_RUNS, FOVLM_CACHE are the folders of shards, models, runs and caches.
set -u
case " $* " in
  "  ") echo "fovlm: which run? ./launch.sh --list shows all; ./launch.sh quickstart is a good first" >&2; exit 2 ;;
  *" -h "* | *" --help "*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
esac
# Relative folders are meant from where the command was typed.
for folder in HOSTFILE FOVLM_DATA FOVLM_MODELS FOVLM_RUNS FOVLM_CACHE; do
  case ${!folder:-/} in /*) ;; *) export "$folder=$PWD/${!folder}" ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
. scripts/env.sh
use_python || exit 2
use_caches || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$PYTHON" -m fovlm.launch "$@"
