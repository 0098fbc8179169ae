#!/bin/sh
# Starts a single-machine Slurm for tests. Needs root and these Debian packages:
#     apt-get install -y --no-install-recommends slurm-wlm munge
#
#     scripts/start_slurm.sh FOLDER          starts it; use it with `export SLURM_CONF=FOLDER/slurm.conf`
#     scripts/start_slurm.sh FOLDER --stop   stops it
#
# It listens on 127.0.0.1 only and keeps its state, logs and process ids in FOLDER.
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
export SLURM_CONF="$folder/slurm.conf"

if [ "${2-}" = --stop ]; then
    for name in slurmd slurmctld munged; do
        [ -f "$folder/$name.pid" ] || continue
        process=$(cat "$folder/$name.pid")
        kill "$process" || true
        while kill -0 "$process" 2> /dev/null; do sleep 0.1; done
        rm -f "$folder/$name.pid"
    done
    exit
fi

mkdir -p "$folder/state" "$folder/spool"
host=$(hostname)
cat > "$SLURM_CONF" <<END
ClusterName=sparsejax
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1,requeue_delay=1
JobRequeue=1
KillWait=10
MailProg=/bin/true
ReturnToService=2
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
$(slurmd -C | head -n 1) NodeAddr=127.0.0.1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END

# A running munged is used as it is.
if ! munge -n > /dev/null 2>&1; then
    mkdir -p /run/munge
    chown munge: /run/munge
    runuser -u munge -- munged
    cp /run/munge/munged.pid "$folder/munged.pid"
fi
slurmctld
slurmd
for _ in $(seq 100); do
    if [ "$(sinfo --noheader --format=%T 2> /dev/null)" = idle ]; then exit 0; fi
    sleep 0.2
done
echo "Slurm did not start; see the logs in $folder" >&2
exit 1
