#!/usr/bin/env bash
# What launch.py has done on each host of a TPU, from the commit that it shipped there:
#   host.sh prepare              Python and the pinned packages, once for a commit
#   host.sh start LOGS FIRST FLAG...
#                                train.py with these flags, as systemd's unit `parallax`; its output goes to LOGS. The
#                                first host of this slice is number FIRST among the hosts of all slices
#   host.sh report               one line "parallax WORKER running|exited|stopped|lost [STATUS]", then output
#   host.sh stop                 lets train.py save and stop, and waits for it
# Invariant: one train.py at most runs on a host, and how it ended is written down whether or not anyone is connected.
set -euo pipefail
cd "$(dirname "$0")/../.."

unit=parallax
state=$HOME/parallax/state
here=$PWD
uv_version=0.13.9
python_version=3.13 # what the image has is too old for JAX

say() { printf '%s\n' "$*" >&2; }

prepare() {
  [ ! -e .venv/ready ] || return 0
  rm -rf .venv
  python3 -m pip install --quiet --user "uv==$uv_version"
  local uv=$HOME/.local/bin/uv python=.venv/bin/python
  "$uv" venv --quiet --python "$python_version" .venv
  # gs:// needs the one lock, the chips the other.
  local locks=(--requirements requirements-gcs.lock --requirements requirements-plan.lock)
  "$uv" pip install --quiet --python "$python" --require-hashes "${locks[@]}"
  # All of it is there then; if not, the locked versions.
  "$uv" pip install --quiet --python "$python" "${locks[@]/--requirements/--constraints}" 'jax[tpu]'
  touch .venv/ready
}

start() {
  local logs=$1 first=$2 worker
  shift 2
  stop
  free_tpu
  worker=$(curl --fail --silent --show-error --header 'Metadata-Flavor: Google' \
    http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
  rm -rf "$state"
  mkdir -p "$state"
  : >"$state/log"
  printf '%s' "$((first + worker))" >"$state/worker"
  printf '%s' "$logs" >"$state/logs"
  printf '%s\0' "$@" >"$state/flags" # systemd would expand a $ in arguments
  sudo systemd-run --quiet --collect --unit="$unit" --uid="$(id -u)" --setenv=HOME="$HOME" --setenv=PATH="$PATH" \
    --property=TimeoutStopSec=180 bash "$here/scripts/launching/host.sh" train
}

# Ends what holds the chips: train.py left over from another day, say. Gently at first, since a killed process may leave
# the chips in a state that the next one cannot use.
free_tpu() {
  local signal holders
  for signal in TERM KILL; do
    mapfile -t holders < <(chip_holders)
    [ "${#holders[@]}" -gt 0 ] || return 0
    say "ending processes that hold the TPU: ${holders[*]}"
    sudo kill -s "$signal" "${holders[@]}" || true
    for _ in {1..20}; do
      [ -n "$(chip_holders)" ] || return 0
      sleep 0.5
    done
  done
}

chip_holders() { sudo lsof -t -w /dev/accel* /dev/vfio/* 2>/dev/null || true; }

# The unit itself. systemd's SIGTERM reaches train.py as well, which saves and exits with 0.
train() {
  local flags status=0 how=exited
  trap 'how=stopped' TERM
  mapfile -d '' flags <"$state/flags"
  (while sleep 60; do upload; done) &
  JAX_PLATFORMS=tpu,cpu PYTHONUNBUFFERED=1 .venv/bin/python scripts/train.py "${flags[@]}" >>"$state/log" 2>&1 || status=$?
  kill "$!" 2>/dev/null || true
  upload
  printf '%s %s' "$how" "$status" >"$state/end.new"
  mv "$state/end.new" "$state/end"
}

# The bucket has no appending; a log is small.
upload() {
  timeout 60 gcloud storage cp "$state/log" "$(<"$state/logs")/process-$(<"$state/worker").log" --quiet >/dev/null 2>&1 ||
    say "the log could not be copied to $(<"$state/logs")"
}

report() {
  local end=lost lines=1 worker
  worker=$(<"$state/worker")
  if systemctl is-active --quiet "$unit"; then # first, since it writes how it ends before it ends
    end=running
  elif [ -e "$state/end" ]; then
    end=$(<"$state/end")
  fi
  printf 'parallax %s %s\n' "$worker" "$end"
  case $end in
    running | 'exited 0') [ "$worker" = 0 ] || return 0 ;; # one stands for all
    *) lines=20 ;;
  esac
  tail -c 8000 "$state/log" | tr '\r' '\n' | tail -n "$lines" | sed "s/^/[$worker] /"
}

stop() {
  if systemctl is-active --quiet "$unit"; then
    sudo systemctl stop "$unit"
  fi
}

"$@"
