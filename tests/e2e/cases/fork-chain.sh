# SPDX-License-Identifier: Apache-2.0
# A Debian guest is kept five times over, each time what changed: each link's fork has the files and the page cache of its moment,
# also what the disk's device wrote into its memory; a chain becomes one snapshot, and a file.
# seconds: 155
export CLONE_RUNTIME_DIR=$WORK/run
root_image <<'END'
echo "root is up"
while read -r line; do echo "typed: $line"; done
END
add_agent root.ext4
store=(--store "$WORK/store")

"$CLONE" run --kernel "$KERNEL_CLOUD" --rootfs root.ext4 --overlay tmpfs --mem 128M --vcpus 2 --name source --no-reboot --cmdline quiet \
  </dev/null >console-source.log 2>&1 &
source=$!
within 60 contains console-source.log "root is up"
guest source true
ends_with 1 "$CLONE" snapshot --name early --incremental "${store[@]}" source
"$CLONE" snapshot --name link0 "${store[@]}" source
for link in 1 2 3 4 5; do
  # Files in the guest's memory that came over vsock, and what it wrote itself over the last ones.
  dd if=/dev/urandom of=in$link bs=64k count=16 2>/dev/null
  "$CLONE" cp in$link source:/run/in$link
  guest source sh -c "dd if=/dev/urandom of=/run/own bs=64k count=8 2>/dev/null; echo 3 >/proc/sys/vm/drop_caches; cat /bin/busybox >/dev/null"
  guest source sh -c 'cd /run; md5sum in* own /bin/busybox' >sums$link
  "$CLONE" snapshot --name link$link --incremental "${store[@]}" source
done
"$CLONE" snapshot --name idle --incremental "${store[@]}" source
"$CLONE" template list "${store[@]}"
"$CLONE" snapshot flatten link5 flat "${store[@]}"
"$CLONE" template export link5 exported "${store[@]}"
ls -l exported
"$CLONE" template import --name imported exported "${store[@]}"
holds() { # template, link: its fork is as the source was then
  "$CLONE" fork --template $1 "${store[@]}" --name $1 </dev/null >console-$1.log 2>&1 &
  local fork=$!
  within 30 guest $1 true
  equal "$1: its files" "$(guest $1 sh -c 'cd /run; md5sum in* own /bin/busybox')" "$(cat sums$2)"
  guest $1 sh -c 'dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null && md5sum /bin/busybox >/dev/null'
  equal "$1: complaints of its kernel" "$(guest $1 dmesg | grep -E 'BUG|Oops|corrupt|EXT4-fs error' || true)" ""
  "$CLONE" stop --force $1
  ends_with 6 wait $fork
}
for link in 1 3 5; do holds link$link $link; done
for template in imported idle; do holds $template 5; done
# A fork's first one is a difference to its template, of which a part may lie compressed.
"$CLONE" template compress link0 "${store[@]}"
"$CLONE" fork --template link5 "${store[@]}" --name branch </dev/null >console-branch.log 2>&1 &
branch=$!
within 30 guest branch true
guest branch sh -c 'dd if=/dev/urandom of=/run/own bs=64k count=8 2>/dev/null; rm /run/in1; cp /run/in2 /run/in6'
guest branch sh -c 'cd /run; md5sum in* own /bin/busybox' >sums6
"$CLONE" snapshot --name branch1 --incremental "${store[@]}" branch
"$CLONE" stop --force branch
ends_with 6 wait $branch
holds branch1 6
"$CLONE" stop --force source
ends_with 6 wait $source
