# SPDX-License-Identifier: Apache-2.0
# Forks are given devices that their template had slots for: the kernels, cloud and generic, find them by themselves, no later than a
# moment after the agent started a first program. Disks of their own, in forks of forks, live forks and after a reboot; what has no
# slot is refused.
# seconds: 170
export CLONE_RUNTIME_DIR=$WORK/run
root_image <<'END'
echo "root is up"
while read -r line; do :; done
END
add_agent root.ext4
store=(--store "$WORK/store")
text_of() { guest "$1" head -c "${#3}" "/dev/$2"; } # VM DISK TEXT-OF-THAT-LENGTH
make_disk() { # NAME: its name is at its begin
  truncate -s 2M "$1.img"
  printf %s "$1" | dd of="$1.img" conv=notrunc status=none
}
has_text() { equal "$1: $2" "$(text_of "$1" "$2" "$3")" "$3"; }
complaints() { guest "$1" dmesg | sed 's/^[^]]*] //' | grep -E 'ACPI (Error|Warning|BIOS)|virtio.*(fail|error)|BUG|WARNING:' || true; }
fork() { # NAME OPTION…: the first program that runs in it finds vdb, or waits a moment for it
  local name=$1
  "$CLONE" fork --template "$template" "${store[@]}" --name "$name" "${@:2}" </dev/null >console-$name.log 2>&1 &
  within 30 guest "$name" sh -c 'tries=1; until [ -b /dev/vdb ] || [ $tries = 20 ]; do tries=$((tries + 1)); sleep 0.1; done
    [ -b /dev/vdb ] && echo found; echo "tries: $tries"' >found
  contains found found || fail "$name: no /dev/vdb"
  echo "$name: $(tail -n 1 found)"
}

try() { # KERNEL
  local kernel=$1 complained
  template=base
  "$CLONE" run --kernel "$kernel" --rootfs root.ext4 --overlay tmpfs --mem 256M --name source --cmdline quiet --transport mmio,slots=7 \
    </dev/null >console-source.log 2>&1 &
  within 90 contains console-source.log "root is up" || fail "$(tail -n 5 console-source.log)"
  within 60 guest source true
  complained=$(complaints source)
  "$CLONE" snapshot --name base "${store[@]}" source
  make_disk first
  fork one --block first.img
  has_text one vdb first
  equal "disks of the source" "$(guest source sh -c 'echo /sys/block/vd*')" /sys/block/vda
  equal "one: complaints" "$(complaints one)" "$complained"
  echo "${kernel##*/}: after $SECONDS s"
}

try "$KERNEL_GENERIC"
for name in one source; do "$CLONE" stop --force $name; done
wait
"$CLONE" template rm base "${store[@]}"

try "$KERNEL_CLOUD"
make_disk second
fork two --block second.img,readonly=on --device virtio-rng
has_text two vdb second
equal "two: random number devices" "$(guest two sh -c 'cat /sys/bus/virtio/devices/*/device | grep -c 0x0004')" 2
guest one sh -c 'printf changed | dd of=/dev/vdb conv=fsync 2>/dev/null'
equal "the disk of one" "$(head -c 7 first.img)" changed
# A fork of the fork has the disk of its template, and another one.
"$CLONE" snapshot --name again --stop "${store[@]}" one
template=again
make_disk third
fork three --block third.img
has_text three vdb changed
has_text three vdc third
guest three sh -c 'printf elsewhere | dd of=/dev/vdb conv=fsync 2>/dev/null; printf kept | dd of=/dev/vdc conv=fsync 2>/dev/null'
equal "the disk of one, in its fork" "$(head -c 7 first.img)" changed
equal "the disk of three" "$(head -c 4 third.img)" kept
make_disk live
"$CLONE" fork --from source --name live --block live.img </dev/null >console-live.log 2>&1 &
within 30 guest live true
has_text live vdb live
# A reboot finds all of them where it finds the others.
guest three reboot -f || true
within 60 contains console-three.log "root is up"
within 30 guest three true
equal "three: disks after a reboot" "$(guest three sh -c 'echo /sys/block/vd*')" "/sys/block/vda /sys/block/vdb /sys/block/vdc"
has_text three vdb changed
has_text three vdc kept
# More than there are slots for.
for name in a b c; do make_disk $name; done
ends_with 1 "$CLONE" fork --template again "${store[@]}" --block a.img --block b.img --block c.img >refused 2>&1
contains refused "virtio-blk.4: slots=7: no slot is left"
equal "lines" "$(wc -l <refused)" 1
complained=$(complaints source | sort -u)
for name in source two three live; do
  equal "$name: complaints" "$(complaints $name | sort -u)" "$complained"
  "$CLONE" stop --force $name
done
wait
