# SPDX-License-Identifier: Apache-2.0
# The example device, built out of tree against an installed clone that was moved, is found by its folder and used by a guest.
# seconds: 30
# host: no
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
root=$here/../..
cmake --install "$root/build/release" --prefix "$WORK/installed" >install.log
mv installed moved
cmake -S "$root/examples/third-party-device" -B plugin -DCMAKE_PREFIX_PATH="$WORK/moved" >build.log
cmake --build plugin >>build.log
moved/bin/clone plugin check plugin/fortune.so
initrd <<'END'
tell fortune dd if=/dev/port bs=1 skip=1520 count=6
END
ends_with 0 "$here/testhost" --keep "$WORK" -- moved/bin/clone run --plugin-dir plugin --kernel "$KERNEL_GENERIC" --initrd initrd.cpio \
  --fortune Hello! --no-reboot --cmdline quiet >console.log
[[ $(told fortune) == Hello!* ]] || fail "the guest read: $(told fortune)"
