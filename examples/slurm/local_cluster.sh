#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, to try sbatch files on: no GPUs, no accounting, no cgroups.
#
#   sudo examples/slurm/local_cluster.sh up FOLDER      # needs Debian's slurm-wlm and munge: apt-get install slurm-wlm munge
#   export SLURM_CONF=FOLDER/slurm.conf
#   sbatch --wait …
#   sudo examples/slurm/local_cluster.sh down FOLDER
#
# SLURM_PORT is the first of three ports (16817), for a second cluster beside the first.
# Everything it writes lies in FOLDER, but for munge's key and socket, which are made where Debian expects them.
set -euo pipefail

usage="usage: $0 up|down FOLDER"
action=${1:?$usage}
folder=$(realpath -m "${2:?$usage}")
export SLURM_CONF="$folder/slurm.conf"

# By the files that they keep their numbers in: other daemons of these names may be running.
stop() {
  local file
  for file in "$folder"/run/*.pid; do
    [ -s "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
  done
}

if [ "$action" = down ]; then
  scancel --quiet --full --user "$(id -un)" 2>/dev/null || true
  stop
  exit 0
fi
[ "$action" = up ] || { echo "$usage" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "SLURM's daemons need root." >&2; exit 2; }
for program in munged slurmctld slurmd; do
  command -v "$program" > /dev/null || { echo "$program is missing: apt-get install slurm-wlm munge" >&2; exit 2; }
done

stop
rm -rf "$folder/state" "$folder/spool" "$folder/run"
mkdir -p "$folder/state" "$folder/spool" "$folder/run" "$folder/log"

# Munge tells the daemons who is who. One of it serves all, so that two clusters may not start it at once.
exec 9> /tmp/lit-sparse-munge.lock
flock 9
install -d -o munge -g munge /run/munge /var/log/munge /var/lib/munge
if [ ! -s /etc/munge/munge.key ]; then
  (umask 077 && head -c 1024 /dev/urandom > /etc/munge/munge.key)
  chown munge:munge /etc/munge/munge.key
fi
pgrep -x munged > /dev/null || su -s /bin/sh munge -c "$(command -v munged)" 9>&-
flock -u 9

host=$(hostname -s)
cat > "$SLURM_CONF" << CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${SLURM_PORT:-16817}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired: five seconds instead of two minutes.
AuthInfo=cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
JobRequeue=1
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((${SLURM_PORT:-16817} + 1)) CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((${SLURM_PORT:-16817} + 2)) CPUs=1 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
printf 'ConstrainCores=no\nConstrainRAMSpace=no\n' > "$folder/cgroup.conf"

slurmctld -i
for node in n1 n2; do
  slurmd -N "$node"
done
for _ in $(seq 60); do
  [ "$(sinfo --noheader --format "%T %D" 2> /dev/null)" = "idle 2" ] && exec sinfo
  sleep 0.5
done
echo "The nodes did not come up; see $folder/log." >&2
sinfo >&2 || true
exit 1
