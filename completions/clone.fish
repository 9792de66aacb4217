# SPDX-License-Identifier: Apache-2.0
# Completion of clone's command line for fish.

# The command that is typed: "list", "plugin check".
function __clone_command
    set -l words (commandline -opc)
    set -e words[1]
    set -q words[1]; or return
    set -l command $words[1]
    for word in $words[2..-1]
        switch "$command $word"
            case 'exec --'
                echo 'exec --'
                return
            case 'template list' 'template inspect' 'template verify' 'template rm' 'template compress' 'template decompress' 'template flatten' 'template export' 'template import' 'plugin list' 'plugin inspect' 'plugin check' 'rootfs create'
                set command "$command $word"
        end
    end
    echo $command
end

function __clone_in
    contains -- (__clone_command) $argv
end

function __clone_at_start
    test (count (commandline -opc)) -eq 1
end

function __clone_vms
    clone list 2>/dev/null | awk 'NR > 1 { print $3 "\t" $4 }'
end

function __clone_templates
    clone template list --json 2>/dev/null | grep -o '"name":"[^"]*' | cut -d '"' -f 4
end

function __clone_plugins
    clone plugin list 2>/dev/null | awk 'NR > 1 && NF { print $1 }'
end

# The names of devices, transports or policies.
function __clone_provided
    clone plugin list --json 2>/dev/null | grep -o "\"kind\":\"$argv\",\"name\":\"[^\"]*" | cut -d '"' -f 8
end

complete -c clone -f
complete -c clone -n '__clone_at_start' -l help -s h -d 'List the commands'
complete -c clone -n '__clone_at_start' -l version -d 'Print the version'
complete -c clone -n '__clone_at_start' -a run -d 'Boot a virtual machine'
complete -c clone -n '__clone_at_start' -a fork -d 'Start a virtual machine from a template'
complete -c clone -n '__clone_at_start' -a snapshot -d 'Keep a running VM as a template'
complete -c clone -n '__clone_at_start' -a template -d 'List, inspect, verify, copy and remove templates'
complete -c clone -n '__clone_at_start' -a list -d 'List the VMs that run'
complete -c clone -n '__clone_at_start' -a status -d 'Tell what each VM and this host use of memory'
complete -c clone -n '__clone_at_start' -a attach -d "Enter a VM's serial console"
complete -c clone -n '__clone_at_start' -a logs -d "Print what a VM's console printed"
complete -c clone -n '__clone_at_start' -a stop -d 'Power a VM off'
complete -c clone -n '__clone_at_start' -a pause -d 'Let a VM stand still'
complete -c clone -n '__clone_at_start' -a resume -d 'Let a paused VM go on'
complete -c clone -n '__clone_at_start' -a metrics -d "Print a VM's metrics as Prometheus text"
complete -c clone -n '__clone_at_start' -a exec -d 'Run a command in a virtual machine'
complete -c clone -n '__clone_at_start' -a cp -d 'Copy files into a virtual machine or out of it'
complete -c clone -n '__clone_at_start' -a plugin -d 'List, inspect and check plugins'
complete -c clone -n '__clone_at_start' -a doctor -d 'Tell what this machine can do for virtual machines'
complete -c clone -n '__clone_at_start' -a rootfs -d 'Make a disk image'

complete -c clone -n '__clone_in run' -l kernel -rF -d 'Kernel to boot'
complete -c clone -n '__clone_in run' -l initrd -rF -d 'Your own initial RAM disk'
complete -c clone -n '__clone_in run' -l cmdline -x -d "Added to the kernel's command line"
complete -c clone -n '__clone_in run' -l modules -xa '(__fish_complete_directories)' -d "Where the kernel's modules are"
complete -c clone -n '__clone_in run' -l init -x -d 'Program of the guest that the generated initrd starts'
complete -c clone -n '__clone_in run' -l boot-protocol -xa 'auto linux64 pvh' -d 'How the kernel is entered'
complete -c clone -n '__clone_in run' -l profile -rF -d 'Settings from a YAML file'
complete -c clone -n '__clone_in run' -l mem -x -d 'Memory'
complete -c clone -n '__clone_in run' -l mem-mb -x -d 'Memory'
complete -c clone -n '__clone_in run' -l mem-backing -xa 'anonymous memfd' -d 'What the memory is on the host'
complete -c clone -n '__clone_in run' -l huge-pages -xa 'off kernel transparent 2M' -d 'Back the memory with huge pages'
complete -c clone -n '__clone_in run fork' -l ksm -xa 'on off' -d 'Let the host merge identical pages'
complete -c clone -n '__clone_in run' -l vcpus -x -d 'Virtual processors'
complete -c clone -n '__clone_in run fork' -l no-reboot -d 'Exit when the guest reboots or panics'
complete -c clone -n '__clone_in run fork' -l grace -x -d 'Seconds to power off in'
complete -c clone -n '__clone_in run fork' -l name -x -d 'What other commands call this VM'
complete -c clone -n '__clone_in run fork' -l no-control -d 'No control socket'
complete -c clone -n '__clone_in run' -l transport -xa '(__clone_provided transport)' -d 'How virtio devices appear'
complete -c clone -n '__clone_in run' -l balloon-policy -xa 'none (__clone_provided balloon-policy)' -d 'What decides how much memory is given back'
complete -c clone -n '__clone_in run fork' -l device -xa '(__clone_provided device)' -d 'Add a device'
complete -c clone -n '__clone_in run' -l without -xa '(__clone_provided device)' -d 'Leave out a default device'
complete -c clone -n '__clone_in run fork' -l balloon -x -d 'Take this much memory back'
complete -c clone -n '__clone_in run fork' -l rootfs -rF -d 'Boot from this disk image'
complete -c clone -n '__clone_in run fork' -l block -rF -d 'Attach a disk image'
complete -c clone -n '__clone_in run fork' -l overlay -rFa 'tmpfs auto off' -d 'Leave the image of --rootfs as it is'
complete -c clone -n '__clone_in run fork' -l cid -x -d "The guest's vsock context id"
complete -c clone -n '__clone_in run fork' -l vsock -xa 'auto vhost user' -d 'Who carries vsock streams'
complete -c clone -n '__clone_in run' -l dry-run -d 'Print the plan as a profile and exit'
complete -c clone -n '__clone_in run fork' -l timing -d 'Print what each step of the start took'
complete -c clone -n '__clone_in run fork' -l verbose -s v -d 'Tell more of what happens'
complete -c clone -n '__clone_in run fork' -l quiet -s q -d 'Print errors only'
complete -c clone -n '__clone_in run fork "template list" "template inspect" "template verify" "template rm" "template compress" "template decompress" "template flatten" "template export" "template import" plugin "plugin list" "plugin inspect"' -l plugin-dir -xa '(__fish_complete_directories)' -d 'Look for plugins here first'
complete -c clone -n '__clone_in run fork "template list" "template inspect" "template verify" "template rm" "template compress" "template decompress" "template flatten" "template export" "template import" plugin "plugin list" "plugin inspect"' -l allow-insecure-plugins -d 'Load plugins that others could have written'

complete -c clone -n '__clone_in fork' -l template -s t -xa '(__clone_templates)' -d 'A template'
complete -c clone -n '__clone_in fork' -l from -xa '(__clone_vms)' -d 'A VM that runs and goes on'
complete -c clone -n '__clone_in fork' -l count -x -d 'So many, each a process'
complete -c clone -n '__clone_in fork' -l prepare -x -d 'Keep so many ready for later forks'
complete -c clone -n '__clone_in fork' -l prefault -xa 'none recorded all' -d 'Memory to map ahead'
complete -c clone -n '__clone_in fork snapshot "template list" "template inspect" "template verify" "template rm" "template compress" "template decompress" "template flatten" "template export" "template import"' -l store -xa '(__fish_complete_directories)' -d 'Folder of the templates'
complete -c clone -n '__clone_in fork snapshot "template list" "template inspect" "template verify" "template rm" "template compress" "template decompress" "template flatten" "template export" "template import"' -l backend -xa 'file memory' -d 'What keeps the templates'
complete -c clone -n '__clone_in snapshot "template import"' -l name -s n -x -d 'What the template is called'
complete -c clone -n '__clone_in snapshot' -l incremental -d 'Keep what differs from the last snapshot'
complete -c clone -n '__clone_in snapshot' -l stop -d 'End the VM when the template is written'
complete -c clone -n '__clone_in template' -a list -d 'The templates that there are'
complete -c clone -n '__clone_in template' -a inspect -d 'What is in a template'
complete -c clone -n '__clone_in template' -a verify -d 'Check the sums of everything in a template'
complete -c clone -n '__clone_in template' -a rm -d 'Remove a template'
complete -c clone -n '__clone_in template' -a compress -d 'Keep a template compressed'
complete -c clone -n '__clone_in template' -a decompress -d 'Keep a template as its forks map it'
complete -c clone -n '__clone_in template' -a flatten -d 'Make a full template of one that is a difference to others'
complete -c clone -n '__clone_in template' -a export -d 'Write a template to a file'
complete -c clone -n '__clone_in template' -a import -d 'Make a template of an exported file'
complete -c clone -n '__clone_in "template export" "template import"' -F
complete -c clone -n '__clone_in "template inspect" "template verify" "template rm" "template compress" "template decompress" "template flatten" "template export"' -a '(__clone_templates)'

complete -c clone -n '__clone_in list' -l no-daemon -d 'Look at the VMs themselves'
complete -c clone -n '__clone_in list status doctor "template list" "template inspect" "plugin list"' -l json -d 'As JSON'
complete -c clone -n '__clone_in status' -l watch -s w -d 'Draw it again and again'

complete -c clone -n '__clone_in snapshot attach logs stop pause resume metrics' -a '(__clone_vms)'
complete -c clone -n '__clone_in snapshot attach logs stop pause resume metrics exec cp' -l vm-id -xa '(__clone_vms)' -d 'Name, id or process id of the VM'
complete -c clone -n '__clone_in attach' -l read-only -s r -d 'Watch; type nothing'
complete -c clone -n '__clone_in logs' -l follow -s f -d 'Go on with what is printed from now on'
complete -c clone -n '__clone_in logs' -l vmm -d "The VMM's own messages instead"
complete -c clone -n '__clone_in stop' -l grace -x -d 'Seconds that the guest may take'
complete -c clone -n '__clone_in stop' -l force -s f -d 'Stop it at once'

complete -c clone -n '__clone_in exec' -l interactive -s i -d 'Send standard input'
complete -c clone -n '__clone_in exec' -l tty -s t -d 'Give the command this terminal'
complete -c clone -n '__clone_in exec' -l user -s u -x -d 'A user of the guest'
complete -c clone -n '__clone_in exec' -l workdir -s w -x -d 'A directory of the guest'
complete -c clone -n '__clone_in exec' -l env -s e -x -d 'Add NAME=VALUE to the environment'
complete -c clone -n '__clone_in exec cp' -l timeout -x -d 'Seconds that the agent may take'
complete -c clone -n '__clone_in cp' -l owners -d 'Keep user and group'
complete -c clone -n '__clone_in cp' -F
complete -c clone -n '__clone_in cp' -a '(__clone_vms | string replace \t ":"\t)'

complete -c clone -n '__clone_in plugin' -a list -d 'The plugins that are found'
complete -c clone -n '__clone_in plugin' -a inspect -d 'What a plugin holds'
complete -c clone -n '__clone_in plugin' -a check -d 'Hold a plugin file against the rules'
complete -c clone -n '__clone_in "plugin inspect"' -a '(__clone_plugins)'
complete -c clone -n '__clone_in "plugin check"' -F
complete -c clone -n '__clone_in "plugin check"' -l with -x -d 'Options for a device or transport'
complete -c clone -n '__clone_in "plugin check"' -l time-limit -x -d 'When a phase counts as hung'

complete -c clone -n '__clone_in doctor' -l can-run-linux -d 'Succeed if stock kernels run here'

complete -c clone -n '__clone_in rootfs' -a create -d 'Make a disk image with a root file system'
complete -c clone -n '__clone_in "rootfs create"' -l output -s o -rF -d 'The image'
complete -c clone -n '__clone_in "rootfs create"' -l size -x -d 'Of the file system'
complete -c clone -n '__clone_in "rootfs create"' -l format -xa 'raw qcow2' -d 'Of the image'
complete -c clone -n '__clone_in "rootfs create"' -l hostname -x -d "The guest's name"
complete -c clone -n '__clone_in "rootfs create"' -l ssh-key -rF -d 'Public keys that may log in as root'
complete -c clone -n '__clone_in "rootfs create"' -l agent -rF -d 'A program to start as the guest agent'
complete -c clone -n '__clone_in "rootfs create"' -l force -d 'Replace an image that exists'
complete -c clone -n '__clone_in "rootfs create"' -l quiet -s q -d 'Errors only'
complete -c clone -n '__clone_in "rootfs create"' -l distro -xa 'debian ubuntu alpine' -d 'A distribution'
complete -c clone -n '__clone_in "rootfs create"' -l from-dir -xa '(__fish_complete_directories)' -d 'The files below a folder'
complete -c clone -n '__clone_in "rootfs create"' -l from-docker -x -d 'A container image'
complete -c clone -n '__clone_in "rootfs create"' -l insecure-registry -d 'Ask the registry; it may speak plain HTTP'
complete -c clone -n '__clone_in "rootfs create"' -l release -x -d 'Of the distribution'
complete -c clone -n '__clone_in "rootfs create"' -l mirror -x -d 'Where packages come from'
complete -c clone -n '__clone_in "rootfs create"' -l package -x -d 'One more package'
complete -c clone -n '__clone_in "rootfs create"' -l keys -rF -d 'Whose signatures count'

complete -c clone -n '__clone_in run fork snapshot template "template list" "template inspect" "template verify" "template rm" "template compress" "template decompress" "template flatten" "template export" "template import" list status attach logs stop pause resume metrics exec cp doctor plugin "plugin list" "plugin inspect" "plugin check" rootfs "rootfs create"' -l help -s h -d 'Print help'
