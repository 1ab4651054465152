//! The controls of VMCS02: the embedder's and L1's together.
//!
//! Called by [`crate::vmcs02`] when L1 changed a control; writes through its cache.

use crate::controls::{entry, exit, pin, primary, secondary};
use crate::field::Field;
use crate::machine::Vmcs;
use crate::own::Own;
use crate::state::NestedVmx;
use crate::vmcs02::PF;

impl NestedVmx {
    /// Controls of VMCS02.
    pub(crate) fn load_controls<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        let host = &self.config.host;
        let (allowed_pin, required_pin) = (host.pin.allowed, host.pin.required);
        let pin12 = self.vmcs12.get32(Field::PinBasedControls);
        let mut pins = (own.pin | pin12) & (pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING) | required_pin;
        if pins & pin::NMI_EXITING != 0 {
            // Bit 3 of the interruptibility state is then L2's blocking, whichever way L1 sees NMIs.
            pins |= allowed_pin & pin::VIRTUAL_NMIS;
        }
        let hardware_timer = self.l2.timer.choose(own.pin, allowed_pin, host.exit.allowed);
        if own.pin & pin::PREEMPTION_TIMER != 0 || (hardware_timer && pin12 & pin::PREEMPTION_TIMER != 0) {
            pins |= pin::PREEMPTION_TIMER;
        }
        self.l2.pin = pins;
        let exits = self.merged_exit(own, pins);
        let entries = self.merged_entry(own);
        self.load_primary(vmcs02, own);
        self.put(vmcs02, Field::PinBasedControls, pins.into());
        self.put(vmcs02, Field::ExitControls, exits.into());
        self.put(vmcs02, Field::EntryControls, entries.into());
        self.load_exceptions(vmcs02, own);
        self.load_fixed(vmcs02);
    }

    fn merged_exit(&self, own: &Own, pins: u32) -> u32 {
        let allowed = self.config.host.exit.allowed;
        let mut exits = own.exit | allowed & (exit::SAVE_DEBUG_CONTROLS | exit::SAVE_EFER | exit::SAVE_PAT);
        if own.passes_interrupts() {
            exits &= !exit::ACKNOWLEDGE_INTERRUPT;
            exits |= self.vmcs12.get32(Field::ExitControls) & exit::ACKNOWLEDGE_INTERRUPT;
        }
        if own.pin & pin::PREEMPTION_TIMER == 0 {
            exits &= !exit::SAVE_PREEMPTION_TIMER;
            if pins & pin::PREEMPTION_TIMER != 0 {
                // An exit to the embedder does not start the timer anew.
                exits |= allowed & exit::SAVE_PREEMPTION_TIMER;
            }
        }
        exits
    }

    fn merged_entry(&self, own: &Own) -> u32 {
        const FROM_L1: u32 = entry::IA32E_MODE_GUEST | entry::LOAD_PERF_GLOBAL_CTRL | entry::LOAD_BNDCFGS;
        own.entry & !entry::IA32E_MODE_GUEST
            | self.vmcs12.get32(Field::EntryControls) & FROM_L1
            | self.config.host.entry.allowed & entry::LOAD_DEBUG_CONTROLS
    }

    fn load_primary<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        const SEPARATE: u32 = primary::IO_BITMAPS
            | primary::UNCONDITIONAL_IO_EXITING
            | primary::MSR_BITMAPS
            | primary::TPR_SHADOW
            | primary::CR8_LOAD_EXITING
            | primary::CR8_STORE_EXITING;
        const CR8: u32 = primary::CR8_LOAD_EXITING | primary::CR8_STORE_EXITING;
        let primary12 = self.vmcs12.get32(Field::PrimaryControls);
        let mut merged = (own.primary | primary12) & !SEPARATE | primary12 & (CR8 | primary::TPR_SHADOW);
        let (mut apic, mut threshold) = (None, self.vmcs12.get32(Field::TprThreshold));
        if primary12 & primary::TPR_SHADOW != 0 {
            // The embedder puts the address of L1's page there.
            self.l2.cache.forget(Field::VirtualApicAddress);
        } else {
            // CR8 is L1's then, and the embedder's business.
            merged |= own.primary & (CR8 | primary::TPR_SHADOW);
            apic = (own.primary & primary::TPR_SHADOW != 0).then_some(own.virtual_apic);
            threshold = own.tpr_threshold;
        }
        merged |= primary12 & own.primary & primary::MSR_BITMAPS;
        merged |= match primary12 & primary::IO_BITMAPS {
            0 if primary12 & primary::UNCONDITIONAL_IO_EXITING != 0 => primary::UNCONDITIONAL_IO_EXITING,
            0 => own.primary & (primary::IO_BITMAPS | primary::UNCONDITIONAL_IO_EXITING),
            _ if own.primary & primary::IO_BITMAPS == 0 && own.primary & primary::UNCONDITIONAL_IO_EXITING != 0 => {
                primary::UNCONDITIONAL_IO_EXITING
            }
            bitmaps => bitmaps,
        };
        let secondary = self.merged_secondary(own);
        if own.primary & primary::SECONDARY_CONTROLS != 0 {
            merged |= primary::SECONDARY_CONTROLS;
            self.put(vmcs02, Field::SecondaryControls, secondary.into());
        }
        self.l2.primary = merged;
        if let Some(address) = apic {
            self.put(vmcs02, Field::VirtualApicAddress, address);
        }
        if merged & primary::TPR_SHADOW != 0 {
            self.put(vmcs02, Field::TprThreshold, threshold.into());
        }
        if merged & primary::CR3_LOAD_EXITING != 0 {
            self.load_cr3_targets(vmcs02, own);
        }
        self.load_secondary(vmcs02, own, secondary);
    }

    fn load_cr3_targets<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        // A target of L1's is none of the embedder's.
        let count =
            if own.primary & primary::CR3_LOAD_EXITING != 0 { 0 } else { self.vmcs12.get(Field::Cr3TargetCount) };
        self.put(vmcs02, Field::Cr3TargetCount, count);
        if count != 0 {
            self.copy_all(vmcs02, &[Field::Cr3Target0, Field::Cr3Target1, Field::Cr3Target2, Field::Cr3Target3]);
        }
    }

    fn merged_secondary(&self, own: &Own) -> u32 {
        /// What the embedder's alone decides, or wants as well.
        const OWN: u32 = secondary::EPT
            | secondary::VPID
            | secondary::DESCRIPTOR_TABLE_EXITING
            | secondary::WBINVD_EXITING
            | secondary::PAUSE_LOOP_EXITING
            | secondary::RDRAND_EXITING
            | secondary::RDSEED_EXITING
            | secondary::ENCLS_EXITING
            | secondary::CONCEAL_VMX_FROM_PT
            | secondary::TSC_SCALING;
        /// What L1 asks for.
        const L1: u32 = secondary::VIRTUALIZE_APIC_ACCESSES
            | secondary::DESCRIPTOR_TABLE_EXITING
            | secondary::RDTSCP
            | secondary::VIRTUALIZE_X2APIC_MODE
            | secondary::WBINVD_EXITING
            | secondary::UNRESTRICTED_GUEST
            | secondary::APIC_REGISTER_VIRTUALIZATION
            | secondary::VIRTUAL_INTERRUPT_DELIVERY
            | secondary::PAUSE_LOOP_EXITING
            | secondary::RDRAND_EXITING
            | secondary::INVPCID
            | secondary::VM_FUNCTIONS
            | secondary::RDSEED_EXITING
            | secondary::XSAVES
            | secondary::TSC_SCALING;
        let secondary12 = self.secondary12();
        let mut merged = own.secondary & OWN | secondary12 & L1;
        if secondary12 & (secondary::VIRTUALIZE_APIC_ACCESSES | secondary::VIRTUALIZE_X2APIC_MODE) == 0 {
            merged |= own.secondary & secondary::VIRTUALIZE_APIC_ACCESSES;
        }
        merged & self.config.host.secondary
    }

    fn load_secondary<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own, merged: u32) {
        let secondary12 = self.secondary12();
        if secondary12 & secondary::VIRTUALIZE_APIC_ACCESSES != 0 {
            // The embedder puts the address of L1's page there.
            self.l2.cache.forget(Field::ApicAccessAddress);
        } else if merged & secondary::VIRTUALIZE_APIC_ACCESSES != 0 {
            self.put(vmcs02, Field::ApicAccessAddress, own.apic_access);
        }
        if merged & secondary::PAUSE_LOOP_EXITING != 0 {
            let (gap, window) = match secondary12 & secondary::PAUSE_LOOP_EXITING != 0 {
                true => (self.vmcs12.get32(Field::PleGap), self.vmcs12.get32(Field::PleWindow)),
                false => own.ple,
            };
            self.put(vmcs02, Field::PleGap, gap.into());
            self.put(vmcs02, Field::PleWindow, window.into());
        }
        if merged & secondary::XSAVES != 0 {
            let bitmap = own.xss_bitmap | self.vmcs12.get(Field::XssExitingBitmap);
            self.put(vmcs02, Field::XssExitingBitmap, bitmap);
        }
        if merged & secondary::VIRTUAL_INTERRUPT_DELIVERY != 0 {
            let bitmaps = [Field::EoiExitBitmap0, Field::EoiExitBitmap1, Field::EoiExitBitmap2, Field::EoiExitBitmap3];
            self.copy_all(vmcs02, &bitmaps);
        }
        if merged & secondary::VM_FUNCTIONS != 0 {
            // No function is the processor's to do: each VMFUNC exits.
            self.put(vmcs02, Field::VmFunctionControls, 0);
        }
        self.load_tsc(vmcs02, own, merged);
    }

    /// L2's TSC: L1's, scaled and offset as L1 says, which is the embedder's, scaled and offset.
    fn load_tsc<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own, merged: u32) {
        let (mut offset, mut multiplier) = (own.tsc_offset, own.tsc_multiplier);
        if self.primary12(primary::TSC_OFFSETTING) {
            if self.has12(secondary::TSC_SCALING) {
                let multiplier12 = self.vmcs12.get(Field::TscMultiplier);
                offset = scale_signed(offset, multiplier12);
                multiplier = scale(multiplier, multiplier12);
            }
            offset = offset.wrapping_add(self.vmcs12.get(Field::TscOffset));
        }
        if self.l2.primary & primary::TSC_OFFSETTING != 0 {
            self.put(vmcs02, Field::TscOffset, offset);
        }
        if merged & secondary::TSC_SCALING != 0 {
            self.put(vmcs02, Field::TscMultiplier, multiplier);
        }
    }

    /// The exception bitmap, and which page faults it means. When the embedder wants page faults too, all of them exit
    /// and the routing applies L1's mask and match.
    fn load_exceptions<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V, own: &Own) {
        let bitmap = own.exceptions | self.vmcs12.get32(Field::ExceptionBitmap);
        let (mask, matching) = if self.own_takes_page_faults() {
            (0, 0)
        } else {
            (self.vmcs12.get32(Field::PageFaultErrorCodeMask), self.vmcs12.get32(Field::PageFaultErrorCodeMatch))
        };
        let bitmap = if self.own_takes_page_faults() { bitmap | PF } else { bitmap };
        self.put(vmcs02, Field::ExceptionBitmap, bitmap.into());
        self.put(vmcs02, Field::PageFaultErrorCodeMask, mask.into());
        self.put(vmcs02, Field::PageFaultErrorCodeMatch, matching.into());
    }

    /// Fields that are the same for every L2.
    fn load_fixed<V: Vmcs + ?Sized>(&mut self, vmcs02: &mut V) {
        self.put(vmcs02, Field::VmcsLinkPointer, u64::MAX);
        for field in [Field::ExitMsrStoreCount, Field::ExitMsrLoadCount, Field::EntryMsrLoadCount] {
            // L1's lists are executed in software; the embedder switches its own MSRs itself.
            self.put(vmcs02, field, 0);
        }
    }
}

/// `value` times `multiplier` with 48 fraction bits.
const fn scale(value: u64, multiplier: u64) -> u64 {
    ((value as u128).wrapping_mul(multiplier as u128) >> 48) as u64
}

/// The same for a signed value, rounded towards zero.
const fn scale_signed(value: u64, multiplier: u64) -> u64 {
    if (value as i64) < 0 { scale(value.wrapping_neg(), multiplier).wrapping_neg() } else { scale(value, multiplier) }
}
