# SPDX-License-Identifier: Apache-2.0
# Forks know that they are other machines than their template: by VMGENID with the generic kernel, which has its driver, and by
# the agent alone with the cloud kernel. Random numbers, keys, host names, clocks and identity pages, asked inside. Besides that they
# share their memory with the template.
# seconds: 120
export CLONE_RUNTIME_DIR=$WORK/run
root_image <<'END'
echo "root is up"
while read -r line; do :; done
END
add_agent root.ext4
add_program root.ext4 "$FIXTURES/load" root/load
add_with_libraries root.ext4 "$(command -v openssl)" usr/bin/openssl
store=(--store "$WORK/store")
random() { guest "$1" sh -c 'head -c 16 /dev/urandom | md5sum'; }
getrandom() { guest "$1" /root/load random; }
page() { guest "$1" dd if=/dev/mem bs=1 skip=$((0x6000 + $2)) count="$3" 2>/dev/null | tr -d '\0'; } # OFFSET BYTES
reseeds() { guest "$1" dmesg | grep -c 'crng reseeded due to virtual machine fork' || true; }
is_in_time() { # VM: its clock is the host's to 50 ms, as near as can be told
  python3 - "$CLONE" exec -i --vm-id "$1" --timeout 30 -- /root/load clock <<'END'
import subprocess, sys, time
guest = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
answers = []
for _ in range(20):
    before = time.time_ns()
    guest.stdin.write(b"\n")
    now = int(guest.stdout.readline())
    answers.append((time.time_ns() - before, now - before))
guest.stdin.close()
limit = 50_000_000
took, ahead = min(answers)
print(f"{sys.argv[5]}: {ahead / 1e6:.1f} ms after the question, its answer took {took / 1e6:.1f} ms")
for took, ahead in answers:
    if not -limit <= ahead <= took + limit:
        sys.exit(f"not yet: {ahead / 1e6:.1f} ms after the question, its answer took {took / 1e6:.1f} ms")
END
}
is_reseeded() { [[ $(reseeds "$1") == "$2" ]]; }

try() { # KERNEL RESEEDS FORK…
  local kernel=$1 reseeds=$2 name before now own_kib forks=("${@:3}") machines=(source "${@:3}")
  local -A process
  rm -f key-*
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
  for name in "${forks[@]}"; do
    "$CLONE" fork --template base "${store[@]}" --name $name </dev/null >console-$name.log 2>&1 &
    process[$name]=$!
  done
  for name in "${forks[@]}"; do
    within 30 guest $name hostname >name # the agent is told first, then asked
    equal "host name" "$(<name)" $name
    within 10 is_reseeded $name "$reseeds"
  done
  for name in "${forks[@]}"; do # the guest's pages that it wrote to, and what the VMM needs for itself
    own_kib=$(awk '$1 == "Anonymous:" { print $2 }' "/proc/${process[$name]}/smaps_rollup")
    echo "$name: $own_kib KiB of its own"
    ((own_kib <= 8 << 10)) || fail "$name: $own_kib KiB of its own"
  done
  for name in "${machines[@]}"; do
    before=$(date +%s)
    now=$(guest $name date +%s)
    ((now >= before - 1 && now <= $(date +%s) + 1)) || fail "$name: the clock says $now after $before"
    [[ $name == source ]] || within 20 is_in_time $name || is_in_time $name
    equal "$name: the name in its page" "$(page $name 72 64)" $name
  done
  equal "host name of the source" "$(guest source hostname)" template
  equal "reseeds of the source" "$(reseeds source)" 0
  equal "id of the source" "$(page source 16 16 | md5sum)" "$id"
  equal "random numbers" "$(for name in "${machines[@]}"; do random $name; done | sort -u | wc -l)" ${#machines[@]}
  equal "numbers of getrandom" "$(for name in "${machines[@]}"; do getrandom $name; done | grep -E '^[0-9a-f]{32}$' | sort -u | wc -l)" ${#machines[@]}
  equal "ids" "$(for name in "${machines[@]}"; do page $name 16 16 | md5sum; done | sort -u | wc -l)" ${#machines[@]}
  for name in "${machines[@]}"; do
    guest $name openssl genpkey -algorithm ED25519 >key-$name
    openssl pkey -in key-$name -noout
  done
  equal "keys" "$(grep -hv -e '-----' key-* | sort -u | wc -l)" ${#machines[@]}
  for name in "${machines[@]}"; do
    equal "$name: complaints" "$(guest $name dmesg | sed 's/^[^]]*] //' | grep -E 'ACPI (Error|Warning)|vmgenid.*(fail|error)' || true)" ''
    "$CLONE" stop --grace 20 $name
  done
  for name in "${forks[@]}"; do equal "what was said of $name's identity" "$(grep 'identity it had' console-$name.log || true)" ''; done
  wait
  "$CLONE" template rm base "${store[@]}"
  echo "${kernel##*/}: after $SECONDS s"
}
try "$KERNEL_GENERIC" 1 one two three
try "$KERNEL_CLOUD" 0 one two
