# SPDX-License-Identifier: Apache-2.0
# A root file system on the cloud kernel with 4 vCPUs, by the generated initrd: mounted read-write from a disk with a queue for
# each vCPU, its own init as process 1, the agent beside it, random numbers from the host, and the file system clean afterwards.
# seconds: 10
root_image <<END
$describe_machine
tell root grep ' / ' /proc/mounts
tell init cat /proc/1/cmdline
tell disk cat /sys/block/vda/serial
tell queues ls /sys/block/vda/mq
tell disk-interrupts sed -n 's/^ *[0-9]*: *\([0-9 ]*[0-9]\) .*virtio.*/\1/p' /proc/interrupts
tell rng cat /sys/class/misc/hw_random/rng_current
tell random sh -c 'head -c 32 /dev/hwrng | hexdump -v -e "1/1 \"%02x\""'
tell agent sh -c 'cd /proc/\$(pidof clone-agent | tr " " "\n" | sort -n | head -n 1); keeper=\$(sed -n "s/^PPid:.//p" status); sed -n "s/^PPid:.//p" /proc/\$keeper/status; cat oom_score_adj; readlink exe'
date >/root/written
END
debugfs -w -R "write $(dirname "$CLONE")/../libexec/clone/clone-agent usr/sbin/clone-agent" "$WORK/root.ext4" 2>/dev/null
ends_with 0 run_clone --kernel "$KERNEL_CLOUD" --rootfs "$WORK/root.ext4" --vcpus 4 --no-reboot --cmdline quiet
check_machine "$KERNEL_CLOUD" 512 4
[[ $(told root) =~ ^/dev/vda\ /\ ext4\ rw, ]] || fail "root: $(told root)"
[[ $(told init) == */sbin/init* ]] || fail "process 1: $(told init)"
equal "the agent: parent of who keeps it, protection, program" "$(told agent)" "1 -1000 /usr/sbin/clone-agent"
equal "serial number" "$(told disk)" clone-root
equal "queues" "$(told queues)" "0 1 2 3"
[[ $(told disk-interrupts) =~ [1-9] ]] || fail "no interrupts of virtio devices"
[[ $(told rng) == virtio_rng* ]] || fail "source of random numbers: $(told rng)"
[[ $(told random) =~ ^[0-9a-f]{64}$ && ! $(told random) =~ ^(00)*$ ]] || fail "random bytes: $(told random)"
e2fsck -fn "$WORK/root.ext4"
debugfs -R 'cat root/written' "$WORK/root.ext4" 2>/dev/null | grep -q UTC
