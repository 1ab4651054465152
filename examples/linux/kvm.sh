# Loads KVM and runs the launcher's guests: `l1=kvm`. Read by /init.
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
extension=kvm-amd
grep -q '^flags.* vmx ' /proc/cpuinfo && extension=kvm-intel
for module in irqbypass kvm $extension; do
    insmod "/lib/modules/$module.ko" || exit
done
processors=$(nproc)
timeout 120 launcher plain "$processors" 2000 &&
    timeout 120 launcher flush "$processors" $((80 / processors)) &&
    echo "init: L1 is content"
