# SPDX-License-Identifier: Apache-2.0
# A Debian guest is kept while three writers sync files to a slow disk, so that requests wait in its queue: what was synced is on
# the disk, and each fork writes on to a layer of its own, whose file system is whole when it is unmounted. No layer is left over.
# seconds: 60
export CLONE_RUNTIME_DIR=$WORK/run HOME=$WORK/home
root_image <<'END'
mount -t ext4 /dev/vdb /mnt
for writer in 1 2 3; do
  ( number=0
    while [ ! -e /run/stop ] && [ $number -lt 120 ]; do
      number=$((number + 1)) file=$writer-$number
      yes $file | head -c 9000 | dd of=/mnt/$file bs=1k conv=fsync 2>/dev/null && echo $file >>/run/synced
    done
    touch /run/ended-$writer ) &
done
echo "root is up"
while read -r line; do :; done
END
add_agent root.ext4
mkdir home
mke2fs -q -t ext4 -b 1024 -J size=2 data.img 12M
store=(--store "$WORK/store")
synced() { guest "$1" cat /run/synced; }
has() { (($(synced "$1" | wc -l) >= $2)); } # VM FILES
holds() { # IMAGE LIST: the file system is whole, and so is each file of the list
  local file
  e2fsck -fn "$1" >fsck.log 2>&1 || { cat fsck.log; fail "$1: its file system is not whole"; }
  rm -rf files
  mkdir files
  debugfs -R "rdump / files" "$1" 2>/dev/null
  while read -r file; do
    { yes "$file" || true; } | head -c 9000 | cmp - "files/$file" || fail "$1: $file"
  done <"$2"
  echo "$1: $(wc -l <"$2") files after $SECONDS s"
}

"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --overlay tmpfs --block data.img,iops=60,iops-burst=1 --mem 128M --vcpus 2 \
  --name source --no-reboot --cmdline quiet </dev/null >console-source.log 2>&1 &
source=$!
within 120 contains console-source.log "root is up"
within 60 has source 6
synced source >synced
"$CLONE" snapshot --name base --stop "${store[@]}" source
ends_with 6 wait $source
# What a crash at that moment would have left.
cp data.img crashed.img
e2fsck -y -E journal_only crashed.img
holds crashed.img synced

sum=$(sha256sum data.img)
forks=()
for name in one two; do
  "$CLONE" fork --template base "${store[@]}" --name $name </dev/null >console-$name.log 2>&1 &
  forks+=($!)
done
for name in one two; do
  within 60 guest $name true
  within 60 has $name $(($(wc -l <synced) + 6))
done
kill -KILL "${forks[1]}" # in the middle of it
ends_with 137 wait "${forks[1]}"
guest one touch /run/stop
within 60 guest one test -e /run/ended-1 -a -e /run/ended-2 -a -e /run/ended-3
synced one >synced-one
head -n "$(wc -l <synced)" synced-one | cmp - synced
guest one umount /mnt
guest one dd if=/dev/vdb bs=64k iflag=direct 2>/dev/null >one.img
holds one.img synced-one
equal "complaints of its kernel" "$(guest one dmesg | grep -E 'BUG|Oops|EXT4-fs (error|warning)|JBD2: (.*err|I/O)|I/O error|hung task' || true)" ""
"$CLONE" stop --grace 20 one
ends_with 0 wait "${forks[0]}"
equal "data.img" "$(sha256sum data.img)" "$sum"
equal "layers that are left" "$(ls -A home/.clone/overlays)" ""
