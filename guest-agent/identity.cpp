// SPDX-License-Identifier: Apache-2.0
// Makes a machine another one than that it was copied from: name, address, randomness, time.
#include <asm/errno.h>
#include <linux/fcntl.h>
#include <linux/if.h>
#include <linux/in.h>
#include <linux/random.h>
#include <linux/route.h>
#include <linux/sockios.h>

#include "conversation.hpp"
#include "files.hpp"
#include "requests.hpp"

using namespace agent_protocol;

namespace {

IdentityRequest request;

long set_hostname(const char* name, Message& what) {
  what << "host name '" << name << "': ";
  const long result = sys::call(__NR_sethostname, sys::word(name), static_cast<long>(length(name)));
  if (result < 0) return result;
  // It is right until the next boot where the file cannot be written.
  const int fd = sys::open("/etc/hostname", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return 0;
  sys::write(fd, name, length(name));
  sys::write(fd, "\n", 1);
  sys::close(fd);
  return 0;
}

// The first interface of a device, or the first that is not the loopback.
bool find_interface(char (&name)[IFNAMSIZ]) {
  const int fd = static_cast<int>(sys::call(__NR_socket, 2 /* AF_INET */, 2 | O_CLOEXEC /* SOCK_DGRAM */, 0));
  if (fd < 0) return false;
  bool found = false;
  for (int index = 1; index < 256; ++index) {
    ifreq interface {};
    interface.ifr_ifindex = index;
    if (sys::ioctl(fd, SIOCGIFNAME, &interface) < 0) continue;
    if (sys::ioctl(fd, SIOCGIFFLAGS, &interface) < 0 || (interface.ifr_flags & IFF_LOOPBACK)) continue;
    Text<64> device;
    device << "/sys/class/net/" << interface.ifr_name << "/device";
    const bool is_device = sys::access(device.c_str()) == 0;
    if (!found || is_device) __builtin_memcpy(name, interface.ifr_name, IFNAMSIZ);
    found = true;
    if (is_device) break;
  }
  sys::close(fd);
  return found;
}

void put(sockaddr& place, const uint8_t* bytes) {
  sockaddr_in address{};
  address.sin_family = 2;  // AF_INET
  if (bytes) __builtin_memcpy(&address.sin_addr, bytes, 4);
  __builtin_memcpy(&place, &address, sizeof address);
}

long set_address(const char* text, const char* gateway_text, Message& what) {
  what << "address '" << text << "', gateway '" << gateway_text << "': ";
  Address address, gateway;
  if (!address.parse(text, true) || (*gateway_text != 0 && !gateway.parse(gateway_text, false))) {
    what << "allowed are IPv4 addresses such as 192.0.2.5/24 and 192.0.2.1: ";
    return -EINVAL;
  }
  ifreq interface {};
  if (!find_interface(interface.ifr_name)) {
    what << "there is no network interface: ";
    return -ENODEV;
  }
  const int fd = static_cast<int>(sys::call(__NR_socket, 2, 2 | O_CLOEXEC, 0));
  if (fd < 0) return fd;
  uint8_t mask[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t bits = address.prefix_bits > i * 8 ? address.prefix_bits - i * 8 : 0;
    mask[i] = static_cast<uint8_t>(bits >= 8 ? 0xff : 0xff00 >> bits);
  }
  put(interface.ifr_addr, address.bytes);
  long result = sys::ioctl(fd, SIOCSIFADDR, &interface);
  put(interface.ifr_netmask, mask);
  if (result >= 0) result = sys::ioctl(fd, SIOCSIFNETMASK, &interface);
  interface.ifr_flags = 0;
  if (result >= 0) result = sys::ioctl(fd, SIOCGIFFLAGS, &interface);
  interface.ifr_flags = static_cast<short>(interface.ifr_flags | IFF_UP);
  if (result >= 0) result = sys::ioctl(fd, SIOCSIFFLAGS, &interface);
  if (result >= 0 && *gateway_text != 0) {
    rtentry route{};
    put(route.rt_dst, nullptr);
    put(route.rt_genmask, nullptr);
    put(route.rt_gateway, nullptr);
    route.rt_flags = RTF_UP;
    for (int i = 0; i < 16 && sys::ioctl(fd, SIOCDELRT, &route) >= 0; ++i) {  // each that another machine had
    }
    put(route.rt_gateway, gateway.bytes);
    route.rt_flags = RTF_UP | RTF_GATEWAY;
    route.rt_dev = interface.ifr_name;
    result = sys::ioctl(fd, SIOCADDRT, &route);
  }
  sys::close(fd);
  return result;
}

long add_entropy(const Reader::Text& bytes, Message& what) {
  what << "entropy: ";
  struct {
    int bit_count, byte_count;
    uint8_t bytes[512];
  } pool;
  const int fd = sys::open("/dev/urandom", O_WRONLY | O_CLOEXEC);
  if (fd < 0) return fd;
  long result = 0;
  for (size_t at = 0; result >= 0 && at < bytes.size_bytes;) {
    const size_t left = bytes.size_bytes - at;
    const size_t part = left < sizeof pool.bytes ? left : sizeof pool.bytes;
    __builtin_memcpy(pool.bytes, bytes.data + at, part);
    pool.byte_count = static_cast<int>(part);
    pool.bit_count = static_cast<int>(part * 8);
    result = sys::ioctl(fd, RNDADDENTROPY, &pool);
    at += part;
  }
  __builtin_memset(&pool, 0, sizeof pool);
  asm volatile("" : : "r"(&pool) : "memory");  // the clearing is not for nothing
  if (result >= 0) result = sys::ioctl(fd, RNDRESEEDCRNG, 0l);
  sys::close(fd);
  return result;
}

// What is told was true when it was sent. A clock that is ahead of that by less than a message takes may well be right, as
// that of a fork of a machine whose clock was, and is not put back.
long set_clock(uint64_t nanoseconds, Message& what) {
  constexpr uint64_t longest_way_ns = 20'000'000;
  what << "clock: ";
  __kernel_timespec now{};
  sys::call(__NR_clock_gettime, 0 /* CLOCK_REALTIME */, sys::word(&now));
  const uint64_t now_ns = static_cast<uint64_t>(now.tv_sec) * 1000000000 + static_cast<uint64_t>(now.tv_nsec);
  if (now_ns >= nanoseconds && now_ns - nanoseconds <= longest_way_ns) return 0;
  const __kernel_timespec time{static_cast<long>(nanoseconds / 1000000000),
                               static_cast<long>(nanoseconds % 1000000000)};
  return sys::call(__NR_clock_settime, 0 /* CLOCK_REALTIME */, sys::word(&time));
}

}  // namespace

// All of it is tried; the first failure is the answer.
void set_identity(Conversation& conversation, const Connection::Frame& frame) {
  Connection& connection = conversation.connection;
  if (!request.parse(frame.reader())) {
    connection.error(-EINVAL, Type::identity, "a malformed request, or a field that this agent does not know");
    return;
  }
  if (conversation.machine == Machine::not_ours) {
    connection.error(-EPERM, Type::identity, "this agent does not run in a virtual machine");
    return;
  }
  long failure = 0;
  Message message;
  const auto attempt = [&](uint32_t field, auto set) {
    if (!(request.fields & field)) return;
    Message what;
    const long result = set(what);
    if (result >= 0 || failure < 0) return;
    failure = result;
    message << what.c_str() << result;
  };
  // The clock comes last on the wire, and first here: it is late already.
  attempt(kIdentityClock, [](Message& what) { return set_clock(request.clock_ns, what); });
  attempt(kIdentityEntropy, [](Message& what) { return add_entropy(request.entropy, what); });
  attempt(kIdentityHostname, [](Message& what) { return set_hostname(request.hostname, what); });
  attempt(kIdentityAddress, [](Message& what) { return set_address(request.address, request.gateway, what); });
  // kIdentityCid: the transport has the new one since it was reset; nothing here keeps the old one.
  if (failure < 0) {
    connection.error(failure, Type::identity, message.c_str());
  } else {
    connection.done();
  }
}
