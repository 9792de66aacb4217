// SPDX-License-Identifier: Apache-2.0
// `clone doctor`: what this machine can do for virtual machines, a line each, with what to do about what is missing.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "cli/doctor_kvm.hpp"
#include "memory/ksm.hpp"
#include "plugin/options.hpp"
#include "util/fd.hpp"

namespace vmm {
namespace {

enum class Verdict { good, note, missing };

struct Finding {
  Verdict verdict;
  std::string what;
  std::string detail;
  std::string advice;  // for what is missing
};

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string value_of(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(key)) {
      const size_t start = line.find_first_not_of(" \t:", key.size());
      return start == std::string::npos ? "" : line.substr(start);
    }
  return "";
}

Finding device_node(const char* path, const char* what, const char* module) {
  Fd fd(::open(path, O_RDWR | O_CLOEXEC));
  if (fd) return {Verdict::good, what, std::string(path) + " opens", ""};
  const std::string why = std::string(path) + ": " + std::strerror(errno);
  if (errno == EACCES || errno == EPERM)
    return {Verdict::missing, what, why, "run as root, or join the group that owns it"};
  return {Verdict::note, what, why, std::string("modprobe ") + module + " (only devices that use it need it)"};
}

Finding huge_pages() {
  const std::string total = value_of("/proc/meminfo", "HugePages_Total");
  const std::string transparent = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  const std::string detail = "transparent: " + (transparent.empty() ? "not offered" : transparent) +
                             "; reserved 2M pages: " + (total.empty() ? "0" : total);
  if (transparent.empty() && (total.empty() || total == "0"))
    return {Verdict::note, "huge pages", detail, "sysctl vm.nr_hugepages=N reserves some for --huge-pages 2M"};
  return {Verdict::good, "huge pages", detail, ""};
}

Finding ksm() {
  const std::string run = first_line("/sys/kernel/mm/ksm/run");
  if (run.empty())
    return {Verdict::note, "KSM", "the kernel has none", "a kernel with CONFIG_KSM merges identical pages of VMs"};
  if (run != "1")
    return {Verdict::note, "KSM", "there, not running",
            "echo 1 > /sys/kernel/mm/ksm/run merges identical pages of VMs"};
  const KsmState state = read_ksm();
  return {Verdict::good, "KSM",
          "running, " + first_line("/sys/kernel/mm/ksm/pages_sharing") + " pages merged: saves " +
              std::to_string(state.saved_bytes) + " bytes",
          ""};
}

Finding memory() {
  const std::string available = value_of("/proc/meminfo", "MemAvailable");
  const std::string policy = first_line("/proc/sys/vm/overcommit_memory");
  if (policy == "2")
    return {Verdict::missing, "memory", available + " available, overcommit forbidden (vm.overcommit_memory=2)",
            "sysctl vm.overcommit_memory=0, or VMs need their whole memory at once"};
  return {Verdict::good, "memory",
          available + " available, overcommit " + (policy == "1" ? "without limit" : "allowed") +
              " (vm.overcommit_memory=" + policy + ")",
          ""};
}

Finding limit(int resource, const char* what, rlim_t wanted, const char* advice) {
  rlimit value{};
  ::getrlimit(static_cast<__rlimit_resource>(resource), &value);
  const std::string shown = value.rlim_cur == RLIM_INFINITY ? "unlimited" : std::to_string(value.rlim_cur);
  if (value.rlim_cur == RLIM_INFINITY || value.rlim_cur >= wanted) return {Verdict::good, what, shown, ""};
  return {Verdict::note, what, shown, advice};
}

Finding io_uring() {
  // io_uring_setup with a NULL argument: EFAULT where the call exists and is allowed.
  constexpr long io_uring_setup = 425;
  ::syscall(io_uring_setup, 1, nullptr);
  if (errno == EFAULT) return {Verdict::good, "io_uring", "offered", ""};
  return {Verdict::note, "io_uring", std::strerror(errno), "disks use a pool of threads instead"};
}

std::vector<Finding> examine() {
  std::vector<Finding> findings;
  utsname system{};
  ::uname(&system);
  findings.push_back({Verdict::good, "kernel", std::string(system.sysname) + " " + system.release, ""});

  const KvmExamination kvm = examine_kvm();
  switch (kvm.kind) {
    case KvmKind::missing:
      findings.push_back({Verdict::missing, "KVM", kvm.detail, kvm.advice});
      break;
    case KvmKind::hardware:
      findings.push_back({Verdict::good, "KVM", kvm.detail, ""});
      break;
    case KvmKind::software:
      findings.push_back({Verdict::missing, "KVM", kvm.detail, kvm.advice});
      break;
  }
  for (const std::string& capability : kvm.missing_capabilities)
    findings.push_back({Verdict::note, "KVM capability", capability + " is not offered", "a newer kernel may have it"});
  if (kvm.kind != KvmKind::missing && kvm.missing_capabilities.empty())
    findings.push_back({Verdict::good, "KVM capability", "all that clone uses are offered", ""});
  if (kvm.kind != KvmKind::missing) findings.push_back({Verdict::good, "KVM limits", kvm.limits, ""});
  findings.push_back(device_node("/dev/vhost-net", "vhost-net", "vhost_net"));
  findings.push_back(device_node("/dev/vhost-vsock", "vhost-vsock", "vhost_vsock"));
  findings.push_back(device_node("/dev/net/tun", "tun", "tun"));
  findings.push_back(device_node("/dev/vfio/vfio", "VFIO", "vfio-pci"));
  findings.push_back(io_uring());
  findings.push_back(ksm());
  findings.push_back(huge_pages());
  findings.push_back(memory());
  findings.push_back(limit(RLIMIT_NOFILE, "open files", 4096, "ulimit -n 65536 for hosts with many VMs"));
  findings.push_back(limit(RLIMIT_MEMLOCK, "locked memory", RLIM_INFINITY, "ulimit -l unlimited for VFIO passthrough"));
  findings.push_back(limit(RLIMIT_NPROC, "processes", 4096, "ulimit -u 65536 for hosts with many VMs"));
  return findings;
}

const char* name_of(Verdict verdict) {
  switch (verdict) {
    case Verdict::good:
      return "ok";
    case Verdict::note:
      return "note";
    case Verdict::missing:
      return "MISSING";
  }
  return "";
}

}  // namespace

ExitCode doctor_command(const Arguments& arguments) {
  CLI::App app("Tell what this machine can do for virtual machines.", "clone doctor");
  bool as_json = false;
  bool question = false;
  app.add_flag("--json", as_json, "As JSON.");
  app.add_flag("--can-run-linux", question, "Print nothing; succeed if stock kernels run on this machine's KVM.");
  if (const Parsed parsed = parse(app, arguments); parsed.done) return parsed.code;
  if (question) return examine_kvm().kind == KvmKind::hardware ? ExitCode::success : ExitCode::cannot_start;

  const auto findings = examine();
  if (as_json) {
    boost::json::array rows;
    for (const Finding& finding : findings)
      rows.push_back(boost::json::object{{"verdict", name_of(finding.verdict)},
                                         {"what", finding.what},
                                         {"detail", finding.detail},
                                         {"advice", finding.advice}});
    std::puts(boost::json::serialize(rows).c_str());
    return ExitCode::success;
  }
  for (const Finding& finding : findings)
    std::printf("%-8s %-15s %s%s%s\n", name_of(finding.verdict), finding.what.c_str(), finding.detail.c_str(),
                finding.advice.empty() ? "" : "; ", finding.advice.c_str());
  return ExitCode::success;
}

}  // namespace vmm
