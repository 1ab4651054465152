//! Groups of VMCS fields: what changed in a VMCS12 since VMCS02 was last made of it.
//!
//! The groups are those of the enlightened VMCS's clean fields, for a plain VMCS as well, so that both kinds say in the
//! same words which fields VMCS02 needs anew. Uses `field`.

use tlfs_abi::evmcs::{self, CleanFields, EvmcsUse};

use crate::field::Field;

/// A set of field groups: bits 15:0 as in [`CleanFields`], but set where something *changed*.
pub type Groups = u32;

/// Every field that belongs to no clean-field group: guest RIP, the TPR threshold, exit information, and what the
/// enlightened VMCS lacks.
pub const OTHER: Groups = 1 << 16;

/// All groups.
pub const ALL: Groups = CleanFields::ALL | OTHER;

const GROUPS: [Groups; Field::COUNT] = {
    let mut groups = [OTHER; Field::COUNT];
    let mut slots: &mut [Groups] = &mut groups;
    let mut fields = Field::ALL;
    while let ([slot, more_slots @ ..], [field, more_fields @ ..]) = (slots, fields) {
        if let Some(entry) = evmcs::field(field.encoding().0)
            && let EvmcsUse::Group(group) = entry.used
            && group != CleanFields::NONE
        {
            *slot = group;
        }
        slots = more_slots;
        fields = more_fields;
    }
    groups
};

impl Field {
    /// The group that the field belongs to, one bit.
    #[inline]
    pub fn group(self) -> Groups {
        GROUPS.get(self.slot()).copied().unwrap_or(OTHER)
    }
}
