// SPDX-License-Identifier: Apache-2.0
// qcow2 images, held against a model in memory and against QEMU's own tools.
#include "disk_rig.hpp"
#include "image_tools.hpp"
#include "scratch_dir.hpp"

using namespace vmm;
using namespace vmm::test;

namespace {

// Content with holes in it, as disks have.
std::vector<uint8_t> sparse_pattern(size_t size, uint8_t seed) {
  std::vector<uint8_t> bytes = pattern(size, seed);
  for (size_t at = 0; at < size; at += 3 * 65536)
    std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(at), std::min<size_t>(65536, size - at), uint8_t{0});
  return bytes;
}

struct Variant {
  const char* name;
  const char* make;  // by a shell, in the folder with base.raw
  uint64_t granule;  // of discards; 0: none
  int steps;
};

constexpr uint64_t kDiskBytes = 6 << 20;

}  // namespace

TEST_CASE("qcow2: random work matches the model, and QEMU agrees") {
  const Variant variants[] = {
      {"fresh", "qemu-img create -f qcow2 x.qcow2 6M", 65536, 3000},
      {"fresh, small clusters", "qemu-img create -f qcow2 -o cluster_size=4k x.qcow2 6M", 4096, 3000},
      {"fresh, least clusters", "qemu-img create -f qcow2 -o cluster_size=512,refcount_bits=64 x.qcow2 6M", 512, 2000},
      {"fresh, large clusters", "qemu-img create -f qcow2 -o cluster_size=2M x.qcow2 6M", 2 << 20, 4000},
      {"version 2", "qemu-img create -f qcow2 -o compat=0.10 x.qcow2 6M", 65536, 2000},
      {"counts of one bit", "qemu-img create -f qcow2 -o cluster_size=4k,refcount_bits=1 x.qcow2 6M", 4096, 2000},
      {"counts of two bits", "qemu-img create -f qcow2 -o cluster_size=4k,refcount_bits=2 x.qcow2 6M", 4096, 600},
      {"counts of four bits", "qemu-img create -f qcow2 -o cluster_size=512,refcount_bits=4 x.qcow2 6M", 512, 600},
      {"counts of eight bits", "qemu-img create -f qcow2 -o cluster_size=4k,refcount_bits=8 x.qcow2 6M", 4096, 600},
      {"counts of 32 bits", "qemu-img create -f qcow2 -o cluster_size=1k,refcount_bits=32 x.qcow2 6M", 1024, 600},
      {"lazy counts", "qemu-img create -f qcow2 -o lazy_refcounts=on x.qcow2 6M", 65536, 1000},
      {"subclusters", "qemu-img create -f qcow2 -o extended_l2=on x.qcow2 6M", 65536, 3000},
      {"preallocated", "qemu-img create -f qcow2 -o preallocation=metadata x.qcow2 6M", 65536, 2000},
      {"full", "qemu-img convert -f raw -O qcow2 base.raw x.qcow2", 65536, 2000},
      {"compressed", "qemu-img convert -c -f raw -O qcow2 base.raw x.qcow2", 65536, 2000},
      {"compressed by zstd, small clusters",
       "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd,cluster_size=8k base.raw x.qcow2", 8192, 2000},
      {"over raw", "qemu-img create -f qcow2 -b base.raw -F raw x.qcow2 6M", 65536, 3000},
      {"over raw, small clusters", "qemu-img create -f qcow2 -b base.raw -F raw -o cluster_size=4k x.qcow2 6M", 4096,
       3000},
      {"over raw, large clusters", "qemu-img create -f qcow2 -b base.raw -F raw -o cluster_size=2M x.qcow2 6M", 2 << 20,
       1500},
      {"over raw, subclusters", "qemu-img create -f qcow2 -b base.raw -F raw -o extended_l2=on x.qcow2 6M", 65536,
       3000},
      {"over raw, version 2", "qemu-img create -f qcow2 -b base.raw -F raw -o compat=0.10 x.qcow2 6M", 0, 2000},
      {"over a shorter one", "truncate -s 2M base.raw; qemu-img create -f qcow2 -b base.raw -F raw x.qcow2 6M", 65536,
       2000},
      {"a chain",
       "qemu-img convert -c -f raw -O qcow2 base.raw a.qcow2; qemu-img create -f qcow2 -b a.qcow2 -F qcow2 b.qcow2 6M; "
       "qemu-io -c 'write -P 7 1M 1M' -c 'write -z 3M 512k' b.qcow2; qemu-img create -f qcow2 -b b.qcow2 -F qcow2 "
       "x.qcow2 "
       "6M",
       65536, 2000},
  };
  uint64_t seed = 4;
  for (const Variant& variant : variants) {
    for (const char* cache : {"writeback", "none"}) {
      CAPTURE(variant.name);
      CAPTURE(cache);
      CAPTURE(seed);
      // Syncs cost nothing in memory, where there is no direct I/O.
      ScratchDir scratch(cache == std::string("none") ? "/var/tmp" : "/dev/shm");
      const std::string folder = scratch.path();
      write_file(folder + "/base.raw", sparse_pattern(kDiskBytes, static_cast<uint8_t>(seed)));
      REQUIRE_MESSAGE(shell(folder, variant.make) == 0, log_of(folder));
      std::vector<uint8_t> model = content(folder, "x.qcow2");
      const auto base = read_file(folder + "/base.raw");
      const bool slow = cache == std::string("none");
      // Between rounds of any length the disk is closed and opened again.
      std::vector<int> ends(slow ? 3 : 6);
      ends[0] = variant.steps * 3 / (slow ? 40 : 8);
      std::mt19937_64 random(seed);
      for (size_t i = 1; i < ends.size(); ++i) ends[i] = std::uniform_int_distribution<int>(0, ends[0])(random);
      std::sort(ends.begin(), ends.end());
      for (int done = 0; const int end : ends) {
        {
          Rig rig({{"path", folder + "/x.qcow2"},
                   {"backing", "on"},
                   {"cache", cache},
                   {"aio", seed % 3 ? "io_uring" : "threads"},
                   {"queues", std::to_string(1 + seed % 3)}});
          rig.start(seed % 2 == 0, seed % 5 == 0 ? uint64_t{1} << VIRTIO_BLK_F_FLUSH : 0);
          RandomWork work(
              rig, seed, model, [&] { return read_file(folder + "/x.qcow2"); }, variant.granule);
          work.run(end - done, 250);
          model = work.model();
        }
        done = end;
        ++seed;
        check(folder, "x.qcow2");
        const bool same = content(folder, "x.qcow2") == model;
        CHECK(same);
        if (!same) return;
      }
      CHECK(read_file(folder + "/base.raw") == base);
    }
  }
}
