// SPDX-License-Identifier: Apache-2.0
// <linux/kvm.h>, usable from C++.
#pragma once

// Linux 6.1's headers put an empty struct before each flexible array. In C++ that has a size, so the structs would be
// larger than the kernel's, and the ioctl numbers, which carry it, wrong. Later headers define it for C++ as here.
#include <linux/stddef.h>
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) TYPE NAME[0]

#include <linux/kvm.h>

static_assert(sizeof(kvm_cpuid2) == 8 && sizeof(kvm_msrs) == 8 && sizeof(kvm_msr_list) == 4);
static_assert(sizeof(kvm_irq_routing) == 8 && sizeof(kvm_xsave) == 4096);
