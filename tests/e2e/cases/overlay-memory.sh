# SPDX-License-Identifier: Apache-2.0
# An overlay in the guest's memory: on both kernels `/` is an ordinary root that can be written, over a base that stays as it is.
# What cannot be is said by the host, or by the guest's first program.
# seconds: 40
cp --sparse=always "$FIXTURES/busybox-root.ext4" base.ext4
guest_script >script <<'END'
tell version uname -r
cat /proc/mounts >/run/mounts
tell root grep ' / ' /run/mounts
tell layers grep -c clone /run/mounts
tell mode stat -c '%a %u %g' /
tell disk-readonly cat /sys/block/vda/ro
tell base cat /etc/base
echo new >/root/new; tell write cat /root/new
echo more >>/etc/base; tell append cat /etc/base
rm /etc/gone; tell delete ls /etc/gone
mv /etc/moved /etc/there; tell rename sh -c 'cat /etc/there; ls /etc/moved'
tell rename-folder busybox mv -T /srv/folder /srv/other
tell renamed-folder sh -c 'cat /srv/other/inside; ls /srv'
echo both >/srv/link-1; tell links sh -c 'cat /srv/link-2; stat -c %h /srv/link-1'
tell devices sh -c 'stat -c %d / /bin/busybox /etc/hosts /etc/base /root/new | sort -u | wc -l'
tell size df -k /
dd if=/dev/zero of=/root/large bs=1M count=20 2>/dev/null && sync && tell large stat -c %s /root/large
tell remount sh -c 'mount -o remount,ro / && ! touch /root/x && mount -o remount,rw / && touch /root/x && echo fine'
END
mkdir tree && echo base >tree/base && echo gone >tree/gone && echo moved >tree/moved && echo inside >tree/inside && echo link >tree/link
{
  echo "write script etc/run"
  for file in base gone moved; do echo "write tree/$file etc/$file"; done
  printf '%s\n' "mkdir srv" "mkdir srv/folder" "write tree/inside srv/folder/inside" "write tree/link srv/link-1" \
    "link srv/link-1 srv/link-2" "set_inode_field srv/link-1 links_count 2" "set_inode_field / mode 040711"
} | debugfs -w -f - base.ext4 >/dev/null 2>&1
e2fsck -fn base.ext4
sum=$(sha256sum base.ext4)

check_guest() { # KERNEL MIB
  equal "kernel" "$(told version)" "${1#*/vmlinuz-}"
  [[ $(told root) =~ ^overlay\ /\ overlay\ rw, ]] || fail "root: $(told root)"
  equal "mounts of the layers" "$(told layers)" 1 # of the overlay itself, which names them
  equal "mode and owner of /" "$(told mode)" "711 0 0"
  equal "read-only disk" "$(told disk-readonly)" 1
  equal "file of the base" "$(told base)" base
  equal "written" "$(told write)" new
  equal "appended" "$(told append)" "base more"
  [[ $(told delete) == *"No such file"* ]] || fail "deleted: $(told delete)"
  [[ $(told rename) == "moved ls: "*"No such file"* ]] || fail "renamed: $(told rename)"
  equal "renaming a folder" "$(told rename-folder)" ""
  equal "renamed folder" "$(told renamed-folder)" "inside link-1 link-2 other"
  equal "hard link of the base" "$(told links)" "both 2"
  equal "devices below /" "$(told devices)" 1
  local size # half of the guest's memory
  size=$(told size | sed -n 's/.*overlay  *\([0-9]*\) .*/\1/p')
  ((size > $2 * 1024 * 3 / 8 && size <= $2 * 1024 / 2)) || fail "size of /: $size KiB of $2 MiB of memory"
  equal "large file" "$(told large)" $((20 << 20))
  [[ $(told remount) == *fine ]] || fail "remounted: $(told remount)"
  equal "base" "$(sha256sum base.ext4)" "$sum"
}
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --overlay --rootfs base.ext4 --mem 256M --no-reboot --cmdline quiet
check_guest "$KERNEL_CLOUD" 256

printf 'kernel: %s\nrootfs: base.ext4\noverlay: tmpfs\nmem: 256M\nno-reboot: on\n' "$KERNEL_GENERIC" >vm.yaml
ends_with 0 run_clone --profile vm.yaml --cmdline quiet
check_guest "$KERNEL_GENERIC" 256

# A base whose journal is not replayed cannot be mounted on a read-only disk: the guest says what to do.
cp --sparse=always base.ext4 dirty.ext4
debugfs -w -R 'feature needs_recovery' dirty.ext4 >/dev/null 2>&1
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs dirty.ext4 --overlay --no-reboot --cmdline quiet
contains console.log 'clone-init: cannot mount /dev/vda read-only as root: ext4: it was not cleanly unmounted, and its journal'

# What the host can tell, it tells before anything runs, in a line.
refused() { # MESSAGE ARG…
  local message=$1 status=0
  shift
  "$CLONE" run --kernel "$KERNEL_CLOUD" "$@" </dev/null >refused.log 2>&1 || status=$?
  ((status == 1 || status == 2)) || fail "status $status of: $*"
  equal "lines" "$(wc -l <refused.log)" 1
  contains refused.log "$message"
}
refused 'clone: error: --overlay: needs --rootfs FILE or --device virtio-blk,root=on' --overlay
refused 'clone: error: plugin virtio-blk.0: overlay=tmpfs: allowed without readonly=on only' --rootfs base.ext4,readonly=on --overlay
refused 'clone: error: plugin virtio-blk.0: overlay=tmpfs: allowed with root=on only' --block base.ext4,overlay=tmpfs
refused 'leave --initrd out' --rootfs base.ext4 --overlay --initrd "$FIXTURES/busybox-initrd.cpio"
mkdir -p "modules/${KERNEL_CLOUD#*/vmlinuz-}"
: >"modules/${KERNEL_CLOUD#*/vmlinuz-}/modules.dep"
refused 'the overlay over the root file system' --rootfs base.ext4 --overlay --modules modules
equal "base" "$(sha256sum base.ext4)" "$sum"
