# Loads KVM and boots a second Linux under QEMU: `l1=linux`. Read by /init.
extension=kvm-amd
grep -q '^flags.* vmx ' /proc/cpuinfo && extension=kvm-intel
for module in irqbypass kvm $extension; do
    insmod "/lib/modules/$module.ko" || exit
done
processors=2
for word in $(cat /proc/cmdline); do
    case $word in
        l2-processors=*) processors=${word#*=} ;;
        load=*) load=$word ;;
    esac
done
# L2 is told of Hyper-V alone, not of KVM, whose hypercalls L0 could take for flushes.
# Without XSAVE: Linux warns of what KVM makes of the emulator's XSAVE leaves, on the bare emulator, too.
cpu=host,kvm=off,xsave=off,hv-relaxed,hv-vapic,hv-vpindex,hv-tlbflush,hv-ipi
LD_PRELOAD=/lib/libdirect_flush.so timeout 600 /usr/bin/qemu-system-x86_64 -accel kvm -cpu "$cpu" -smp "$processors" -m 256 \
    -nodefaults -no-user-config -display none -no-reboot -serial stdio \
    -kernel /l2-kernel -initrd /l2-initrd -append "console=ttyS0 quiet panic=-1 $load" 2>&1 </dev/null |
    while read -r line; do
        echo "l2: $line"
        case $line in *"workload: passed"*) echo "init: L2 is content" ;; esac
    done
