# SPDX-License-Identifier: Apache-2.0
# Debian's cloud kernel with an initrd, 1 vCPU and 128 MiB: what the guest sees of the machine, the host's time, power-off.
# seconds: 8
initrd <<END
$describe_machine
tell serial-interrupts sed -n 's/^ *4: *\([0-9]*\) .*ttyS0.*/\1/p' /proc/interrupts
tell rtc cat /sys/class/rtc/rtc0/name
END
begin=$(date +%s)
ends_with 0 run_clone --timing --kernel "$KERNEL_CLOUD" --initrd "$WORK/initrd.cpio" --mem 128M --no-reboot --cmdline quiet
end=$(date +%s)
check_machine "$KERNEL_CLOUD" 128 1
(($(told serial-interrupts) > 0)) || fail "no interrupts of the serial port"
[[ $(told rtc) == rtc_cmos* ]] || fail "rtc: $(told rtc)"
clock=$(told clock)
((clock >= begin - 1 && clock <= end + 1)) || fail "the guest's clock is at $clock, the run was from $begin to $end"
for step in memory kvm devices 'kernel load' 'memory slots' 'first instruction'; do contains "$WORK/console.log" "$step"; done
