//! The list of what runs on emulated machines: a line of [`SCENARIOS`] for each run of an emulator.
//!
//! A run of the small hypervisor is a batch of many scenarios, each with a result of its own: their names are `svm/cpuid`
//! and the like, from the hypervisor's own list.

use crate::machine::Typed;

macro_rules! scenarios {
    ($($on:ident $name:literal => $function:path;)*) => {
        /// The scenarios of the small hypervisor: on which extension, and the name.
        const OF_L1: &[(&str, &str)] = &[$((stringify!($on), $name),)*];
    };
}

include!("../../examples/l1/src/scenarios/list.rs");

/// An emulator and the processor it emulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// QEMU, with this `-cpu`.
    Qemu(&'static str),
    /// Bochs, with this `cpu: model=`.
    Bochs(&'static str),
}

impl Machine {
    /// The processor's name in tables and reports.
    pub const fn cpu(self) -> &'static str {
        match self {
            Machine::Qemu(cpu) | Machine::Bochs(cpu) => cpu,
        }
    }
}

/// A file that is loaded beside the image.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// What it holds.
    pub content: Content,
    /// Its command line.
    pub args: &'static str,
}

/// What a module holds.
#[derive(Clone, Copy, Debug)]
pub enum Content {
    /// These bytes.
    Text(&'static str),
    /// Another image of `examples/`; `cpus=N` is added to its command line when there are several processors.
    Image(&'static str),
    /// The Debian kernel.
    LinuxKernel,
    /// The initial RAM disk for it.
    LinuxInitrd,
    /// The one that has QEMU and a second Linux in it.
    LinuxQemuInitrd,
}

/// How a run must end.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// The image reports success.
    Success,
    /// The image reports failure, after printing this: the control of a check.
    Failure(&'static str),
    /// The machine powers off, and Linux has warned of nothing.
    PowerOff {
        /// All of this was printed; `{cpus}` is the number of processors.
        says: &'static [&'static str],
        /// Counters of L0 that are not zero.
        counted: &'static [&'static str],
        /// Counters of L0 that are zero.
        not_counted: &'static [&'static str],
    },
    /// L0 gives up, saying this: the control of a check of its own.
    GaveUp(&'static str),
}

/// A virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extension {
    /// AMD-V.
    Svm,
    /// VT-x.
    Vmx,
}

impl Extension {
    const fn name(self) -> &'static str {
        match self {
            Extension::Svm => "svm",
            Extension::Vmx => "vmx",
        }
    }
}

/// One run of one image.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name for `--scenario`. Runs of one scenario on several machines share it.
    pub name: &'static str,
    /// It is a batch: all scenarios that the small hypervisor has for this extension, each with a result.
    pub batch: Option<Extension>,
    /// What it runs on.
    pub machine: Machine,
    /// The image.
    pub image: &'static str,
    /// The image's command line. `cpus=N` is added when there are several.
    pub args: &'static str,
    /// Files beside it.
    pub modules: &'static [Module],
    /// Processors, unless `--smp` says otherwise.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// What is typed at the serial port.
    pub typed: Option<Typed>,
    /// How it must end.
    pub expect: Expect,
    /// The scenario that does the same on the bare emulator: what fails there as well is the emulator's fault.
    pub control: Option<&'static str>,
    /// Is about images with SSE: runs with those for the host's target alone.
    pub sse: bool,
    /// Takes minutes: runs when it is named, or with `--all`.
    pub slow: bool,
    /// Seconds after which it has failed, unless `--timeout` says otherwise.
    pub timeout: u64,
}

impl Scenario {
    /// The names of a batch's scenarios, as the small hypervisor knows them; none when this is a single scenario.
    pub fn parts(&self) -> Vec<&'static str> {
        let Some(extension) = self.batch else { return Vec::new() };
        let here = |on: &str| on == extension.name() || on == "both";
        OF_L1.iter().filter(|(on, _)| here(on)).map(|(_, name)| *name).collect()
    }

    /// The name of the batch's scenario `part` for `--scenario` and in tables.
    pub fn full_name(&self, part: &str) -> String {
        format!("{}/{part}", self.name)
    }

    /// The machine, for tables and reports: the processor, and how many when `cpus` is not 1.
    pub fn machine_name(&self, cpus: u32) -> String {
        match cpus {
            1 => self.machine.cpu().to_string(),
            n => format!("{} x{n}", self.machine.cpu()),
        }
    }

    /// True when it needs Debian's packages.
    pub fn is_linux(&self) -> bool {
        self.modules.iter().any(|m| matches!(m.content, Content::LinuxInitrd | Content::LinuxQemuInitrd))
    }

    /// True when it needs QEMU's packages, too.
    pub fn has_qemu_inside(&self) -> bool {
        self.modules.iter().any(|m| matches!(m.content, Content::LinuxQemuInitrd))
    }
}

/// What most scenarios have.
const BASE: Scenario = Scenario {
    name: "",
    batch: None,
    machine: Machine::Qemu("max"),
    image: "selftest",
    args: "",
    modules: &[],
    cpus: 1,
    memory: 256,
    typed: None,
    expect: Expect::Success,
    control: None,
    sse: false,
    slow: false,
    timeout: 120,
};

const NO_VGIF: Machine = Machine::Qemu("EPYC-Rome,+svm");

const BOCHS: Machine = Machine::Bochs(crate::bochs::MODEL);
/// Of what Bochs emulates, a processor of which Linux warns of nothing.
const BOCHS_LINUX: Machine = Machine::Bochs("corei7_haswell_4770");

const TWO_FILES: &[Module] = &[
    Module { content: Content::Text("Zoological"), args: "bytes=10 first=90" },
    Module { content: Content::Text("a"), args: "bytes=1 first=97" },
];

/// The small hypervisor on the emulator itself.
const SVM_BARE: Scenario = Scenario { name: "svm-bare", batch: Some(Extension::Svm), image: "l1", ..BASE };

/// The same on VT-x.
const VMX_BARE: Scenario =
    Scenario { name: "vmx-bare", batch: Some(Extension::Vmx), image: "l1", machine: BOCHS, timeout: 300, ..BASE };
const VMX: Scenario = Scenario {
    name: "vmx",
    batch: Some(Extension::Vmx),
    image: "l0",
    args: "audit",
    modules: SMALL_L1,
    machine: BOCHS,
    timeout: 300,
    ..BASE
};

/// The small hypervisor on L0.
const SVM: Scenario =
    Scenario { name: "svm", batch: Some(Extension::Svm), image: "l0", args: "audit", modules: SMALL_L1, ..BASE };

const SMALL_L1: &[Module] = &[Module { content: Content::Image("l1"), args: "" }];

/// Saving and restoring at every seventh exit, a storm takes long: a small one.
const CHURNED_L1: &[Module] = &[Module { content: Content::Image("l1"), args: "storm=60" }];

/// With several processors and direct flush there is nothing that may be skipped.
const ALL_OF_IT: &[Module] = &[Module { content: Content::Image("l1"), args: "skip=no storm=20400" }];

const HOSTILE: &[Module] = &[Module { content: Content::Image("l1"), args: "scenario=hostile-vmcbs hostile=100000" }];

/// A million flushes by the host, and as many by the small hypervisor.
const STORM: &[Module] = &[Module {
    content: Content::Image("l1"),
    args: "scenario=flush-storm,flush-storm-reflected skip=no storm=1000000",
}];

const ASID_REUSE: &[Module] = &[Module { content: Content::Image("l1"), args: "scenario=asid-reuse" }];

const FLUSH: &[Module] = &[Module { content: Content::Image("l1"), args: "scenario=flush-direct" }];

/// The smallest hypervisor.
const SMALLEST_L1: &[Module] = &[Module { content: Content::Image("selftest"), args: "test=vmx" }];

const ENLIGHTENED_VM_ENTRIES: &[Module] =
    &[Module { content: Content::Image("vmxchecks"), args: "samples=3000 explain=no evmcs=yes" }];

const VM_ENTRIES: &[Module] = &[Module { content: Content::Image("vmxchecks"), args: "samples=3000 explain=no" }];

const RUNTIME_AS_L1: &[Module] = &[Module { content: Content::Image("selftest"), args: "test=boot" }];

/// An `image`: the Debian kernel on the emulator itself, with one module, its initial RAM disk.
pub const BARE_LINUX: &str = "linux";

/// Debian's Linux as L1, up to a shell at the serial port, where somebody types how to end it.
const LINUX: Scenario = Scenario { image: "l0", args: "audit", memory: 512, timeout: 240, ..BASE };

const LINUX_SHELL: &[Module] = &[
    Module { content: Content::LinuxKernel, args: "console=ttyS0 panic=-1 l1=shell" },
    Module { content: Content::LinuxInitrd, args: "" },
];

/// The same, running guests on its KVM.
const LINUX_KVM: &[Module] = &[
    Module { content: Content::LinuxKernel, args: "console=ttyS0 panic=-1 l1=kvm" },
    Module { content: Content::LinuxInitrd, args: "" },
];

/// The shell came up, and its user ended it.
const SHELL_ENDS: Expect = Expect::PowerOff {
    says: &["init: Linux 6.", " on {cpus} processors: shell", "l1# "],
    counted: &["l1_exits"],
    not_counted: &["l2_exits"],
};

/// Linux found its enlightenments, and its guests' flushes never came to it.
const DIRECT_FLUSHES: Expect = Expect::PowerOff {
    says: &[
        "init: Linux 6.",
        " on {cpus} processors: kvm",
        "Hypervisor detected: Microsoft Hyper-V",
        "Switched to clocksource hyperv_clocksource_tsc_page",
        "SVM: kvm: Nested Paging enabled",
        "SVM: kvm: Hyper-V enlightened NPT TLB flush enabled",
        "SVM: kvm: Hyper-V Direct TLB Flush enabled",
        "launcher: KVM offers direct flush: yes",
        "init: L1 is content",
    ],
    counted: &["l2_exits", "direct_flushes"],
    not_counted: &["reflected_flushes"],
};

/// Without enlightenments Linux does its guests' flushes itself.
const PLAIN_FLUSHES: Expect = Expect::PowerOff {
    says: &[
        "init: Linux 6.",
        " on {cpus} processors: kvm",
        "SVM: kvm: Nested Paging enabled",
        "launcher: KVM offers direct flush: no",
        "init: L1 is content",
    ],
    counted: &["l2_exits"],
    not_counted: &["direct_flushes", "l1_calls"],
};

/// The same on VT-x, with the enlightened VMCS.
const VMX_DIRECT_FLUSHES: Expect = Expect::PowerOff {
    says: &[
        "init: Linux 6.",
        " on {cpus} processors: kvm",
        "Hypervisor detected: Microsoft Hyper-V",
        "launcher: KVM offers direct flush: yes",
        "init: L1 is content",
    ],
    counted: &["l2_exits", "direct_flushes"],
    not_counted: &["reflected_flushes"],
};

/// And with a plain one.
const VMX_PLAIN_FLUSHES: Expect = Expect::PowerOff {
    says: &[
        "init: Linux 6.",
        " on {cpus} processors: kvm",
        "launcher: KVM offers direct flush: no",
        "init: L1 is content",
    ],
    counted: &["l2_exits"],
    not_counted: &["direct_flushes", "l1_calls"],
};

/// The same, running a second Linux under QEMU.
const LINUX_LINUX: &[Module] = &[
    Module { content: Content::LinuxKernel, args: "console=ttyS0 panic=-1 l1=linux load=4,512,5" },
    Module { content: Content::LinuxQemuInitrd, args: "" },
];

/// The second Linux used flush hypercalls, which never came to the first.
const LINUX_FLUSHES: Expect = Expect::PowerOff {
    says: &[
        " on {cpus} processors: linux",
        "SVM: kvm: Hyper-V Direct TLB Flush enabled",
        "l2: direct flush for the processor",
        "Hyper-V: Using hypercall for remote TLB flush",
        " 0 stale",
        "init: L2 is content",
    ],
    counted: &["l2_exits", "direct_flushes"],
    not_counted: &["reflected_flushes"],
};

/// The second Linux's flushes are the first's to do.
const LINUX_PLAIN: Expect = Expect::PowerOff {
    says: &[
        " on {cpus} processors: linux",
        "not offered by KVM",
        "Hyper-V: Using hypercall for remote TLB flush",
        " 0 stale",
        "init: L2 is content",
    ],
    counted: &["l2_exits"],
    not_counted: &["direct_flushes", "l1_calls"],
};

/// The controls: what L1 does without L0.
const BARE_INITRD: &[Module] = &[Module { content: Content::LinuxInitrd, args: "" }];
const BARE_QEMU_INITRD: &[Module] = &[Module { content: Content::LinuxQemuInitrd, args: "" }];
const BARE_FLUSHES: Expect = Expect::PowerOff {
    says: &[" on {cpus} processors: kvm", "launcher: KVM offers direct flush: no", "init: L1 is content"],
    counted: &[],
    not_counted: &[],
};
const BARE_LINUX_FLUSHES: Expect = Expect::PowerOff {
    says: &[" on {cpus} processors: linux", " 0 stale", "init: L2 is content"],
    counted: &[],
    not_counted: &[],
};

const POWER_OFF: Typed = Typed { prompt: "\nl1# ", line: "poweroff -f" };

/// All scenarios, in the order in which they run.
#[rustfmt::skip]
pub const SCENARIOS: &[Scenario] = &[
    Scenario { name: "boot", args: "test=boot modules=2", modules: TWO_FILES, cpus: 4, ..BASE },
    Scenario { name: "boot", args: "test=boot modules=2", modules: TWO_FILES, cpus: 2, machine: BOCHS, ..BASE },
    Scenario { name: "boot-16-processors", args: "test=boot", cpus: 16, ..BASE },
    Scenario { name: "hypercall-selftest", args: "test=hypercall", ..BASE },
    Scenario { name: "hypercall-selftest", args: "test=hypercall", machine: BOCHS, ..BASE },
    Scenario { name: "hypercall-selftest-control", args: "test=hypercall corrupt=yes", expect: Expect::Failure("failed: Long SUCCESS"), ..BASE },
    Scenario { name: "unhandled-exception", args: "test=unhandled", expect: Expect::Failure("unhandled: #UD"), ..BASE },
    Scenario { name: "nested-fault", args: "test=nested", expect: Expect::Failure("nested fault on one interrupt stack: #BP"), ..BASE },
    // The small hypervisor on the emulator itself: the control of what it finds on the L0 hypervisor.
    SVM_BARE,
    Scenario { cpus: 4, ..SVM_BARE },
    Scenario { machine: NO_VGIF, ..SVM_BARE },
    // The L0 hypervisor with the runtime's own test as its guest.
    Scenario { name: "l0-boot", image: "l0", modules: RUNTIME_AS_L1, ..BASE },
    Scenario { name: "l0-boot-4-processors", image: "l0", modules: RUNTIME_AS_L1, cpus: 4, ..BASE },
    // The library's VM-entry checks against the processor's own; and a check that is overlooked, as the control.
    Scenario { name: "vmx-entry-checks", image: "vmxchecks", machine: BOCHS, ..BASE },
    Scenario { name: "vmx-entry-checks-blind", image: "vmxchecks", args: "samples=4000 blind=vpid", machine: BOCHS, expect: Expect::Failure("disagree"), ..BASE },
    // The same with L0 as the processor.
    Scenario { name: "l0-vmx-entry-checks", image: "l0", modules: VM_ENTRIES, machine: BOCHS, ..BASE },
    Scenario { name: "l0-vmx-entry-checks-enlightened", image: "l0", modules: ENLIGHTENED_VM_ENTRIES, machine: BOCHS, ..BASE },
    Scenario { name: "l0-boot", image: "l0", modules: RUNTIME_AS_L1, machine: BOCHS, ..BASE },
    // A kick at every instruction of the window before a VM entry; the control loses one.
    Scenario { name: "vmx-kick-window", args: "test=kick", cpus: 2, machine: BOCHS, ..BASE },
    Scenario { name: "vmx-kick-window-control", args: "test=kick redirect=no", cpus: 2, machine: BOCHS, expect: Expect::Failure("a kick was lost"), ..BASE },
    // The small hypervisor on VT-x: alone, and as L1.
    VMX_BARE,
    Scenario { cpus: 2, ..VMX_BARE },
    VMX,
    Scenario { cpus: 2, ..VMX },
    // Without the enlightenments L0 offers what the enlightened VMCS cannot carry.
    Scenario { name: "vmx-plain", args: "enlighten=off audit", ..VMX },
    // The smallest hypervisor: alone, and as L1.
    Scenario { name: "vmx-smallest-bare", args: "test=vmx", machine: BOCHS, ..BASE },
    Scenario { name: "vmx-smallest", image: "l0", args: "audit", modules: SMALLEST_L1, machine: BOCHS, ..BASE },
    Scenario { name: "l0-boot-churn", image: "l0", args: "churn=7", modules: RUNTIME_AS_L1, cpus: 2, machine: BOCHS, ..BASE },
    Scenario { name: "vmx-smallest-churn", image: "l0", args: "audit churn=7", modules: SMALLEST_L1, machine: BOCHS, ..BASE },
    Scenario { name: "vmx-smallest-plain", image: "l0", args: "audit enlighten=off", modules: SMALLEST_L1, machine: BOCHS, ..BASE },
    Scenario { name: "l0-boot-2-processors", image: "l0", modules: RUNTIME_AS_L1, cpus: 2, machine: BOCHS, ..BASE },
    Scenario { name: "l0-refuses-sse", image: "l0", modules: RUNTIME_AS_L1, sse: true, expect: Expect::GaveUp("built with SSE"), ..BASE },
    // The small hypervisor and its guests on the L0 hypervisor.
    SVM,
    Scenario { modules: ALL_OF_IT, cpus: 2, ..SVM },
    Scenario { modules: ALL_OF_IT, cpus: 4, timeout: 180, ..SVM },
    Scenario { machine: NO_VGIF, ..SVM },
    // Nested state goes through its saved form every seventh exit.
    Scenario { name: "svm-churn", args: "churn=7 audit", modules: CHURNED_L1, cpus: 2, ..SVM },
    // A timeline is recorded, and what became of it is checked.
    Scenario { name: "trace", image: "l0", args: "trace", modules: FLUSH, cpus: 3, ..BASE },
    Scenario { name: "svm-hostile-100000", image: "l0", args: "audit", modules: HOSTILE, timeout: 600, ..BASE },
    // A kernel that nobody here wrote.
    Scenario { name: "linux-shell", modules: LINUX_SHELL, cpus: 2, typed: Some(POWER_OFF), expect: SHELL_ENDS, ..LINUX },
    // Its control: the same on the bare emulator.
    Scenario { name: "linux-kvm-bare", modules: BARE_INITRD, args: "console=ttyS0 panic=-1 l1=kvm", cpus: 2, expect: BARE_FLUSHES, image: BARE_LINUX, ..LINUX },
    Scenario { name: "linux-kvm", modules: LINUX_KVM, cpus: 2, expect: DIRECT_FLUSHES, control: Some("linux-kvm-bare"), ..LINUX },
    Scenario { name: "linux-kvm-4-processors", modules: LINUX_KVM, cpus: 4, expect: DIRECT_FLUSHES, control: Some("linux-kvm-bare"), ..LINUX },
    Scenario { name: "linux-kvm-plain", args: "audit enlighten=off", modules: LINUX_KVM, cpus: 2, expect: PLAIN_FLUSHES, control: Some("linux-kvm-bare"), ..LINUX },
    Scenario { name: "linux-kvm-linux-bare", modules: BARE_QEMU_INITRD, args: "console=ttyS0 panic=-1 l1=linux load=4,512,5", cpus: 2, memory: 1024, expect: BARE_LINUX_FLUSHES, slow: true, timeout: 600, image: BARE_LINUX, ..LINUX },
    Scenario { name: "linux-kvm-linux", modules: LINUX_LINUX, cpus: 2, memory: 1024, expect: LINUX_FLUSHES, control: Some("linux-kvm-linux-bare"), slow: true, timeout: 600, ..LINUX },
    Scenario { name: "linux-kvm-linux-plain", args: "audit enlighten=off", modules: LINUX_LINUX, cpus: 2, memory: 1024, expect: LINUX_PLAIN, control: Some("linux-kvm-linux-bare"), slow: true, timeout: 600, ..LINUX },
    Scenario { name: "linux-shell", args: "", modules: LINUX_SHELL, machine: BOCHS_LINUX, typed: Some(POWER_OFF), expect: SHELL_ENDS, slow: true, timeout: 900, ..LINUX },
    Scenario { name: "svm-storm", image: "l0", args: "audit", modules: STORM, cpus: 4, slow: true, timeout: 1200, ..BASE },
    Scenario { name: "vmx-linux-kvm", args: "", modules: LINUX_KVM, machine: BOCHS_LINUX, expect: VMX_DIRECT_FLUSHES, slow: true, timeout: 900, ..LINUX },
    Scenario { name: "vmx-linux-kvm-plain", args: "enlighten=off", modules: LINUX_KVM, machine: BOCHS_LINUX, expect: VMX_PLAIN_FLUSHES, slow: true, timeout: 900, ..LINUX },
    // Faults that L0 commits on purpose: the controls of the TLB auditor.
    Scenario { name: "audit-no-tlb-control", image: "l0", args: "audit mutant=no-tlb-control", modules: ASID_REUSE, expect: Expect::GaveUp("audit:"), ..BASE },
    Scenario { name: "audit-one-asid", image: "l0", args: "audit mutant=one-asid", modules: ASID_REUSE, expect: Expect::GaveUp("without a flush"), ..BASE },
    Scenario { name: "audit-drain-skipped", image: "l0", args: "audit mutant=drain-skipped", modules: FLUSH, cpus: 2, expect: Expect::GaveUp("audit:"), ..BASE },
    Scenario { name: "audit-no-kick", image: "l0", args: "audit mutant=no-kick", modules: FLUSH, cpus: 2, expect: Expect::GaveUp("runs on from before it"), ..BASE },
    Scenario { name: "vmx-audit-one-vpid", image: "l0", args: "audit mutant=one-asid", modules: SMALLEST_L1, machine: BOCHS, expect: Expect::GaveUp("without a flush"), ..BASE },
    Scenario { name: "vmx-audit-no-invvpid", image: "l0", args: "audit mutant=no-tlb-control churn=7", modules: SMALLEST_L1, machine: BOCHS, expect: Expect::GaveUp("audit:"), ..BASE },
    Scenario { name: "vmx-audit-no-invept", image: "l0", args: "audit mutant=no-invept churn=7", modules: SMALLEST_L1, machine: BOCHS, expect: Expect::GaveUp("without a flush though entry"), ..BASE },
    Scenario { name: "panic", args: "test=panic", expect: Expect::Failure("as asked"), ..BASE },
];

/// Every name that `--scenario` knows, in the order of the list, each once.
pub fn names() -> Vec<String> {
    let mut names = Vec::new();
    for scenario in SCENARIOS {
        let parts = scenario.parts().into_iter().map(|part| scenario.full_name(part));
        for name in std::iter::once(scenario.name.to_string()).chain(parts) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names
}

/// A run, and of a batch which of its scenarios.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The run.
    pub scenario: &'static Scenario,
    /// Of a batch: these of its scenarios, as the small hypervisor knows them.
    pub parts: Vec<&'static str>,
}

impl Chosen {
    /// All of the run.
    pub fn whole(scenario: &'static Scenario) -> Chosen {
        Chosen { scenario, parts: scenario.parts() }
    }

    /// What of `scenario` is in `names`.
    pub fn named(scenario: &'static Scenario, names: &[String]) -> Option<Chosen> {
        if names.iter().any(|name| name == scenario.name) {
            return Some(Chosen::whole(scenario));
        }
        let mut parts = scenario.parts();
        parts.retain(|part| names.contains(&scenario.full_name(part)));
        (!parts.is_empty()).then_some(Chosen { scenario, parts })
    }

    /// How many results it gives.
    pub fn results(&self) -> usize {
        self.parts.len().max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_hypervisors_list_is_here() {
        let names = names();
        for name in ["svm", "svm/cpuid", "svm-bare/cpuid", "svm-churn/flush-direct", "boot"] {
            assert_eq!(names.iter().filter(|n| *n == name).count(), 1, "{name}");
        }
        assert!(!names.contains(&"boot/cpuid".to_string()));
    }

    #[test]
    fn a_batch_is_chosen_whole_or_in_part() {
        let find = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|w| w.to_string()).collect();
            Chosen::named(&SVM, &wanted).map(|chosen| chosen.parts)
        };
        assert_eq!(find(&["svm/hlt", "svm/cpuid", "svm-bare/msr"]), Some(vec!["cpuid", "hlt"]));
        assert_eq!(find(&["svm/hlt", "svm"]).map(|parts| parts.len()), Some(SVM.parts().len()));
        assert_eq!(find(&["svm-bare"]), None);
    }
}
