# SPDX-License-Identifier: Apache-2.0
# 5 GiB and 4 vCPUs: memory below the PCI hole and above 4 GiB is there, and data put above 4 GiB is what is read back.
# seconds: 30
initrd <<END
$describe_machine
tell high-ram sh -c 'grep "^ *[1-9a-f][0-9a-f]\{8,\}-.*System RAM" /proc/iomem'
free_high() { awk '/zone *Normal/ { normal = 1 } normal && /nr_free_pages/ { print \$2; exit }' /proc/zoneinfo; }
mount -t tmpfs none /mnt
before=\$(free_high)
yes 'a page above 4 GiB' | head -c 33554432 >/mnt/file
after=\$(free_high)
tell high-pages echo \$((before - after))
tell sum sha256sum /mnt/file
END
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --initrd "$WORK/initrd.cpio" --mem 5G --vcpus 4 --no-reboot --cmdline quiet
check_machine "$KERNEL_CLOUD" 5120 4
range=$(told high-ram)
range=${range%% *}
first=$((16#${range%-*})) last=$((16#${range#*-}))
equal "start of the memory above the hole" "$first" $((4 << 30))
((last + 1 - first >= 1 << 30)) || fail "memory above 4 GiB: $range"
(($(told high-pages) >= 6000)) || fail "of the file's 8192 pages $(told high-pages) are above 4 GiB"
expected=$(head -c 33554432 < <(yes 'a page above 4 GiB') | sha256sum)
equal "content" "$(told sum)" "${expected%% *}  /mnt/file"
