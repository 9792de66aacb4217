# SPDX-License-Identifier: Apache-2.0
# Forks know that they are other machines than their template: by VMGENID with the generic kernel, which has its driver, and by
# the agent alone with the cloud kernel. Random numbers, host names, clocks and identity pages, asked inside.
# seconds: 75
export CLONE_RUNTIME_DIR=$WORK/run
agent=$(dirname "$CLONE")/../libexec/clone/clone-agent
root_image <<'END'
echo "root is up"
while read -r line; do :; done
END
debugfs -w -R "write $agent usr/sbin/clone-agent" root.ext4 2>/dev/null
debugfs -w -R "set_inode_field usr/sbin/clone-agent mode 0100755" root.ext4 2>/dev/null
store=(--store "$WORK/store")
guest() { "$CLONE" exec --vm-id "$1" --timeout 30 -- "${@:2}"; }
random() { guest "$1" sh -c 'head -c 16 /dev/urandom | md5sum'; }
page() { guest "$1" dd if=/dev/mem bs=1 skip=$((0x6000 + $2)) count="$3" 2>/dev/null | tr -d '\0'; } # OFFSET BYTES
reseeds() { guest "$1" dmesg | grep -c 'crng reseeded due to virtual machine fork' || true; }
is_reseeded() { [[ $(reseeds "$1") == "$2" ]]; }

try() { # KERNEL RESEEDS
  local kernel=$1 reseeds=$2 name before now machines=(source one two)
  "$CLONE" run --kernel "$kernel" --rootfs root.ext4 --overlay tmpfs --mem 256M --name source --no-reboot --cmdline quiet \
    </dev/null >console-source.log 2>&1 &
  within 60 contains console-source.log "root is up"
  within 60 guest source true
  guest source hostname template
  equal "reseeds of the source" "$(reseeds source)" 0
  local id
  id=$(page source 16 16 | md5sum)
  "$CLONE" snapshot --name base "${store[@]}" source
  sleep 3 # which the forks' clocks have to make up for
  for name in one two; do
    "$CLONE" fork --template base "${store[@]}" --name $name </dev/null >console-$name.log 2>&1 &
  done
  for name in one two; do
    within 30 guest $name hostname >name # the agent is told first, then asked
    equal "host name" "$(<name)" $name
    within 10 is_reseeded $name "$reseeds"
  done
  for name in "${machines[@]}"; do
    before=$(date +%s)
    now=$(guest $name date +%s)
    ((now >= before - 1 && now <= $(date +%s) + 1)) || fail "$name: the clock says $now after $before"
    equal "$name: the name in its page" "$(page $name 72 64)" $name
  done
  equal "host name of the source" "$(guest source hostname)" template
  equal "reseeds of the source" "$(reseeds source)" 0
  equal "id of the source" "$(page source 16 16 | md5sum)" "$id"
  equal "random numbers" "$(for name in "${machines[@]}"; do random $name; done | sort -u | wc -l)" 3
  equal "ids" "$(for name in "${machines[@]}"; do page $name 16 16 | md5sum; done | sort -u | wc -l)" 3
  for name in "${machines[@]}"; do
    equal "$name: complaints" "$(guest $name dmesg | sed 's/^[^]]*] //' | grep -E 'ACPI (Error|Warning)|vmgenid.*(fail|error)' || true)" ''
    "$CLONE" stop --grace 20 $name
  done
  for name in one two; do equal "what was said of $name's identity" "$(grep 'identity it had' console-$name.log || true)" ''; done
  wait
  "$CLONE" template rm base "${store[@]}"
  echo "${kernel##*/}: after $SECONDS s"
}
try "$KERNEL_GENERIC" 1
try "$KERNEL_CLOUD" 0
