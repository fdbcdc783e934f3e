#!/bin/sh
# A Slurm cluster of this one machine, on loopback, to try studies on (Debian, as root):
#
#   apt-get install slurm-wlm slurmdbd munge mariadb-server
#   sh experiments/cluster/slurm.sh start      # again after a reboot: jobs and accounts are kept
#   export SLURM_CONF=~/slurm/slurm.conf       # for sbatch, squeue, scancel, scontrol, sacct
#   sh experiments/cluster/slurm.sh stop
#
# Accounts are kept, as submitit learns from sacct alone that a job was cancelled.
set -eu
dir=${SLURM_DIR:-$HOME/slurm}
host=$(hostname -s)
export SLURM_CONF="$dir/slurm.conf"

alive() { [ -f "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }

wait_for() { # NAME COMMAND...
	name=$1
	shift
	for _ in $(seq 60); do
		if timeout 5 "$@" >/dev/null 2>&1; then return; fi
		sleep 0.5
	done
	echo "error: $name does not answer; see $dir/*.log" >&2
	exit 1
}

settings() {
	mkdir -p "$dir/ctld" "$dir/slurmd" "$dir/munge" /run/munge
	chmod 755 "$dir" "$dir/munge" /run/munge
	[ -f "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
	[ -f "$dir/password" ] || (umask 077 && head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$dir/password")
	cat >"$dir/slurm.conf" <<-END
		ClusterName=trial
		SlurmctldHost=$host(127.0.0.1)
		SlurmUser=root
		AccountingStorageType=accounting_storage/slurmdbd
		AccountingStorageHost=127.0.0.1
		StateSaveLocation=$dir/ctld
		SlurmdSpoolDir=$dir/slurmd
		SlurmctldPidFile=$dir/slurmctld.pid
		SlurmdPidFile=$dir/slurmd.pid
		SlurmctldLogFile=$dir/slurmctld.log
		SlurmdLogFile=$dir/slurmd.log
		ProctrackType=proctrack/linuxproc
		TaskPlugin=task/none
		SelectType=select/cons_tres
		SelectTypeParameters=CR_CPU
		ReturnToService=2
		MpiDefault=none
		NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
		PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
	END
	(
		umask 077
		cat >"$dir/slurmdbd.conf" <<-END
			DbdHost=$host
			DbdAddr=127.0.0.1
			SlurmUser=root
			StorageType=accounting_storage/mysql
			StorageHost=127.0.0.1
			StoragePort=13306
			StorageUser=slurm
			StoragePass=$(cat "$dir/password")
			PidFile=$dir/slurmdbd.pid
			LogFile=$dir/slurmdbd.log
		END
	)
}

database() {
	[ -d "$dir/mysql" ] || mariadb-install-db --user=root --datadir="$dir/mysql" >"$dir/mysql.log" 2>&1
	mariadbd --no-defaults --user=root --datadir="$dir/mysql" --socket="$dir/mysql.socket" \
		--bind-address=127.0.0.1 --port=13306 --pid-file="$dir/mysql.pid" >>"$dir/mysql.log" 2>&1 &
	wait_for mariadb mariadb-admin --socket="$dir/mysql.socket" ping
	mariadb --socket="$dir/mysql.socket" -e "
		create or replace user slurm@'127.0.0.1' identified by '$(cat "$dir/password")';
		grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
}

start() {
	settings
	alive munged || munged --force --key-file="$dir/munge/key" \
		--pid-file="$dir/munged.pid" --log-file="$dir/munged.log" --seed-file="$dir/munge/seed"
	alive mysql || database
	alive slurmdbd || slurmdbd
	wait_for slurmdbd sacctmgr --immediate --noheader show cluster
	alive slurmctld || slurmctld
	alive slurmd || slurmd -N "$host"
	wait_for Slurm sinfo --noheader
	scontrol update "nodename=$host" state=resume 2>/dev/null || true # it was drained
	sinfo
}

stop() {
	for name in slurmd slurmctld slurmdbd munged mysql; do
		if alive "$name"; then
			pid=$(cat "$dir/$name.pid")
			kill "$pid"
			while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
		fi
	done
}

case "${1:-}" in
start) start ;;
stop) stop ;;
*) sed -n 's/^# \{0,1\}//; 2,9p' "$0" ;;
esac
