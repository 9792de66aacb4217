// SPDX-License-Identifier: Apache-2.0
// The C table over Virtqueue; a clone_virtqueue is a Virtqueue.
#include "virtqueue/virtqueue_service.hpp"

#include "clone/sdk/error.hpp"
#include "plugin/host_context.hpp"
#include "virtqueue/virtqueue.hpp"

namespace vmm {
namespace {

Virtqueue& self(clone_virtqueue* queue) { return *reinterpret_cast<Virtqueue*>(queue); }

clone_status create(const clone_host* host, const clone_virtqueue_config* config, clone_virtqueue** queue,
                    clone_err* err) noexcept {
  return clone_sdk::guarded(err, [&]() -> Result<void> {
    if (config->size < sizeof *config) return Error{"the queue's configuration is too short"};
    *queue = reinterpret_cast<clone_virtqueue*>(TRY(Virtqueue::create(*context_of(host).memory, *config)).release());
    return {};
  });
}

clone_status pop(clone_virtqueue* queue, clone_chain* chain, clone_err* err) noexcept {
  const clone_status status = self(queue).pop(*chain);
  if (status == CLONE_ERR_GUEST && err) return clone_sdk::report(err, Error{self(queue).broken(), 0, status});
  return status;
}

clone_status get_layout(clone_virtqueue* queue, clone_virtqueue_layout* layout) noexcept {
  if (layout->size < sizeof *layout) return CLONE_ERR_INVALID;
  const uint32_t size = layout->size;
  *layout = self(queue).layout();
  layout->size = size;
  return CLONE_OK;
}

clone_status get_position(clone_virtqueue* queue, clone_virtqueue_position* position) noexcept {
  if (position->size < sizeof *position) return CLONE_ERR_INVALID;
  const uint32_t size = position->size;
  *position = self(queue).position();
  position->size = size;
  return CLONE_OK;
}

clone_status set_position(clone_virtqueue* queue, const clone_virtqueue_position* position, clone_err* err) noexcept {
  return clone_sdk::guarded(err, [&] { return self(queue).set_position(*position); });
}

constexpr clone_host_virtqueue kTable = {
    sizeof(clone_host_virtqueue),
    0,
    [](const clone_host*) noexcept { return kRingFeatures; },
    create,
    [](clone_virtqueue* queue) noexcept { delete &self(queue); },
    [](clone_virtqueue* queue) noexcept { return self(queue).kick_fd(); },
    [](clone_virtqueue* queue) noexcept { return self(queue).size(); },
    pop,
    [](clone_virtqueue* queue, const clone_chain* chain, uint32_t written_bytes) noexcept {
      return self(queue).push(*chain, written_bytes);
    },
    [](clone_virtqueue* queue) noexcept { self(queue).signal(); },
    [](clone_virtqueue* queue) noexcept { self(queue).disable_kick(); },
    [](clone_virtqueue* queue) noexcept { return int32_t{self(queue).enable_kick()}; },
    get_layout,
    [](clone_virtqueue* queue) noexcept { return self(queue).take_call_fd(); },
    [](clone_virtqueue* queue) noexcept { return int32_t{self(queue).call_fd_taken()}; },
    get_position,
    set_position};

}  // namespace

const clone_host_virtqueue* virtqueue_service() { return &kTable; }

}  // namespace vmm
