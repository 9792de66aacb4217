# SPDX-License-Identifier: Apache-2.0
# SIGTERM presses the power button: a guest that listens powers off, one that does not is stopped after --grace.
# seconds: 15
root_image <<'END'
event=$(grep -l 'Power Button' /sys/class/input/event*/device/name | head -n 1)
event=${event%/device/name}
exec 3</dev/input/${event##*/} # what is pressed before it is open is lost
echo listening
# struct input_event: 16 bytes of time, type, code, value; EV_KEY 1, KEY_POWER 116, pressed
key=$(dd bs=24 count=1 <&3 2>/dev/null | tail -c 8 | hexdump -e '2/2 "%d." 1/4 "%d"')
echo "key: $key"
case $(cat /proc/cmdline) in *ignore*) sleep 1000 ;; esac
END
options=(--kernel "$KERNEL_CLOUD" --rootfs root.ext4 --no-reboot)
start_clone "${options[@]}" --cmdline quiet
within 60 contains console.log listening
kill "$clone_process"
ends_with 0 wait "$clone_process"
equal "what the guest read" "$(told key)" "1.116.1"

start_clone "${options[@]}" --grace 2 --cmdline 'quiet ignore'
within 60 contains console.log listening
kill -INT "$clone_process"
within 5 contains console.log 'key: 1.116.1'
begin=$SECONDS
ends_with 6 wait "$clone_process"
((SECONDS - begin <= 8)) || fail "it took $((SECONDS - begin)) s"
contains console.log 'the guest did not power off in time'
