# SPDX-License-Identifier: Apache-2.0
# Debian's generic kernel with an initrd, 4 vCPUs and 128 MiB: all processors work, as one socket.
# seconds: 12
initrd <<END
$describe_machine
for cpu in 0 1 2 3; do tell on-\$cpu taskset -c \$cpu sh -c 'cut -d " " -f 39 /proc/self/stat'; done
tell sockets sh -c 'sort -u /sys/devices/system/cpu/cpu*/topology/physical_package_id'
tell cores sh -c 'cat /sys/devices/system/cpu/cpu*/topology/core_id'
END
ends_with 0 run_clone --kernel "$KERNEL_GENERIC" --initrd "$WORK/initrd.cpio" --mem 128M --vcpus 4 --no-reboot --cmdline quiet
check_machine "$KERNEL_GENERIC" 128 4
for cpu in 0 1 2 3; do equal "processor of a process bound to $cpu" "$(told on-$cpu)" $cpu; done
equal "sockets" "$(told sockets)" 0
equal "cores" "$(told cores)" "0 1 2 3"
