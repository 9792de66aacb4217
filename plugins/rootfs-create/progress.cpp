// SPDX-License-Identifier: Apache-2.0
// Progress on standard error, and the signals that end the work early.
#include "progress.hpp"

#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "tree.hpp"
#include "util/log.hpp"

namespace rootfs {
namespace {

volatile sig_atomic_t caught = 0;

int64_t now_ms() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

// The first `width` characters, without what would move a terminal's cursor.
std::string printable(std::string_view text, size_t width) {
  std::string result;
  for (const char c : text) {
    const bool continues = (static_cast<unsigned char>(c) & 0xc0) == 0x80;
    if (width == 0 && !continues) break;
    if (!continues) --width;
    result += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  return result;
}

}  // namespace

void catch_signals() {
  struct sigaction action {};
  action.sa_handler = [](int number) { caught = number; };
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    struct sigaction old {};
    // One that was ignored from the start (nohup) stays so.
    if (::sigaction(number, nullptr, &old) == 0 && old.sa_handler != SIG_IGN) ::sigaction(number, &action, nullptr);
  }
  ::signal(SIGPIPE, SIG_IGN);
}

int signal_caught() { return caught; }

vmm::Result<void> interrupted() {
  if (caught == 0) return {};
  return vmm::Error{std::string("interrupted by SIG") + ::sigabbrev_np(caught), EINTR};
}

Progress::Progress(Loudness loudness)
    : terminal_(loudness == Loudness::normal && ::isatty(STDERR_FILENO) == 1), quiet_(loudness == Loudness::quiet) {}

void Progress::stage(std::string name) {
  clear();
  stage_ = std::move(name);
  detail_.clear();
  done_ = total_ = 0;
  if (quiet_) return;
  if (terminal_) {
    draw(true);
  } else {
    note(stage_);
  }
}

void Progress::bytes(uint64_t done, uint64_t total) {
  done_ = done;
  total_ = total;
  draw(total > 0 && done == total);
}

void Progress::detail(std::string_view text) {
  detail_ = text;
  draw(false);
}

void Progress::note(std::string_view text) {
  if (quiet_) return;
  clear();
  const std::string line = "rootfs: " + std::string(text) + "\n";
  std::fputs(line.c_str(), stderr);
}

void Progress::draw(bool at_once) {
  if (!terminal_ || stage_.empty()) return;
  const int64_t now = now_ms();
  if (!at_once && now - last_drawn_ms_ < 100) return;
  last_drawn_ms_ = now;
  std::string line = stage_;
  if (total_ > 0) line += "  " + std::to_string(std::min<uint64_t>(100, done_ * 100 / total_)) + "%";
  if (done_ > 0) line += "  " + human_size(done_) + (total_ > 0 ? " of " + human_size(total_) : "");
  if (!detail_.empty()) line += "  " + detail_;
  winsize size{};
  const size_t columns = ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 1 ? size.ws_col - 1u : 79u;
  std::fprintf(stderr, "\r%s\033[K", printable(line, columns).c_str());
  drawn_ = true;
}

void Progress::clear() {
  if (drawn_) std::fputs("\r\033[K", stderr);
  drawn_ = false;
}

}  // namespace rootfs
