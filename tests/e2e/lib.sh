# SPDX-License-Identifier: Apache-2.0
# What an end-to-end case is written with; run-here sources it before the case.
# Given: CLONE, KERNEL_CLOUD, KERNEL_GENERIC, FIXTURES, WORK (an empty directory, where the case starts), TIME_LIMIT (seconds).
set -Eeuo pipefail
trap 'echo "${BASH_SOURCE[0]-}:$LINENO: status $?: $BASH_COMMAND" >&2' ERR
PATH=$PATH:/usr/sbin:/sbin
PYTHONPATH=$(dirname "${BASH_SOURCE[0]}") # terminal.py
export PYTHONPATH PYTHONDONTWRITEBYTECODE=1

# Not whatever Python is first on the path, and without what site-packages add: in a test host that takes a second instead of five.
python3() { /usr/bin/python3 -S "$@"; }

fail() { echo "failed: $*" >&2; exit 1; }
skip() { echo "$*"; exit 77; } # the reason is the last line of the log

contains() { # FILE TEXT
  grep -qF -e "$2" -- "$1" || { echo "$1 lacks: $2; it ends with:" >&2; tail -n 8 -- "$1" >&2; return 1; }
}

equal() { # WHAT ACTUAL EXPECTED
  [[ $2 == "$3" ]] || fail "$1: '$2', not '$3'"
}

within() { # SECONDS COMMAND…: repeats COMMAND until it succeeds, for four times as long: the machine may be busy with other work
  local end=$((SECONDS + 4 * $1))
  shift
  until "$@" 2>/dev/null; do
    ((SECONDS < end)) || { echo "not in time: $*" >&2; "$@" || true; return 1; }
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

ends_with() { # STATUS COMMAND…
  local expected=$1 status=0
  shift
  "$@" || status=$?
  equal "status of $*" "$status" "$expected"
}

encode_run() { # SCRIPT: the word for the kernel command line that makes a fixture's init run it
  local word
  word=run=$(base64 -w 0 <<<"$1")
  ((${#word} < 1900)) || fail "encode_run: the script is too long for a kernel command line"
  echo "$word"
}

# What a guest's script needs most: `tell KEY COMMAND…` prints what the case reads with `told KEY`.
guest_script() { # reads the rest of the script
  cat <<'END'
tell() { local key=$1; shift; echo "$key: $("$@" 2>&1 | tr '\n' ' ' | sed 's/ *$//')"; }
complaints() { dmesg | sed 's/^[^]]*] //' | grep -E 'ACPI (Error|Warning|BIOS)|WARNING:|BUG:|Oops|rcu.*stall'; }
END
  cat
}

initrd() { # FILE…: $WORK/initrd.cpio, the fixture with the script on standard input as /etc/run and with FILEs in /
  mkdir -p "$WORK/initrd/etc"
  guest_script >"$WORK/initrd/etc/run"
  (($# == 0)) || cp -- "$@" "$WORK/initrd/"
  { cat "$FIXTURES/busybox-initrd.cpio"; (cd "$WORK/initrd" && find . | busybox cpio -o -H newc 2>/dev/null); } >"$WORK/initrd.cpio"
}

root_image() { # $WORK/root.ext4, the fixture with the script on standard input as /etc/run
  cp --sparse=always "$FIXTURES/busybox-root.ext4" "$WORK/root.ext4"
  guest_script >"$WORK/script"
  debugfs -w -R "write $WORK/script etc/run" "$WORK/root.ext4" 2>/dev/null
}

add_program() { # IMAGE FILE PATH
  debugfs -w -R "write $2 $3" "$1" 2>/dev/null
  debugfs -w -R "set_inode_field $3 mode 0100755" "$1" 2>/dev/null
}
add_with_libraries() { # IMAGE FILE PATH: into the image of a small root file system that has none yet
  local library
  printf 'mkdir %s\n' lib lib/x86_64-linux-gnu lib64 >"$WORK/additions"
  for library in $(ldd "$2" | grep -o '/lib[^ ]*'); do echo "write $library $library"; done >>"$WORK/additions"
  debugfs -w -f "$WORK/additions" "$1" >/dev/null 2>&1
  add_program "$@"
}
add_agent() { # IMAGE: a guest's init starts it
  add_program "$1" "$(dirname "$CLONE")/../libexec/clone/clone-agent" usr/sbin/clone-agent
}

guest() { "$CLONE" exec --vm-id "$1" --timeout 30 -- "${@:2}"; } # VM COMMAND…: by its agent

module() { # KERNEL NAME…: the files of a kernel's modules, dependencies first
  modprobe -aS "${1#*/vmlinuz-}" --show-depends "${@:2}" | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

told() { # KEY: what the guest told last under that key
  sed -n "s/\r//g; s/^$1: //p" "$WORK/console.log" | tail -n 1
}

# What a guest says of its machine, and the check of it. The kernel may complain only as it does in QEMU on the same KVM: the
# test host's emulated SVM lets XSETBV pass KVM by, for one, which Linux notices.
describe_machine='
tell version uname -r
tell nproc nproc
tell memory sed -n "s/MemTotal: *\([0-9]*\) kB/\1/p" /proc/meminfo
tell timers sed -n "s/^ *LOC: *\([0-9 ]*[0-9]\).*/\1/p" /proc/interrupts
tell clock date -u +%s
tell complaints complaints'
check_machine() { # KERNEL MIB VCPUS
  equal "kernel" "$(told version)" "${1#*/vmlinuz-}"
  equal "processors" "$(told nproc)" "$3"
  local memory count timers complaints
  memory=$(told memory)
  ((memory <= $2 * 1024 && memory > $2 * 1024 * 9 / 10 - 65536)) || fail "memory: $memory KiB of $2 MiB"
  read -r -a timers < <(told timers)
  equal "processors with a timer" "${#timers[@]}" "$3"
  for count in "${timers[@]}"; do ((count > 0)) || fail "timer interrupts: ${timers[*]}"; done
  complaints=$(told complaints)
  if [[ $complaints ]]; then equal "complaints of the kernel" "$complaints" "$(peer_complaints "$1")"; fi
}

peer_microvm() { # KERNEL SCRIPT: boots the fixture's initrd in QEMU's microvm, console on standard output
  timeout --foreground "$TIME_LIMIT" qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 256M -nodefaults -no-user-config \
    -no-reboot -display none -serial stdio -kernel "$1" -initrd "$FIXTURES/busybox-initrd.cpio" \
    -append "console=ttyS0 quiet panic=-1 $(encode_run "$2")" </dev/null 2>&1
}

peer_complaints() { # KERNEL: asked once in a test host
  local answer=/tmp/e2e-peer-complaints-${1##*/}
  [[ -e $answer ]] || peer_microvm "$1" "$(guest_script <<<'tell complaints complaints')" >"$answer"
  sed -n 's/\r//g; s/^complaints: //p' "$answer"
}
