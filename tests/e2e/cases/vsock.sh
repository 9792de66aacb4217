# SPDX-License-Identifier: Apache-2.0
# vsock by both backends with stock guests: megabytes both ways, half-close, many streams, refusals, streams that the guest
# begins, the control command, CIDs. And the vhost backend's unit tests, which need the test host's kernel.
# seconds: 90
here=$(dirname "${BASH_SOURCE[0]}")/..
export CLONE_RUNTIME_DIR=$WORK/run
cc -O2 -static -o vsock-guest "$here/vsock-guest.c"

ends_with 2 "$CLONE" run --kernel "$KERNEL_CLOUD" --cid 2 --dry-run 2>cid.log
contains cid.log "cid=2: allowed is a number, 3 to 4294967294"

unit_tests=$(dirname "$CLONE")/unit-tests
if [[ -x $unit_tests ]]; then
  "$unit_tests" --test-case='vhost-vsock*' >unit.log 2>&1 || { cat unit.log; fail "the vhost backend's unit tests"; }
  contains unit.log "0 failed"
  echo "unit tests: $(grep 'test cases' unit.log)"
  ! grep -q skipped: unit.log || fail "the unit tests found no vhost-vsock"
fi

root_image <<'END'
chmod 755 /vsock-guest
tell dialled sh -c '/vsock-guest serve & /vsock-guest dial 7000 2; wait'
tell complaints complaints
END
debugfs -w -R "write $WORK/vsock-guest vsock-guest" root.ext4 2>/dev/null
debugfs -w -R "sif vsock-guest mode 0100755" root.ext4 2>/dev/null

directory_of() { local directory; for directory in "$CLONE_RUNTIME_DIR"/*/; do [[ -S $directory/vsock.sock || -S $directory/control.sock ]] && echo "$directory" && return; done; return 1; }
locked() { grep -q ":$(stat -c %i "$CLONE_RUNTIME_DIR/.cid/$1") " /proc/locks; } # CID
for backend in vhost user; do
  echo "$backend begins at $SECONDS s"
  kernel=$KERNEL_CLOUD
  [[ $backend == user ]] || kernel=$KERNEL_GENERIC
  start_clone --kernel "$kernel" --rootfs root.ext4,overlay=tmpfs --vsock "$backend,cid=4242" --no-reboot --cmdline quiet
  within 20 directory_of >/dev/null
  directory=$(directory_of)
  [[ $backend == vhost ]] || within 20 test -S "$directory/vsock.sock"
  # The lock keeps the CID from another VM of this user.
  within 20 locked 4242
  ends_with 1 timeout 30 "$CLONE" run --kernel "$kernel" --cid 4242,backend=user 2>lock.log </dev/null
  contains lock.log "cid=4242: in use by another machine"
  timeout "$TIME_LIMIT" python3 "$here/vsock-host.py" "$backend" "$directory" 4242 || { tail -n 20 console.log; fail "backend=$backend"; }
  echo "the host is done at $SECONDS s"
  ends_with 0 wait "$clone_process"
  equal "the host's answer ($backend)" "$(told dialled | grep -o 'host says.*')" "host says: $((2 << 20)) bytes"
  if [[ $(told complaints) ]]; then equal "complaints of the guest" "$(told complaints)" "$(peer_complaints "$kernel")"; fi
  [[ ! -e $directory/vsock.sock ]] || fail "vsock.sock is left behind"
done
