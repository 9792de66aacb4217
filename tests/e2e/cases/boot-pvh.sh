# SPDX-License-Identifier: Apache-2.0
# The vmlinux out of the generic bzImage boots by its PVH entry, and by the 64-bit entry when told to.
# seconds: 30
python3 - "$KERNEL_GENERIC" >vmlinux <<'END'
import lzma, sys
image = open(sys.argv[1], "rb").read()
sys.stdout.buffer.write(lzma.LZMADecompressor().decompress(image[image.index(b"\xfd7zXZ\0"):]))
END
initrd <<<"$describe_machine"
for protocol in auto linux64; do
  ends_with 0 run_clone --kernel vmlinux --boot-protocol $protocol --initrd "$WORK/initrd.cpio" --mem 256M --vcpus 2 --no-reboot \
    --cmdline quiet
  check_machine "$KERNEL_GENERIC" 256 2
done
