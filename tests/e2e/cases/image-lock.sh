# SPDX-License-Identifier: Apache-2.0
# A second machine is refused an image that is in use, by name; after a SIGKILL of the first nothing is left in the way.
# seconds: 12
root_image <<'END'
echo up
[ -e /root/seen ] && poweroff -f
touch /root/seen
sync
echo seen
sleep 1000
END
options=(--kernel "$KERNEL_CLOUD" --rootfs root.ext4 --no-reboot --cmdline quiet)
start_clone "${options[@]}"
within 60 contains console.log seen
second() { "$CLONE" run "${options[@]}" </dev/null >second.log 2>&1; }
ends_with 1 second
equal "lines" "$(wc -l <second.log)" 1
contains second.log 'clone: error: plugin virtio-blk.0: path=root.ext4: in use by another process'
kill -KILL "$clone_process"
ends_with 137 wait "$clone_process"
ends_with 0 run_clone "${options[@]}"
contains console.log up
