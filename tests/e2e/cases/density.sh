# SPDX-License-Identifier: Apache-2.0
# Ten machines on one base at once, each with a root of its own that it writes to: four in memory, three in temporary files,
# three in files that stay. Idle, with KSM on and a policy in a hurry, each gives memory back, equal pages are kept once, and
# what status says of them is what the kernel says. One gets busy and has its memory back at once. Nobody is killed, and the
# base stays as it is.
# seconds: 170
export CLONE_RUNTIME_DIR=$WORK/run
# Each says that it is up, waits until it is told to go on, and tells what is in the file that all of them write.
root_image <<'END_OF_SCRIPT'
echo "$(sed -n 's/.*machine=\([0-9]*\).*/\1/p' /proc/cmdline)" >/etc/number
echo "up as $(cat /etc/number)"
read -r word
echo "$word as $(cat /etc/number), root $(sed -n 's/^\([^ ]*\) \/ .*/\1/p' /proc/mounts)"
dmesg | grep -iE 'out of memory|killed process' || echo "nobody was killed"
END_OF_SCRIPT
mv root.ext4 base.ext4
add_agent base.ext4
sum=$(sha256sum base.ext4)
mkdir home
export HOME=$WORK/home

policy=hysteresis,first-after=1,second-after=2,last-after=3,hold=2,flaps=100,check=5
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
  "$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs base.ext4 --overlay "$overlay" --mem 128M --name "vm$number" --no-reboot \
    --cmdline "quiet machine=$number" --balloon-policy "$policy" <&"$input" >"console-$number.log" 2>&1 &
  machines+=($!)
  within 60 contains "console-$number.log" "up as $number"
  "$CLONE" exec --vm-id "vm$number" --timeout 30 -- true
  "$CLONE" pause "vm$number" # the test host has one processor, for the next one to boot
  echo "$number is up after $SECONDS s"
done
for pid in "${machines[@]}"; do kill -0 "$pid" || fail "a machine ended while others started"; done
equal "names of temporary overlays" "$(ls -A home/.clone/overlays)" ""
# One that would write to the base is refused by name.
ends_with 1 "$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs base.ext4 </dev/null >writer.log 2>&1
contains writer.log 'path=base.ext4: in use by another process (opened for reading)'

for number in {1..10}; do "$CLONE" resume "vm$number"; done
python3 "$(dirname "${BASH_SOURCE[0]}")/../density.py" "$CLONE"

for number in {1..10}; do echo go >&"${inputs[number - 1]}"; done
for pid in "${machines[@]}"; do ends_with 0 wait "$pid"; done
for number in {1..10}; do
  contains "console-$number.log" "go as $number, root ${roots[number - 1]}"
  contains "console-$number.log" "nobody was killed"
done
equal "overlays that stay" "$(echo *.qcow2)" "file-10.qcow2 file-8.qcow2 file-9.qcow2"
for number in {8..10}; do
  qemu-img check "file-$number.qcow2"
  qemu-img info "file-$number.qcow2" >described
  contains described "backing file: $(realpath base.ext4)"
  qemu-img convert -O raw "file-$number.qcow2" flat.ext4
  equal "what machine $number wrote" "$(debugfs -R 'cat etc/number' flat.ext4 2>/dev/null)" "$number"
done
equal "base" "$(sha256sum base.ext4)" "$sum"
echo "all of it after $SECONDS s"
