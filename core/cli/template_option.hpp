// SPDX-License-Identifier: Apache-2.0
// Where templates are kept, for every command that names one.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "plugin/library.hpp"
#include "snapshot/backend.hpp"
#include "snapshot/plan_sections.hpp"

namespace vmm {

struct TemplateStore {
  std::string backend = kDefaultSnapshotBackend;
  std::string folder;  // empty: the backend's own choice
};

void add_store_option(CLI::App& app, TemplateStore& store);
Result<std::unique_ptr<SnapshotBackend>> open_store(PluginLibrary& library, const TemplateStore& store);

}  // namespace vmm
