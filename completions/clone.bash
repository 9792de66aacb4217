# SPDX-License-Identifier: Apache-2.0
# Completion of clone's command line for bash. Needs no bash-completion package.

_clone_options() { # COMMAND: its options
  case $1 in
    run)
      echo --kernel --initrd --cmdline --modules --init --boot-protocol --profile --mem --mem-mb --mem-backing --huge-pages \
        --ksm --vcpus --no-reboot --grace --name --no-control --transport --balloon-policy --device --without --balloon \
        --rootfs --block --overlay --cid --vsock --plugin-dir --allow-insecure-plugins --dry-run --timing --verbose --quiet
      ;;
    fork)
      echo --template --from --count --prepare --prefault --backend --store --ksm --no-reboot --grace --name --no-control --device \
        --rootfs --block --overlay --balloon --cid --vsock --plugin-dir --allow-insecure-plugins --timing --verbose --quiet
      ;;
    snapshot) echo --vm-id --name --incremental --backend --store --stop ;;
    'template list' | 'template inspect') echo --json --backend --store --plugin-dir --allow-insecure-plugins ;;
    'template verify' | 'template rm' | 'template compress' | 'template decompress' | 'template flatten' | 'template export')
      echo --backend --store --plugin-dir --allow-insecure-plugins
      ;;
    'template import') echo --name --backend --store --plugin-dir --allow-insecure-plugins ;;
    list) echo --json --no-daemon ;;
    status) echo --json --watch ;;
    attach) echo --vm-id --read-only ;;
    logs) echo --vm-id --follow --vmm ;;
    stop) echo --vm-id --grace --force ;;
    pause | resume | metrics) echo --vm-id ;;
    exec) echo --vm-id --interactive --tty --user --workdir --env --timeout -- ;;
    cp) echo --vm-id --owners --timeout ;;
    plugin) echo --plugin-dir --allow-insecure-plugins ;;
    'plugin list') echo --json ;;
    'plugin check') echo --with --time-limit ;;
    doctor) echo --json --can-run-linux ;;
    'rootfs create')
      echo --output --size --format --hostname --ssh-key --agent --force --quiet --distro --from-dir --from-docker \
        --insecure-registry --release --mirror --package --keys
      ;;
  esac
  echo --help
}

_clone_vms() { "$1" list 2>/dev/null | awk 'NR > 1 { print $3 }'; }
_clone_templates() { "$1" template list --json 2>/dev/null | grep -o '"name":"[^"]*' | cut -d '"' -f 4; }
_clone_plugins() { "$1" plugin list 2>/dev/null | awk 'NR > 1 && NF { print $1 }'; }

_clone_provided() { # PROGRAM KIND: the names of devices, transports or policies
  "$1" plugin list --json 2>/dev/null | grep -o "\"kind\":\"$2\",\"name\":\"[^\"]*" | cut -d '"' -f 8
}

_clone_offer() { # WORDS: those that begin with $current
  mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -W "$1" -- "$current")
}

_clone_offer_files() { # -f, or -d for folders only
  compopt -o filenames 2>/dev/null
  mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen "$1" -- "$current")
}

_clone() {
  local program=$1 current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
  local command=${COMP_WORDS[1]} word vm
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    _clone_offer "run fork snapshot template list status attach logs stop pause resume metrics exec cp plugin doctor rootfs --help --version"
    return
  fi
  # Bash breaks words at "=" and ":": --vm-id=web and web:/etc are three each.
  if [[ $current == = ]]; then
    current=''
  elif [[ $previous == = ]]; then
    previous=${COMP_WORDS[COMP_CWORD - 2]}
  fi
  for word in "${COMP_WORDS[@]:2:COMP_CWORD - 2}"; do
    case $command:$word in
      exec:--) return ;; # the guest's command is behind it
      template:list | template:inspect | template:verify | template:rm | template:compress | template:decompress | template:flatten | template:export | template:import | plugin:list | plugin:inspect | plugin:check | rootfs:create) command+=" $word" ;;
    esac
  done

  case $command:$previous in
    *:--vm-id | fork:--from) _clone_offer "$(_clone_vms "$program")" ;;
    fork:--template | fork:-t) _clone_offer "$(_clone_templates "$program")" ;;
    run:--kernel | run:--initrd | run:--profile | run:--rootfs | run:--block | fork:--rootfs | fork:--block) _clone_offer_files -f ;;
    run:--modules | *:--plugin-dir | *:--store) _clone_offer_files -d ;;
    *:--backend) _clone_offer "$(_clone_provided "$program" snapshot-backend)" ;;
    run:--boot-protocol) _clone_offer "auto linux64 pvh" ;;
    run:--mem-backing) _clone_offer "anonymous memfd" ;;
    run:--huge-pages) _clone_offer "off kernel transparent 2M" ;;
    run:--ksm | fork:--ksm) _clone_offer "on off" ;;
    run:--vsock | fork:--vsock) _clone_offer "auto vhost user" ;;
    run:--transport) _clone_offer "$(_clone_provided "$program" transport)" ;;
    run:--balloon-policy) _clone_offer "$(_clone_provided "$program" balloon-policy) none" ;;
    run:--device | run:--without | fork:--device) _clone_offer "$(_clone_provided "$program" device)" ;;
    run:--overlay | fork:--overlay)
      _clone_offer "tmpfs auto off"
      _clone_offer_files -f
      ;;
    fork:--prefault) _clone_offer "none recorded all" ;;
    'rootfs create':--distro) _clone_offer "debian ubuntu alpine" ;;
    'rootfs create':--format) _clone_offer "raw qcow2" ;;
    'rootfs create':--from-dir) _clone_offer_files -d ;;
    'rootfs create':-o | 'rootfs create':--output | 'rootfs create':--ssh-key | 'rootfs create':--agent | 'rootfs create':--keys)
      _clone_offer_files -f
      ;;
    run:--cmdline | run:--init | run:--mem | run:--mem-mb | run:--vcpus | run:--grace | run:--name | run:--balloon | run:--cid) ;;
    fork:--grace | fork:--name | fork:--count | fork:--prepare | fork:--balloon | fork:--cid | snapshot:--name | snapshot:-n | 'template import':--name | 'template import':-n) ;;
    stop:--grace | exec:--user | exec:-u | exec:--workdir | exec:-w | exec:--env | exec:-e | exec:--timeout | cp:--timeout) ;;
    'plugin check':--with | 'plugin check':--time-limit | 'rootfs create':--size | 'rootfs create':--hostname) ;;
    'rootfs create':--from-docker | 'rootfs create':--release | 'rootfs create':--mirror | 'rootfs create':--package) ;;
    *)
      case $command:$current in
        *:-*) _clone_offer "$(_clone_options "$command")" ;;
        snapshot:* | attach:* | logs:* | stop:* | pause:* | resume:* | metrics:*) _clone_offer "$(_clone_vms "$program")" ;;
        cp:*)
          [[ $current != : && $previous != : ]] || return 0 # a path of the guest
          _clone_offer_files -f
          for vm in $(_clone_vms "$program"); do _clone_offer "$vm:"; done
          compopt -o nospace 2>/dev/null
          ;;
        template:*) _clone_offer "list inspect verify rm compress decompress flatten export import" ;;
        'template inspect':* | 'template verify':* | 'template rm':* | 'template compress':* | 'template decompress':* | 'template flatten':*)
          _clone_offer "$(_clone_templates "$program")"
          ;;
        'template export':*)
          _clone_offer "$(_clone_templates "$program")"
          _clone_offer_files -f
          ;;
        'template import':*) _clone_offer_files -f ;;
        plugin:*) _clone_offer "list inspect check" ;;
        'plugin inspect':*) _clone_offer "$(_clone_plugins "$program")" ;;
        'plugin check':*) _clone_offer_files -f ;;
        rootfs:*) _clone_offer create ;;
      esac
      ;;
  esac
  return 0
}

complete -F _clone clone
