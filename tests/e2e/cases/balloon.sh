# SPDX-License-Identifier: Apache-2.0
# Memory comes back: a guest that touched 300 MiB and freed it shrinks by free page reporting alone; a fixed balloon takes and
# the guest, out of memory, has it again without a death.
# seconds: 45
resident() { awk '/^Rss:/ { print int($2 / 1024) }' "/proc/$1/smaps_rollup"; } # MiB
below() { (($(resident "$clone_process") < $1)); }
above() { (($(resident "$clone_process") >= $1)); }
mapfile -t modules < <(module "$KERNEL_CLOUD" virtio_mmio virtio_balloon)
load='for module in '$(basename -a "${modules[@]}" | tr '\n' ' ')'; do insmod /$module; done'

initrd "${modules[@]}" <<END
$load
echo 2 >/sys/module/page_reporting/parameters/page_reporting_order 2>/dev/null
mount -t tmpfs -o size=400M none /mnt
echo ready; sleep 2
dd if=/dev/zero of=/mnt/file bs=1M count=300 2>/dev/null
echo touched; sleep 3
rm /mnt/file
echo freed; sleep 1000
END
options=(--kernel "$KERNEL_CLOUD" --initrd "$WORK/initrd.cpio" --mem 512M --no-reboot --cmdline quiet)
start_clone "${options[@]}" --balloon-policy none
within 60 contains console.log ready
idle=$(resident "$clone_process")
within 60 contains console.log touched
touched=$(resident "$clone_process")
((touched >= idle + 250)) || # some of it was touched at boot
   fail "the guest touched 300 MiB: $idle MiB before, $touched MiB after"
within 60 contains console.log freed
within 20 below $((idle + 60)) || fail "300 MiB were freed: $idle MiB before, $touched MiB touched, $(resident "$clone_process") MiB now"
echo "free page reporting: $idle MiB before, $touched MiB touched, $(resident "$clone_process") MiB after"
kill -KILL "$clone_process"
wait "$clone_process" 2>/dev/null || true

# A balloon of 150 of 512 MiB; then the guest takes four fifths of what was available without it.
initrd "${modules[@]}" <<END
$load
free() { sed -n 's/MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
for i in \$(seq 100); do [ \$(free) -lt 345000 ] && break; sleep 0.2; done
tell inflated free
mount -t tmpfs -o size=90% none /mnt
dd if=/dev/zero of=/mnt/file bs=1M count=380 2>/dev/null
tell written stat -c %s /mnt/file
tell kills sh -c 'dmesg | grep -ci "killed process"'
rm /mnt/file
END
ends_with 0 run_clone "${options[@]}" --balloon 150M
inflated=$(told inflated)
((inflated < 345000)) || fail "with a balloon of 150 MiB of 512, $inflated KiB are available"
equal "written while inflated" "$(told written)" $((380 << 20))
equal "processes killed" "$(told kills)" 0
