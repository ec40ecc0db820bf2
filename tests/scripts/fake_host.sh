#!/usr/bin/env bash
# Fakes of the programs that a host of a TPU has and this machine need not have: one file, linked under many names.
#
# sudo runs its command; systemd-run and systemctl keep one unit, in a process group of its own; curl is the metadata
# server; lsof names a process that was left over; pip installs a uv that makes an environment of Python's library alone;
# sleep takes a hundredth of the time.
#
# Invariant: each notes its command line in $HOME/calls, as a shell would take it. It is bash, which starts in a tenth of
# the time of Python: a test makes dozens of these calls.
set -euo pipefail

sudo() { exec "$@"; }

systemd-run() {
  local given=("FAKE_GCLOUD=$FAKE_GCLOUD")
  while [[ $1 == --* ]]; do
    [[ $1 != --setenv=* ]] || given+=("${1#--setenv=}")
    shift
  done
  set -m # the unit is a process group
  (cd / && exec env -i "${given[@]}" "$@") </dev/null >/dev/null 2>>"$HOME/journal" &
  echo $! >"$HOME/unit.pid"
}

systemctl() {
  local verb=$1 pid=0
  [ ! -e "$HOME/unit.pid" ] || read -r pid <"$HOME/unit.pid"
  if [ "$verb" = stop ] && is_alive "$pid"; then
    kill -TERM -- "-$pid" || true
    for _ in {1..1000}; do
      is_alive "$pid" || break
      (sleep 1)
    done
  fi
  [ "$verb" != is-active ] || ! is_alive "$pid" || return 0
  [ "$pid" = 0 ] || kill -KILL -- "-$pid" 2>/dev/null || true # nothing of a unit outlives it
  [ "$verb" = stop ] || return 3
}

# A zombie is not: who reaps it is not ours to say.
is_alive() {
  local stat
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  [[ ${stat##*) } != Z* ]]
}

# The worker's number in its slice.
curl() {
  [[ $(<"$FAKE_GCLOUD/scenario.json") =~ \"hosts\":\ ([0-9]+) ]] || true
  printf '%s' $((${HOME##*/} % ${BASH_REMATCH[1]:-1}))
}

lsof() {
  local pid
  [ -e "$HOME/holder" ] || return 0
  pid=$(<"$HOME/holder")
  ! is_alive "$pid" || echo "$pid"
}

# Only `-m pip install uv`.
python3() {
  mkdir -p "$HOME/.local/bin"
  ln -sf "$0" "$HOME/.local/bin/uv"
}

uv() {
  [ "$1" = venv ] || return 0
  mkdir -p "${!#}/bin"
  ln -s "$FAKE_GCLOUD/python" "${!#}/bin/python"
}

sleep() {
  local whole fraction=${1#"${1%%.*}"}
  printf -v whole '%03d' "${1%%.*}"
  PATH=${PATH#*:} # past this one
  exec sleep "${whole::-2}.${whole: -2}${fraction#.}"
}

printf -v call '%q ' "${0##*/}" "$@"
{ echo "$call" >>"$HOME/calls"; } 2>/dev/null || true # the host may be gone
"${0##*/}" "$@"
