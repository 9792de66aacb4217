// SPDX-License-Identifier: Apache-2.0
// pc-platform: what every PC has besides disks and networks: power management registers, clock, keyboard controller,
// generation id.
#include "acpi_pm.hpp"
#include "clone/sdk/plugin.hpp"
#include "i8042.hpp"
#include "rtc.hpp"
#include "vmgenid.hpp"

CLONE_SDK_PLUGIN("pc-platform", "1.0.0", "clone", "Apache-2.0",
                 "Power management, real-time clock, keyboard controller, generation id",
                 CLONE_PROVIDES("device", "acpi-pm", "default") CLONE_PROVIDES("device", "rtc", "default")
                     CLONE_PROVIDES("device", "i8042", "default") CLONE_PROVIDES("device", "vmgenid", "default"))
CLONE_SDK_DEVICES(pc_platform::AcpiPm, pc_platform::Rtc, pc_platform::I8042, pc_platform::Vmgenid)
