// SPDX-License-Identifier: Apache-2.0
// fortune: a device of eight I/O ports that tells the guest a text, byte by byte.
//
//   port 0 to 7, read   the next byte of the text; a line feed at its end, then the text again
//   port 0, write       the position in the text, from where the next read goes on
#include <mutex>
#include <string>

#include <clone/sdk/plugin.hpp>

namespace {

using clone_sdk::Claim;
using clone_sdk::Error;
using clone_sdk::Options;
using clone_sdk::Reader;
using clone_sdk::Result;
using clone_sdk::Writer;

constexpr uint64_t kPortCount = 8;
constexpr uint32_t kStateVersion = 1;

class Fortune final : public clone_sdk::Device {
 public:
  static const clone_descriptor descriptor;
  using Device::Device;

  // Called once. What cannot be had is an error here, before the VM runs.
  Result<void> configure(const Options& options) override {
    text_ = std::string(options.text("text").value_or("")) + "\n";
    const uint64_t port = options.number("port");
    // A node in the ACPI tables makes the guest reserve the ports for this device.
    CLONE_TRY(host().add_acpi_node("LNRO0F0F", {clone_sdk::acpi_io(port, kPortCount)}));
    claim_ = CLONE_TRY((host().claim<&Fortune::read, &Fortune::write>(CLONE_BUS_PIO, port, kPortCount, this)));
    return {};
  }

  // This device has no thread and no I/O of its own, so that there is nothing to park.
  Result<void> quiesce() override { return {}; }
  Result<void> resume() override { return {}; }
  Result<void> reset_device() override {
    const std::lock_guard lock(mutex_);
    position_ = 0;
    return {};
  }

  // The state is what the guest can tell apart: the position. The text is an option and comes with the plan.
  Result<void> save(const Writer& writer) override {
    const std::lock_guard lock(mutex_);
    return writer.put("position", kStateVersion, position_);
  }
  // Saved state may have been tampered with: it is checked as a guest's input is.
  Result<void> load(const Reader& reader) override {
    const auto position = CLONE_TRY(reader.get<uint32_t>("position", kStateVersion));
    if (position >= text_.size())
      return Error{"position " + std::to_string(position) + " lies behind the text", 0, CLONE_ERR_CORRUPT};
    const std::lock_guard lock(mutex_);
    position_ = position;
    return {};
  }

  // On vCPU threads, several at once.
  void read(uint64_t, void* data, uint32_t size_bytes) {
    const std::lock_guard lock(mutex_);
    for (uint32_t i = 0; i < size_bytes; ++i) {
      static_cast<char*>(data)[i] = text_[position_];
      position_ = (position_ + 1) % static_cast<uint32_t>(text_.size());
    }
  }
  void write(uint64_t offset, const void* data, uint32_t) {
    const std::lock_guard lock(mutex_);
    if (offset == 0) position_ = *static_cast<const uint8_t*>(data) % static_cast<uint32_t>(text_.size());
  }

 private:
  std::mutex mutex_;
  std::string text_;
  uint32_t position_ = 0;
  Claim claim_;  // the last member, so that it is given back before what its handlers use
};

constexpr clone_option text_option =
    clone_sdk::text_option("text", "You will write a device.", "The fortune that is told.", 255);
constexpr clone_option port_option =
    clone_sdk::number_option("port", "0x5f0", "First of the eight I/O ports.", 0, 0xfff8);
constexpr const clone_option* options[] = {&text_option, &port_option, nullptr};

constexpr clone_descriptor Fortune::descriptor = {sizeof(clone_descriptor),
                                                  CLONE_CAN_SAVE | CLONE_CAN_MIGRATE,
                                                  "fortune",
                                                  "A device that tells the guest a fortune.",
                                                  options,
                                                  ""};

}  // namespace

CLONE_SDK_PLUGIN("fortune", "1.0.0", "Example Ltd", "Apache-2.0", "Tells the guest a fortune",
                 CLONE_PROVIDES("device", "fortune", "")
                     CLONE_PROVIDES_FLAG("--fortune", "fortune", "TEXT", "text=%", "Tell the guest a fortune."))
CLONE_SDK_DEVICES(Fortune)
