# SPDX-License-Identifier: Apache-2.0
# virtio-blk over a block device: the unit test that needs a loop device, which not every machine has.
# seconds: 10
tests=$(dirname "$CLONE")/unit-tests
"$tests" -tc='virtio-blk: a block device as the disk' --no-colors >output 2>&1
cat output
contains output '1 passed'
if grep -q 'skipped:' output; then fail "no loop device"; fi
