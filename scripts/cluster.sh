#!/usr/bin/env bash
# usage: scripts/cluster.sh install           Debian's packages for all of this
#        scripts/cluster.sh up FOLDER         two nodes, node-a and node-b, until the standard input ends
#        scripts/cluster.sh on FOLDER NODE COMMAND ...
#
# Each node has namespaces of its own for network, processes, mounts and host name, and runs sshd, munged and slurmd;
# node-a also runs slurmctld. A veth pair joins them. The file system is the machine's; homes, keys, logs and
# settings are below FOLDER. Killing a node's process 1 is the end of all its processes. Must be root.
set -euo pipefail

# Packages bring services, which must not start on this machine.
install() {
  local policy=/usr/sbin/policy-rc.d
  if [ ! -e $policy ]; then
    trap "rm -f $policy" EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends iproute2 openssh-server pdsh slurm-wlm munge
}

settings() {
  mkdir -p slurm node-a/home/.ssh node-b/home/.ssh
  printf '127.0.0.1 localhost\n10.66.0.1 node-a\n10.66.0.2 node-b\n' >hosts
  ssh-keygen -q -t ed25519 -N '' -f key
  head -c 1024 /dev/urandom >munge.key && chmod 400 munge.key
  cat >sshd_config <<CONF
HostKey $PWD/key
AuthorizedKeysFile $PWD/key.pub
PermitRootLogin prohibit-password
StrictModes no
UseDNS no
CONF
  tee node-a/home/.ssh/config >node-b/home/.ssh/config <<CONF
IdentityFile $PWD/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
CONF
  cat >slurm/slurm.conf <<CONF
ClusterName=two
SlurmctldHost=node-a
SlurmUser=root
StateSaveLocation=$PWD/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
ReturnToService=2
SlurmdTimeout=30
KillWait=120
NodeName=node-a,node-b CPUs=4
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
}

up() {
  local node
  rm -rf -- "$1" && mkdir -p "$1" && cd "$1"
  settings
  trap 'exec 2>/dev/null; kill -KILL $(cat node-?/pid) $(jobs -p); wait' EXIT
  trap exit TERM INT HUP
  for node in node-a node-b; do
    unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc "$here" node "$PWD" "$node" &
    until first=$(cat "/proc/$!/task/$!/children") && [ -n "$first" ]; do sleep 0.1; done
    echo "${first% }" >"$node/pid"
  done
  # Without this, the link of both nodes would vanish with the last process of one.
  exec 8<"/proc/$(cat node-a/pid)/ns/net" 9<"/proc/$(cat node-b/pid)/ns/net"
  ip link add eth0 netns "$(cat node-a/pid)" type veth peer name eth0 netns "$(cat node-b/pid)"
  until [ "$("$here" on . node-a sinfo --noheader --states=idle --format=%D 2>/dev/null)" = 2 ]; do sleep 0.5; done
  echo ready
  cat <&0 >/dev/null &
  wait $!
}

# Process 1 of a node.
node() {
  cd "$1"
  hostname "$2"
  mount --bind hosts /etc/hosts
  mount --bind slurm /etc/slurm
  sed "s,^root:.*,root:x:0:0:root:$1/$2/home:/bin/bash," /etc/passwd >"$2/passwd"
  mount --bind "$2/passwd" /etc/passwd
  for folder in /run /var/log /var/spool /var/lib/munge; do mount -t tmpfs tmpfs $folder; done
  mkdir -p /run/sshd /run/munge
  ip link set lo up
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
  ip address add "$(awk -v n="$2" '$2 == n {print $1}' hosts)/24" dev eth0
  ip link set eth0 up
  /usr/sbin/sshd -D -e -f sshd_config 2>"$2/sshd.log" &
  munged --foreground --force --key-file="$1/munge.key" 2>"$2/munged.log" &
  if [ "$2" = node-a ]; then slurmctld -D >"$2/slurmctld.log" 2>&1 & fi
  slurmd -D -N "$2" >"$2/slurmd.log" 2>&1 &
  while :; do wait; sleep 1; done
}

on() {
  local pid
  pid=$(cat "$1/$2/pid")
  exec nsenter --target "$pid" --mount --uts --ipc --net --pid --wd="$PWD" "${@:3}"
}

here=$(readlink -f "$0")
case "${1:-}" in
  install | up | node | on) "$@" ;;
  *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
