# SPDX-License-Identifier: Apache-2.0
# A profile boots, a flag wins over it, and what --dry-run prints is the same machine when it is fed back.
# seconds: 9
initrd <<END
$describe_machine
tell cmdline cat /proc/cmdline
tell disk cat /sys/block/vda/serial
END
cp "$FIXTURES/busybox-root.ext4" disk.img
ln -s "$KERNEL_CLOUD" kernel
cat >vm.yaml <<'END'
kernel: kernel
initrd: initrd.cpio
mem: 256M
vcpus: 8
no-reboot: on
cmdline: quiet one=1
block: disk.img,readonly=on
END
mkdir elsewhere
cd elsewhere # paths in a profile start at its folder
"$CLONE" run --profile ../vm.yaml --vcpus 2 --dry-run >plan.yaml
"$CLONE" run --profile plan.yaml --dry-run | diff plan.yaml -
ends_with 0 run_clone --profile plan.yaml
check_machine "$KERNEL_CLOUD" 256 2
[[ $(told cmdline) == *" quiet one=1" ]] || fail "command line: $(told cmdline)"
# The profile for tenants who must not learn of each other.
"$CLONE" run --profile "$(dirname "${BASH_SOURCE[0]}")/../../../configs/hardened.yaml" --dry-run >hardened.yaml
contains hardened.yaml 'ksm: off'
