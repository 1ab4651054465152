//! The embedder's own controls, as VMCS01 has them.
//!
//! Used where VMCS02 is made and where exits are routed; reads VMCS01 once.

use crate::controls::{pin, primary, secondary};
use crate::field::Field;
use crate::groups;
use crate::machine::Vmcs;
use crate::state::NestedVmx;
use crate::vmcs02::PF;

/// The TSC multiplier that changes nothing: 1.0 with 48 fraction bits.
const ONE: u64 = 1 << 48;

/// The embedder's own controls, as VMCS01 has them: read once, and again when the embedder says that they changed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Own {
    pub(crate) pin: u32,
    pub(crate) primary: u32,
    pub(crate) secondary: u32,
    pub(crate) exit: u32,
    pub(crate) entry: u32,
    pub(crate) exceptions: u32,
    pub(crate) pf_mask: u32,
    pub(crate) pf_match: u32,
    pub(crate) cr0_mask: u64,
    pub(crate) cr4_mask: u64,
    /// What the processor is to have in the masked bits of CR0 and CR4, whatever the guest believes.
    pub(crate) cr0: u64,
    pub(crate) cr4: u64,
    pub(crate) tsc_offset: u64,
    pub(crate) tsc_multiplier: u64,
    pub(crate) xss_bitmap: u64,
    pub(crate) ple: (u32, u32),
    pub(crate) io_bitmaps: (u64, u64),
    pub(crate) virtual_apic: u64,
    pub(crate) apic_access: u64,
    pub(crate) tpr_threshold: u32,
}

impl Own {
    fn read<V: Vmcs + ?Sized>(vmcs01: &V) -> Self {
        let windows = primary::INTERRUPT_WINDOW_EXITING | primary::NMI_WINDOW_EXITING;
        let primary = vmcs01.read32(Field::PrimaryControls) & !windows;
        let with_secondary = primary & primary::SECONDARY_CONTROLS != 0;
        let secondary = if with_secondary { vmcs01.read32(Field::SecondaryControls) } else { 0 };
        let read_if = |condition: bool, field| if condition { vmcs01.read(field) } else { 0 };
        let (scaling, ple) = (secondary & secondary::TSC_SCALING != 0, secondary & secondary::PAUSE_LOOP_EXITING != 0);
        let (cr0_mask, cr4_mask) = (vmcs01.read(Field::Cr0Mask), vmcs01.read(Field::Cr4Mask));
        Self {
            pin: vmcs01.read32(Field::PinBasedControls),
            primary,
            secondary,
            exit: vmcs01.read32(Field::ExitControls),
            entry: vmcs01.read32(Field::EntryControls),
            exceptions: vmcs01.read32(Field::ExceptionBitmap),
            pf_mask: vmcs01.read32(Field::PageFaultErrorCodeMask),
            pf_match: vmcs01.read32(Field::PageFaultErrorCodeMatch),
            cr0_mask,
            cr4_mask,
            cr0: vmcs01.read(Field::GuestCr0) & cr0_mask,
            cr4: vmcs01.read(Field::GuestCr4) & cr4_mask,
            tsc_offset: read_if(primary & primary::TSC_OFFSETTING != 0, Field::TscOffset),
            tsc_multiplier: if scaling { vmcs01.read(Field::TscMultiplier) } else { ONE },
            xss_bitmap: read_if(secondary & secondary::XSAVES != 0, Field::XssExitingBitmap),
            ple: (read_if(ple, Field::PleGap) as u32, read_if(ple, Field::PleWindow) as u32),
            io_bitmaps: match primary & primary::IO_BITMAPS != 0 {
                true => (vmcs01.read(Field::IoBitmapA), vmcs01.read(Field::IoBitmapB)),
                false => (0, 0),
            },
            virtual_apic: read_if(primary & primary::TPR_SHADOW != 0, Field::VirtualApicAddress),
            apic_access: read_if(secondary & secondary::VIRTUALIZE_APIC_ACCESSES != 0, Field::ApicAccessAddress),
            tpr_threshold: read_if(primary & primary::TPR_SHADOW != 0, Field::TprThreshold) as u32,
        }
    }

    /// True when physical interrupts go to the guest, not to the embedder.
    #[inline]
    pub(crate) const fn passes_interrupts(&self) -> bool {
        self.pin & pin::EXTERNAL_INTERRUPT_EXITING == 0
    }
}

impl NestedVmx {
    /// The embedder changed a control field of VMCS01, or wrote a control field of VMCS02 itself: both are read and
    /// made anew at the next VM entry of L1's.
    pub fn own_controls_changed(&mut self) {
        self.l2.own = None;
        self.l2.cache.forget_all();
        self.l2.vpid01 = None;
        self.changed = groups::ALL;
    }

    /// The embedder's controls.
    #[inline]
    pub(crate) fn own<V: Vmcs + ?Sized>(&mut self, vmcs01: &V) -> Own {
        match self.l2.own {
            Some(own) => own,
            None => {
                let own = Own::read(vmcs01);
                self.l2.own = Some(own);
                own
            }
        }
    }

    /// The embedder's controls as last read; zero before any entry.
    #[inline]
    pub(crate) fn own_known(&self) -> Own {
        self.l2.own.unwrap_or_default()
    }

    /// True when the embedder's exception bitmap, mask and match let any page fault exit.
    pub(crate) fn own_takes_page_faults(&self) -> bool {
        let own = self.own_known();
        // With bit 14 clear a fault exits that does not match: none if everything matches.
        own.exceptions & PF != 0 || own.pf_mask != 0 || own.pf_match != 0
    }

    /// True when the embedder's exception bitmap wants an exception.
    pub(crate) fn own_takes(&self, vector: u32, error_code: u32) -> bool {
        let own = self.own_known();
        let bit = own.exceptions >> (vector & 31) & 1 != 0;
        if vector & 31 == 14 { (error_code & own.pf_mask == own.pf_match) == bit } else { bit }
    }
}
