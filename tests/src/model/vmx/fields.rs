//! VMCS fields by their encodings (SDM volume 3, appendix B), and the VMCS as a store of them.
//!
//! In memory a VMCS of the model is: revision identifier, abort indicator, launch state, then 8 bytes for each
//! field in the order of [`ALL`]. While a VMCS is active its fields live in the CPU, and memory has what VMCLEAR left.

use crate::model::mem::PhysMem;

macro_rules! fields {
    ($($name:ident = $encoding:literal),* $(,)?) => {
        $(#[allow(missing_docs)] pub const $name: u32 = $encoding;)*
        /// Every field, by encoding.
        pub const ALL: &[u32] = &[$($encoding),*];
        /// The name of a field.
        pub fn name(encoding: u32) -> Option<&'static str> {
            match encoding {
                $($encoding => Some(stringify!($name)),)*
                _ => None,
            }
        }
    };
}

fields! {
    VPID = 0x0000,
    GUEST_ES = 0x0800, GUEST_CS = 0x0802, GUEST_SS = 0x0804, GUEST_DS = 0x0806, GUEST_FS = 0x0808, GUEST_GS = 0x080A,
    GUEST_LDTR = 0x080C, GUEST_TR = 0x080E,
    HOST_ES = 0x0C00, HOST_CS = 0x0C02, HOST_SS = 0x0C04, HOST_DS = 0x0C06, HOST_FS = 0x0C08, HOST_GS = 0x0C0A,
    HOST_TR = 0x0C0C,
    IO_BITMAP_A = 0x2000, IO_BITMAP_B = 0x2002, MSR_BITMAP = 0x2004, EXIT_MSR_STORE = 0x2006, EXIT_MSR_LOAD = 0x2008,
    ENTRY_MSR_LOAD = 0x200A, EXECUTIVE_VMCS = 0x200C, PML_ADDRESS = 0x200E, TSC_OFFSET = 0x2010, VIRTUAL_APIC = 0x2012,
    APIC_ACCESS = 0x2014, EPTP = 0x201A, XSS_BITMAP = 0x202C, TSC_MULTIPLIER = 0x2032,
    GUEST_PHYSICAL = 0x2400,
    LINK = 0x2800, GUEST_DEBUGCTL = 0x2802, GUEST_PAT = 0x2804, GUEST_EFER = 0x2806,
    PDPTE0 = 0x280A, PDPTE1 = 0x280C, PDPTE2 = 0x280E, PDPTE3 = 0x2810,
    HOST_PAT = 0x2C00, HOST_EFER = 0x2C02,
    PIN = 0x4000, PROC = 0x4002, EXCEPTIONS = 0x4004, PF_MASK = 0x4006, PF_MATCH = 0x4008, CR3_TARGETS = 0x400A,
    EXIT = 0x400C, EXIT_MSR_STORE_COUNT = 0x400E, EXIT_MSR_LOAD_COUNT = 0x4010, ENTRY = 0x4012,
    ENTRY_MSR_LOAD_COUNT = 0x4014, ENTRY_INFO = 0x4016, ENTRY_ERROR = 0x4018, ENTRY_LENGTH = 0x401A,
    TPR_THRESHOLD = 0x401C, PROC2 = 0x401E, PLE_GAP = 0x4020, PLE_WINDOW = 0x4022,
    INSTRUCTION_ERROR = 0x4400, EXIT_REASON = 0x4402, EXIT_INFO = 0x4404, EXIT_ERROR = 0x4406, IDT_INFO = 0x4408,
    IDT_ERROR = 0x440A, EXIT_LENGTH = 0x440C, INSTRUCTION_INFO = 0x440E,
    GUEST_ES_LIMIT = 0x4800, GUEST_CS_LIMIT = 0x4802, GUEST_SS_LIMIT = 0x4804, GUEST_DS_LIMIT = 0x4806,
    GUEST_FS_LIMIT = 0x4808, GUEST_GS_LIMIT = 0x480A, GUEST_LDTR_LIMIT = 0x480C, GUEST_TR_LIMIT = 0x480E,
    GUEST_GDTR_LIMIT = 0x4810, GUEST_IDTR_LIMIT = 0x4812, GUEST_ES_AR = 0x4814, GUEST_CS_AR = 0x4816,
    GUEST_SS_AR = 0x4818, GUEST_DS_AR = 0x481A, GUEST_FS_AR = 0x481C, GUEST_GS_AR = 0x481E, GUEST_LDTR_AR = 0x4820,
    GUEST_TR_AR = 0x4822, INTERRUPTIBILITY = 0x4824, ACTIVITY = 0x4826, SMBASE = 0x4828, GUEST_SYSENTER_CS = 0x482A,
    PREEMPTION_TIMER = 0x482E,
    HOST_SYSENTER_CS = 0x4C00,
    CR0_MASK = 0x6000, CR4_MASK = 0x6002, CR0_SHADOW = 0x6004, CR4_SHADOW = 0x6006, CR3_TARGET0 = 0x6008,
    CR3_TARGET1 = 0x600A, CR3_TARGET2 = 0x600C, CR3_TARGET3 = 0x600E,
    QUALIFICATION = 0x6400, IO_RCX = 0x6402, IO_RSI = 0x6404, IO_RDI = 0x6406, IO_RIP = 0x6408, GUEST_LINEAR = 0x640A,
    GUEST_CR0 = 0x6800, GUEST_CR3 = 0x6802, GUEST_CR4 = 0x6804, GUEST_ES_BASE = 0x6806, GUEST_CS_BASE = 0x6808,
    GUEST_SS_BASE = 0x680A, GUEST_DS_BASE = 0x680C, GUEST_FS_BASE = 0x680E, GUEST_GS_BASE = 0x6810,
    GUEST_LDTR_BASE = 0x6812, GUEST_TR_BASE = 0x6814, GUEST_GDTR_BASE = 0x6816, GUEST_IDTR_BASE = 0x6818,
    GUEST_DR7 = 0x681A, GUEST_RSP = 0x681C, GUEST_RIP = 0x681E, GUEST_RFLAGS = 0x6820, PENDING_DEBUG = 0x6822,
    GUEST_SYSENTER_ESP = 0x6824, GUEST_SYSENTER_EIP = 0x6826,
    HOST_CR0 = 0x6C00, HOST_CR3 = 0x6C02, HOST_CR4 = 0x6C04, HOST_FS_BASE = 0x6C06, HOST_GS_BASE = 0x6C08,
    HOST_TR_BASE = 0x6C0A, HOST_GDTR_BASE = 0x6C0C, HOST_IDTR_BASE = 0x6C0E, HOST_SYSENTER_ESP = 0x6C10,
    HOST_SYSENTER_EIP = 0x6C12, HOST_RSP = 0x6C14, HOST_RIP = 0x6C16,
}

/// Bits of a field: 16, 32 or 64 (natural width is 64 here).
pub fn width(encoding: u32) -> u32 {
    match (encoding >> 13) & 3 {
        0 => 16,
        2 => 32,
        _ => 64,
    }
}

/// Exit-information fields, which VMWRITE may refuse.
pub fn read_only(encoding: u32) -> bool {
    (encoding >> 10) & 3 == 1
}

/// Width, type and index of an encoding as a number below 1,024, if the index is small enough.
const fn key(encoding: u32) -> Option<usize> {
    let index = (encoding >> 1) & 0x1FF;
    if index < 64 && encoding >> 15 == 0 {
        Some(((encoding >> 13) << 8 | ((encoding >> 10) & 3) << 6 | index) as usize)
    } else {
        None
    }
}

/// Position in [`ALL`] by key, 255 for none.
const SLOTS: [u8; 1024] = {
    let mut slots = [255; 1024];
    let mut n = 0;
    while n < ALL.len() {
        if let Some(key) = key(ALL[n]) {
            slots[key] = n as u8;
        }
        n += 1;
    }
    slots
};

fn slot(encoding: u32) -> Option<usize> {
    let slot = SLOTS[key(encoding)?];
    (slot != 255 && encoding & 0x1000 == 0).then_some(usize::from(slot))
}

/// The model's VMCS revision identifier.
pub const REVISION: u32 = 0x4D6F_6431;

/// A VMCS in the CPU.
#[derive(Clone, Debug)]
pub(super) struct Vmcs {
    values: Box<[u64]>,
    pub(super) launched: bool,
}

impl Vmcs {
    /// Loads from the region at `pa`.
    pub(super) fn load(mem: &PhysMem, pa: u64) -> Self {
        let values = (0..ALL.len() as u64).map(|n| mem.read(pa + 16 + n * 8, 8)).collect();
        Self { values, launched: mem.read(pa + 8, 8) == 1 }
    }

    /// Writes back, as VMCLEAR does.
    pub(super) fn save(&self, mem: &PhysMem, pa: u64) {
        mem.write(pa + 8, 8, u64::from(self.launched));
        for (n, value) in (0..).zip(&self.values) {
            mem.write(pa + 16 + n * 8, 8, *value);
        }
    }

    /// The whole field.
    pub(super) fn get(&self, encoding: u32) -> u64 {
        slot(encoding).map_or(0, |n| self.values[n])
    }

    pub(super) fn set(&mut self, encoding: u32, value: u64) {
        if let Some(n) = slot(encoding) {
            self.values[n] = value & (u64::MAX >> (64 - width(encoding)));
        }
    }

    /// VMREAD: with bit 0 of a 64-bit field's encoding, the high half.
    pub(super) fn read(&self, encoding: u32) -> Option<u64> {
        let high = encoding & 1 != 0;
        slot(encoding).filter(|_| !high || (encoding >> 13) & 3 == 1)?;
        Some(if high { self.get(encoding & !1) >> 32 } else { self.get(encoding) })
    }

    /// VMWRITE; false if there is no such field.
    pub(super) fn write(&mut self, encoding: u32, value: u64) -> bool {
        if self.read(encoding).is_none() {
            return false;
        }
        if encoding & 1 != 0 {
            let low = self.get(encoding & !1) & 0xFFFF_FFFF;
            self.set(encoding & !1, low | value << 32);
        } else {
            self.set(encoding, value);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_and_named() {
        assert!(ALL.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((name(0x6C16), name(0x4C00)), (Some("HOST_RIP"), Some("HOST_SYSENTER_CS")));
        assert!(ALL.iter().all(|e| e & 1 == 0 && name(*e).is_some()));
        assert!(ALL.iter().enumerate().all(|(n, e)| slot(*e) == Some(n)));
        assert!((0..0x1_0000).filter(|e| slot(*e).is_some()).all(|e| name(e & !1).is_some()));
    }

    #[test]
    fn halves_and_widths() {
        let mem = PhysMem::new(0x2000);
        let mut v = Vmcs::load(&mem, 0x1000);
        assert!(v.write(EPTP + 1, 0x12));
        assert!(v.write(EPTP, 0x1_0000_0034) && v.write(EPTP + 1, 0x12));
        assert_eq!((v.get(EPTP), v.read(EPTP + 1)), (0x12_0000_0034, Some(0x12)));
        assert!(!v.write(PIN + 1, 0), "only 64-bit fields have halves");
        assert!(v.write(VPID, 0x1_2345));
        assert_eq!(v.get(VPID), 0x2345);
        assert!(!v.write(0x2FFE, 0));
        v.save(&mem, 0x1000);
        assert_eq!(Vmcs::load(&mem, 0x1000).get(EPTP), 0x12_0000_0034);
    }
}
