// SPDX-License-Identifier: Apache-2.0
// The core's bench host under the name that the tests call it by.
#pragma once

#include "plugin/bench_host.hpp"

namespace vmm::test {

using FakeHost = BenchHost;
using FakeLoop = BenchLoop;
using vmm::signal_event;
using vmm::take_event;

}  // namespace vmm::test
