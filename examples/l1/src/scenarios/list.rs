// Every scenario of this hypervisor, in the order in which they run: on which extension it runs (`svm`, `vmx`, or
// `both`), its name, its function. This is the one list of them: `scenarios/mod.rs` and `cargo xtask qemu-test` include
// it, each with a macro `scenarios` of its own.
scenarios! {
    svm "cpuid" => exits::cpuid;
    svm "hlt" => exits::hlt;
    svm "prefixed-vmmcall" => exits::prefixed_vmmcall;
    svm "msr" => exits::msr;
    svm "msr-map-change" => exits::msr_map_change;
    svm "io" => exits::io;
    svm "cr-dr" => exits::cr_dr;
    svm "cr0-selective" => exits::cr0_selective;
    svm "exceptions" => exits::exceptions;
    svm "shutdown" => exits::shutdown;
    svm "registers" => exits::registers;
    svm "injection" => events::injection;
    svm "interrupted-delivery" => events::interrupted_delivery;
    svm "virtual-interrupt" => events::virtual_interrupt;
    svm "interrupt-window" => events::interrupt_window;
    svm "refusals" => events::refusals;
    svm "npf-read" => paging::npf_read;
    svm "npf-write" => paging::npf_write;
    svm "npf-execute" => paging::npf_execute;
    svm "npf-supervisor" => paging::npf_supervisor;
    svm "npf-reserved" => paging::npf_reserved;
    svm "npf-walk" => paging::npf_walk;
    svm "npt-accessed-dirty" => paging::npt_accessed_dirty;
    svm "asids" => paging::asids;
    svm "asid-reuse" => paging::asid_reuse;
    svm "real-mode" => modes::real_mode;
    svm "protected-mode" => modes::protected_mode;
    svm "32-bit-paging" => modes::paging_32;
    svm "pae" => modes::pae;
    svm "every-processor" => modes::every_processor;
    svm "pending-interrupt" => interrupts::pending_interrupt;
    svm "masked-interrupt" => interrupts::masked_interrupt;
    svm "interrupt-while-running" => interrupts::interrupt_while_running;
    svm "nmi-while-running" => interrupts::nmi_while_running;
    svm "nmi-and-gif" => interrupts::nmi_and_gif;
    svm "interrupt-and-gif" => interrupts::interrupt_and_gif;
    svm "hostile-vmcbs" => hostile::vmcbs;
    both "reference-time" => time::reference_time;
    both "crash-registers" => time::crash;
    svm "flush-control" => flush::control;
    svm "flush-direct" => flush::direct;
    svm "flush-empty-set" => flush::empty_set;
    svm "flush-preconditions" => flush_rules::preconditions;
    svm "flush-other-calls" => flush_rules::other_calls;
    svm "flush-refused-input" => flush_rules::refused_input;
    svm "flush-synthetic-exit" => flush_rules::synthetic_exit;
    svm "flush-unreadable-partition-assist" => flush_rules::unreadable_partition_assist;
    svm "flush-other-vm" => other_vm::keeps;
    svm "flush-lock-release" => storm::lock_release;
    svm "flush-storm" => storm::direct;
    svm "flush-storm-reflected" => storm::reflected;
}
