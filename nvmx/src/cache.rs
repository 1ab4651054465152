//! What a hardware VMCS holds, as far as it is known without a VMREAD, and sets of fields.
//!
//! A write of what is there already is skipped. Used by the modules that make VMCS02 and end L2's runs; uses `field`
//! and the embedder's [`Vmcs`].

use crate::field::{Area, Field};
use crate::machine::Vmcs;

/// A set of VMCS fields, by slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSet {
    low: u64,
    middle: u64,
    high: u64,
}

const _: () = assert!(Field::COUNT <= 192);

impl FieldSet {
    pub(crate) const EMPTY: Self = Self { low: 0, middle: 0, high: 0 };

    /// The set of `fields`.
    pub(crate) const fn of(mut fields: &[Field]) -> Self {
        let mut set = Self::EMPTY;
        while let [field, rest @ ..] = fields {
            set = set.with(*field);
            fields = rest;
        }
        set
    }

    /// All fields of an area.
    pub(crate) const fn area(area: Area) -> Self {
        let (mut set, mut fields) = (Self::EMPTY, Field::ALL);
        while let [field, rest @ ..] = fields {
            if field.area() as u8 == area as u8 {
                set = set.with(*field);
            }
            fields = rest;
        }
        set
    }

    /// The set and `field`.
    #[inline(always)]
    pub(crate) const fn with(self, field: Field) -> Self {
        let one = Self::one(field);
        Self { low: self.low | one.low, middle: self.middle | one.middle, high: self.high | one.high }
    }

    #[inline(always)]
    const fn one(field: Field) -> Self {
        let bit = 1 << (field.slot() & 63);
        match field.slot() >> 6 {
            0 => Self { low: bit, ..Self::EMPTY },
            1 => Self { middle: bit, ..Self::EMPTY },
            _ => Self { high: bit, ..Self::EMPTY },
        }
    }

    #[inline(always)]
    pub(crate) const fn contains(&self, field: Field) -> bool {
        let one = Self::one(field);
        self.low & one.low | self.middle & one.middle | self.high & one.high != 0
    }

    #[inline(always)]
    pub(crate) const fn insert(&mut self, field: Field) {
        *self = self.with(field);
    }

    #[inline(always)]
    pub(crate) const fn remove(&mut self, field: Field) {
        *self = self.without(&Self::one(field));
    }

    /// The set less `other`.
    #[inline(always)]
    pub(crate) const fn without(&self, other: &Self) -> Self {
        Self { low: self.low & !other.low, middle: self.middle & !other.middle, high: self.high & !other.high }
    }

    /// The set and `other`.
    #[inline(always)]
    pub(crate) const fn union(&self, other: &Self) -> Self {
        Self { low: self.low | other.low, middle: self.middle | other.middle, high: self.high | other.high }
    }

    #[inline(always)]
    pub(crate) const fn is_empty(&self) -> bool {
        self.low | self.middle | self.high == 0
    }

    /// The lowest field, taken out.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<Field> {
        let (word, base) = if self.low != 0 {
            (&mut self.low, 0)
        } else if self.middle != 0 {
            (&mut self.middle, 64)
        } else {
            (&mut self.high, 128)
        };
        let bit = word.trailing_zeros();
        *word &= word.wrapping_sub(1);
        Field::ALL.get(bit.wrapping_add(base) as usize).copied()
    }
}

/// What a run of the guest changes in its VMCS.
const VOLATILE: FieldSet = FieldSet::area(Area::Guest).union(&FieldSet::area(Area::ExitInformation));

/// The known contents of one hardware VMCS.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    values: [u64; Field::COUNT],
    known: FieldSet,
}

impl Default for Cache {
    fn default() -> Self {
        Self { values: [0; Field::COUNT], known: FieldSet::EMPTY }
    }
}

impl Cache {
    /// Nothing is known any more.
    pub(crate) const fn forget_all(&mut self) {
        self.known = FieldSet::EMPTY;
    }

    /// The guest ran, or somebody else wrote its state: only the controls are still known.
    #[inline(always)]
    pub(crate) const fn forget_guest(&mut self) {
        self.known = self.known.without(&VOLATILE);
    }

    /// One field is not known any more.
    #[inline(always)]
    pub(crate) const fn forget(&mut self, field: Field) {
        self.known.remove(field);
    }

    /// The value of `field`, if it is known.
    #[inline(always)]
    pub(crate) fn known(&self, field: Field) -> Option<u64> {
        if self.known.contains(field) { self.values.get(field.slot()).copied() } else { None }
    }

    /// `field` is known to be `value`.
    #[inline(always)]
    pub(crate) fn learn(&mut self, field: Field, value: u64) {
        if let Some(slot) = self.values.get_mut(field.slot()) {
            *slot = value;
            self.known.insert(field);
        }
    }

    /// As [`learn`](Self::learn), to be completed by [`noted`](Self::noted).
    #[inline(always)]
    pub(crate) fn note(&mut self, field: Field, value: u64) {
        if let Some(slot) = self.values.get_mut(field.slot()) {
            *slot = value;
        }
    }

    /// The values of `fields` were noted.
    #[inline(always)]
    pub(crate) const fn noted(&mut self, fields: &FieldSet) {
        self.known = self.known.union(fields);
    }

    /// Writes a field unless it is known to hold `value`.
    #[inline]
    pub(crate) fn write<V: Vmcs + ?Sized>(&mut self, vmcs: &mut V, field: Field, value: u64) {
        if self.known(field) != Some(value) {
            vmcs.write(field, value);
            self.learn(field, value);
        }
    }

    /// Reads a field unless it is known.
    #[inline]
    pub(crate) fn read<V: Vmcs + ?Sized>(&mut self, vmcs: &V, field: Field) -> u64 {
        if let Some(value) = self.known(field) {
            return value;
        }
        let value = vmcs.read(field);
        self.learn(field, value);
        value
    }
}
