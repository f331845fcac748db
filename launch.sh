#!/usr/bin/env bash
# Trains a run. Without an environment, makes one first (scripts/env.sh); nothing else needs to be done.
usage="usage: ./launch.sh NAME [section.key=value ...] [--resume auto|none|PATH] [--dry-run] [-- LAUNCHER OPTIONS]
       ./launch.sh --list

NAME is one of the runs of experiments/*.yaml. Everything after -- goes to the deepspeed launcher, or to srun.
NUM_GPUS    GPUs to use on each node (default: all; 0: run on the CPU)
CPU_RANKS   processes where there is no GPU (default 2)
HOSTFILE    nodes, one 'name slots=N' a line: multi-node training over ssh
Inside a SLURM allocation the run starts itself with srun, one task per GPU.
FOVLM_DATA, FOVLM_MODELS, FOVLM_RUNS, FOVLM_CACHE are the folders of shards, models, runs and caches."
set -u
# Relative folders are meant from where the command was typed.
for folder in HOSTFILE FOVLM_DATA FOVLM_MODELS FOVLM_RUNS FOVLM_CACHE; do
  case ${!folder:-/} in /*) ;; *) export "$folder=$PWD/${!folder}" ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 2
. scripts/env.sh

refuse() { say "$@"; exit 2; }

# -- the command line -----------------------------------------------------------------------------------------------
name="" mode=train overrides=() options=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) echo "$usage"; exit 0 ;;
    --list) mode=list ;;
    --dry-run) mode=dry ;;
    --resume) [ $# -gt 1 ] || refuse "--resume wants auto, none or a folder"; overrides+=("train.resume=$2"); shift ;;
    --resume=*) overrides+=("train.resume=${1#*=}") ;;
    --) shift; options=("$@"); break ;;
    -*) refuse "unknown option $1; --help shows all (options of the launcher go after --)" ;;
    *=*) overrides+=("$1") ;;
    *) [ -z "$name" ] || refuse "'$1': one run at a time, and '$name' stands there already"; name=$1 ;;
  esac
  shift
done
[ "$mode" = list ] || [ -n "$name" ] || refuse "which run? ./launch.sh --list shows all; ./launch.sh quickstart is a good first"

use_python || exit 2
[ "$mode" != list ] || exec "$PYTHON" -m fovlm.config.experiments
use_caches || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
run=("$name" ${overrides[@]+"${overrides[@]}"})

# -- what there is to run on ----------------------------------------------------------------------------------------
# gpus: the numbers of this node's GPUs, as CUDA_VISIBLE_DEVICES has them, else all that nvidia-smi lists.
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
else
  gpus=($(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+$'))
fi
found=${#gpus[@]}
slurm="" nodes=1
if [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${HOSTFILE:-}" ]; then
  slurm=yes nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
  found=${SLURM_GPUS_ON_NODE:-$found}
fi
local_ranks=${NUM_GPUS:-$found}
[[ $local_ranks =~ ^[0-9]+$ ]] || refuse "NUM_GPUS=$local_ranks is no number"
[ -n "${HOSTFILE:-}" ] || [ "$local_ranks" -le "$found" ] || refuse "NUM_GPUS=$local_ranks, but this node has $found"
device=cuda
if [ "$local_ranks" -eq 0 ] && [ -z "${HOSTFILE:-}" ]; then
  device=cpu local_ranks=${CPU_RANKS:-2}
  export DS_ACCELERATOR=cpu
fi
world=$((local_ranks * nodes))
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || refuse "HOSTFILE=$HOSTFILE is no file"
  world=$(awk -v most="${NUM_GPUS:-0}" '/^[^#]*slots=/ { split($0, a, "slots="); n += most ? most : a[2] } END { print n + 0 }' "$HOSTFILE")
  [ "$world" -gt 0 ] || refuse "HOSTFILE=$HOSTFILE has no line like 'name slots=8'"
fi
chosen=" ${options[*]-} "
[[ $chosen =~ \ --?(i|e|include|exclude|num_gpus|num_nodes|num_accelerators|H|hostfile)[=\ ] ]] && chosen=yes || chosen=""
[ -n "$chosen" ] && world=1  # the launcher decides; the run itself checks again

# Mistakes in the experiment are told here, once, before anything heavy starts.
"$PYTHON" -m fovlm.config.deepspeed "$world" "$device" "${run[@]}" || exit
[ "$mode" != dry ] || WORLD_SIZE=$world exec "$PYTHON" -m fovlm.train "${run[@]}" --dry-run

read -r port cores < <("$PYTHON" -c 'import os, socket
s = socket.socket(); s.bind(("", 0))
print(s.getsockname()[1], len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > local_ranks ? cores / local_ranks : 1))}

# -- the command ----------------------------------------------------------------------------------------------------
if [ -n "$slurm" ]; then
  MASTER_ADDR=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1)
  export MASTER_ADDR=${MASTER_ADDR:-$(hostname)} MASTER_PORT=${MASTER_PORT:-$port}
  command=(srun --nodes="$nodes" --ntasks="$world" --ntasks-per-node="$local_ranks" --kill-on-bad-exit=1)
  [ -z "${SLURM_CPUS_ON_NODE:-}" ] || command+=(--cpus-per-task=$((SLURM_CPUS_ON_NODE > local_ranks ? SLURM_CPUS_ON_NODE / local_ranks : 1)))
  [ -z "${SLURM_STEP_ID:-}" ] || command+=(--overlap) # started from a shell that is a step itself
  command+=(${options[@]+"${options[@]}"} scripts/slurm_task.sh "$PYTHON" -u -m fovlm.train "${run[@]}")
else
  command=(deepspeed --module --no_local_rank --log_level critical --master_port "${MASTER_PORT:-$port}")
  if [ -n "${HOSTFILE:-}" ]; then
    command+=(--hostfile "$HOSTFILE")
    [ -z "${NUM_GPUS:-}" ] || [ -n "$chosen" ] || command+=(--num_gpus "$NUM_GPUS")
    # The launcher hands other nodes only what this file lists.
    export DS_ENV_FILE=${DS_ENV_FILE:-$cache/deepspeed_env}
    env | grep -E '^(FOVLM|HF|TORCH|TRITON|WANDB|OMP|MPL)[A-Z_]*=' >"$DS_ENV_FILE"
  elif [ -z "$chosen" ]; then
    if [ "$device" = cpu ]; then
      command+=(--num_gpus "$local_ranks")
    else
      command+=(--include "localhost:$(IFS=,; echo "${gpus[*]:0:$local_ranks}")")
    fi
    unset CUDA_VISIBLE_DEVICES # it would win over the choice made here
  fi
  command+=(${options[@]+"${options[@]}"} fovlm.train "${run[@]}")
fi

# -- the run, its signals and its end -------------------------------------------------------------------------------
# A process group of its own: a signal reaches the ranks once, from here, and they save and stop. The deepspeed launcher
# would leave them behind (single node) or kill them after 30 seconds. Ctrl-C asks to save, a second one kills.
set -m
"${command[@]}" </dev/null &
child=$!
set +m

pass_on() { # SIGNAL
  interrupted=yes
  if [ -n "$slurm" ] || [ -n "${HOSTFILE:-}" ]; then
    kill -s "$1" "$child" 2>/dev/null
  else
    # Deaf itself to a signal that went to this whole group, as `timeout` and terminals send it.
    (trap '' TERM USR1 INT; exec "$PYTHON" - "$child" "$1") <<'PY' 2>/dev/null || kill -s TERM -- "-$child" 2>/dev/null
import signal, sys, psutil
ranks = [rank for launch in psutil.Process(int(sys.argv[1])).children() for rank in launch.children()]
for rank in ranks:
    rank.send_signal(signal.Signals["SIG" + sys.argv[2]])
sys.exit(not ranks)
PY
  fi
}
asked=""
ask_to_stop() {
  if [ -n "$asked" ]; then kill -s KILL -- "-$child" 2>/dev/null; interrupted=yes; return; fi
  asked=yes
  say "saving, then stopping (again: stop at once)"
  pass_on TERM
}
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1
trap ask_to_stop INT

status=0
while :; do
  interrupted=""
  wait "$child"
  now=$?
  [ "$now" -eq 127 ] || status=$now
  [ -n "$interrupted" ] || break
done

# Nobody may stay behind: a launcher that dies itself ends with 0 and leaves its ranks. Zombies don't count: in a
# container nobody may be there to bury them.
left_behind() {
  kill -s 0 -- "-$child" 2>/dev/null && "$PYTHON" - "$child" <<'PY'
import os, sys, psutil
def lives(process):
    try:
        return os.getpgid(process.pid) == int(sys.argv[1]) and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False
sys.exit(not any(map(lives, psutil.process_iter())))
PY
}
for _ in 1 2 3 4 5; do left_behind || break; sleep 1; done
if left_behind; then
  kill -s KILL -- "-$child" 2>/dev/null
  if [ "$status" -eq 0 ]; then status=1; say "the launcher ended before its ranks, which were killed"; fi
fi

[ "$status" -lt 192 ] || status=$((128 + 256 - status)) # the launcher's 256 - signal, as the shell says it
again="./launch.sh" # without train.resume: what was saved now is newer than what it may name
for word in "${run[@]}"; do [[ $word = train.resume=* ]] || again+=" $word"; done
case $status in
  0 | 2) ;; # the run said all there is to say
  75) say "$name saved and stopped; to go on: $again" ;;
  137) say "$name failed (status 137): a rank was killed by signal 9, often for want of memory; to go on from the last good checkpoint: $again" ;;
  *) say "$name failed (status $status), see above; to go on from the last good checkpoint: $again" ;;
esac
exit "$status"
