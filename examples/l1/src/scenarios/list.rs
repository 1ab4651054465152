// Every scenario of this hypervisor, in the order in which they run: on which extension it runs (`svm`, `vmx`, or
// `both`), its name, its function. This is the one list of them: `scenarios/mod.rs` and `cargo xtask qemu-test` include
// it, each with a macro `scenarios` of its own.
scenarios! {
    both "cpuid" => exits::cpuid;
    both "hlt" => exits::hlt;
    svm "prefixed-vmmcall" => exits::prefixed_vmmcall;
    both "msr" => exits::msr;
    both "msr-map-change" => exits::msr_map_change;
    both "io" => exits::io;
    svm "cr-dr" => exits::cr_dr;
    svm "cr0-selective" => exits::cr0_selective;
    both "exceptions" => exits::exceptions;
    both "shutdown" => exits::shutdown;
    both "registers" => exits::registers;
    both "injection" => events::injection;
    both "interrupted-delivery" => events::interrupted_delivery;
    svm "virtual-interrupt" => events::virtual_interrupt;
    svm "interrupt-window" => events::interrupt_window;
    svm "refusals" => events::refusals;
    both "npf-read" => paging::npf_read;
    both "npf-write" => paging::npf_write;
    svm "npf-execute" => paging::npf_execute;
    svm "npf-supervisor" => paging::npf_supervisor;
    svm "npf-reserved" => paging::npf_reserved;
    both "npf-walk" => paging::npf_walk;
    svm "npt-accessed-dirty" => paging::npt_accessed_dirty;
    both "asids" => paging::asids;
    both "asid-reuse" => paging::asid_reuse;
    both "real-mode" => modes::real_mode;
    both "protected-mode" => modes::protected_mode;
    both "32-bit-paging" => modes::paging_32;
    both "pae" => modes::pae;
    both "every-processor" => modes::every_processor;
    svm "pending-interrupt" => interrupts::pending_interrupt;
    svm "masked-interrupt" => interrupts::masked_interrupt;
    svm "interrupt-while-running" => interrupts::interrupt_while_running;
    svm "nmi-while-running" => interrupts::nmi_while_running;
    svm "nmi-and-gif" => interrupts::nmi_and_gif;
    svm "interrupt-and-gif" => interrupts::interrupt_and_gif;
    svm "hostile-vmcbs" => hostile::vmcbs;
    both "reference-time" => time::reference_time;
    both "crash-registers" => time::crash;
    both "flush-control" => flush::control;
    both "flush-direct" => flush::direct;
    both "flush-empty-set" => flush::empty_set;
    both "flush-preconditions" => flush_rules::preconditions;
    both "flush-other-calls" => flush_rules::other_calls;
    both "flush-refused-input" => flush_rules::refused_input;
    both "flush-synthetic-exit" => flush_rules::synthetic_exit;
    both "flush-unreadable-partition-assist" => flush_rules::unreadable_partition_assist;
    both "flush-other-vm" => other_vm::keeps;
    svm "flush-lock-release" => storm::lock_release;
    svm "flush-storm" => storm::direct;
    svm "flush-storm-reflected" => storm::reflected;
}
