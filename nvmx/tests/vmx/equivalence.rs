//! Economy changes nothing: two VPs live through the same random history, one as it is, the other reads every field and
//! makes all of VMCS02 anew at every entry. What the processor and L1 see must be the same.

use nvmx::bits::{cr0, cr4};
use nvmx::controls::{entry, exit, primary, secondary};
use nvmx::exit_reason as r;
use nvmx::field::{Area, Field};
use nvmx::{Entry, L1Exit, L2Exit};

use crate::rig::{EVMCS, End, Rig};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.next() as usize % values.len()]
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }
}

/// Guest state with values that are legal together.
const GUEST: &[(Field, &[u64])] = &[
    (Field::GuestRip, &[0x9000, 0x9002, 0xFFFF_F000]),
    (Field::GuestRsp, &[0xA000, 0xFFFF_8000_0000_0000]),
    (Field::GuestRflags, &[2, 0x202, 0x246]),
    (Field::GuestInterruptibility, &[0, 8]),
    (Field::GuestCr0, &[0x8000_0031, 0x8000_0031 | cr0::TS, 0x8000_0033 | cr0::WP]),
    (Field::GuestCr3, &[0x7_0000, 0x7_8000]),
    (Field::GuestCr4, &[cr4::PAE | cr4::VMXE, cr4::PAE | cr4::VMXE | cr4::PGE]),
    (Field::GuestDr7, &[0x400, 0x455]),
    (Field::GuestDebugctl, &[0, 1]),
    (Field::GuestPat, &[0x0007_0406_0007_0406, 0x0606_0606_0606_0606, 0x0101_0101_0101_0101]),
    (Field::GuestEfer, &[0xD00, 0xD01, 0x501]),
    (Field::GuestFsBase, &[0, 0x5000]),
    (Field::GuestGsBase, &[0x1000, 0x6000]),
    (Field::GuestGsSelector, &[0, 0x18]),
    (Field::GuestEsLimit, &[0xFFFF_FFFF, 0xFFFF]),
    (Field::GuestGdtrBase, &[0x1000, 0x2000]),
    (Field::GuestIdtrLimit, &[0xFFF, 0xFFFF]),
    (Field::GuestSysenterCs, &[0, 0x33]),
    (Field::GuestSysenterEip, &[0x100, 0x200]),
    (Field::GuestBndcfgs, &[0, 1]),
];

/// Other fields that L1 writes; bits in controls are toggled.
const OTHERS: &[(Field, &[u64])] = &[
    (Field::Cr0Mask, &[0, cr0::TS, cr0::TS | cr0::PE]),
    (Field::Cr0ReadShadow, &[0, cr0::TS]),
    (Field::Cr4Mask, &[0, cr4::VMXE, cr4::PGE]),
    (Field::Cr4ReadShadow, &[0, cr4::PGE]),
    (Field::ExceptionBitmap, &[0, 1 << 6, 1 << 14]),
    (Field::TscOffset, &[0, 77]),
    (Field::VirtualProcessorId, &[7, 8]),
    (Field::EptPointer, &[0x6_001E, 0x8_001E]),
    (Field::EntryInterruptionInfo, &[0, 0x8000_0306, 0x8000_0B0D, 0x306]),
    (Field::EntryExceptionErrorCode, &[0, 0x10]),
    (Field::HostRip, &[0xB000, 0xB100]),
    (Field::HostPat, &[0x0007_0406_0007_0406, 0x0404_0404_0404_0404]),
    (Field::HostGsBase, &[0x1_0000, 0x2_0000]),
];

const TOGGLES: &[(Field, u32)] = &[
    (Field::PrimaryControls, primary::HLT_EXITING),
    (Field::PrimaryControls, primary::RDTSC_EXITING),
    (Field::PrimaryControls, primary::TSC_OFFSETTING),
    (Field::PrimaryControls, primary::INTERRUPT_WINDOW_EXITING),
    (Field::PrimaryControls, primary::MSR_BITMAPS),
    (Field::SecondaryControls, secondary::WBINVD_EXITING),
    (Field::SecondaryControls, secondary::RDTSCP),
    (Field::ExitControls, exit::SAVE_PAT),
    (Field::ExitControls, exit::LOAD_PAT),
    (Field::ExitControls, exit::SAVE_EFER),
    (Field::ExitControls, exit::LOAD_EFER),
    (Field::ExitControls, exit::SAVE_DEBUG_CONTROLS),
    (Field::EntryControls, entry::LOAD_PAT),
    (Field::EntryControls, entry::LOAD_EFER),
    (Field::EntryControls, entry::LOAD_DEBUG_CONTROLS),
    (Field::EntryControls, entry::LOAD_BNDCFGS),
];

/// Fields of VMCS02 that an entry uses: controls and guest state.
fn used(rig: &Rig) -> Vec<(Field, u64)> {
    let unused = [
        // Of no meaning without a valid event.
        Field::EntryInterruptionInfo,
        Field::EntryExceptionErrorCode,
        Field::EntryInstructionLength,
    ];
    let valid = rig.vmcs02.peek(Field::EntryInterruptionInfo) >> 31 != 0;
    let tsc = rig.vmcs02.peek(Field::PrimaryControls) & u64::from(primary::TSC_OFFSETTING) != 0;
    let bitmaps = rig.vmcs02.peek(Field::PrimaryControls) & u64::from(primary::MSR_BITMAPS) != 0;
    let bounds = rig.vmcs02.peek(Field::EntryControls) & u64::from(entry::LOAD_BNDCFGS) != 0;
    Field::ALL
        .iter()
        .filter(|field| matches!(field.area(), Area::Control | Area::Guest))
        .filter(|field| valid || !unused.contains(field))
        .filter(|field| tsc || **field != Field::TscOffset)
        .filter(|field| bitmaps || **field != Field::MsrBitmap)
        .filter(|field| bounds || **field != Field::GuestBndcfgs)
        .map(|field| (*field, rig.vmcs02.peek(*field)))
        .collect()
}

/// L1's registers that its VM entries and exits leave in place.
const OF_L1: &[Field] = &[Field::GuestPat, Field::GuestEfer, Field::GuestDr7, Field::GuestDebugctl];

/// The processor's part of an exit.
fn exit_of(rig: &mut Rig, reason: u32) {
    let long = rig.vmcs02.peek(Field::GuestEfer) & 1 << 10 != 0;
    let controls = rig.vmcs02.peek(Field::EntryControls) & !(1 << 9) | u64::from(long) << 9;
    rig.vmcs02.poke(Field::EntryControls, controls);
    let exit = rig.l2(reason);
    let expected = if reason == r::PML_FULL { L2Exit::Embedder { reason } } else { L2Exit::ToL1 };
    assert_eq!(exit, expected);
}

fn enter(rig: &mut Rig) {
    assert!(matches!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Run(_)));
}

/// A plain or an enlightened pair, launched. `write` sets a field of L1's VMCS.
trait Kind {
    fn make() -> Rig;
    fn write(rig: &mut Rig, field: Field, value: u64) -> bool;
    fn read(rig: &mut Rig, field: Field) -> Option<u64>;
    /// Everything is read and made anew.
    fn naive(rig: &mut Rig);
}

struct Plain;
struct Enlightened;

impl Kind for Plain {
    fn make() -> Rig {
        Rig::launched(&[])
    }
    fn write(rig: &mut Rig, field: Field, value: u64) -> bool {
        rig.vmwrite(field.encoding(), value) == End::Succeed
    }
    fn read(rig: &mut Rig, field: Field) -> Option<u64> {
        Some(rig.told(field))
    }
    fn naive(rig: &mut Rig) {
        for field in Field::ALL {
            rig.told(*field);
        }
        rig.nested.own_controls_changed();
    }
}

impl Kind for Enlightened {
    fn make() -> Rig {
        let mut rig = Rig::announced();
        assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
        rig
    }
    fn write(rig: &mut Rig, field: Field, value: u64) -> bool {
        if field.evmcs().is_none() {
            return false;
        }
        rig.set_evmcs(field, value);
        let group = field.group() & 0xFFFF;
        let clean = u32::from_le_bytes(rig.read(EVMCS + 0x338));
        rig.write(EVMCS + 0x338, &(clean & !group).to_le_bytes());
        true
    }
    fn read(rig: &mut Rig, field: Field) -> Option<u64> {
        field.evmcs()?;
        Some(rig.evmcs(field))
    }
    fn naive(rig: &mut Rig) {
        rig.write(EVMCS + 0x338, &0u32.to_le_bytes());
        rig.nested.own_controls_changed();
    }
}

fn history<K: Kind>(seed: u64) {
    let mut random = Random(seed);
    let mut pair = [K::make(), K::make()];
    for step in 0..60 {
        pair.iter_mut().for_each(enter);
        let [a, b] = &pair;
        let (a, b) = (used(a), used(b));
        let differ: Vec<_> = a.iter().zip(&b).filter(|(a, b)| a != b).collect();
        assert!(a == b, "seed {seed}, entry {step}: {differ:x?}");
        while random.one_in(2) {
            let (field, values) = random.of(GUEST);
            let value = random.of(values);
            pair.iter_mut().for_each(|rig| rig.vmcs02.poke(field, value));
        }
        if random.one_in(4) {
            pair.iter_mut().for_each(|rig| exit_of(rig, r::PML_FULL));
            continue;
        }
        pair.iter_mut().for_each(|rig| exit_of(rig, r::CPUID));
        let of_l1 = |rig: &Rig| OF_L1.iter().map(|field| rig.vmcs01.peek(*field)).collect::<Vec<_>>();
        assert_eq!(of_l1(&pair[0]), of_l1(&pair[1]), "seed {seed}, exit {step}");
        pair.iter_mut().for_each(enter);
        while random.one_in(2) {
            let field = random.of(Field::ALL);
            let [a, b] = pair.each_mut().map(|rig| K::read(rig, field));
            assert_eq!(a, b, "seed {seed}, exit {step}, {field:?}");
        }
        while random.one_in(2) {
            let (field, values) = random.of(GUEST);
            let value = random.of(values);
            if OF_L1.contains(&field) {
                pair.iter_mut().for_each(|rig| rig.vmcs01.poke(field, value));
            }
        }
        for _ in 0..random.next() % 4 {
            let list = if random.one_in(2) { GUEST } else { OTHERS };
            let (field, values) = random.of(list);
            let value = random.of(values);
            pair.iter_mut().for_each(|rig| _ = K::write(rig, field, value));
        }
        if random.one_in(3) {
            let (field, bit) = random.of(TOGGLES);
            let [value, _] = pair.each_mut().map(|rig| K::read(rig, field).unwrap() ^ u64::from(bit));
            pair.iter_mut().for_each(|rig| _ = K::write(rig, field, value));
        }
        // Bochs's EFER check: LMA as the mode, which GUEST's values keep; "load IA32_EFER" off inherits L1's.
        K::naive(&mut pair[1]);
        let [a, b] = pair.each_mut().map(|rig| rig.l1(r::VMRESUME));
        assert_eq!(a, b, "seed {seed}, entry {step}");
        if a != L1Exit::EnterL2 {
            return;
        }
    }
}

#[test]
fn of_a_plain_vmcs() {
    (0..400).for_each(history::<Plain>);
}

#[test]
fn of_an_enlightened_vmcs() {
    (0..400).for_each(history::<Enlightened>);
}
