# SPDX-License-Identifier: Apache-2.0
# Overlays in files: one that keeps what the guest writes over two boots and passes qemu-img's checks, over raw and qcow2; a
# temporary one that is gone after power-off, SIGTERM and SIGKILL. The base is shared by all and stays as it is.
# seconds: 60
cp --sparse=always "$FIXTURES/busybox-root.ext4" base.ext4
guest_script >script <<'END'
tell root grep ' / ' /proc/mounts
tell disk-readonly cat /sys/block/vda/ro
tell base cat /etc/base
tell before sh -c 'cat /root/kept; ls /etc/gone; sha256sum </root/large'
grep -q stay= /proc/cmdline && { echo "here to stay"; sleep 1000; }
echo "written $(uname -r)" >>/root/kept
rm -f /etc/gone
dd if=/dev/urandom of=/root/large bs=64k count=100 2>/dev/null
tell large sh -c 'sha256sum </root/large'
END
echo base >base && echo gone >gone
printf '%s\n' "write script etc/run" "write base etc/base" "write gone etc/gone" | debugfs -w -f - base.ext4 >/dev/null 2>&1
qemu-img convert -O qcow2 base.ext4 base.qcow2
sums=$(sha256sum base.ext4 base.qcow2)
mkdir tmpfs-home
other_home=$(mktemp -d /var/tmp/e2e-home.XXXXXXXX) # in the test host an overlayfs, which knows no files without a name
trap 'rm -rf "$other_home"' EXIT
export HOME=$WORK/tmpfs-home
boot() { # KERNEL ARG…
  ends_with 0 run_clone --kernel "$1" --no-reboot --cmdline quiet "${@:2}"
}
stay() { # LOG ARG…: a machine in the background that stays up, $!
  local log=$1
  shift
  "$CLONE" run --kernel "$KERNEL_CLOUD" --no-reboot --cmdline "quiet stay=1" "$@" </dev/null >"$log" 2>&1 &
}
nothing_left() { # HOME
  equal "mode of the folder" "$(stat -c %a "$1/.clone/overlays")" 700
  equal "left in $1" "$(ls -A "$1/.clone/overlays")" ""
}
refused() { # MESSAGE ARG…
  local message=$1
  shift
  ends_with 1 "$CLONE" run --kernel "$KERNEL_CLOUD" "$@" </dev/null >refused.log 2>&1
  equal "lines" "$(grep -c 'clone: error' refused.log)" 1
  contains refused.log "$message"
}

stay stay.log --rootfs base.ext4 --overlay auto --mem 128M --grace 1
stays=$!
within 60 contains stay.log 'here to stay'
nothing_left "$HOME" # no name, though it is in use

boot "$KERNEL_CLOUD" --rootfs base.ext4 --overlay kept.qcow2
[[ $(told root) =~ ^/dev/vda\ /\ ext4\ rw, ]] || fail "root: $(told root)"
equal "read-only disk" "$(told disk-readonly)" 0
equal "file of the base" "$(told base)" base
[[ $(told before) == *"/root/kept"*"No such file"*"/etc/gone"* ]] || fail "before the first boot: $(told before)"
large=$(told large)
qemu-img check kept.qcow2
qemu-img info kept.qcow2 >info
contains info "backing file: $(realpath base.ext4)"
contains info 'backing file format: raw'

inode=$(stat -c %i kept.qcow2)
boot "$KERNEL_GENERIC" --rootfs base.ext4 --overlay kept.qcow2
equal "what the first boot left" "$(told before)" "written ${KERNEL_CLOUD#*/vmlinuz-} ls: /etc/gone: No such file or directory $large"
equal "overlay" "$(stat -c %i kept.qcow2)" "$inode"
qemu-img check kept.qcow2
qemu-img convert -O raw kept.qcow2 flat.ext4
e2fsck -fn flat.ext4
equal "kept" "$(debugfs -R 'cat root/kept' flat.ext4 2>/dev/null)" \
  "$(printf 'written %s\n' "${KERNEL_CLOUD#*/vmlinuz-}" "${KERNEL_GENERIC#*/vmlinuz-}")"
equal "bases" "$(sha256sum base.ext4 base.qcow2)" "$sums"
ends_with 1 qemu-img compare -q base.ext4 kept.qcow2

# Its own base and no other.
cp --sparse=always base.ext4 other.ext4
refused "overlay=kept.qcow2: is an overlay of $(realpath base.ext4), not of other.ext4; allowed is its own base" \
  --rootfs other.ext4 --overlay kept.qcow2
refused 'path=base.ext4: in use by another process (opened for reading)' --rootfs base.ext4

kill -TERM "$stays"
ends_with 6 wait "$stays"
nothing_left "$HOME"

# Over a qcow2 base.
boot "$KERNEL_CLOUD" --rootfs base.qcow2 --overlay over.qcow2
equal "file of the base" "$(told base)" base
qemu-img check over.qcow2
qemu-img info over.qcow2 >info
contains info 'backing file format: qcow2'
large=$(told large)
qemu-img convert -O raw over.qcow2 flat.ext4
e2fsck -fn flat.ext4
equal "large file" "$(debugfs -R 'cat root/large' flat.ext4 2>/dev/null | sha256sum)" "$large"

# Where a file needs a name for a moment.
export HOME=$other_home
stay killed.log --rootfs base.qcow2 --overlay auto --cmdline stay=1 # not quiet: it need not be up for this
stays=$!
within 60 contains killed.log 'Linux version'
nothing_left "$HOME"
kill -KILL "$stays"
ends_with 137 wait "$stays"
nothing_left "$HOME"
: >"$HOME/.clone/overlays/overlay-0123456789abcdef.qcow2" # of a start that was killed in that moment
boot "$KERNEL_CLOUD" --rootfs base.ext4 --overlay auto
[[ $(told before) == *"/root/kept"*"No such file"* ]] || fail "a temporary overlay is not empty: $(told before)"
[[ $(told large) ]] || fail "nothing was written"
nothing_left "$HOME"
equal "bases" "$(sha256sum base.ext4 base.qcow2)" "$sums"
