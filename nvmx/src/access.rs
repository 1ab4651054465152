//! Exits of L2 that take more than a control bit to decide: exceptions, control registers, MSRs, ports, VM functions.

use hvcore::addr::L1Gpa;
use hvcore::memory::GuestMemory;

use crate::bitmaps::Bits;
use crate::bits::{cr0, cr4, interruption};
use crate::controls::{pin, primary, secondary};
use crate::ept::switch_eptp;
use crate::events::Injection;
use crate::exit::Exit;
use crate::exit_reason as r;
use crate::field::Field;
use crate::l1::Fault;
use crate::l2::{L2Exit, RAX, RCX};
use crate::machine::{Gprs, Machine, Vmcs};
use crate::msr_list::Msrs;
use crate::state::NestedVmx;
use crate::step::{complete_instruction, in_64bit_code, register};
use crate::vmcs02::PF;

/// Vectors.
const DF: u32 = 8;
const PAGE_FAULT: u32 = 14;

/// What becomes of an exception that is raised while an event is being delivered.
enum Combined {
    /// The exception itself.
    Alone,
    /// #DF.
    DoubleFault,
    TripleFault,
}

/// The SDM's table of double-fault conditions (volume 3, "Interrupt 8").
fn combine(first: Option<Injection>, second: u32) -> Combined {
    let Some(first) = first.filter(|event| event.info & interruption::TYPE == interruption::HARDWARE_EXCEPTION) else {
        return Combined::Alone;
    };
    let contributory = |vector: u32| matches!(vector, 0 | 10..=13);
    match first.info & interruption::VECTOR {
        DF if contributory(second) || second == PAGE_FAULT => Combined::TripleFault,
        PAGE_FAULT if contributory(second) || second == PAGE_FAULT => Combined::DoubleFault,
        vector if contributory(vector) && contributory(second) => Combined::DoubleFault,
        _ => Combined::Alone,
    }
}

impl NestedVmx {
    /// True when L1's exception bitmap, mask and match name an exception.
    fn l1_wants_exception(&self, vector: u32, error_code: u32) -> bool {
        let bitmap = self.vmcs12.get32(Field::ExceptionBitmap);
        if vector != PAGE_FAULT {
            return bitmap >> (vector & 31) & 1 != 0;
        }
        let mask = self.vmcs12.get32(Field::PageFaultErrorCodeMask);
        let matches = error_code & mask == self.vmcs12.get32(Field::PageFaultErrorCodeMatch);
        matches == (bitmap & PF != 0)
    }

    pub(crate) fn l2_exception<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let embedder = L2Exit::Embedder { reason: r::EXCEPTION_OR_NMI };
        let info = m.vmcs02.read32(Field::ExitInterruptionInfo);
        if info & interruption::TYPE == interruption::NMI {
            let own = self.own_known().pin & pin::NMI_EXITING != 0;
            return if !own && self.pin12(pin::NMI_EXITING) {
                self.reflect_as(m, r::EXCEPTION_OR_NMI)
            } else {
                embedder
            };
        }
        let vector = info & interruption::VECTOR;
        let code = info & interruption::ERROR_CODE != 0;
        let error_code = if code { m.vmcs02.read32(Field::ExitInterruptionErrorCode) } else { 0 };
        self.l2.events.nmi_unblocked =
            info & interruption::NMI_UNBLOCKING != 0 && self.l2.events.injection.is_none() && vector != DF;
        if self.own_takes(vector, error_code) {
            return embedder;
        }
        if self.l1_wants_exception(vector, error_code) {
            return self.reflect_as(m, r::EXCEPTION_OR_NMI);
        }
        // Only there because one bitmap has to do for two: L2 gets it after all.
        if vector == PAGE_FAULT {
            m.gprs.set_cr2(m.vmcs02.read(Field::ExitQualification));
        }
        let length = if Injection::is_software(info) { m.vmcs02.read32(Field::ExitInstructionLength) } else { 0 };
        let event = Injection { info: info & !interruption::NMI_UNBLOCKING, error_code, length };
        self.raise(m, event, vector)
    }

    /// Raises an exception in L2, which L1 may want to see; RIP is at the instruction that faults.
    pub fn raise_in_l2<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, fault: Fault) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let mut info = interruption::VALID | interruption::HARDWARE_EXCEPTION | u32::from(fault.vector & 31);
        let mut error_code = 0;
        if let Some(code) = fault.error_code
            && m.vmcs02.read(Field::GuestCr0) & cr0::PE != 0
        {
            info |= interruption::ERROR_CODE;
            error_code = code;
        }
        let vector = u32::from(fault.vector & 31);
        if self.l1_wants_exception(vector, error_code) && !matches!(self.combined(vector), Combined::DoubleFault) {
            let exit = Exit {
                interruption_info: info,
                error_code,
                ..Exit::simple(r::EXCEPTION_OR_NMI, fault.cr2.unwrap_or_default())
            };
            return self.exit_to_l1(m, exit);
        }
        if let Some(address) = fault.cr2 {
            m.gprs.set_cr2(address);
        }
        self.raise(m, Injection { info, error_code, length: 0 }, vector)
    }

    fn combined(&self, vector: u32) -> Combined {
        combine(self.l2.events.injection, vector)
    }

    /// Delivers an exception to L2 that L1 does not want, together with what was being delivered.
    fn raise<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, event: Injection, vector: u32) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let event = match self.combined(vector) {
            Combined::Alone => event,
            Combined::TripleFault => {
                self.l2.events.injection = None;
                return self.exit_to_l1(m, Exit::simple(r::TRIPLE_FAULT, 0));
            }
            Combined::DoubleFault => {
                self.l2.events.injection = None;
                let kind = interruption::VALID | interruption::HARDWARE_EXCEPTION | interruption::ERROR_CODE;
                let info = kind | DF;
                if self.l1_wants_exception(DF, 0) {
                    let exit = Exit { interruption_info: info, ..Exit::simple(r::EXCEPTION_OR_NMI, 0) };
                    return self.exit_to_l1(m, exit);
                }
                Injection { info, error_code: 0, length: 0 }
            }
        };
        self.l2.events.injection = Some(event);
        L2Exit::Resume
    }

    pub(crate) fn l2_msr<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>, reason: u32) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let bits = Bits::of_msr(m.gprs.get(RCX) as u32, reason == r::WRMSR);
        let source = self.msr_source();
        let Some(bits) =
            bits.filter(|bits| self.primary12(primary::MSR_BITMAPS) && !bits.wanted_by_l1(m.memory, source))
        else {
            return self.reflect_as(m, reason);
        };
        if bits.wanted_by(m.msr_bitmap01) || self.l2.primary & primary::MSR_BITMAPS == 0 {
            return L2Exit::Embedder { reason };
        }
        self.l2.msr_words.admit(m.msr_bitmap02.words, m.msr_bitmap01, m.memory, source, bits.word);
        L2Exit::Resume
    }

    pub(crate) fn l2_io<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        let embedder = L2Exit::Embedder { reason: r::IO };
        if !self.primary12(primary::IO_BITMAPS) {
            return if self.primary12(primary::UNCONDITIONAL_IO_EXITING) {
                self.reflect_as(m, r::IO)
            } else {
                embedder
            };
        }
        let qualification = m.vmcs02.read(Field::ExitQualification);
        let size = (qualification & 7).wrapping_add(1) as u8;
        let source = self.io_source();
        let Some(bits) =
            Bits::of_port((qualification >> 16) as u16, size).filter(|bits| !bits.wanted_by_l1(m.memory, source))
        else {
            return self.reflect_as(m, r::IO);
        };
        if bits.wanted_by(m.io_bitmaps01) || self.l2.primary & primary::IO_BITMAPS == 0 {
            return embedder;
        }
        self.l2.io_words.admit(m.io_bitmaps02.words, m.io_bitmaps01, m.memory, source, bits.word);
        if bits.high != 0 {
            let next = bits.word.wrapping_add(1);
            self.l2.io_words.admit(m.io_bitmaps02.words, m.io_bitmaps01, m.memory, source, next);
        }
        L2Exit::Resume
    }

    pub(crate) fn l2_cr_access<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        // Other code than 64-bit code has no upper halves of registers.
        let operand = |n| {
            let value = register(m.vmcs02, m.gprs, n);
            if value >> 32 != 0 && !in_64bit_code(m.vmcs02) { value & 0xFFFF_FFFF } else { value }
        };
        let access = CrAccess::of(m.vmcs02.read(Field::ExitQualification), operand);
        if self.l1_wants_cr(access) {
            return self.reflect_as(m, r::CR_ACCESS);
        }
        let (real, shadow) = match access {
            CrAccess::Write { number: 4, .. } => (Field::GuestCr4, Field::Cr4ReadShadow),
            CrAccess::Write { number: 0, .. } | CrAccess::Clts | CrAccess::Lmsw { .. } => {
                (Field::GuestCr0, Field::Cr0ReadShadow)
            }
            _ => return L2Exit::Embedder { reason: r::CR_ACCESS },
        };
        self.write_cr(m, access, real, shadow)
    }

    /// A write of CR0 or CR4 that exited because of bits that the embedder masks and L1 does not.
    fn write_cr<V, G, M, L>(
        &mut self,
        m: &mut Machine<'_, V, G, M, L>,
        access: CrAccess,
        real: Field,
        shadow: Field,
    ) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        /// A change of these does more than change the register: the embedder's.
        const MODE: u64 = cr0::PG | cr0::PE;
        let own = self.own_known();
        let is_cr0 = real == Field::GuestCr0;
        let (own_mask, own_value, mask12) = match is_cr0 {
            true => (own.cr0_mask, own.cr0, self.vmcs12.get(Field::Cr0Mask)),
            false => (own.cr4_mask, own.cr4, self.vmcs12.get(Field::Cr4Mask)),
        };
        let (now, shown) = (m.vmcs02.read(real), m.vmcs02.read(shadow));
        // What L1 believes the register to be: its own bits are those of VMCS12 and do not change here.
        let before = now & !own_mask | shown & own_mask & !mask12 | self.vmcs12.get(real) & own_mask & mask12;
        let value = access.value(before) & !mask12 | before & mask12;
        let unrestricted = self.has12(secondary::UNRESTRICTED_GUEST);
        let legal = match is_cr0 {
            true => self.config.allows_cr0(value, unrestricted),
            false => self.config.allows_cr4(value),
        };
        if !legal {
            return self.raise_in_l2(m, Fault::GP);
        }
        let mode = if is_cr0 { MODE } else { cr4::PAE | cr4::PSE | cr4::PGE | cr4::PCIDE | cr4::LA57 };
        if (value ^ before) & mode != 0 {
            return L2Exit::Embedder { reason: r::CR_ACCESS };
        }
        m.vmcs02.write(real, value & !own_mask | own_value);
        let shown = shown & mask12 | value & own_mask & !mask12;
        self.l2.cache.write(m.vmcs02, shadow, shown);
        complete_instruction(m.vmcs02);
        L2Exit::Resume
    }

    /// True when L1's masks and controls name an access to a control register.
    fn l1_wants_cr(&self, access: CrAccess) -> bool {
        let masked = |mask, shadow, value| self.vmcs12.get(mask) & (value ^ self.vmcs12.get(shadow));
        match access {
            CrAccess::Write { number: 0, value } => masked(Field::Cr0Mask, Field::Cr0ReadShadow, value) != 0,
            CrAccess::Write { number: 4, value } => masked(Field::Cr4Mask, Field::Cr4ReadShadow, value) != 0,
            CrAccess::Write { number: 3, value } => {
                self.primary12(primary::CR3_LOAD_EXITING) && !self.is_cr3_target(value)
            }
            CrAccess::Write { number: 8, .. } => self.primary12(primary::CR8_LOAD_EXITING),
            CrAccess::Write { .. } => false,
            CrAccess::Read { number: 3 } => self.primary12(primary::CR3_STORE_EXITING),
            CrAccess::Read { number } => number == 8 && self.primary12(primary::CR8_STORE_EXITING),
            CrAccess::Clts => self.vmcs12.get(Field::Cr0Mask) & self.vmcs12.get(Field::Cr0ReadShadow) & cr0::TS != 0,
            CrAccess::Lmsw { value } => {
                let differs = masked(Field::Cr0Mask, Field::Cr0ReadShadow, value);
                // LMSW sets PE but never clears it.
                differs & 0xE != 0 || differs & value & cr0::PE != 0
            }
        }
    }

    fn is_cr3_target(&self, value: u64) -> bool {
        let targets = [Field::Cr3Target0, Field::Cr3Target1, Field::Cr3Target2, Field::Cr3Target3];
        let count = self.vmcs12.get32(Field::Cr3TargetCount) as usize;
        targets.iter().take(count).any(|target| self.vmcs12.get(*target) == value)
    }

    /// VMFUNC: EPTP switching as the processor would do it, all else is L1's.
    pub(crate) fn l2_vmfunc<V, G, M, L>(&mut self, m: &mut Machine<'_, V, G, M, L>) -> L2Exit
    where
        V: Vmcs + ?Sized,
        G: Gprs + Msrs + ?Sized,
        M: GuestMemory + ?Sized,
        L: ?Sized,
    {
        if !self.has12(secondary::VM_FUNCTIONS) || m.gprs.get(RAX) as u32 > 63 {
            return self.raise_in_l2(m, Fault::UD);
        }
        let Some(eptp) = self.switched_eptp(m.memory, m.gprs.get(RAX) as u32, m.gprs.get(RCX) as u32) else {
            return self.reflect_as(m, r::VMFUNC);
        };
        complete_instruction(m.vmcs02);
        if eptp == self.vmcs12.get(Field::EptPointer) {
            return L2Exit::Resume;
        }
        self.vmcs12.set(Field::EptPointer, eptp);
        self.context.eptp = Some(eptp);
        self.tag2.invalidate();
        L2Exit::EptpSwitched
    }

    /// The EPT pointer that VMFUNC with EAX `function` and ECX `index` switches to.
    fn switched_eptp<M: GuestMemory + ?Sized>(&self, memory: &M, function: u32, index: u32) -> Option<u64> {
        if function != 0 || self.vmcs12.get(Field::VmFunctionControls) & 1 == 0 {
            return None;
        }
        switch_eptp(memory, &self.config, L1Gpa::new(self.vmcs12.get(Field::EptpListAddress)), index)
    }
}

/// An access to a control register, decoded (SDM volume 3, "Exit Qualification for Control-Register Accesses").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CrAccess {
    Write { number: u8, value: u64 },
    Read { number: u8 },
    Clts,
    Lmsw { value: u64 },
}

impl CrAccess {
    fn of(qualification: u64, register: impl FnOnce(u8) -> u64) -> Self {
        let number = (qualification & 0xF) as u8;
        match qualification >> 4 & 3 {
            0 => Self::Write { number, value: register((qualification >> 8 & 0xF) as u8) },
            1 => Self::Read { number },
            2 => Self::Clts,
            _ => Self::Lmsw { value: qualification >> 16 & 0xF },
        }
    }

    /// What the register, `before` so far, becomes.
    const fn value(self, before: u64) -> u64 {
        match self {
            Self::Write { value, .. } => value,
            Self::Read { .. } => before,
            Self::Clts => before & !cr0::TS,
            Self::Lmsw { value } => before & !0xE | value,
        }
    }
}
