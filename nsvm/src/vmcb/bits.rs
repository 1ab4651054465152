//! Bits of the VMCB's fields and of the registers it holds (APM volume 2, sections 15.5 to 15.21 and appendix B).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The intercept vectors, offsets 0x000 to 0x017 of the VMCB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Intercepts {
    /// Bits 15:0 reads of CR0 to CR15, bits 31:16 writes.
    pub cr: u32,
    /// Bits 15:0 reads of DR0 to DR15, bits 31:16 writes.
    pub dr: u32,
    /// Exceptions 0 to 31.
    pub exceptions: u32,
    /// Vector 3, see [`misc1`].
    pub misc1: u32,
    /// Vector 4, see [`misc2`].
    pub misc2: u32,
    /// Vector 5, see [`misc3`].
    pub misc3: u32,
}

impl Intercepts {
    /// What an embedder intercepts while L1 runs, at least: SVM's instructions and MSRs, the Hyper-V interface, its kicks
    /// (NMI), what would reset or stop the processor, and the ports and MSRs of its maps.
    pub const OF_EMBEDDER: Self = Self {
        cr: 0,
        dr: 0,
        exceptions: 0,
        misc1: misc1::NMI
            | misc1::INIT
            | misc1::CPUID
            | misc1::INVLPGA
            | misc1::IOIO_PROT
            | misc1::MSR_PROT
            | misc1::SHUTDOWN,
        misc2: misc2::VMRUN
            | misc2::VMMCALL
            | misc2::VMLOAD
            | misc2::VMSAVE
            | misc2::STGI
            | misc2::CLGI
            | misc2::SKINIT,
        misc3: 0,
    };

    /// What either of the two wants.
    #[inline]
    pub const fn union(self, other: Self) -> Self {
        Self {
            cr: self.cr | other.cr,
            dr: self.dr | other.dr,
            exceptions: self.exceptions | other.exceptions,
            misc1: self.misc1 | other.misc1,
            misc2: self.misc2 | other.misc2,
            misc3: self.misc3 | other.misc3,
        }
    }

    /// What both want.
    #[inline]
    pub const fn intersection(self, other: Self) -> Self {
        Self {
            cr: self.cr & other.cr,
            dr: self.dr & other.dr,
            exceptions: self.exceptions & other.exceptions,
            misc1: self.misc1 & other.misc1,
            misc2: self.misc2 & other.misc2,
            misc3: self.misc3 & other.misc3,
        }
    }
}

macro_rules! bit_consts {
    ($(#[$doc:meta])* $name:ident: $ty:ty { $($(#[$bdoc:meta])* $bit:ident = $value:expr;)* }) => {
        $(#[$doc])*
        pub mod $name {
            $($(#[$bdoc])* pub const $bit: $ty = $value;)*
        }
    };
}

bit_consts! {
    /// Intercept vector 3 (offset 0x00C).
    misc1: u32 {
        /// Physical interrupt.
        INTR = 1;
        /// NMI.
        NMI = 1 << 1;
        /// SMI.
        SMI = 1 << 2;
        /// INIT.
        INIT = 1 << 3;
        /// Virtual interrupt about to be taken.
        VINTR = 1 << 4;
        /// CR0 writes that change bits other than TS and MP.
        CR0_SEL_WRITE = 1 << 5;
        /// SIDT.
        IDTR_READ = 1 << 6;
        /// SGDT.
        GDTR_READ = 1 << 7;
        /// SLDT.
        LDTR_READ = 1 << 8;
        /// STR.
        TR_READ = 1 << 9;
        /// LIDT.
        IDTR_WRITE = 1 << 10;
        /// LGDT.
        GDTR_WRITE = 1 << 11;
        /// LLDT.
        LDTR_WRITE = 1 << 12;
        /// LTR.
        TR_WRITE = 1 << 13;
        /// RDTSC.
        RDTSC = 1 << 14;
        /// RDPMC.
        RDPMC = 1 << 15;
        /// PUSHF.
        PUSHF = 1 << 16;
        /// POPF.
        POPF = 1 << 17;
        /// CPUID.
        CPUID = 1 << 18;
        /// RSM.
        RSM = 1 << 19;
        /// IRET.
        IRET = 1 << 20;
        /// INTn.
        INTN = 1 << 21;
        /// INVD.
        INVD = 1 << 22;
        /// PAUSE.
        PAUSE = 1 << 23;
        /// HLT.
        HLT = 1 << 24;
        /// INVLPG.
        INVLPG = 1 << 25;
        /// INVLPGA.
        INVLPGA = 1 << 26;
        /// IN and OUT, by the IO permission map.
        IOIO_PROT = 1 << 27;
        /// RDMSR and WRMSR, by the MSR permission map.
        MSR_PROT = 1 << 28;
        /// Task switch.
        TASK_SWITCH = 1 << 29;
        /// FERR freeze.
        FERR_FREEZE = 1 << 30;
        /// Shutdown.
        SHUTDOWN = 1 << 31;
    }
}

bit_consts! {
    /// Intercept vector 4 (offset 0x010).
    misc2: u32 {
        /// VMRUN; must be set.
        VMRUN = 1;
        /// VMMCALL.
        VMMCALL = 1 << 1;
        /// VMLOAD.
        VMLOAD = 1 << 2;
        /// VMSAVE.
        VMSAVE = 1 << 3;
        /// STGI.
        STGI = 1 << 4;
        /// CLGI.
        CLGI = 1 << 5;
        /// SKINIT.
        SKINIT = 1 << 6;
        /// RDTSCP.
        RDTSCP = 1 << 7;
        /// ICEBP (INT1).
        ICEBP = 1 << 8;
        /// WBINVD and WBNOINVD.
        WBINVD = 1 << 9;
        /// MONITOR and MONITORX.
        MONITOR = 1 << 10;
        /// MWAIT and MWAITX, unconditionally.
        MWAIT = 1 << 11;
        /// MWAIT and MWAITX when the monitor is armed.
        MWAIT_ARMED = 1 << 12;
        /// XSETBV.
        XSETBV = 1 << 13;
        /// RDPRU.
        RDPRU = 1 << 14;
        /// Writes of EFER, after the instruction.
        EFER_WRITE_TRAP = 1 << 15;
    }
}

bit_consts! {
    /// Intercept vector 5 (offset 0x014).
    misc3: u32 {
        /// INVLPGB.
        INVLPGB = 1;
        /// Illegal INVLPGB.
        INVLPGB_ILLEGAL = 1 << 1;
        /// INVPCID.
        INVPCID = 1 << 2;
        /// MCOMMIT.
        MCOMMIT = 1 << 3;
        /// TLBSYNC.
        TLBSYNC = 1 << 4;
        /// Bus lock.
        BUS_LOCK = 1 << 5;
        /// HLT when no virtual interrupt is pending.
        IDLE_HLT = 1 << 6;
    }
}

bit_consts! {
    /// TLB_CONTROL (offset 0x05C; APM section 15.16.2).
    tlb: u8 {
        /// Nothing is flushed.
        NONE = 0;
        /// Every entry of every ASID.
        ALL = 1;
        /// This guest's entries (FlushByAsid).
        ASID = 3;
        /// This guest's non-global entries (FlushByAsid).
        ASID_NON_GLOBAL = 7;
    }
}

bit_consts! {
    /// Virtual interrupt control (offset 0x060; APM section 15.21).
    int_ctl: u64 {
        /// Bits 7:0, virtual task priority (CR8 in bits 3:0).
        V_TPR = 0xFF;
        /// A virtual interrupt is pending.
        V_IRQ = 1 << 8;
        /// The virtual GIF's value.
        V_GIF = 1 << 9;
        /// A virtual NMI is pending.
        V_NMI = 1 << 11;
        /// Virtual NMIs are blocked.
        V_NMI_MASK = 1 << 12;
        /// Bits 19:16, priority of the virtual interrupt.
        V_INTR_PRIO = 0xF << 16;
        /// Ignore V_TPR for the virtual interrupt.
        V_IGN_TPR = 1 << 20;
        /// RFLAGS.IF and CR8 of the guest mask virtual interrupts only.
        V_INTR_MASKING = 1 << 24;
        /// The virtual GIF is in use.
        V_GIF_ENABLE = 1 << 25;
        /// Virtual NMIs are in use.
        V_NMI_ENABLE = 1 << 26;
        /// x2AVIC.
        X2AVIC = 1 << 30;
        /// AVIC.
        AVIC = 1 << 31;
        /// Bits 39:32, vector of the virtual interrupt.
        V_INTR_VECTOR = 0xFF << 32;
    }
}

bit_consts! {
    /// Interrupt state (offset 0x068).
    int_state: u64 {
        /// The guest is in an interrupt shadow.
        SHADOW = 1;
        /// Value of the guest's RFLAGS.IF, SEV-ES only.
        GUEST_MASK = 1 << 1;
    }
}

bit_consts! {
    /// Nested paging control (offset 0x090).
    np: u64 {
        /// Nested paging is on.
        ENABLE = 1;
    }
}

bit_consts! {
    /// Virtualization extensions (offset 0x0B8).
    virt_ext: u64 {
        /// LBR virtualization.
        LBR = 1;
        /// Virtual VMLOAD and VMSAVE.
        VMLOAD_VMSAVE = 1 << 1;
    }
}

bit_consts! {
    /// VMCB clean bits (offset 0x0C0; APM section 15.15): set means unchanged since the last VMEXIT.
    clean: u32 {
        /// Intercepts, TSC offset, PAUSE filter.
        INTERCEPTS = 1;
        /// IOPM and MSRPM base addresses (not their contents).
        PERMISSION_MAPS = 1 << 1;
        /// ASID.
        ASID = 1 << 2;
        /// Virtual interrupt control.
        TPR = 1 << 3;
        /// Nested paging: nCR3, G_PAT, NP control.
        NP = 1 << 4;
        /// CR0, CR3, CR4, EFER.
        CRX = 1 << 5;
        /// DR6, DR7.
        DRX = 1 << 6;
        /// GDTR, IDTR.
        DT = 1 << 7;
        /// CS, DS, SS, ES, CPL.
        SEG = 1 << 8;
        /// CR2.
        CR2 = 1 << 9;
        /// DBGCTL and the last-branch registers.
        LBR = 1 << 10;
        /// AVIC.
        AVIC = 1 << 11;
        /// S_CET, SSP, ISST_ADDR.
        CET = 1 << 12;
        /// Hyper-V: the enlightened fields, and the MSR permission map's contents with the enlightened bitmap.
        ENLIGHTENMENTS = 1 << 31;
    }
}

bit_consts! {
    /// RFLAGS.
    rflags: u64 {
        /// Always one.
        FIXED = 1 << 1;
        /// Trap flag.
        TF = 1 << 8;
        /// Interrupt enable.
        IF = 1 << 9;
        /// Virtual-8086 mode.
        VM = 1 << 17;
    }
}

bit_consts! {
    /// CR0.
    cr0: u64 {
        /// Protection enabled.
        PE = 1;
        /// Monitor coprocessor.
        MP = 1 << 1;
        /// Task switched.
        TS = 1 << 3;
        /// Write protect.
        WP = 1 << 16;
        /// Not write-through.
        NW = 1 << 29;
        /// Cache disable.
        CD = 1 << 30;
        /// Paging.
        PG = 1 << 31;
    }
}

bit_consts! {
    /// CR4.
    cr4: u64 {
        /// Physical address extension.
        PAE = 1 << 5;
        /// Control-flow enforcement.
        CET = 1 << 23;
    }
}

bit_consts! {
    /// EFER.
    efer: u64 {
        /// System call extensions.
        SCE = 1;
        /// Long mode enable.
        LME = 1 << 8;
        /// Long mode active.
        LMA = 1 << 10;
        /// No-execute enable.
        NXE = 1 << 11;
        /// SVM enable.
        SVME = 1 << 12;
        /// Long mode segment limit enable.
        LMSLE = 1 << 13;
        /// Fast FXSAVE.
        FFXSR = 1 << 14;
        /// Translation cache extension.
        TCE = 1 << 15;
    }
}

bit_consts! {
    /// Segment attributes as the VMCB packs them.
    seg: u16 {
        /// Present.
        P = 1 << 7;
        /// 64-bit code.
        L = 1 << 9;
        /// Default size (CS) or big (SS).
        DB = 1 << 10;
    }
}

/// DR6.BS: the trap came from single-stepping.
pub const DR6_BS: u64 = 1 << 14;
/// S_CET bits that exist: shadow stacks enabled, WRSS enabled.
pub const S_CET_DEFINED: u64 = 3;
/// TSC_RATIO after reset: one, in 8.32 fixed point.
pub const TSC_RATIO_ONE: u64 = 1 << 32;
/// DR7 after reset and after every #VMEXIT.
pub const DR7_RESET: u64 = 0x400;

/// Kinds of event (bits 10:8 of EVENTINJ and EXITINTINFO).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventKind {
    /// External or virtual interrupt.
    Interrupt = 0,
    /// NMI; the vector is ignored.
    Nmi = 2,
    /// Exception (fault or trap).
    Exception = 3,
    /// Software interrupt (INTn).
    Software = 4,
}

/// An event as EVENTINJ and EXITINTINFO hold it: vector 7:0, kind 10:8, error code valid 11, valid 31,
/// error code 63:32 (APM section 15.20).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Event(u64);

impl Event {
    /// Bit 31: there is an event.
    pub const VALID: u64 = 1 << 31;
    /// Bit 11: bits 63:32 are an error code.
    pub const ERROR_VALID: u64 = 1 << 11;
    /// The bits that are defined.
    pub const DEFINED: u64 = 0xFFFF_FFFF_8000_0FFF;

    /// From the field's value; reserved bits are dropped.
    #[inline]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw & Self::DEFINED)
    }

    /// The field's value.
    #[inline]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// An exception, with an error code where there is one.
    #[inline]
    pub const fn exception(vector: u8, error_code: Option<u32>) -> Self {
        let base = Self::VALID | (EventKind::Exception as u64) << 8 | vector as u64;
        match error_code {
            Some(code) => Self(base | Self::ERROR_VALID | (code as u64) << 32),
            None => Self(base),
        }
    }

    /// An external interrupt.
    #[inline]
    pub const fn interrupt(vector: u8) -> Self {
        Self(Self::VALID | vector as u64)
    }

    /// An NMI.
    #[inline]
    pub const fn nmi() -> Self {
        Self(Self::VALID | (EventKind::Nmi as u64) << 8 | 2)
    }

    /// True when there is an event.
    #[inline]
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }

    /// The vector.
    #[inline]
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The kind, or `None` for a reserved one.
    #[inline]
    pub const fn kind(self) -> Option<EventKind> {
        match (self.0 >> 8) & 7 {
            0 => Some(EventKind::Interrupt),
            2 => Some(EventKind::Nmi),
            3 => Some(EventKind::Exception),
            4 => Some(EventKind::Software),
            _ => None,
        }
    }

    /// The error code, if there is one.
    #[inline]
    pub const fn error_code(self) -> Option<u32> {
        if self.0 & Self::ERROR_VALID != 0 { Some((self.0 >> 32) as u32) } else { None }
    }

    /// The event with the one inconsistency that QEMU's TCG produces put right: an "exception" with a vector above 31
    /// is an interrupt.
    #[inline]
    pub const fn corrected(self) -> Self {
        if matches!(self.kind(), Some(EventKind::Exception)) && self.vector() > 31 {
            Self(Self::VALID | self.vector() as u64)
        } else {
            self
        }
    }
}
