# SPDX-License-Identifier: Apache-2.0
# Ten machines on one base at once, each with a root of its own that it writes to, four in memory, three in temporary files,
# three in files that stay; the base stays as it is.
# seconds: 80
cp --sparse=always "$FIXTURES/busybox-root.ext4" base.ext4
# Each says that it is up, waits until it is told to go on, and tells what is in the file that all of them write.
guest_script >script <<'END'
echo "$(sed -n 's/.*machine=\([0-9]*\).*/\1/p' /proc/cmdline)" >/etc/number
echo "up as $(cat /etc/number)"
read -r word
echo "$word as $(cat /etc/number), root $(sed -n 's/^\([^ ]*\) \/ .*/\1/p' /proc/mounts)"
END
debugfs -w -R "write script etc/run" base.ext4 2>/dev/null
sum=$(sha256sum base.ext4)
mkdir home
export HOME=$WORK/home
machines=() inputs=() roots=()
for number in {1..10}; do
  if ((number <= 4)); then overlay=tmpfs root=overlay
  elif ((number <= 7)); then overlay=auto root=/dev/vda
  else overlay=file-$number.qcow2 root=/dev/vda
  fi
  roots+=("$root")
  mkfifo "in-$number"
  exec {input}<>"in-$number"
  inputs+=("$input")
  "$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs base.ext4 --overlay "$overlay" --mem 96M --no-reboot \
    --cmdline "quiet machine=$number" <&"$input" >"console-$number.log" 2>&1 &
  machines+=($!)
  within 60 contains "console-$number.log" "up as $number" # one after another: the test host has one processor
done
for pid in "${machines[@]}"; do kill -0 "$pid" || fail "a machine ended while others started"; done
equal "names of temporary overlays" "$(ls -A home/.clone/overlays)" ""
echo "ten machines are up after $SECONDS s"
# One that would write to it is refused by name.
ends_with 1 "$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs base.ext4 </dev/null >writer.log 2>&1
contains writer.log 'path=base.ext4: in use by another process (opened for reading)'
for number in {1..10}; do echo go >&"${inputs[number - 1]}"; done
for pid in "${machines[@]}"; do ends_with 0 wait "$pid"; done
for number in {1..10}; do contains "console-$number.log" "go as $number, root ${roots[number - 1]}"; done
equal "overlays that stay" "$(echo *.qcow2)" "file-10.qcow2 file-8.qcow2 file-9.qcow2"
for number in {8..10}; do
  qemu-img check "file-$number.qcow2"
  qemu-img info "file-$number.qcow2" >described
  contains described "backing file: $(realpath base.ext4)"
  qemu-img convert -O raw "file-$number.qcow2" flat.ext4
  equal "what machine $number wrote" "$(debugfs -R 'cat etc/number' flat.ext4 2>/dev/null)" "$number"
done
equal "base" "$(sha256sum base.ext4)" "$sum"
