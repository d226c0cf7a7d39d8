#!/usr/bin/env bash
# A SLURM of one node on this machine, to try `hydra/launcher=submitit_slurm` and to test it: Debian's own packages, with
# accounting (submitit asks sacct). Needs root. Run it again at any time; `scripts/slurm_local.sh stop` stops it all.
set -euo pipefail

state=/var/lib/cegbench-slurm
configuration=/etc/slurm/slurm.conf
mark="# Written by cegbench's scripts/slurm_local.sh."
packages=(slurm-wlm slurmdbd munge mariadb-server)
socket=$state/mysql/mysqld.sock

refuse() { echo "error: $*" >&2; exit 2; }

answers() { timeout 5 "$@" >/dev/null 2>&1; }

idle() { answers sinfo && sinfo --noheader --format=%T | grep -Eq '^(idle|mixed|allocated)$'; }

# wait_for WHAT LOG COMMAND...: until the command answers, for a minute at most
wait_for() {
  local what=$1 log=$2
  local deadline=$((SECONDS + 60))
  while [ $SECONDS -lt $deadline ]; do
    "${@:3}" && return
    sleep 0.2
  done
  tail -n 5 "$log" >&2 || true
  echo "error: $what does not answer; its log is $log" >&2
  exit 1
}

process_of() { cat "$state/$1.pid" 2>/dev/null; }

# Only what this script started: the process must still be the program that its file of process ids names.
runs() { local id; id=$(process_of "$1") && [ "$(cat "/proc/$id/comm" 2>/dev/null)" = "$1" ]; }

stop() {
  for daemon in slurmd slurmctld slurmdbd mariadbd munged; do
    runs "$daemon" || continue
    local id; id=$(process_of "$daemon")
    kill "$id"
    for _ in $(seq 60); do [ -d "/proc/$id" ] || break; sleep 0.5; done
    [ ! -d "/proc/$id" ] || kill -KILL "$id"
  done
}

install_packages() {
  local program missing=
  for program in slurmctld slurmd slurmdbd sacct munged mariadbd; do
    command -v $program >/dev/null || missing=$program
  done
  [ -n "$missing" ] || return 0
  echo "installing ${packages[*]} (once)"
  # Debian starts what it installs; without a configuration that fails, or leaves daemons that are not ours.
  local policy=/usr/sbin/policy-rc.d
  [ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; trap "rm -f $policy" EXIT; }
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq --no-install-recommends "${packages[@]}" >/dev/null
}

write_configuration() {
  mkdir -p $state/{control,node,munge,mysql} /etc/slurm
  local name memory; name=$(hostname -s)
  memory=$(awk '/^MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
  # Requeued jobs start again only when their old credential has expired, by default after two minutes.
  cat >$configuration <<END
$mark
ClusterName=local
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket,cred_expire=10
StateSaveLocation=$state/control
SlurmdSpoolDir=$state/node
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobRequeue=1
KillWait=10
ReturnToService=2
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePass=$state/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=$name Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
END
  install -m 600 /dev/null /etc/slurm/slurmdbd.conf
  cat >/etc/slurm/slurmdbd.conf <<END
$mark
DbdHost=localhost
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket
PidFile=$state/slurmdbd.pid
LogFile=$state/slurmdbd.log
StorageType=accounting_storage/mysql
StorageUser=root
StorageLoc=slurm
END
}

start_munged() {
  runs munged && return
  local folder=$state/munge
  [ -s $folder/key ] || head -c 128 /dev/urandom >$folder/key
  chmod 711 $folder; chmod 600 $folder/key; touch $state/munged.log
  chown -R munge:munge $folder $state/munged.log
  runuser -u munge -- munged --key-file=$folder/key --socket=$folder/socket --pid-file=$folder/pid \
    --seed-file=$folder/seed --log-file=$state/munged.log
  wait_for munged $state/munged.log test -S $folder/socket
  cp $folder/pid $state/munged.pid
}

start_mariadbd() {
  runs mariadbd && return
  chown mysql:mysql $state/mysql
  [ -d $state/mysql/mysql ] || mariadb-install-db --no-defaults --user=mysql --datadir=$state/mysql \
    --auth-root-authentication-method=socket --skip-test-db >/dev/null
  # Root reaches it through its socket alone: there is no port and no password.
  setsid mariadbd --no-defaults --user=mysql --datadir=$state/mysql --socket=$socket --skip-networking \
    --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 </dev/null >$state/mariadbd.log 2>&1 &
  echo $! >$state/mariadbd.pid
  wait_for mariadbd $state/mariadbd.log answers mariadb --no-defaults --socket=$socket --execute='select 1'
}

start() {
  [ "$(id -u)" = 0 ] || refuse "SLURM's daemons need root: run it as root"
  [ -e /etc/debian_version ] || refuse "this is not Debian or one of its descendants: install SLURM as your system does"
  [ ! -e $configuration ] || grep -qxF "$mark" $configuration ||
    refuse "$configuration is not from this script: this machine has a SLURM of its own, use that"
  if idle && answers sacct; then
    echo "SLURM runs on this machine already"
    return
  fi
  install_packages
  stop
  write_configuration
  start_munged
  start_mariadbd
  MYSQL_UNIX_PORT=$socket slurmdbd
  wait_for slurmdbd $state/slurmdbd.log answers sacctmgr --noheader show cluster
  sacctmgr --immediate --quiet add cluster local >/dev/null 2>&1 || true  # where it is known already, that is no error
  slurmctld
  slurmd
  wait_for slurmctld $state/slurmctld.log idle
  wait_for sacct $state/slurmdbd.log answers sacct
  echo "SLURM runs on this machine: sinfo shows it, scripts/slurm_local.sh stop stops it"
}

case ${1:-start} in
  start) start ;;
  stop) stop ;;
  *) refuse "usage: $0 [stop]" ;;
esac
