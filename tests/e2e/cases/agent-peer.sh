# SPDX-License-Identifier: Apache-2.0
# The guest agent in QEMU's microvm, over the host kernel's vsock and the guest kernel's: apart from clone's own devices.
# seconds: 45
[[ -c /dev/vhost-vsock ]] || skip "no /dev/vhost-vsock"
agent=$(realpath "$(dirname "$CLONE")/../libexec/clone/clone-agent")
mapfile -t modules < <(module "$KERNEL_CLOUD" virtio_mmio vmw_vsock_virtio_transport)
# The agent is there before vsock is, and a second one beside it.
cat >first <<END
#!/bin/sh
mount -t proc none /proc; mount -t devtmpfs none /dev
/clone-agent & echo \$! >/agent.pid
/clone-agent &
sleep 0.2
for module in ${modules[*]##*/}; do insmod /\$module; done
echo modules loaded
while :; do sleep 1; done
END
chmod +x first
initrd "$agent" "${modules[@]}" first </dev/null
qemu-system-x86_64 -M microvm,rtc=on -accel kvm -cpu host -m 256M -nodefaults -no-user-config -no-reboot -display none \
  -serial "file:$WORK/console.log" -device vhost-vsock-device,guest-cid=42 -kernel "$KERNEL_CLOUD" -initrd "$WORK/initrd.cpio" \
  -append "console=ttyS0 quiet panic=-1 rdinit=/first" </dev/null &
machine=$!
trap 'kill $machine 2>/dev/null || true' EXIT
timeout "$TIME_LIMIT" python3 "$(dirname "${BASH_SOURCE[0]}")/../agent-client.py" 42 | tee client.log || { tail -n 20 "$WORK/console.log"; fail "the client"; }
contains client.log "unprivileged port closed"
contains client.log "idle, and active"
contains client.log "the old conversation goes on"
# A shell is process 1: the agent itself ends the machine. QEMU does not survive the reset on the test host's emulated SVM.
within 20 contains "$WORK/console.log" "reboot: Restarting system"
