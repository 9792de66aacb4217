# SPDX-License-Identifier: Apache-2.0
# Images by `clone rootfs create` from each source, made on this machine, one of them without root; then booted in a test host,
# where the guests are asked.
# seconds: 260
# host: no
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
for tool in skopeo umoci docker-registry mmdebstrap openssl qemu-img setfattr; do
  command -v $tool >/dev/null || skip "$tool is not installed"
done
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
create() { "$CLONE" rootfs create "$@" </dev/null 2>messages || { cat messages >&2; return 1; }; }
background=()
trap 'for process in "${background[@]}"; do kill "$process" 2>/dev/null || true; done' EXIT # some may have ended

cc -O1 -static -o list-tree "$here/list-tree.c"
# As an agent the program is called without arguments. Debian gets the real one.
agent=$WORK/list-tree

program=$(dirname "$CLONE")/../libexec/clone/clone-rootfs

# Debian through the mirror, once for several runs; the rest goes on meanwhile.
debian_image=$FIXTURES/rootfs-debian.img
ssh_key='ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAe0b0ZkV0Zf0m1R3g0o3v2Xq7P1mXx8bq9s2cWJz0Qk test'
debian=''
if [[ ! $debian_image -nt $program || ! $debian_image -nt ${program%rootfs}agent ]]; then
  echo "$ssh_key" >key.pub
  "$CLONE" rootfs create --distro debian --hostname web --ssh-key key.pub --package less --force -o "$debian_image" \
    </dev/null 2>debian-messages &
  debian=$!
  background+=("$debian")
fi

# A folder with all that is hard to keep. The guest's init lists it.
mkdir -p folder/{bin,sbin,files/'a b'/deep,files/many}
cp "$(command -v busybox)" folder/bin/busybox
ln -s busybox folder/bin/sh
cp list-tree folder/bin/
printf '#!/bin/sh\n/bin/busybox stty -opost -F /dev/console\nprintf "tree-begin\\r\\n"; /bin/list-tree /files | /bin/busybox sed "s/$/\\r/"; printf "tree-end\\r\\n"; exec /bin/busybox poweroff -f\n' >folder/sbin/init
chmod 755 folder/sbin/init
(
  cd folder/files
  echo one >one; ln one 'a b/deep/second name'; ln one many/third
  ln -s /nowhere/at/all dangling; ln -s "$(printf 'x%.0s' {1..200})" long-link; ln dangling dangling-too
  mkfifo fifo; mknod null c 1 3; mknod large-numbers b 259 70000; mknod node c 5 1; ln node node-too
  cp /bin/true setuid; chmod 4711 setuid; echo x >setgid; chmod 2755 setgid; mkdir sticky; chmod 1777 sticky
  echo odd >owned; chown 3000000000:70000 owned; chown -h 55:66 dangling
  echo line >$'new\nline'; echo b >$'\x01\xff byte'; echo space >' leading and trailing '; echo dash >-rf; : >empty
  printf 'name%.0s' {1..63} | xargs -I{} touch {}
  setfattr -n user.note -v 'a value' one; setfattr -n user.big -v "$(head -c 3000 /dev/zero | tr '\0' v)" owned
  setfattr -n trusted.secret -v 1 'a b'; setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 setuid
  setfattr -n system.posix_acl_access -v 0x0200000001000600ffffffff020006003700000004000400ffffffff10000600ffffffff20000400ffffffff ' leading and trailing '
  truncate -s 300M sparse; echo middle | dd of=sparse bs=1M seek=150 conv=notrunc status=none
  head -c 3000000 /dev/urandom >random
  for ((i = 0; i < 200; ++i)); do : >"many/a file with a rather long name, number $i"; done
  touch -d '1969-12-31 12:00:00.5 UTC' empty; touch -d '2100-02-03 04:05:06.789 UTC' random
  touch -d '2001-02-03 UTC' 'a b/deep' 'a b' many
)
./list-tree folder/files >folder.list
create --from-dir folder -o folder.img --size 128M
(($(stat -c '%b' folder.img) < 64 * 2048)) || fail "folder.img is not sparse"
equal "permissions of the image" "$(stat -c %a folder.img)" 644
e2fsck -fn folder.img
# The same as qcow2, which is booted. Its raw twin differs in identifiers, times and what is computed from them.
create --from-dir folder -o folder.qcow2 --size 128M --format qcow2
qemu-img check folder.qcow2
qemu-img convert -O raw folder.qcow2 back.img
e2fsck -fn back.img
differences=$({ cmp -l folder.img back.img || true; } | wc -l)
((differences < 20000)) || fail "folder.qcow2 differs from folder.img in $differences bytes"
truncate -s 192M folder.qcow2 # as a disk of the test host, whose end is fixed, it has room to grow

# Alpine: a signed repository of our own; the same as qcow2, and refusals.
"$here/alpine-repository" alpine
alpine=(--distro alpine --release 3.20 --mirror "file://$WORK/alpine" --keys alpine/keys --hostname alp --package hello --agent "$agent" --size 128M)
create "${alpine[@]}" -o alpine.img
contains messages 'rootfs: 5 packages'
create "${alpine[@]}" -o alpine.qcow2 --format qcow2
qemu-img check alpine.qcow2
equal "format" "$(qemu-img info --output=json alpine.qcow2 | python3 -c 'import json, sys; i = json.load(sys.stdin); print(i["format"], i["virtual-size"])')" "qcow2 134217728"
qemu-img convert -O raw alpine.qcow2 back.img
e2fsck -fn back.img
debugfs -R 'cat usr/share/hello/text' back.img 2>/dev/null | grep -q 'Hello of 2.10'
port=$(free_port)
python3 -m http.server "$port" --bind 127.0.0.1 --directory alpine >/dev/null 2>&1 &
background+=($!)
within 20 bash -c "exec 3<>/dev/tcp/127.0.0.1/$port"
create "${alpine[@]}" --mirror "http://127.0.0.1:$port" -o by-http.img
equal "world" "$(debugfs -R 'cat etc/apk/world' by-http.img 2>/dev/null | tr '\n' ' ')" 'alpine-base hello '
refused() { # MESSAGE ARG…: one line that says why, no file left
  local message=$1 status=0
  shift
  "$CLONE" rootfs create "$@" -o refused.img -q </dev/null 2>messages || status=$?
  ((status == 1 || status == 2)) || fail "status $status, not refused ($message): $*"
  contains messages "$message" || { cat messages; fail "refused: $*"; }
  [[ -z $(compgen -G '*refused.img*'; compgen -G '.refused.img*') ]] || fail "left behind: $(ls -A)"
}
repository=alpine/v3.20/main/x86_64
damaged() { # MESSAGE FILE OFFSET: refused after a byte of a file of the repository has been changed
  cp "$repository/$2" saved
  printf '\x5a' | dd of="$repository/$2" bs=1 seek="$3" conv=notrunc status=none
  refused "$1" "${alpine[@]}"
  mv saved "$repository/$2"
}
damaged 'signature by test-6f00ba11.rsa.pub is wrong' APKINDEX.tar.gz 700
damaged 'busybox-1.36.1-r2' busybox-1.36.1-r2.apk 30
damaged 'its data is not what its signed part says' busybox-1.36.1-r2.apk 500000
cp $repository/hello-2.9-r7.apk kept; mv $repository/hello-2.10-r1.apk saved; cp kept $repository/hello-2.10-r1.apk
refused 'it is not the package that the index lists' "${alpine[@]}"
mv saved $repository/hello-2.10-r1.apk
openssl genrsa 2048 2>/dev/null | openssl rsa -pubout 2>/dev/null >other.pub
mkdir other-keys && cp other.pub other-keys/other.rsa.pub
refused 'signed by test-6f00ba11.rsa.pub, which is not among the keys in other-keys' "${alpine[@]}" --keys other-keys
refused 'the image needs missing, which is in none of the repositories' "${alpine[@]}" --package missing

# A container image: built here, pushed to a registry on loopback, imported. Without root.
mkdir -p container/rootfs
umoci init --layout container/oci
umoci new --image container/oci:box
umoci unpack --image container/oci:box container/bundle
root=container/bundle/rootfs
mkdir -p "$root"/{bin,usr/bin,sbin,srv/app,srv/opaque,srv/gone,etc}
cp "$(command -v busybox)" "$root/bin/busybox"
for name in sh cat ls ip stat ps mount grep stty tty hostname sleep poweroff wc pwd; do ln -s busybox "$root/bin/$name"; done
echo 'lower layer' >"$root/srv/app/lower"; echo old >"$root/srv/opaque/old"; echo gone >"$root/srv/gone/file"
echo x >"$root/srv/owned"; chown 1234:5678 "$root/srv/owned"; chmod 4755 "$root/srv/owned"
umoci repack --refresh-bundle --image container/oci:box container/bundle
rm -rf "$root/srv/gone" "$root/srv/opaque"
mkdir "$root/srv/opaque"; echo new >"$root/srv/opaque/new"; echo 'upper layer' >"$root/srv/app/upper"
umoci repack --refresh-bundle --image container/oci:box container/bundle
umoci config --image container/oci:box --config.env 'GREETING=hello from the image' --config.workingdir /srv/app --config.cmd /bin/sh
registry=127.0.0.1:$(free_port)
printf 'version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: "%s"}\n' "$WORK/registry" "$registry" >registry.yml
docker-registry serve registry.yml >registry.log 2>&1 &
background+=($!)
within 20 bash -c "exec 3<>/dev/tcp/${registry/://}"
skopeo --insecure-policy copy -q --dest-tls-verify=false oci:container/oci:box docker://$registry/tests/box:1
refused skopeo --from-docker $registry/tests/nothing:1 --insecure-registry
mkdir -m 777 public
cp "$agent" public/agent
chmod 755 "$WORK"
# By a user of no rights: owners are right all the same.
(cd public && TMPDIR=$WORK/public HOME=/nonexistent setpriv --reuid 65534 --regid 65534 --clear-groups "$CLONE" rootfs create \
  --from-docker $registry/tests/box:1 --insecure-registry --hostname box --agent agent --size 64M -o container.img)
equal "what is left beside the image" "$(ls -A public | tr '\n' ' ')" "agent container.img "
create --from-docker oci:container/oci:box --hostname box --agent "$agent" --size 64M -o from-oci.img
skopeo --insecure-policy copy -q oci:container/oci:box docker-archive:box.tar:box:1
create --from-docker docker-archive:box.tar --size 64M -o from-archive.img
for image in from-oci from-archive; do
  equal "$image" "$(debugfs -R 'cat srv/app/upper' $image.img 2>/dev/null)" 'upper layer'
done
# A local engine is asked first: one that tells what it was asked, and exports a tree.
mkdir engine
cat >engine/docker <<EOF
#!/bin/sh
echo "\$*" >>$WORK/engine.log
case \$1 in
  version) echo 20.10 ;;
  create) echo 0123456789ab ;;
  inspect) echo '{"Env":["GREETING=engine"],"WorkingDir":"/srv","Cmd":["/bin/sh"]}' ;;
  export) tar -C $WORK/$root -c . ;;
esac
EOF
chmod 755 engine/docker
PATH=$WORK/engine:$PATH create --from-docker local/box:2 --size 64M -o from-engine.img
equal "calls of the engine" "$(cut -d' ' -f1,2 engine.log | tr '\n' ' ')" 'version --format create local/box:2 inspect --type export 0123456789ab rm 0123456789ab '
debugfs -R 'cat etc/clone-init.conf' from-engine.img 2>/dev/null | grep -qx 'env=GREETING=engine'
# Layers are hostile.
hostile() { # MESSAGE PYTHON: an image whose layer is what the statement adds to a tar
  rm -rf hostile && mkdir hostile
  python3 - "$2" <<'PY'
import hashlib, io, json, os, sys, tarfile
layer = io.BytesIO()
tar = tarfile.open(fileobj=layer, mode="w")
def add(name, kind=tarfile.REGTYPE, link="", data=b"x"):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(data) if kind == tarfile.REGTYPE else 0
    tar.addfile(entry, io.BytesIO(data))
exec(sys.argv[1])
tar.close()
os.makedirs("hostile/blobs/sha256")
def blob(data, media):
    digest = hashlib.sha256(data).hexdigest()
    open("hostile/blobs/sha256/" + digest, "wb").write(data)
    return {"mediaType": "application/vnd.oci.image." + media, "digest": "sha256:" + digest, "size": len(data)}
config = blob(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer.getvalue()).hexdigest()]}}).encode(), "config.v1+json")
manifest = blob(json.dumps({"schemaVersion": 2, "config": config, "layers": [blob(layer.getvalue(), "layer.v1.tar")]}).encode(), "manifest.v1+json")
manifest["annotations"] = {"org.opencontainers.image.ref.name": "x"}
json.dump({"schemaVersion": 2, "manifests": [manifest]}, open("hostile/index.json", "w"))
json.dump({"imageLayoutVersion": "1.0.0"}, open("hostile/oci-layout", "w"))
PY
  refused "$1" --from-docker oci:hostile:x --size 64M
}
hostile "'..' in a name" 'add("../../escaped")'
hostile "an absolute name" 'add("/etc/escaped")'
hostile "is a symbolic link that leads nowhere" 'add("link", tarfile.SYMTYPE, "/tmp/e2e-escape"); add("link/file")'
hostile "a hard link to" 'add("passwd", tarfile.LNKTYPE, "etc/passwd")'
hostile "'..' in a name" 'add("passwd", tarfile.LNKTYPE, "../../etc/passwd")'
[[ ! -e /tmp/e2e-escape && ! -e /etc/escaped ]] || fail "a layer wrote to the host"

# The command line, and what cannot be.
refused 'give one of --distro, --from-dir and --from-docker' --size 64M
refused 'give one of --distro' --from-dir folder --distro debian
refused "--size: 'lots' given; allowed is a size from 16M to 16T" --from-dir folder --size lots
refused "--size: '1M' given" --from-dir folder --size 1M
refused "--package: '-o evil' given" --distro debian --package='-o evil'
refused "--release goes with --distro only" --from-dir folder --release 3
refused "--mirror: 'ftp://x' given" --distro debian --mirror ftp://x
refused "--hostname: 'a b' given" --from-dir folder --hostname 'a b'
refused "nowhere: No such file or directory" --from-dir nowhere
refused "--agent nothing: No such file" --from-dir folder --agent nothing
refused "--agent folder: not a program; allowed is a regular file that is executable" --from-dir nowhere --agent folder
refused "--agent folder.list: not a program" --from-dir nowhere --agent folder.list
refused "that is a private key" --from-dir folder --ssh-key "$(echo 'BEGIN OPENSSH PRIVATE KEY' >id; echo id)"
refused "no public key in it" --from-dir folder --ssh-key folder.list
refused "'bogus' given" --distro debian --hostname web --release bookworm --size bogus
refused "is not an image" --from-docker=--help
for arguments in '' --force '--format qcow2'; do
  ends_with 1 "$CLONE" rootfs create --from-dir nowhere -o folder $arguments 2>messages
  contains messages 'folder: is a directory; give the name of a file'
done
# The names of what is needed on the way are nobody's concern.
mkdir small.qcow2.raw
create --from-dir container/rootfs -o small.qcow2 --format qcow2 --size 16M
qemu-img check small.qcow2
equal "what is beside small.qcow2" "$(ls -A | grep -F small.qcow2 | tr '\n' ' ')" 'small.qcow2 small.qcow2.raw '
# Too small: the size that the message names does.
mkdir large
head -c 40000000 /dev/urandom >large/file
refused "the files need at least" --from-dir large --size 32M
needed=$(grep -o 'at least [0-9]*M' messages | tr -dc 0-9)
create --from-dir large --size "${needed}M" -o enough.img
e2fsck -fn enough.img
echo precious >there.img
! "$CLONE" rootfs create --from-dir folder -o there.img 2>messages
contains messages 'there.img: it exists already (--force replaces it)'
equal "a file that is not replaced" "$(<there.img)" precious
create --from-dir folder -o there.img --size 64M --force
e2fsck -fn there.img

# A command that is a program of its own: listed, and trusted no more than a plugin is.
"$CLONE" --help | grep -q '^  rootfs  *Make a disk image'
ends_with 2 "$CLONE" nonesuch 2>messages
contains messages "unknown command 'nonesuch'; there are: run, "
ends_with 2 "$CLONE" init 2>messages # a program of the guest's is none
if ((EUID == 0)); then
  mkdir -p prefix/bin prefix/libexec/clone
  cp "$CLONE" prefix/bin/
  cp "$program" "$program.summary" prefix/libexec/clone/
  prefix/bin/clone rootfs create --help >/dev/null
  chmod o+w prefix/libexec/clone/clone-rootfs
  ends_with 1 prefix/bin/clone rootfs create --help 2>messages
  contains messages 'refused: others can write to'
fi
# On a terminal one line is redrawn, with percent and bytes.
python3 - <<'PY'
import os
from terminal import Terminal
terminal = Terminal([os.environ["CLONE"], "rootfs", "create", "--from-dir", "large", "-o", "terminal.img", "--force"])
terminal.expect("\rwriting 38.2 MiB in")
terminal.expect("100%  38.2 MiB of 38.2 MiB")
terminal.expect("terminal.img: 4.0 GiB raw, ")
terminal.ends(0)
PY

# Interrupted, and out of space: the message names the step, nothing is left.
mkdir interrupted && cd interrupted
mkdir programs
printf '#!/bin/sh\necho $$ >started\necho "I: busy" >&2\nsleep 1000\n' >programs/mmdebstrap
chmod 755 programs/mmdebstrap
mkdir scratch
TMPDIR=$PWD/scratch PATH=$PWD/programs:$PATH "$CLONE" rootfs create --distro debian -o image.img 2>../messages &
process=$!
within 10 test -s started
group=$(<started) # a program of ours leads a process group
within 10 pgrep -x sleep -g "$group" >/dev/null
kill -TERM $process
ends_with 143 wait $process
contains ../messages 'rootfs: mmdebstrap bookworm: interrupted by SIGTERM'
equal "left after an interruption" "$(ls -A . scratch | tr '\n' ' ')" ".: programs scratch started  scratch: "
! pgrep -l -g "$group" --runstates R,S,D,T || fail "a process of mmdebstrap is left"
cd ..
mkdir small
if ((EUID == 0)) && unshare --mount true 2>/dev/null; then
  unshare --mount bash -c 'mount -t tmpfs -o size=1M none small && mkdir small/tmp && ! "$CLONE" rootfs create --from-dir folder -o small/image.img 2>messages && ls -A small >left'
  contains messages 'No space left on device'
  contains messages 'rootfs: writing'
  equal "left after a full disk" "$(<left)" tmp
fi

[[ ! $debian ]] || wait "$debian" || { cat debian-messages; fail "Debian"; }
cp --sparse=always "$debian_image" debian.img
"$here/testhost" --timeout $((TIME_LIMIT - SECONDS)) --memory 3G --output "$WORK/output" --keep "$here" --keep "$CLONE" --disk debian.img --disk alpine.img \
  --disk public/container.img --disk folder.qcow2 -- "$here/rootfs-boots.py" debian alpine container folder,format=qcow2
qemu-img check folder.qcow2
qemu-img convert -O raw folder.qcow2 folder.img
# `clone stop` was systemd's to do: the root file system was unmounted.
! dumpe2fs -h debian.img 2>/dev/null | grep needs_recovery || fail "Debian was not shut down in good order"
# A guest that powers off with files open leaves its journal to be replayed (status 1); what is damaged after that is an error.
for image in debian alpine public/container folder; do
  e2fsck -fp $image.img || (($? == 1))
  e2fsck -fn $image.img
done
