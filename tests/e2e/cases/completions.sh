# SPDX-License-Identifier: Apache-2.0
# Completion in bash, zsh and fish knows every command and every option that --help shows; that of bash, and of fish where it is
# installed, is asked for commands, options, values, names of VMs and files.
# seconds: 5
# host: no
completions=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../../../completions")

mkdir bin folder
cat >bin/clone <<'END'
#!/bin/sh
case "$*" in
  list) printf 'PID  ID        NAME  STATE\n12   107961aa  web   running\n13   5f03c2d1  db    paused\n' ;;
  'template list --json') echo '[{"name":"base","parent":null},{"name":"warm","parent":"base"}]' ;;
  'plugin list') printf 'PLUGIN  VERSION\nserial  1.0.0\n' ;;
  'plugin list --json') echo '{"plugins":[{"provides":[{"kind":"device","name":"serial"},{"kind":"transport","name":"mmio"}]}]}' ;;
esac
END
chmod +x bin/clone
touch 'a file.img'
PATH=$WORK/bin:$PATH
source "$completions/clone.bash"

completed() { # WORD…: what bash offers in place of the last word, sorted
  trap - ERR # compgen without a match
  COMP_WORDS=("$@")
  COMP_CWORD=$(($# - 1))
  _clone clone "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
  ((${#COMPREPLY[@]} == 0)) || printf '%s\n' "${COMPREPLY[@]}" | sort
}
offers() { # EXPECTED WORD…
  equal "offered for ${*:2}" "$(completed "${@:2}" | paste -sd ' ')" "$1"
}

fish_knows() { # COMMAND OPTION: an option of that command in fish's file, or in one that several commands have
  awk -v command="$1" -v option="$2" '
    match($0, /__clone_in [^\x27]*/) {
      rest = substr($0, RSTART + 11, RLENGTH - 11)
      while (match(rest, /"[^"]*"|[^ "]+/)) {
        word = substr(rest, RSTART, RLENGTH); rest = substr(rest, RSTART + RLENGTH); gsub(/"/, "", word)
        if (word == command && index($0 " ", " -l " substr(option, 3) " ")) found = 1
      }
    }
    END { exit !found }' "$completions/clone.fish"
}
zsh_knows() { # COMMAND OPTION: in the branch of that command
  awk -v command="$1" -v option="$2" '
    /^    \(.*\)$/ {
      inside = 0
      label = $0; gsub(/[ ]*[()][ ]*|\x27/, "", label)
      count = split(label, names, "|")
      for (i = 1; i <= count; ++i) if (names[i] == command) inside = 1
    }
    /^      ;;/ { inside = 0 }
    inside && $0 ~ "[{\x27\",)*]" option "[]=}[]" { found = 1 }
    END { exit !found }' "$completions/_clone"
}

commands() { # [COMMAND]: those that its --help lists
  "$CLONE" "$@" --help | awk '/^(Commands|Subcommands):/ { listed = 1; next } listed && /^  [a-z]/ { print $1; next } { listed = 0 }'
}
check_options() { # COMMAND…
  local name=$* option count=0
  for option in $("$CLONE" "$@" --help | sed -nE 's/^  (-[-a-zA-Z,]+).*/\1/p' | tr , '\n' | grep -E '^--'); do
    count=$((count + 1))
    completed clone "$@" -- | grep -qxF -e "$option" || fail "bash: clone $name lacks $option"
    zsh_knows "$name" "$option" || fail "zsh: clone $name lacks $option"
    fish_knows "$name" "$option" || fail "fish: clone $name lacks $option"
  done
  ((count > 0)) || fail "clone $name --help shows no option"
}
mapfile -t all < <(commands)
((${#all[@]} >= 17)) || fail "clone --help lists ${all[*]}"
for command in "${all[@]}"; do
  completed clone '' | grep -qxF -e "$command" || fail "bash lacks $command"
  grep -qE "^    ['\"]$command:" "$completions/_clone" || fail "zsh lacks $command"
  grep -qF -e "__clone_at_start' -a $command -d" "$completions/clone.fish" || fail "fish lacks $command"
  check_options "$command"
  for sub in $(commands "$command"); do
    completed clone "$command" '' | grep -qxF -e "$sub" || fail "bash: clone $command lacks $sub"
    grep -qE "['\"]$sub:" "$completions/_clone" || fail "zsh: clone $command lacks $sub"
    grep -qF -e "-n '__clone_in $command' -a $sub -d" "$completions/clone.fish" || fail "fish: clone $command lacks $sub"
    check_options "$command" "$sub"
  done
done
# The checks themselves can fail.
! zsh_knows list --force || fail "zsh_knows finds what is not there"
! fish_knows list --force || fail "fish_knows finds what is not there"
! zsh_knows list --js || fail "zsh_knows takes a part for the whole"

offers 'status stop' clone st
offers '--no-daemon' clone list --n
offers 'db web' clone stop ''
offers 'web' clone attach w
offers 'db web' clone exec --vm-id ''
offers 'web' clone logs --vm-id = w
offers 'web' clone logs -f w
offers '' clone exec -- --v
offers 'off on' clone run --ksm ''
offers 'off on' clone run --ksm =
offers 'serial' clone run --without s
offers 'mmio' clone run --transport ''
offers 'a file.img' clone run --rootfs a
offers 'folder' clone run --modules f
offers '' clone run --name w
offers 'base warm' clone fork --template ''
offers 'warm' clone fork -t w
offers 'db web' clone fork --from ''
offers '--template' clone fork --te
offers '--from' clone fork --fr
offers 'folder' clone fork --store f
offers 'web' clone snapshot --name base w
offers '' clone snapshot --name w
offers 'verify' clone template v
offers 'base warm' clone template rm ''
offers 'warm' clone template inspect --json w
offers '' clone template list ''
offers 'flatten' clone template fl
offers 'base warm' clone template flatten ''
offers 'compress' clone template comp
offers 'warm' clone template decompress w
offers 'a file.img' clone template import a
offers '--incremental' clone snapshot --in
offers 'web:' clone cp w
offers 'a file.img' clone cp a
offers '' clone cp web : /etc
offers 'check' clone plugin ch
offers 'serial' clone plugin --plugin-dir folder inspect ''
offers 'alpine debian ubuntu' clone rootfs create --distro ''
equal "completion of clone" "$(complete -p clone)" 'complete -F _clone clone'

if command -v zsh >/dev/null; then zsh -n "$completions/_clone"; fi
if command -v fish >/dev/null; then
  mkdir home
  fish_offers() { # EXPECTED LINE
    equal "fish offers for '$2'" \
      "$(HOME=$WORK/home fish --no-config -c 'source $argv[1]; complete -C $argv[2]' "$completions/clone.fish" "$2" | cut -f 1 | sort | paste -sd ' ')" "$1"
  }
  fish_offers 'status stop' 'clone st'
  fish_offers 'db web' 'clone stop '
  fish_offers '--json' 'clone list --j'
  fish_offers 'serial' 'clone plugin inspect '
  fish_offers 'base warm' 'clone fork --template '
  fish_offers 'db web' 'clone fork --from '
  fish_offers 'base warm' 'clone template rm '
  fish_offers '--stop --store' 'clone snapshot --st'
  fish_offers 'web:' 'clone cp w'
fi
