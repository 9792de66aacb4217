# SPDX-License-Identifier: Apache-2.0
# What an end-to-end case is written with; run-here sources it before the case.
# Given: CLONE, KERNEL_CLOUD, KERNEL_GENERIC, FIXTURES, WORK (an empty directory, where the case starts), TIME_LIMIT (seconds).
set -Eeuo pipefail
trap 'echo "${BASH_SOURCE[0]-}:$LINENO: status $?: $BASH_COMMAND" >&2' ERR

fail() { echo "failed: $*" >&2; exit 1; }
skip() { echo "$*"; exit 77; } # the reason is the last line of the log

contains() { # FILE TEXT
  grep -qF -e "$2" -- "$1" || { echo "$1 lacks: $2" >&2; return 1; }
}

within() { # SECONDS COMMAND…: repeats COMMAND until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" 2>/dev/null; do
    ((SECONDS < end)) || { echo "not in time: $*" >&2; return 1; }
    sleep 0.2
  done
}

run_clone() { # [--timeout SECONDS] ARG…: the VM's console goes to $WORK/console.log; the status is that of `clone run`
  local limit=$TIME_LIMIT
  if [[ $1 == --timeout ]]; then limit=$2; shift 2; fi
  timeout --foreground --kill-after=5 "$limit" "$CLONE" run "$@" </dev/null >"$WORK/console.log" 2>&1
}

start_clone() { # ARG…: the same in the background, as process $clone_process, which takes every signal
  (trap - INT; exec "$CLONE" run "$@" </dev/null >"$WORK/console.log" 2>&1) & # bash ignores SIGINT in the background
  clone_process=$!
}

encode_run() { # SCRIPT: the word for the kernel command line that makes a fixture's init run it
  local word
  word=run=$(base64 -w 0 <<<"$1")
  ((${#word} < 1900)) || fail "encode_run: the script is too long for a kernel command line"
  echo "$word"
}
