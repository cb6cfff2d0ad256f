#!/bin/sh
# Installs the Debian packages the harness needs, if any is missing and we are root; else says which.
#   sh ci/packages.sh         to run the harness
#   sh ci/packages.sh lab     also to build the lab (its QEMU, its images, kernels), and for the project's own tests
set -eu
packages="python3 python3-venv binutils gcc libc6-dev"
case "${1-}" in
'') ;;
lab)
    # QEMU (harness/lab/hardware.py)
    packages="$packages make ninja-build patch pkg-config xz-utils libglib2.0-dev zlib1g-dev libfdt-dev libcap-ng-dev"
    # images (ci/qemu/)
    packages="$packages mmdebstrap squashfs-tools cpio zstd kmod"
    # kernels of the lab's own (harness/lab/kbuild.py)
    packages="$packages git flex bison bc libelf-dev lz4"
    # what only its tests need: an archive of their own, BTF of their own
    packages="$packages gnupg pahole"
    ;;
*)
    echo "usage: sh ci/packages.sh [lab]" >&2
    exit 2
    ;;
esac
missing=
for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ]; then
    echo "missing Debian packages:$missing; as root: apt-get install$missing" >&2
    exit 2
fi
export DEBIAN_FRONTEND=noninteractive
echo "installing Debian packages:$missing"
apt-get update -qq
# What it says on the way is of no use to anybody; errors are on stderr.
# shellcheck disable=SC2086 -- a list of words
apt-get install -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 $missing >/dev/null
