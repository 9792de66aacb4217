// SPDX-License-Identifier: Apache-2.0
// serial: a 16550A UART at ports and on an ISA interrupt, whose other end is the machine's console or a file.
#include <fcntl.h>
#include <unistd.h>

#include <mutex>
#include <string>

#include "clone/sdk/fd.hpp"
#include "clone/sdk/plugin.hpp"
#include "uart.hpp"

namespace {

using clone_sdk::Error;
using clone_sdk::Fd;
using clone_sdk::Options;
using clone_sdk::Reader;
using clone_sdk::Result;
using clone_sdk::Writer;
using serial::Uart;

// Output into a file: written line by line, dropped where it cannot be written.
class LineFile {
 public:
  Result<void> open(const std::string& path) {
    fd_ = Fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0644));
    if (!fd_) return clone_sdk::errno_error("file=" + path);
    return {};
  }
  explicit operator bool() const { return static_cast<bool>(fd_); }
  void put(char byte) {
    line_ += byte;
    if (byte == '\n' || line_.size() >= kLongestLine) flush();
  }
  void flush() {
    if (line_.empty()) return;
    [[maybe_unused]] const ssize_t written = ::write(fd_.get(), line_.data(), line_.size());
    line_.clear();
  }

 private:
  static constexpr size_t kLongestLine = 1024;

  Fd fd_;
  std::string line_;
};

class Serial final : public clone_sdk::Device {
 public:
  static const clone_descriptor descriptor;

  using Device::Device;
  ~Serial() override { file_.flush(); }

  Result<void> configure(const Options& options) override {
    const uint64_t port = options.number("port");
    if (const auto path = options.text("file")) {
      CLONE_TRY(file_.open(std::string(*path)));
    } else if (options.flag("console")) {
      console_ = CLONE_TRY(host().service<clone_host_console>(CLONE_HOST_CONSOLE));
      clone_sdk::ErrorBuffer error;
      CLONE_TRY(error.result(console_->attach(host().raw(), &Serial::typed_thunk, this, error)));
    }
    line_ = CLONE_TRY(clone_sdk::IrqLine::allocate(host(), static_cast<uint32_t>(options.number("irq"))));
    CLONE_TRY(host().add_acpi_node(
        "PNP0501", {clone_sdk::acpi_io(port, serial::kRegisterCount), clone_sdk::acpi_irq(line_.gsi())}));
    claim_ =
        CLONE_TRY((host().claim<&Serial::read, &Serial::write>(CLONE_BUS_PIO, port, serial::kRegisterCount, this)));
    return {};
  }

  Result<void> start() override { return run(); }
  Result<void> resume() override { return run(); }
  // Input that comes from now on would be missing in the saved state.
  Result<void> quiesce() override {
    const std::lock_guard lock(mutex_);
    running_ = false;
    file_.flush();
    return {};
  }
  Result<void> reset_device() override {
    const std::lock_guard lock(mutex_);
    uart_ = {};
    line_.forget();
    return {};
  }

  Result<void> save(const Writer& writer) override { return writer.put("uart", kStateVersion, uart_.state()); }
  Result<void> load(const Reader& reader) override {
    const auto state = CLONE_TRY(reader.get<Uart::State>("uart", kStateVersion));
    const std::lock_guard lock(mutex_);
    if (!uart_.set_state(state)) return Error{"section uart holds impossible registers", 0, CLONE_ERR_CORRUPT};
    line_.forget();
    return {};
  }

  void read(uint64_t offset, void* data, uint32_t size_bytes) {
    bool wanted;
    {
      const std::lock_guard lock(mutex_);
      for (uint32_t i = 0; i < size_bytes; ++i)
        static_cast<uint8_t*>(data)[i] = uart_.read(static_cast<uint32_t>(offset) + i);
      update_interrupt();
      wanted = take_input_wanted();
    }
    if (wanted) console_->input_wanted(host().raw());
  }

  void write(uint64_t offset, const void* data, uint32_t size_bytes) {
    char sent[serial::kRegisterCount];
    size_t sent_count = 0;
    bool wanted;
    {
      const std::lock_guard lock(mutex_);
      for (uint32_t i = 0; i < size_bytes; ++i) {
        const uint8_t value = static_cast<const uint8_t*>(data)[i];
        if (const auto byte = uart_.write(static_cast<uint32_t>(offset) + i, value))
          sent[sent_count++] = static_cast<char>(*byte);
      }
      update_interrupt();
      wanted = take_input_wanted();
      if (file_)
        for (size_t i = 0; i < sent_count; ++i) file_.put(sent[i]);
    }
    // Without the lock: the console may take a moment, and its input comes on another thread.
    if (console_ && sent_count != 0) console_->write(host().raw(), sent, sent_count);
    if (wanted) console_->input_wanted(host().raw());
  }

 private:
  static constexpr uint32_t kStateVersion = 1;

  Result<void> run() {
    bool wanted;
    {
      const std::lock_guard lock(mutex_);
      running_ = true;
      update_interrupt();
      wanted = take_input_wanted();
    }
    if (wanted) console_->input_wanted(host().raw());
    return {};
  }

  static uint64_t typed_thunk(void* self, const void* data, uint64_t size_bytes) noexcept {
    return static_cast<Serial*>(self)->typed({static_cast<const uint8_t*>(data), size_bytes});
  }
  uint64_t typed(std::span<const uint8_t> bytes) {
    const std::lock_guard lock(mutex_);
    const size_t taken = running_ ? uart_.receive(bytes) : 0;
    input_refused_ = taken < bytes.size();
    update_interrupt();
    return taken;
  }

  // True once when input was refused and there is room for it now. Under the lock; the host is told without it.
  bool take_input_wanted() {
    if (!input_refused_ || !running_ || !uart_.has_room()) return false;
    input_refused_ = false;
    return true;
  }

  // The line follows the chip, as on the ISA bus, where each rise is an interrupt. Under the lock.
  void update_interrupt() {
    if (running_) line_.set(uart_.interrupt());
  }

  std::mutex mutex_;
  Uart uart_;
  bool running_ = false;
  bool input_refused_ = false;

  clone_sdk::IrqLine line_;
  const clone_host_console* console_ = nullptr;  // null: none
  LineFile file_;
  clone_sdk::Claim claim_;
};

constexpr clone_option port_option =
    clone_sdk::number_option("port", "0x3f8", "First of the eight I/O ports.", 0, 0xfff8);
constexpr clone_option irq_option = clone_sdk::number_option("irq", "4", "Interrupt line.", 0, 23);
constexpr clone_option console_option = clone_sdk::bool_option("console", "on", "Be the machine's console.");
constexpr clone_option file_option =
    clone_sdk::path_option("file", nullptr, "Append output to this file instead of the console.");
constexpr const clone_option* options[] = {&port_option, &irq_option, &console_option, &file_option, nullptr};

constexpr clone_descriptor Serial::descriptor = {sizeof(clone_descriptor),
                                                 CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                 "serial",
                                                 "A 16550A serial port; the first one is the console.",
                                                 options,
                                                 ""};

}  // namespace

CLONE_SDK_PLUGIN("serial", "1.0.0", "clone", "Apache-2.0", "16550A serial port, the machine's console",
                 CLONE_PROVIDES("device", "serial", "default"))
CLONE_SDK_DEVICES(Serial)
