//! Events that wait: INIT, SIPI, NMI, interrupts, the preemption timer; windows, inactive guests, priorities.

use hvcore::addr::Level;
use nvmx::caps::Config;
use nvmx::controls::{exit, pin, primary};
use nvmx::exit_reason as r;
use nvmx::field::Field;
use nvmx::{Entry, L1Exit, L2Exit, NestedVmx};

use crate::rig::{End, Rig, host};

const NMI: u64 = 0x8000_0202;
const INTERRUPT: u64 = 0x8000_0030;

/// An embedder that takes interrupts itself, and an L1 with these pin-based controls and other fields.
fn rig(pins: u32, fields: &[(Field, u64)]) -> Rig {
    rig_on(*Rig::new().nested.config(), pins, fields)
}

fn rig_on(config: Config, pins: u32, fields: &[(Field, u64)]) -> Rig {
    let mut rig = Rig::filled_with(config);
    let own = pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING | pin::VIRTUAL_NMIS;
    rig.vmcs01.poke(Field::PinBasedControls, 0x16 | u64::from(own));
    let pins = rig.plus(Field::PinBasedControls, pins.into());
    rig.set(&[pins]);
    rig.set(fields);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2, "{:?}", rig.nested.last_refusal());
    rig
}

fn route(rig: &mut Rig) -> Level {
    rig.call(|nested, m| nested.route_events(m))
}

/// What L1 is told when `pend` has happened; `None` while L2 goes on.
fn told(rig: &mut Rig, pend: impl FnOnce(&mut NestedVmx)) -> Option<(u64, u64, u64)> {
    pend(&mut rig.nested);
    if route(rig) == Level::L2 {
        return None;
    }
    let fields = [Field::ExitReason, Field::ExitQualification, Field::ExitInterruptionInfo];
    let [reason, qualification, info] = fields.map(|field| rig.told(field));
    Some((reason, qualification, info))
}

fn window(rig: &Rig, bit: u32) -> bool {
    rig.vmcs02.peek(Field::PrimaryControls) & u64::from(bit) != 0
}

/// L2 ran and had an exit of the embedder's.
fn ran(rig: &mut Rig) {
    rig.run();
    assert_eq!(rig.l2(r::PML_FULL), L2Exit::Embedder { reason: r::PML_FULL });
}

#[test]
fn init_ends_l2s_run_and_waits_in_root_operation() {
    let mut rig = rig(0, &[]);
    ran(&mut rig);
    assert_eq!(told(&mut rig, NestedVmx::pend_init), Some((3, 0, 0)));
    assert_eq!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Run(rig.run()), "it was the exit");
    rig.nested.pend_init();
    assert!(matches!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Run(_)), "blocked");
    assert_eq!(rig.end(r::VMXOFF), End::Succeed);
    assert_eq!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Init);
    // Outside VMX operation at once.
    let mut rig = Rig::new();
    rig.nested.pend_init();
    assert_eq!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Init);
    rig.nested.reset();
    assert!(matches!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Run(_)));
}

#[test]
fn sipi_is_for_those_who_wait() {
    let mut waits = rig(0, &[(Field::GuestActivity, 3)]);
    assert_eq!(waits.call(|nested, m| nested.prepare_entry(m)), Entry::Wait);
    // Everything else is blocked.
    assert_eq!(told(&mut waits, NestedVmx::pend_init), None);
    assert_eq!(told(&mut waits, NestedVmx::pend_nmi), None);
    assert_eq!(waits.call(|nested, m| nested.prepare_entry(m)), Entry::Wait);
    assert_eq!(told(&mut waits, |nested| nested.pend_sipi(0x9A)), Some((4, 0x9A, 0)));
    assert_eq!(waits.told(Field::GuestActivity), 3);
    let mut runs = rig(0, &[]);
    ran(&mut runs);
    assert_eq!(told(&mut runs, |nested| nested.pend_sipi(0x9A)), None);
    runs.run();
    assert_eq!(runs.l2(r::CPUID), L2Exit::ToL1);
    runs.set(&[(Field::GuestActivity, 3)]);
    assert_eq!(runs.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(runs.call(|nested, m| nested.prepare_entry(m)), Entry::Wait, "the old one is lost");
}

#[test]
fn a_guest_that_is_shut_down_waits_for_an_nmi_or_init() {
    let mut host = host();
    host.misc |= 1 << 7;
    let config = Config::all(host, false, false).unwrap();
    let make = || rig_on(config, pin::NMI_EXITING, &[(Field::GuestActivity, 2)]);
    let mut rig = make();
    assert_eq!(rig.call(|nested, m| nested.prepare_entry(m)), Entry::Wait);
    assert_eq!(told(&mut rig, |nested| nested.pend_interrupt(Some(0x30))), None);
    assert_eq!(told(&mut rig, NestedVmx::pend_nmi), Some((0, 0, NMI)));
    assert_eq!(told(&mut make(), NestedVmx::pend_init), Some((3, 0, 0)));
}

#[test]
fn nmis_that_l1_wants() {
    let mut rig = rig(pin::NMI_EXITING, &[]);
    ran(&mut rig);
    assert_eq!(told(&mut rig, NestedVmx::pend_nmi), Some((0, 0, NMI)));
    assert_eq!(rig.vmcs01.peek(Field::GuestInterruptibility), 8, "L1 is in its NMI handler");
    rig.run();
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), 0, "and gets it once");
}

#[test]
fn nmis_that_l1_lets_through_are_l2s() {
    let mut rig = rig(0, &[]);
    ran(&mut rig);
    assert_eq!(told(&mut rig, NestedVmx::pend_nmi), None);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), NMI);
    // Blocked: a window opens, and the NMI goes in when it has.
    let mut rig = self::rig(0, &[]);
    ran(&mut rig);
    rig.vmcs02.poke(Field::GuestInterruptibility, 8);
    rig.nested.pend_nmi();
    rig.run();
    assert!(window(&rig, primary::NMI_WINDOW_EXITING));
    rig.vmcs02.poke(Field::GuestInterruptibility, 0);
    assert_eq!(rig.l2(r::NMI_WINDOW), L2Exit::Resume);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), NMI);
    assert!(!window(&rig, primary::NMI_WINDOW_EXITING));
    // The blocking is L1's as well.
    rig.vmcs02.poke(Field::GuestInterruptibility, 8);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.vmcs01.peek(Field::GuestInterruptibility), 8);
}

#[test]
fn virtual_nmis_have_a_blocking_of_their_own() {
    // With virtual NMIs L2's blocking is none of L1's.
    for (pins, blocked_after, exits) in [(pin::NMI_EXITING | pin::VIRTUAL_NMIS, 0, true), (pin::NMI_EXITING, 8, false)]
    {
        let mut rig = rig(pins, &[]);
        ran(&mut rig);
        rig.vmcs02.poke(Field::GuestInterruptibility, 8);
        assert_eq!(told(&mut rig, NestedVmx::pend_nmi).is_some(), exits);
        let mut rig = self::rig(pins, &[]);
        ran(&mut rig);
        rig.vmcs02.poke(Field::GuestInterruptibility, 8);
        rig.run();
        assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
        assert_eq!(rig.vmcs01.peek(Field::GuestInterruptibility), blocked_after);
    }
}

#[test]
fn interrupts_that_l1_wants() {
    let interrupts = pin::EXTERNAL_INTERRUPT_EXITING;
    let pend = |nested: &mut NestedVmx| nested.pend_interrupt(Some(0x30));
    let mut rig = rig(interrupts, &[]);
    ran(&mut rig);
    assert_eq!(told(&mut rig, pend), Some((1, 0, 0)));
    assert_eq!(rig.nested.pending_interrupt(), Some(0x30), "not acknowledged");
    // L1's own RFLAGS.IF is clear after the exit: it waits for a window.
    rig.run();
    assert_ne!(rig.vmcs01.peek(Field::PrimaryControls) & u64::from(primary::INTERRUPT_WINDOW_EXITING), 0);
    rig.vmcs01.poke(Field::GuestRflags, 0x202);
    assert_eq!(rig.l1(r::INTERRUPT_WINDOW), L1Exit::Resume);
    rig.run();
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), INTERRUPT);
    assert_eq!(rig.vmcs01.peek(Field::PrimaryControls) & u64::from(primary::INTERRUPT_WINDOW_EXITING), 0);
    assert_eq!(rig.nested.pending_interrupt(), None);
    // A window that the library did not open is not its own.
    assert_eq!(rig.l1(r::INTERRUPT_WINDOW), L1Exit::NotMine { reason: r::INTERRUPT_WINDOW });
    // Acknowledged on exit.
    let acknowledge = Rig::filled().nested.vmcs12().get(Field::ExitControls) | u64::from(exit::ACKNOWLEDGE_INTERRUPT);
    let mut rig = self::rig(interrupts, &[(Field::ExitControls, acknowledge)]);
    ran(&mut rig);
    assert_eq!(told(&mut rig, pend), Some((1, 0, INTERRUPT)));
    assert_eq!(rig.nested.pending_interrupt(), None);
}

#[test]
fn interrupts_that_l1_lets_through_are_l2s() {
    for (flags, blocking, open) in [(0x202, 0, true), (2, 0, false), (0x202, 1, false), (0x202, 2, false)] {
        let mut rig = rig(0, &[]);
        ran(&mut rig);
        rig.vmcs02.poke(Field::GuestRflags, flags);
        rig.vmcs02.poke(Field::GuestInterruptibility, blocking);
        assert_eq!(told(&mut rig, |nested| nested.pend_interrupt(Some(0x30))), None);
        rig.run();
        assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo) == INTERRUPT, open);
        assert_eq!(window(&rig, primary::INTERRUPT_WINDOW_EXITING), !open);
        assert_eq!(rig.nested.pending_interrupt().is_none(), open);
    }
    // Withdrawn in time.
    let mut rig = rig(0, &[]);
    ran(&mut rig);
    rig.nested.pend_interrupt(Some(0x30));
    rig.nested.pend_interrupt(None);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo) >> 31, 0);
    assert!(!window(&rig, primary::INTERRUPT_WINDOW_EXITING));
}

#[test]
fn the_first_of_several() {
    let all = pin::EXTERNAL_INTERRUPT_EXITING | pin::NMI_EXITING;
    let mut rig = rig(all, &[]);
    ran(&mut rig);
    rig.nested.pend_interrupt(Some(0x30));
    rig.nested.pend_nmi();
    rig.nested.pend_init();
    assert_eq!(told(&mut rig, |_| ()), Some((3, 0, 0)));
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(told(&mut rig, |_| ()), Some((0, 0, NMI)));
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    assert_eq!(told(&mut rig, |_| ()), Some((1, 0, 0)));
}

#[test]
fn what_waits_behind_an_injection_comes_right_after_it() {
    let mut rig = rig(pin::EXTERNAL_INTERRUPT_EXITING, &[(Field::EntryInterruptionInfo, 0x8000_0306)]);
    rig.nested.pend_interrupt(Some(0x30));
    assert_eq!(route(&mut rig), Level::L2);
    let plan = rig.run();
    assert!(!plan.exit_soon, "the processor's timer does it");
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), 0x8000_0306);
    assert_eq!(rig.vmcs02.peek(Field::PreemptionTimer), 0);
    assert_ne!(rig.vmcs02.peek(Field::PinBasedControls) & u64::from(pin::PREEMPTION_TIMER), 0);
    assert_eq!(rig.l2(r::PREEMPTION_TIMER), L2Exit::Resume);
    assert_eq!(told(&mut rig, |_| ()), Some((1, 0, 0)));
    // Nothing waits: no such haste.
    let mut rig = self::rig(pin::EXTERNAL_INTERRUPT_EXITING, &[(Field::EntryInterruptionInfo, 0x8000_0306)]);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::PinBasedControls) & u64::from(pin::PREEMPTION_TIMER), 0);
}

#[test]
fn without_a_timer_the_embedder_has_to_hurry() {
    let mut host = host();
    host.pin.allowed &= !pin::PREEMPTION_TIMER;
    let config = Config::all(host, false, false).unwrap();
    let event = [(Field::EntryInterruptionInfo, 0x8000_0306)];
    let mut rig = rig_on(config, pin::EXTERNAL_INTERRUPT_EXITING, &event);
    rig.nested.pend_interrupt(Some(0x30));
    assert!(rig.run().exit_soon);
    let mut rig = rig_on(config, pin::EXTERNAL_INTERRUPT_EXITING, &event);
    assert!(!rig.run().exit_soon);
}

/// Controls of an L1 with a preemption timer whose value exits save.
fn timer(value: u64) -> [(Field, u64); 2] {
    let exits = Rig::filled().nested.vmcs12().get(Field::ExitControls) | u64::from(exit::SAVE_PREEMPTION_TIMER);
    [(Field::ExitControls, exits), (Field::PreemptionTimer, value)]
}

#[test]
fn the_timer_in_hardware() {
    let mut rig = rig(pin::PREEMPTION_TIMER, &timer(1000));
    assert_eq!(rig.run().timer, None);
    assert_eq!(rig.vmcs02.peek(Field::PreemptionTimer), 1000);
    assert_ne!(rig.vmcs02.peek(Field::PinBasedControls) & u64::from(pin::PREEMPTION_TIMER), 0);
    assert_ne!(rig.vmcs02.peek(Field::ExitControls) & u64::from(exit::SAVE_PREEMPTION_TIMER), 0);
    // An exit to the embedder does not start it anew.
    rig.vmcs02.poke(Field::PreemptionTimer, 600);
    assert_eq!(rig.l2(r::PML_FULL), L2Exit::Embedder { reason: r::PML_FULL });
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::PreemptionTimer), 600);
    rig.vmcs02.poke(Field::PreemptionTimer, 0);
    assert_eq!(rig.l2(r::PREEMPTION_TIMER), L2Exit::ToL1);
    assert_eq!(rig.told(Field::ExitReason), r::PREEMPTION_TIMER.into());
    assert_eq!(rig.told(Field::PreemptionTimer), 0);
    // Not saved without the control; started anew by each entry.
    let mut rig = self::rig(pin::PREEMPTION_TIMER, &[(Field::PreemptionTimer, 1000)]);
    rig.run();
    rig.vmcs02.poke(Field::PreemptionTimer, 600);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::PreemptionTimer), 1000);
    assert_eq!(rig.l1(r::VMRESUME), L1Exit::EnterL2);
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::PreemptionTimer), 1000);
}

#[test]
fn the_timer_keeps_its_value_while_the_library_uses_it() {
    let mut fields = timer(1000).to_vec();
    fields.push((Field::EntryInterruptionInfo, 0x8000_0306));
    let mut rig = rig(pin::PREEMPTION_TIMER | pin::EXTERNAL_INTERRUPT_EXITING, &fields);
    rig.nested.pend_interrupt(Some(0x30));
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::PreemptionTimer), 0);
    assert_eq!(rig.l2(r::PREEMPTION_TIMER), L2Exit::Resume);
    assert_eq!(told(&mut rig, |_| ()), Some((1, 0, 0)));
    assert_eq!(rig.told(Field::PreemptionTimer), 1000);
}

#[test]
fn the_timer_in_software() {
    let mut host = host();
    host.pin.allowed &= !pin::PREEMPTION_TIMER;
    let config = Config::all(host, false, false).unwrap();
    let mut rig = rig_on(config, pin::PREEMPTION_TIMER, &timer(1000));
    assert_eq!(rig.run().timer, Some(1000));
    assert_eq!(rig.vmcs02.peek(Field::PinBasedControls) & u64::from(pin::PREEMPTION_TIMER), 0);
    rig.nested.timer_elapsed(999);
    assert_eq!(rig.l2(r::PML_FULL), L2Exit::Embedder { reason: r::PML_FULL });
    assert_eq!(route(&mut rig), Level::L2);
    assert_eq!(rig.run().timer, Some(1));
    rig.nested.timer_elapsed(1);
    assert_eq!(rig.l2(r::PML_FULL), L2Exit::Embedder { reason: r::PML_FULL });
    assert_eq!(told(&mut rig, |_| ()), Some((r::PREEMPTION_TIMER.into(), 0, 0)));
    assert_eq!(rig.told(Field::PreemptionTimer), 0);
    // An exit saves what is left.
    let mut rig = rig_on(config, pin::PREEMPTION_TIMER, &timer(1000));
    rig.run();
    rig.nested.timer_elapsed(300);
    assert_eq!(rig.l2(r::CPUID), L2Exit::ToL1);
    assert_eq!(rig.told(Field::PreemptionTimer), 700);
    // Zero exits before anything is executed.
    let mut rig = rig_on(config, pin::PREEMPTION_TIMER, &timer(0));
    assert_eq!(told(&mut rig, |_| ()), Some((r::PREEMPTION_TIMER.into(), 0, 0)));
}

#[test]
fn an_embedder_that_uses_the_timer_keeps_it() {
    let mut rig = Rig::filled();
    rig.vmcs01.poke(Field::PinBasedControls, 0x16 | u64::from(pin::PREEMPTION_TIMER));
    let pins = rig.plus(Field::PinBasedControls, pin::PREEMPTION_TIMER.into());
    rig.set(&[pins, (Field::PreemptionTimer, 50)]);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    assert_eq!(rig.run().timer, Some(50));
    assert_eq!(rig.l2(r::PREEMPTION_TIMER), L2Exit::Embedder { reason: r::PREEMPTION_TIMER });
}

#[test]
fn a_halted_l2_with_an_open_window_exits_at_once() {
    let window =
        Rig::filled().nested.vmcs12().get(Field::PrimaryControls) | u64::from(primary::INTERRUPT_WINDOW_EXITING);
    let controls = (Field::PrimaryControls, window);
    let halted = (Field::GuestActivity, 1);
    for (flags, exits) in [(0x202, true), (2, false)] {
        let mut rig = rig(0, &[controls, halted, (Field::GuestRflags, flags)]);
        assert_eq!(told(&mut rig, |_| ()).is_some(), exits);
        if exits {
            assert_eq!(rig.told(Field::ExitReason), r::INTERRUPT_WINDOW.into());
            assert_eq!(rig.told(Field::GuestActivity), 1, "still halted");
        } else {
            rig.run();
            assert_eq!(rig.vmcs02.peek(Field::GuestActivity), 1);
        }
    }
    assert_eq!(told(&mut rig(0, &[controls, (Field::GuestRflags, 0x202)]), |_| ()), None, "the processor tells");
}

#[test]
fn an_exit_of_l1_in_the_middle_of_a_delivery_repeats_it() {
    let mut rig = Rig::new();
    rig.vmcs01.poke(Field::IdtVectoringInfo, 0x8000_0B0E);
    rig.vmcs01.poke(Field::IdtVectoringErrorCode, 2);
    assert_eq!(rig.l1(r::EPT_VIOLATION), L1Exit::NotMine { reason: r::EPT_VIOLATION });
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), 0x8000_0B0E);
    assert_eq!(rig.vmcs01.peek(Field::EntryExceptionErrorCode), 2);
    // Other exits come between instructions, whatever the field still holds.
    assert_eq!(rig.l1(r::HLT), L1Exit::NotMine { reason: r::HLT });
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), 0);
}

#[test]
fn without_virtual_nmis_there_are_no_windows_for_them() {
    let mut host = host();
    host.pin.allowed &= !pin::VIRTUAL_NMIS;
    host.primary.allowed &= !primary::NMI_WINDOW_EXITING;
    let mut rig = Rig::filled_with(Config::all(host, false, false).unwrap());
    rig.vmcs01.poke(Field::PinBasedControls, 0x16 | u64::from(pin::NMI_EXITING));
    rig.vmcs01.poke(Field::GuestInterruptibility, 8);
    rig.nested.pend_nmi();
    rig.run();
    assert_eq!(rig.vmcs01.peek(Field::PrimaryControls) & u64::from(primary::NMI_WINDOW_EXITING), 0);
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), 0);
    rig.vmcs01.poke(Field::GuestInterruptibility, 0);
    rig.run();
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), NMI);
    assert_eq!(rig.l1(r::VMLAUNCH), L1Exit::EnterL2);
    rig.vmcs02.poke(Field::GuestInterruptibility, 8);
    rig.nested.pend_nmi();
    rig.run();
    assert!(!window(&rig, primary::NMI_WINDOW_EXITING));
}

#[test]
fn l1_gets_its_nmi_when_its_window_opens() {
    let mut rig = Rig::ready();
    rig.vmcs01.poke(Field::PinBasedControls, 0x16 | u64::from(pin::NMI_EXITING | pin::VIRTUAL_NMIS));
    rig.vmcs01.poke(Field::GuestInterruptibility, 8);
    rig.nested.pend_nmi();
    rig.run();
    assert_ne!(rig.vmcs01.peek(Field::PrimaryControls) & u64::from(primary::NMI_WINDOW_EXITING), 0);
    rig.vmcs01.poke(Field::GuestInterruptibility, 0);
    assert_eq!(rig.l1(r::NMI_WINDOW), L1Exit::Resume);
    rig.run();
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), NMI);
    // Behind the embedder's own injection it waits once more.
    rig.nested.pend_nmi();
    rig.run();
    assert_eq!(rig.vmcs01.peek(Field::EntryInterruptionInfo), NMI);
    assert_ne!(rig.vmcs01.peek(Field::PrimaryControls) & u64::from(primary::NMI_WINDOW_EXITING), 0);
}

#[test]
fn behind_an_injection_what_l1_lets_through_waits_for_a_window() {
    let mut rig = rig(0, &[(Field::EntryInterruptionInfo, 0x8000_0306), (Field::GuestRflags, 0x202)]);
    rig.nested.pend_nmi();
    rig.nested.pend_interrupt(Some(0x30));
    rig.run();
    assert_eq!(rig.vmcs02.peek(Field::EntryInterruptionInfo), 0x8000_0306);
    assert!(window(&rig, primary::NMI_WINDOW_EXITING) && window(&rig, primary::INTERRUPT_WINDOW_EXITING));
    assert_eq!(rig.vmcs02.peek(Field::PinBasedControls) & u64::from(pin::PREEMPTION_TIMER), 0, "no hurry");
}
