#!/usr/bin/env bash
# Creates a Cloud TPU slice, copies this tree to it and trains on it.
#
#   launch/tpu_pod.sh [--dry-run] COMMAND NAME [OPTIONS]
#
#   create NAME --type=v5p-128 [--spot] [--version=RUNTIME] [-- GCLOUD FLAGS]
#                          queues a request for a slice: on demand, unless --spot or -- --reserved
#   status NAME            the state of the request and, once there is a slice, of the run
#   sync NAME              copies the files that git tracks, as they are now; installs .[tpu]
#   run NAME [--script=train] -- ARGS    starts launch/train.py ARGS, or another script of launch/
#                          (eval, search, reproduce), in the background on all workers
#   logs NAME [--worker=N] [--follow]    the end of ~/rope_jax/run.log on all workers, or on one
#   stop NAME [--wait=60]  SIGTERM to the run; SIGKILL if it is still there after so many seconds
#   delete NAME [--yes]    deletes the slice and the request, with everything on its disks
#
# All take --zone=ZONE and --project=PROJECT; defaults: $ROPE_JAX_ZONE, and $ROPE_JAX_PROJECT or
# gcloud's own. --dry-run prints the commands, for a shell in this tree's root, and runs nothing.
# --workdir must be a directory that all workers see under the same path: mount a bucket (gcsfuse)
# or Filestore on each of them first. gcloud reaches several workers only with its key in the agent:
# ssh-add ~/.ssh/google_compute_engine

# shellcheck disable=SC2016  # what is in single quotes is for the workers to expand
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' launch/tpu_pod.sh; }

fail() { echo "error: $1" >&2 && exit "${2:-2}"; }

# The words, written so that any shell reads the same words back.
quote() {
  local word line="" apostrophe="'\\''"
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/$apostrophe}'"
    line+="$word "
  done
  echo "${line% }"
}

execute() { if [[ $dry_run ]]; then quote "$@"; else "$@"; fi; }

# on_workers WHICH SCRIPT ARGS...: runs the script over ssh with ARGS as its $1, $2, ...
on_workers() {
  execute "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" "--worker=$1" \
    "--command=set -- $(quote "${@:3}")"$'\n'"$2"
}

# Scripts of the workers. A run holds a lock on run.lock for as long as one of its processes lives,
# so that the process id left by a dead run is never taken for a run.
check_idle='if [ -e ~/rope_jax/run.lock ] && ! flock -n ~/rope_jax/run.lock true; then
  echo "$(hostname): a run is going; stop it first" >&2; exit 1
fi'
check_installed='[ -e ~/rope_jax/.installed ] ||
  { echo "$(hostname): not installed; sync first" >&2; exit 1; }'

# Removes what the last sync brought and nothing else: logs and runs may lie beside it. With the
# time of unpacking on setup.cfg (-m), install_once installs; a venv without pip was not finished.
install='set -e
mkdir -p ~/rope_jax && cd ~/rope_jax && rm -f .installed
if [ -e .synced ]; then xargs -d "\n" rm -f -- <.synced; fi
tar -xzmf ~/rope_jax.tar.gz
tar -tzf ~/rope_jax.tar.gz >.synced
[ -e .venv/bin/pip ] || rm -rf .venv
bash -euo pipefail -c "source launch/venv.sh; install_once \"[tpu]\"" || {
  [ -e .venv/bin/pip ] || echo "$(hostname): on all workers, e.g., sudo add-apt-repository -y" \
    "ppa:deadsnakes/ppa && sudo apt-get install -y python3.12-venv" >&2
  exit 1
}
touch .installed'

start='cd ~/rope_jax || exit 1
exec 9>>run.lock
flock -n 9 || { echo "$(hostname): a run is going" >&2; exit 1; }
echo "== $(date -u)" >>run.log
setsid .venv/bin/python -u "launch/$1.py" "${@:2}" </dev/null >>run.log 2>&1 &
echo $! >run.pid
echo "$(hostname): started"'

terminate='cd ~/rope_jax 2>/dev/null && ! flock -n run.lock true ||
  { echo "$(hostname): no run"; exit 0; }
kill -s TERM "$(cat run.pid)"
flock -w "$1" run.lock true && { echo "$(hostname): stopped"; exit 0; }
kill -s KILL -- "-$(cat run.pid)"
flock -w 10 run.lock true || { echo "$(hostname): it survived SIGKILL" >&2; exit 1; }
echo "$(hostname): killed, after $1 seconds"'

show_log='cd ~/rope_jax && [ -e run.log ] || { echo "$(hostname): no log yet" >&2; exit 1; }
if [ "$1" ]; then tail -n 40 -f --pid="$(cat run.pid)" run.log; else tail -n 40 run.log; fi |
  sed -u "s/^/$(hostname): /"'

show_state='state="no run"
[ ! -e ~/rope_jax/run.lock ] || flock -n ~/rope_jax/run.lock true || state=running
echo "$(hostname): $state; $(tail -n 1 ~/rope_jax/run.log 2>/dev/null)"'

create() {
  [[ $type ]] || fail "create needs --type, e.g. --type=v5p-128"
  if [[ ! $version ]]; then
    case "$type" in
      v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5e-*) fail "--type=$type: Cloud TPU calls it v5litepod-${type#v5e-}" ;;
      *) fail "--type=$type: no runtime is known for it; give --version=RUNTIME" ;;
    esac
  fi
  execute "${tpus[@]}" queued-resources create "$name" "${where[@]}" "--node-id=$name" \
    "--accelerator-type=$type" "--runtime-version=$version" ${spot:+--spot} "$@"
}

sync() {
  on_workers all "$check_idle"
  # A file that is tracked but deleted is left out, not an error.
  execute bash -euo pipefail -c 'mkdir -p build && git ls-files -z |
    while IFS= read -r -d "" file; do if [[ -e $file ]]; then printf "%s\0" "$file"; fi; done |
    tar --null -T - -czf "$1"' pack "build/$name.tar.gz"
  execute "${tpus[@]}" tpu-vm scp "build/$name.tar.gz" "$name:rope_jax.tar.gz" "${where[@]}" \
    --worker=all
  on_workers all "$install"
}

run() {
  local word previous="" workdir=""
  for word; do
    if [[ $previous =~ ^--?workdir$ ]]; then workdir=$word; fi
    if [[ $word =~ ^--?workdir= ]]; then workdir=${word#*=}; fi
    previous=$word
  done
  case "$workdir" in
    "") fail "run needs -- --workdir=DIR, a directory that all workers see, e.g. with --config" ;;
    gs://*) fail "--workdir=$workdir: mount the bucket on all workers and give the mount's path" ;;
    /*) ;;
    *) fail "--workdir=$workdir: must be an absolute path, the same mount on all workers" ;;
  esac
  [[ $script =~ ^(train|eval|search|reproduce)$ ]] ||
    fail "--script=$script: one of train, eval, search, reproduce"
  # All are asked before the first one starts: a run on some of the workers waits for the others.
  on_workers all "$check_idle"$'\n'"$check_installed"
  on_workers all "$start" "$script" "$@" ||
    fail "not all workers started it, and those that did wait: launch/tpu_pod.sh stop $name" 1
}

status() {
  local state
  state=$(execute "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
    "--format=value(state.state)")
  echo "$state"
  if [[ $dry_run || $state == ACTIVE ]]; then on_workers all "$show_state"; fi
}

delete() {
  local answer=""
  if [[ ! $yes && ! $dry_run ]]; then
    read -r -p "Delete $name, with everything on its disks? [y/N] " answer || true
    [[ $answer == [yY]* ]] || fail "$name was not deleted" 1
  fi
  execute "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

dry_run="" name="" type="" version="" spot="" worker=all follow="" wait=60 yes="" script=train
zone=${ROPE_JAX_ZONE:-} project=${ROPE_JAX_PROJECT:-}
if [[ ${1:-} == --dry-run ]]; then dry_run=yes && shift; fi
case "${1:-}" in
  create | status | sync | run | logs | stop | delete) command=$1 && shift ;;
  --help | -h) usage && exit ;;
  "") usage >&2 && exit 2 ;;
  *) fail "$1: unknown command; --help lists them" ;;
esac
while (($#)) && [[ $1 != -- ]]; do
  case "$command $1" in
    *" --help" | *" -h") usage && exit ;;
    *" --dry-run") dry_run=yes ;;
    *" --zone="*) zone=${1#*=} ;;
    *" --project="*) project=${1#*=} ;;
    "create --type="*) type=${1#*=} ;;
    "create --version="*) version=${1#*=} ;;
    "create --spot") spot=yes ;;
    "logs --worker="*) worker=${1#*=} ;;
    "logs --follow") follow=yes ;;
    "run --script="*) script=${1#*=} ;;
    "stop --wait="*) wait=${1#*=} ;;
    "delete --yes") yes=yes ;;
    *" --worker"*) fail "$1: $command is for all workers: JAX hangs unless all of them run it" ;;
    *" -"*) fail "$1: not an option of $command; what is for the script goes after --" ;;
    *) name+=${name:+ }$1 ;;
  esac
  shift
done
(($# == 0)) || [[ $command == run || $command == create ]] || fail "$command takes nothing after --"
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] ||
  fail "$command needs one NAME, of small letters, digits and hyphens, not '$name'"
[[ $zone ]] || fail "no zone: give --zone=ZONE or set ROPE_JAX_ZONE"
[[ $wait =~ ^[0-9]+$ ]] || fail "--wait=$wait: must be a number of seconds"
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud was not found: install the Google Cloud CLI (cloud.google.com/sdk/docs/install)"

tpus=(gcloud compute tpus)
where=("--zone=$zone")
if [[ $project ]]; then where+=("--project=$project"); fi
case "$command" in
  logs) on_workers "$worker" "$show_log" "$follow" ;;
  stop) on_workers all "$terminate" "$wait" ;;
  *) "$command" "${@:2}" ;;
esac
