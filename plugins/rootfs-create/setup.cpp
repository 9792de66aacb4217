// SPDX-License-Identifier: Apache-2.0
// What lies between a file tree and a machine, for systemd, OpenRC, and trees without an init.
#include "setup.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <memory>

namespace rootfs {
namespace {

constexpr const char* kAgent = "usr/sbin/clone-agent";
constexpr size_t kLargestText = 4 << 20;

// The generated initrd may have started an agent already: this one takes its place when it ends. What agents serve and
// run outlives them.
constexpr const char* kAgentUnit = R"([Unit]
Description=Agent of the virtual machine monitor
DefaultDependencies=no
After=local-fs.target
Conflicts=shutdown.target
StartLimitIntervalSec=0

[Service]
ExecStart=/usr/sbin/clone-agent
Restart=always
RestartSec=1
KillMode=process

[Install]
WantedBy=multi-user.target
)";

constexpr const char* kAgentScript = R"(#!/sbin/openrc-run
description="Agent of the virtual machine monitor"
command="/usr/sbin/clone-agent"
command_background="yes"
pidfile="/run/clone-agent.pid"
)";

constexpr const char* kNetworkd = R"([Match]
Type=ether
Kind=!*

[Network]
DHCP=yes
)";

// Each machine makes its own host keys: none are shared through the image.
constexpr const char* kSshDropIn = R"([Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
)";

constexpr const char* kInterfaces = "auto lo\niface lo inet loopback\n\nauto eth0\niface eth0 inet dhcp\n";
constexpr const char* kConsoleLine = "ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100\n";
constexpr const char* kInittab = R"(::sysinit:/sbin/openrc sysinit
::sysinit:/sbin/openrc boot
::wait:/sbin/openrc default
::ctrlaltdel:/sbin/reboot
::shutdown:/sbin/openrc shutdown
)";

enum class Init { systemd, openrc, plain, unknown };

Result<std::string> read_host_file(const std::string& path) {
  const auto fd = std::make_shared<const Fd>(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status {};
  if (!*fd || ::fstat(fd->get(), &status) != 0) return errno_error(path);
  if (!S_ISREG(status.st_mode)) return Error{path + ": not a regular file"};
  return read_text({fd, {}, 0, static_cast<uint64_t>(status.st_size)}, 256 << 20);
}

class SetUp {
 public:
  SetUp(const Context& context, const Setup& setup) : tree_(context.tree), context_(context), setup_(setup) {}

  Result<void> run() {
    for (const char* folder : {"proc", "sys", "dev", "run", "etc"}) TRY(tree_.put_directory(folder, 0755));
    TRY(tree_.put_directory("tmp", 01777));
    TRY(tree_.put_directory("root", 0700));
    TRY(name_machine());
    if (!setup_.ssh_keys.empty()) TRY(install_keys());
    const Init init = TRY(find_init());
    if (setup_.origin != Origin::folder) TRY(unlock_root());
    if (init == Init::systemd) TRY(set_up_systemd());
    if (init == Init::openrc) TRY(set_up_openrc());
    if (init == Init::plain) TRY(set_up_plain());
    return install_agent(init);
  }

 private:
  bool has(const char* path) const { return tree_.find(path) != nullptr; }

  // The text of a file in the tree; empty if there is none.
  Result<std::string> text_of(const char* path) const {
    const InodePointer inode = tree_.find(path);
    if (!inode || !inode->is_regular()) return std::string();
    return read_text(inode->content, kLargestText).context(path);
  }
  Result<void> put_text(const std::string& path, std::string_view text, mode_t permissions = 0644) {
    return tree_.put(path, TRY(context_.spool.file(text, permissions)));
  }
  // New text for a file that may be there: its owner, permissions and attributes stay.
  Result<void> change_text(const char* path, std::string_view text, mode_t permissions) {
    const InodePointer file = TRY(context_.spool.file(text, permissions));
    const InodePointer there = tree_.find(path);
    if (!there || !there->is_regular()) return tree_.put(path, file);
    there->content = file->content;
    return {};
  }

  Result<void> name_machine() {
    std::string name = setup_.hostname;
    if (name.empty()) name = TRY(text_of("etc/hostname"));
    while (!name.empty() && (name.back() == '\n' || name.back() == ' ')) name.pop_back();
    // A distribution's tree has the name of the host that made it.
    if (name.empty() || !check_hostname(name).ok() || (setup_.hostname.empty() && setup_.origin != Origin::folder))
      name = "clone";
    if (setup_.origin != Origin::folder || !setup_.hostname.empty() || !has("etc/hostname"))
      TRY(put_text("etc/hostname", name + "\n"));
    if (setup_.origin != Origin::folder || TRY(text_of("etc/hosts")).empty())
      TRY(put_text("etc/hosts",
                   "127.0.0.1\tlocalhost\n127.0.1.1\t" + name + "\n::1\tlocalhost ip6-localhost ip6-loopback\n"));
    if (setup_.origin == Origin::distribution || !has("etc/fstab"))
      TRY(put_text("etc/fstab", "# The root file system is mounted before the init starts and needs no entry.\n"));
    return {};
  }

  Result<void> install_keys() {
    const auto folder = std::make_shared<Inode>();
    folder->mode = S_IFDIR | 0700;
    folder->mtime_s = ::time(nullptr);
    TRY(tree_.put("root/.ssh", folder));
    return put_text("root/.ssh/authorized_keys", setup_.ssh_keys, 0600);
  }

  Result<Init> find_init() {
    const InodePointer init = tree_.find("sbin/init");
    InodePointer systemd = tree_.find("usr/lib/systemd/systemd");
    if (!systemd) systemd = tree_.find("lib/systemd/systemd");
    if (systemd && !init) TRY(tree_.put_symlink("sbin/init", "/lib/systemd/systemd"));
    if (systemd && (!init || init == systemd)) return Init::systemd;
    if (has("sbin/openrc")) return Init::openrc;
    if (!init) return Init::plain;
    // Images of containers bring busybox's init by accident: with an inittab for what they do not have.
    if (setup_.origin != Origin::folder && init == tree_.find("bin/busybox")) return Init::plain;
    return Init::unknown;
  }

  // A console where nobody can log in is of no use: root without a password, which sshd does not accept.
  Result<void> unlock_root() {
    std::string shadow = TRY(text_of("etc/shadow"));
    constexpr std::string_view root = "root:";
    size_t at = shadow.starts_with(root) ? 0 : shadow.find("\nroot:");
    if (at == shadow.npos) return {};
    at += shadow[at] == '\n' ? root.size() + 1 : root.size();
    if (at >= shadow.size() || (shadow[at] != '*' && shadow[at] != '!')) return {};
    const size_t end = shadow.find(':', at);
    if (end == shadow.npos) return {};
    shadow.erase(at, end - at);
    return change_text("etc/shadow", shadow, 0600);
  }

  Result<void> enable(const std::string& target, const std::string& unit) {
    const bool in_usr = has(("usr/lib/systemd/system/" + unit).c_str());
    if (!in_usr && !has(("lib/systemd/system/" + unit).c_str())) return {};
    return tree_.put_symlink("etc/systemd/system/" + target + ".wants/" + unit, "/lib/systemd/system/" + unit);
  }

  Result<void> set_up_systemd() {
    // Without udev no device unit becomes active, which the getty of a serial line waits for.
    const bool udev = has("lib/systemd/systemd-udevd") || has("usr/lib/systemd/systemd-udevd") || has("bin/udevadm");
    if (udev) {
      TRY(tree_.put_symlink("etc/systemd/system/getty.target.wants/serial-getty@ttyS0.service",
                            "/lib/systemd/system/serial-getty@.service"));
    } else {
      TRY(enable("getty.target", "console-getty.service"));
    }
    const InodePointer networks = tree_.find("etc/systemd/network");
    const bool configured =
        (networks && !networks->children.empty()) || has("etc/network/interfaces") || has("etc/netplan");
    if (has("lib/systemd/systemd-networkd") && (setup_.origin == Origin::distribution || !configured)) {
      TRY(put_text("etc/systemd/network/80-ethernet-dhcp.network", kNetworkd));
      TRY(enable("multi-user.target", "systemd-networkd.service"));
      TRY(enable("sockets.target", "systemd-networkd.socket"));
      if (has("lib/systemd/systemd-resolved") && setup_.origin == Origin::distribution) {
        TRY(enable("sysinit.target", "systemd-resolved.service"));
        TRY(tree_.put_symlink("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"));
      }
    }
    if (setup_.origin != Origin::folder) {
      TRY(put_text("etc/machine-id", "", 0444));  // each machine makes its own
      TRY(tree_.remove("var/lib/dbus/machine-id"));
      TRY(tree_.remove("var/lib/systemd/random-seed"));
    }
    if (setup_.origin == Origin::distribution && has("usr/sbin/sshd")) {
      TRY(forget_host_keys());
      TRY(put_text("etc/systemd/system/ssh.service.d/host-keys.conf", kSshDropIn));
    }
    return {};
  }

  Result<void> forget_host_keys() {
    const InodePointer folder = tree_.find("etc/ssh");
    if (!folder || !folder->is_directory()) return {};
    std::erase_if(folder->children, [](const auto& child) { return child.first.starts_with("ssh_host_"); });
    return {};
  }

  Result<void> set_up_openrc() {
    std::string inittab = TRY(text_of("etc/inittab"));
    if (inittab.empty()) inittab = kInittab;
    std::string changed;
    bool console = false;
    for (size_t at = 0; at < inittab.size();) {
      const size_t end = std::min(inittab.find('\n', at), inittab.size());
      const std::string line = inittab.substr(at, end - at);
      at = end + 1;
      console |= line.starts_with("ttyS0:");
      // There are no virtual terminals for the gettys of a PC.
      const bool virtual_terminal = line.starts_with("tty") && line.size() > 4 && line[3] >= '1' && line[3] <= '9';
      if (setup_.origin == Origin::folder || !virtual_terminal) changed += line + "\n";
    }
    if (!console) changed += kConsoleLine;
    TRY(change_text("etc/inittab", changed, 0644));
    const std::string securetty = TRY(text_of("etc/securetty"));
    if (!securetty.empty() && ("\n" + securetty).find("\nttyS0\n") == std::string::npos)
      TRY(change_text("etc/securetty", securetty + (securetty.ends_with('\n') ? "" : "\n") + "ttyS0\n", 0644));
    if (!has("etc/network/interfaces")) TRY(put_text("etc/network/interfaces", kInterfaces));

    const InodePointer levels = tree_.find("etc/runlevels/boot");
    if (!levels || levels->children.empty()) {
      static constexpr std::pair<const char*, const char*> services[] = {
          {"sysinit", "devfs"},     {"sysinit", "dmesg"},      {"sysinit", "mdev"},       {"boot", "hostname"},
          {"boot", "sysctl"},       {"boot", "bootmisc"},      {"boot", "syslog"},        {"boot", "networking"},
          {"shutdown", "mount-ro"}, {"shutdown", "killprocs"}, {"shutdown", "savecache"}, {"default", "acpid"}};
      for (const auto& [level, service] : services) TRY(add_service(level, service));
    }
    if (setup_.origin == Origin::distribution) TRY(add_service("default", "sshd"));
    return {};
  }

  Result<void> add_service(const std::string& level, const std::string& service) {
    if (!has(("etc/init.d/" + service).c_str())) return {};
    return tree_.put_symlink("etc/runlevels/" + level + "/" + service, "/etc/init.d/" + service);
  }

  Result<void> set_up_plain() {
    const std::string program = TRY(read_host_file(setup_.plain_init_path));
    TRY(put_text("sbin/init", program, 0755));
    // clone-plain-init's configuration; a value with a line break cannot be one of its lines.
    std::string text;
    const auto add = [&text](const char* key, const std::string& value) {
      if (value.find('\n') == value.npos && value.find('\0') == value.npos)
        text += std::string(key) + "=" + value + "\n";
    };
    for (const std::string& variable : setup_.container.environment) add("env", variable);
    if (!setup_.container.directory.empty()) add("directory", setup_.container.directory);
    for (const std::string& word : setup_.container.command) add("command", word);
    return put_text("etc/clone-init.conf", text);
  }

  Result<void> install_agent(Init init) {
    if (setup_.agent_path.empty()) return {};
    if (init == Init::unknown) {
      context_.progress.note("the image's init is neither systemd nor OpenRC: the agent is installed, but not started");
    }
    const std::string program = TRY(read_host_file(setup_.agent_path));
    TRY(put_text(kAgent, program, 0755));
    if (init == Init::systemd) {
      TRY(put_text("etc/systemd/system/clone-agent.service", kAgentUnit));
      TRY(tree_.put_symlink("etc/systemd/system/multi-user.target.wants/clone-agent.service",
                            "/etc/systemd/system/clone-agent.service"));
    }
    if (init == Init::openrc) {
      TRY(put_text("etc/init.d/clone-agent", kAgentScript, 0755));
      TRY(add_service("default", "clone-agent"));
    }
    return {};
  }

  Tree& tree_;
  const Context& context_;
  const Setup& setup_;
};

}  // namespace

Result<void> make_bootable(const Context& context, const Setup& setup) { return SetUp(context, setup).run(); }

Result<void> check_hostname(const std::string& name) {
  constexpr std::string_view allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-.";
  if (name.empty() || name.size() > 64 || name.find_first_not_of(allowed) != name.npos || name.front() == '-' ||
      name.front() == '.')
    return Error{"--hostname: '" + name +
                 "' given; allowed are up to 64 letters, digits, '-' and '.', a letter or digit first"};
  return {};
}

}  // namespace rootfs
