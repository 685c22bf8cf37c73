#!/bin/sh
# Runs the test of the microkernels on an emulated CPU: boots Linux in the emulator Bochs.
#   BOCHS=DIR KERNEL=FILE [MODEL=sapphire_rapids] [KERNEL_ARGS=...] [LIMIT=3600] tools/emulate_avx512.sh [ARG...]
# BOCHS   source tree of Bochs, newer than 3.0 and built in place (nothing is installed) with
#         ./configure --with-nogui --enable-x86-64 --enable-cpu-level=6 --enable-avx --enable-evex \
#             --enable-all-optimizations --enable-long-phy-address --disable-docbook && make
# KERNEL  vmlinuz with a built-in serial console, such as that of Debian's linux-image-cloud-amd64
# MODEL   corei7_skylake_x has AVX-512 without BF16, corei7_haswell_4770 has AVX2 only
# ARG     arguments of tests/microkernels/tile_test.cpp
# Needs g++, python3, cpio, xorriso, isolinux. Exits with the status of the test.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
bochs=$(cd "${BOCHS:?expected BOCHS to be a built source tree of Bochs}" && pwd)
kernel=${KERNEL:?expected KERNEL to be a vmlinuz}
isolinux=${ISOLINUX:-/usr/lib/ISOLINUX/isolinux.bin}
ldlinux=${LDLINUX:-/usr/lib/syslinux/modules/bios/ldlinux.c32}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

(cd "$root" && python3 -m tools.tile_test --static --all "$work/tile_test")

# The only program of the guest: runs the test on the serial port and powers off.
cat > "$work/init.c" << 'EOF'
#include <fcntl.h>
#include <stdio.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

int main(void) {
  int status = 0;
  mkdir("/dev", 0755);
  mknod("/dev/ttyS0", S_IFCHR | 0600, makedev(4, 64));
  for (int fd = open("/dev/ttyS0", O_RDWR); fd >= 0 && fd < 2;) fd = dup(fd);
  if (fork() == 0) {
    char* arguments[] = {"/tile_test", ARGUMENTS NULL};
    execv(arguments[0], arguments);
    _exit(127);
  }
  wait(&status);
  printf("guest: status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  fflush(stdout);
  tcdrain(1);
  reboot(RB_POWER_OFF);
}
EOF
mkdir "$work/guest" "$work/disc"
arguments=$(for argument in "$@"; do printf '"%s",' "$argument"; done)
gcc -O1 -static -D"ARGUMENTS=$arguments" "$work/init.c" -o "$work/guest/init"
cp "$work/tile_test" "$work/guest/"
(cd "$work/guest" && find . | cpio --quiet -o -H newc) > "$work/disc/initrd"
cp "$kernel" "$work/disc/vmlinuz"
cp "$isolinux" "$ldlinux" "$work/disc/"
cat > "$work/disc/isolinux.cfg" << EOF
DEFAULT linux
LABEL linux
  KERNEL vmlinuz
  INITRD initrd
  APPEND console=ttyS0 mitigations=off lsm=capability panic=-1 ${KERNEL_ARGS:-clearcpuid=fsrm,erms,rep_good}
EOF
xorriso -as mkisofs -quiet -o "$work/disc.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
    -boot-info-table "$work/disc" 2> "$work/xorriso.log"
cat > "$work/bochsrc" << EOF
cpu: model=${MODEL:-sapphire_rapids}, ips=50000000
memory: guest=256, host=256
romimage: file=$bochs/bios/BIOS-bochs-latest
vgaromimage: file=$bochs/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
ata0-master: type=cdrom, path=$work/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
display_library: nogui
log: $work/log
panic: action=fatal
EOF
# Bochs reports an error on power-off; the status is that of the guest.
timeout "${LIMIT:-3600}" "$bochs/bochs" -q -f "$work/bochsrc" > "$work/screen" 2>&1 < /dev/null || true
tr -d '\r' < "$work/serial"
status=$(sed -n 's/^guest: status \([0-9]*\).*/\1/p' "$work/serial")
if [ -z "$status" ]; then
    tail -n 20 "$work/log"
    echo "emulate_avx512.sh: the guest did not finish"
    exit 3
fi
exit "$status"
