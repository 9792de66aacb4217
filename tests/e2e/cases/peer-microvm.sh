# SPDX-License-Identifier: Apache-2.0
# Debian's cloud kernel boots in QEMU's microvm on the test host's KVM: the host and the fixtures are sound, apart from clone.
# seconds: 8
peer_microvm "$KERNEL_CLOUD" 'echo "guest $(uname -r) $((6 * 7))"' >"$WORK/console.log"
contains "$WORK/console.log" "guest ${KERNEL_CLOUD#*/vmlinuz-} 42"
contains "$WORK/console.log" "run: exit status 0"
