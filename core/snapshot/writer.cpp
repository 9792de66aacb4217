// SPDX-License-Identifier: Apache-2.0
// The child that writes, and what it tells: "ok", or the error's line.
#include "snapshot/writer.hpp"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace vmm {
namespace {

constexpr std::string_view kSuccess = "ok";
constexpr size_t kLongestText = 4096;

Result<void> write(const SnapshotBackend& backend, const std::string& name, const GuestMemory& memory,
                   const Sections& sections) {
  auto image = TRY(backend.begin(name, "", memory.size_bytes()));
  TRY(image.write_memory(memory));
  TRY(image.write(sections));
  return image.commit();
}

// Nothing of what the other process holds is touched: no destructors, no exit handlers.
[[noreturn]] void be_the_child(int result, const SnapshotBackend& backend, const std::string& name,
                               const GuestMemory& memory, const Sections& sections) {
  const Result<void> written = write(backend, name, memory, sections);
  const std::string_view text = written.ok() ? kSuccess : std::string_view(written.error().message);
  const ssize_t told = ::write(result, text.data(), std::min(text.size(), kLongestText));
  ::_exit(written.ok() && told > 0 ? 0 : 1);
}

}  // namespace

Result<std::unique_ptr<SnapshotWriter>> SnapshotWriter::start(EventLoop& loop,
                                                              std::unique_ptr<SnapshotBackend> backend,
                                                              const std::string& name, const GuestMemory& memory,
                                                              const Sections& sections, Done done) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return errno_error("pipe");
  Fd ours(ends[0]), theirs(ends[1]);
  // The threads of this process wait for orders, vCPUs and devices stand still: none of them is in the middle of what the
  // child uses.
  const pid_t child = ::fork();
  if (child < 0) return errno_error("fork");
  if (child == 0) be_the_child(theirs.get(), *backend, name, memory, sections);
  std::unique_ptr<SnapshotWriter> writer(new SnapshotWriter(loop, std::move(ours), child, std::move(done)));
  TRY(loop.add_fd(writer->result_.get(), CLONE_READABLE, [self = writer.get()](uint32_t) { self->ready(); }));
  return writer;
}

SnapshotWriter::~SnapshotWriter() {
  if (!result_) return;
  loop_.remove_fd(result_.get());
  // The machine ends: a snapshot that is not whole yet is not waited for, and completes by itself.
}

void SnapshotWriter::ready() {
  char part[512];
  for (;;) {
    const ssize_t got = ::read(result_.get(), part, sizeof part);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) break;
    if (text_.size() < kLongestText) text_.append(part, static_cast<size_t>(got));
  }
  loop_.remove_fd(result_.get());
  result_.reset();
  int status = 0;
  while (::waitpid(child_, &status, 0) < 0 && errno == EINTR) {
  }
  const Done done = std::move(done_);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0 && text_ == kSuccess) return done({});
  if (text_.empty())
    text_ = "the process that wrote it ended " + (WIFSIGNALED(status)
                                                      ? "by signal " + std::to_string(WTERMSIG(status))
                                                      : "with status " + std::to_string(WEXITSTATUS(status)));
  done(Error{text_, 0, CLONE_ERR_SYSTEM});
}

}  // namespace vmm
