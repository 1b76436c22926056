#!/bin/sh
# Portcullis @VERSION@: makes a firewall qube in dom0. Read it before you run it.
#
#   install.sh                     show what would be done, and change nothing
#   install.sh --apply             do it: also to upgrade, and again without harm
#   install.sh --remove [--apply]  the same for taking everything away again
#
#   --name QUBE    name of the firewall qube (sys-portcullis)
#   --netvm QUBE   where its traffic goes, when it is made (sys-net)
#
# Nothing of the system is switched to it: the closing lines say how you do that.
set -eu

name=sys-portcullis netvm=sys-net apply=no action=install
kernel=@KERNEL@
sha256=@SHA256@
kernels=${PORTCULLIS_KERNELS:-/var/lib/qubes/vm-kernels}
here=$(cd "$(dirname "$0")" && pwd)
image=$here/vm-kernels/$kernel/vmlinuz

fail() { echo "install.sh: $*" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --apply) apply=yes ;;
        --remove) action=remove ;;
        --name) name=${2:?--name needs a qube}; shift ;;
        --netvm) netvm=${2:?--netvm needs a qube}; shift ;;
        *) sed -n '2,/^$/s/^# \{0,1\}//p;/^set /q' "$0"; exit 2 ;;
    esac
    shift
done

# Every change goes through here, and only with --apply is it made.
run() {
    if [ $apply = yes ]; then echo "+ $*"; "$@"; else echo "would run: $*"; fi
}

exists() { qvm-check --quiet "$name" 2>/dev/null; }
# A value that cannot be read is one that must be set.
pref() { qvm-prefs "$name" "$1" 2>/dev/null || echo '(unset)'; }
feature() { qvm-features "$name" "$1" 2>/dev/null || echo '(unset)'; }

set_pref() {
    now=$(pref "$1")
    [ "$now" != None ] || now=''
    [ "$now" = "$2" ] || run qvm-prefs "$name" "$1" "$2"
}
set_feature() { [ "$(feature "$1")" = "$2" ] || run qvm-features "$name" "$1" "$2"; }

# A qube of this name that is something else is left alone.
must_be_ours() {
    case $(pref kernel) in
        portcullis-*) ;;
        *) fail "there is a qube $name, and it is no Portcullis; choose another --name" ;;
    esac
}

install() {
    echo "$sha256  $image" | sha256sum --check --quiet - || fail "$image is damaged"
    fresh=no
    if exists; then must_be_ours; else fresh=yes; fi
    if ! cmp -s "$image" "$kernels/$kernel/vmlinuz"; then
        run mkdir -p "$kernels/$kernel"
        run cp "$image" "$kernels/$kernel/vmlinuz"
    fi
    if [ $fresh = yes ]; then
        run qvm-create --class StandaloneVM --label green "$name"
        # What you may well want otherwise is set once only.
        set_pref netvm "$netvm"
        set_pref memory 32
    fi
    set_pref virt_mode pvh
    set_pref kernel $kernel
    set_pref kernelopts ''
    set_pref maxmem 0
    set_pref vcpus 1
    set_pref provides_network True
    set_pref audiovm ''
    set_pref guivm ''
    set_pref include_in_backups False
    if [ "$(qubes-prefs default_netvm)" = "$name" ]; then set_pref autostart True; fi
    for one in qubes-firewall no-default-kernelopts skip-update qrexec vmexec; do
        set_feature "$one" 1
    done
    set_feature gui ''
    cat <<END

Yours to decide; nothing of this was changed:
  qvm-prefs QUBE netvm $name           one qube behind it, also while that runs
  qubes-prefs default_netvm $name      all qubes that have no netvm of their own (now: $(qubes-prefs default_netvm))
  qvm-prefs $name autostart True       start it with the computer, once it is the default
  qubes-prefs updatevm sys-net         must not be this qube: dom0's updates need Linux (now: $(qubes-prefs updatevm))
Leave clockvm on a Linux qube (now: $(qubes-prefs clockvm)). A running firewall takes a new image when it is restarted.
END
}

remove() {
    if exists; then
        must_be_ours
        for switch in default_netvm updatevm clockvm; do
            [ "$(qubes-prefs $switch)" != "$name" ] || fail "$name is the $switch; choose another first: qubes-prefs $switch QUBE"
        done
        users=$(qvm-ls --raw-data --fields NAME,NETVM | awk -F '|' -v name="$name" '$2 == name { print $1 }')
        [ -z "$users" ] || fail "these qubes are behind $name; give them another netvm first: $(echo "$users" | tr '\n' ' ')"
        if qvm-check --quiet --running "$name" 2>/dev/null; then run qvm-shutdown --wait "$name"; fi
        run qvm-remove --force "$name"
    fi
    used=" $(qvm-ls --raw-data --fields NAME,KERNEL | awk -F '|' -v name="$name" '$1 != name { print $2 }' | tr '\n' ' ') "
    for folder in "$kernels"/portcullis-*; do
        [ -f "$folder/vmlinuz" ] || continue
        case $used in *" ${folder##*/} "*) continue ;; esac
        run rm "$folder/vmlinuz"
        run rmdir "$folder"
    done
}

$action
[ $apply = yes ] || echo "Nothing was changed. Add --apply to do it."
