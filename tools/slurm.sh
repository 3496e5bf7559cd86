#!/usr/bin/env bash
# A Slurm of one machine, to test jobs with: `eval "$(tools/slurm.sh up)"`, then `tools/slurm.sh down`.
#
# `up` installs Debian's packages where they are missing, starts munged, slurmctld and slurmd on
# loopback, and prints the line by which a shell finds them; where they run already, only that.
# `down` cancels all jobs, stops the three and removes what they wrote; the packages stay.
# It has a configuration, sockets and ports of its own: another Slurm on the machine is not touched.
# Its node claims 4 processors and 200 GB, which nobody enforces. Partitions: `normal`, the default,
# whose jobs those of `urgent` preempt after 10 s of grace.
set -euo pipefail

HOME_OF=/run/fairchem-equiformer-slurm  # sockets need a short path; gone when the machine restarts
PACKAGES=(slurmctld slurmd slurm-client munge)
CONTROL_PORT=16817
NODE_PORT=16818
export SLURM_CONF=$HOME_OF/slurm.conf

fail() {  # say why in one line, and give up
    echo "tools/slurm.sh: $1" >&2
    exit 1
}

quietly() {  # run a command, of whose output the last line is of interest, if it fails
    local said
    said=$("$@" 2>&1) || fail "$1 failed: $(tail -n 1 <<<"$said")"
}

alive() {  # whether a daemon of this script runs
    local pid
    pid=$(cat "$HOME_OF/$1.pid" 2>/dev/null) || return 1
    [[ $(cat "/proc/$pid/stat" 2>/dev/null) == "$pid ($1) "[!Z]* ]]  # Z: ended, and not waited for
}

install_packages() {
    local missing=()
    for package in "${PACKAGES[@]}"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-get update
    quietly apt-get install -y --no-install-recommends "${missing[@]}"
}

configure() {
    local host
    host=$(hostname -s)
    install -d -m 755 "$HOME_OF" "$HOME_OF/state" "$HOME_OF/spool"
    install -d -m 755 -o munge -g munge "$HOME_OF/munge"
    head -c 1024 /dev/urandom >"$HOME_OF/munge/key"
    chown munge:munge "$HOME_OF/munge/key"
    chmod 400 "$HOME_OF/munge/key"
    # A requeued job waits until the credentials of its first run have expired, 120 s by default.
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$CONTROL_PORT
SlurmdPort=$NODE_PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$HOME_OF/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$HOME_OF/state
SlurmdSpoolDir=$HOME_OF/spool
SlurmctldPidFile=$HOME_OF/slurmctld.pid
SlurmdPidFile=$HOME_OF/slurmd.pid
SlurmctldLogFile=$HOME_OF/slurmctld.log
SlurmdLogFile=$HOME_OF/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=200000 State=UNKNOWN
PartitionName=normal Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=10 State=UP
PartitionName=urgent Nodes=$host MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
CONF
}

start() {
    alive munged || quietly setpriv --reuid munge --regid munge --clear-groups munged \
        --key-file="$HOME_OF/munge/key" --socket="$HOME_OF/munge/socket" \
        --pid-file="$HOME_OF/munge/munged.pid" --log-file="$HOME_OF/munge/munged.log" \
        --seed-file="$HOME_OF/munge/seed"
    ln -sf munge/munged.pid "$HOME_OF/munged.pid"
    alive slurmctld || quietly slurmctld
    alive slurmd || quietly slurmd
    for _ in {1..60}; do
        [ "$(sinfo --noheader --format=%t --partition=normal 2>/dev/null)" != idle ] || return 0
        sleep 0.5
    done
    fail "the node did not come up within 30 s; see $HOME_OF/slurmctld.log and slurmd.log"
}

up() {
    if ! { alive munged && alive slurmctld && alive slurmd; }; then
        [ "$(id -u)" -eq 0 ] || fail "needs root, to install packages and start daemons"
        command -v apt-get >/dev/null || fail "needs Debian, or one of its kind: there is no apt-get"
        install_packages
        [ -e "$SLURM_CONF" ] || configure
        start
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
    [ -d "$HOME_OF" ] || return 0
    [ "$(id -u)" -eq 0 ] || fail "needs root, which started the daemons"
    ! alive slurmctld || timeout 20 bash -c '
        scancel --user=root
        while squeue --noheader 2>/dev/null | grep -q .; do sleep 0.5; done' || true
    for daemon in slurmd slurmctld munged; do
        ! alive "$daemon" || kill "$(cat "$HOME_OF/$daemon.pid")"
        for _ in {1..100}; do
            alive "$daemon" || break
            sleep 0.1
        done
        ! alive "$daemon" || kill -KILL "$(cat "$HOME_OF/$daemon.pid")"
    done
    rm -rf "$HOME_OF"
}

case "${1-}" in
    up | down) "$1" ;;
    *) fail "usage: tools/slurm.sh up|down" ;;
esac
