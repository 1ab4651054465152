//! The generic functions of `hvcore`, with an embedder's types chosen.

use crate::embedder::{Calls, Indexes, Memory, Port, Regs, Tables, hpa, yes};
use crate::keep_named;
use core::hint::black_box;
use hvcore::addr::L2Gpa;
use hvcore::flush::{FlushCalls, FlushDomain, GvaWidth, LocalFlush, Ranges, Shootdown, VpFlush};
use hvcore::hypercall::calls::*;
use hvcore::hypercall::{Answer, Hypercall, Input, Output, Privileges, Request};
use hvcore::memory::{CallerMemory, GuestMemory, L1Caller, L2Caller};
use hvcore::partition::{OverlayMemory, PartitionConfig};
use hvcore::pv::PreemptedByte;
use hvcore::shadow::{PagePool, PageRecord, ShadowError, ShadowPage, TagFlush};
use hvcore::vp_index::{KnownBanks, Slots};
use tlfs_abi::status::HvStatus;

type L1 = L1Caller<'static, Memory>;
type L2 = L2Caller<'static, Memory, Memory>;

fn pool(pages: &'static [ShadowPage], records: &'static mut [PageRecord]) -> Result<PagePool<'static>, ShadowError> {
    PagePool::new(pages, records, |_| hpa())
}

fn invalidate(tables: &mut Tables) -> TagFlush {
    tables.invalidate(|_| yes())
}

fn invalidate_l2(tables: &mut Tables, start: L2Gpa, bytes: u64) -> TagFlush {
    tables.invalidate_l2(|_| yes(), start, bytes)
}

type Overlaid = OverlayMemory<'static, Memory>;

/// The engine's own handlers: a flush hypercall all the way to the queues.
type Flushes = FlushCalls<'static, 'static>;

struct FlushHost(Flushes);

impl FlushVirtual for FlushHost {
    fn flush_space(&mut self, target: &FlushTarget<'_>) -> Answer {
        self.0.flush_space(target)
    }
    fn flush_list(&mut self, target: &FlushTarget<'_>, ranges: &GvaRanges<'_>) -> Answer {
        self.0.flush_list(target, ranges)
    }
}

impl FlushGuestPhysical for FlushHost {
    fn flush_guest_physical_space(&mut self, address_space: u64) -> Answer {
        self.0.flush_guest_physical_space(address_space)
    }
    fn flush_guest_physical_list(&mut self, address_space: u64, ranges: &[u64]) -> Answer {
        self.0.flush_guest_physical_list(address_space, ranges)
    }
}

hvcore::offer_hypercalls!(impl for FlushHost {
    FlushVirtualAddressSpace,
    FlushVirtualAddressList,
    FlushVirtualAddressSpaceEx,
    FlushVirtualAddressListEx,
    FlushGuestPhysicalAddressSpace,
    FlushGuestPhysicalAddressList,
});

fn gva_spans(ranges: &GvaRanges<'_>) {
    ranges.spans().for_each(|span| _ = black_box(span));
}

fn kicks(shootdown: &Shootdown) {
    shootdown.kicks().for_each(|slot| _ = black_box(slot));
}

fn queued_spans(ranges: &Ranges<16>, width: GvaWidth) {
    if let Some(spans) = ranges.spans(width) {
        spans.for_each(|span| _ = black_box(span));
    }
}

/// Keeps them all.
pub fn keep_all() {
    intake();
    calls();
    flush();
    partition();
    shadow();
}

fn intake() {
    keep_named! {
        "hvcore::client::flush": hvcore::client::flush::<Port, Indexes>;
        "hvcore::client::flush_guest_physical": hvcore::client::flush_guest_physical::<Port>;
        "hvcore::client::send_ipi": hvcore::client::send_ipi::<Port, Indexes>;
        "hvcore::hypercall::handle": hvcore::hypercall::handle::<Calls, Regs, L1>;
        "hvcore::hypercall::handle": hvcore::hypercall::handle::<Calls, Regs, L2>;
        "hvcore::hypercall::Input::elements": Input::<FlushVirtualAddressListEx>::elements;
        "hvcore::hypercall::Input::header": Input::<FlushVirtualAddressListEx>::header;
        "hvcore::hypercall::Input::level": Input::<FlushVirtualAddressListEx>::level;
        "hvcore::hypercall::Input::privileges": Input::<FlushVirtualAddressListEx>::privileges;
        "hvcore::hypercall::Input::variable": Input::<FlushVirtualAddressListEx>::variable;
        "hvcore::hypercall::Output::push": Output::<L2>::push::<u64>;
        "hvcore::hypercall::Output::push": Output::<L2>::push::<[u8; 3]>;
        "hvcore::hypercall::Request::code": Request::<Regs, L2>::code;
        "hvcore::hypercall::Request::serve": Request::<Regs, L2>::serve::<FlushVirtualAddressListEx, Calls>;
        "hvcore::memory::GuestMemory::page": <Memory as GuestMemory>::page;
        "hvcore::memory::GuestMemory::read_u32": <Memory as GuestMemory>::read_u32;
        "hvcore::memory::GuestMemory::read_u64": <Memory as GuestMemory>::read_u64;
        "hvcore::memory::GuestMemory::write_u64": <Memory as GuestMemory>::write_u64;
        "hvcore::vp_index::KnownBanks as Iterator": <KnownBanks as Iterator>::next;
        "hvcore::vp_index::Slots as Iterator": <Slots as Iterator>::next;
    }
}

fn calls() {
    keep_named! {
        "hvcore::hypercall::calls::ExtQueryCapabilities as Hypercall": <ExtQueryCapabilities as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::FlushGuestPhysicalAddressList as Hypercall": <FlushGuestPhysicalAddressList as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::FlushGuestPhysicalAddressSpace as Hypercall": <FlushGuestPhysicalAddressSpace as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::FlushVirtualAddressList as Hypercall": <FlushVirtualAddressList as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::FlushVirtualAddressListEx as Hypercall": <FlushVirtualAddressListEx as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::FlushVirtualAddressSpace as Hypercall": <FlushVirtualAddressSpace as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::FlushVirtualAddressSpaceEx as Hypercall": <FlushVirtualAddressSpaceEx as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::GetVpIndexFromApicId as Hypercall": <GetVpIndexFromApicId as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::GetVpRegisters as Hypercall": <GetVpRegisters as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::NotifyLongSpinWait as Hypercall": <NotifyLongSpinWait as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::PostMessage as Hypercall": <PostMessage as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::SendSyntheticClusterIpi as Hypercall": <SendSyntheticClusterIpi as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::SendSyntheticClusterIpiEx as Hypercall": <SendSyntheticClusterIpiEx as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::SetVpRegisters as Hypercall": <SetVpRegisters as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::SignalEvent as Hypercall": <SignalEvent as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::calls::StartVirtualProcessor as Hypercall": <StartVirtualProcessor as Hypercall<Calls>>::serve::<L2>;
        "hvcore::hypercall::Answer as From": <Answer as From<HvStatus>>::from;
        "hvcore::hypercall::Privileges as BitOr": <Privileges as core::ops::BitOr>::bitor;
        "hvcore::memory::L1Caller as CallerMemory": <L1 as CallerMemory>::memory;
        "hvcore::memory::L1Caller as CallerMemory": <L1 as CallerMemory>::translate;
        "hvcore::memory::L2Caller as CallerMemory": <L2 as CallerMemory>::memory;
        "hvcore::memory::L2Caller as CallerMemory": <L2 as CallerMemory>::translate;
    }
}

fn flush() {
    keep_named! {
        "hvcore::hypercall::handle": hvcore::hypercall::handle::<FlushHost, Regs, L2>;
        "hvcore::hypercall::calls::GvaRanges::spans": gva_spans;
        "hvcore::flush::FlushCalls as FlushVirtual": <Flushes as FlushVirtual>::flush_space;
        "hvcore::flush::FlushCalls as FlushVirtual": <Flushes as FlushVirtual>::flush_list;
        "hvcore::flush::FlushCalls as FlushGuestPhysical": <Flushes as FlushGuestPhysical>::flush_guest_physical_space;
        "hvcore::flush::FlushCalls as FlushGuestPhysical": <Flushes as FlushGuestPhysical>::flush_guest_physical_list;
        "hvcore::flush::FlushCalls::called_by": Flushes::called_by;
        "hvcore::flush::FlushCalls::flushes_caller": Flushes::flushes_caller;
        "hvcore::flush::FlushCalls::new": Flushes::new;
        "hvcore::flush::FlushCalls::posted": Flushes::posted;
        "hvcore::flush::FlushDomain::flush_l1": FlushDomain::<16>::flush_l1;
        "hvcore::flush::FlushDomain::flush_l2": FlushDomain::<16>::flush_l2;
        "hvcore::flush::FlushDomain::flush_second_stage": FlushDomain::<16>::flush_second_stage;
        "hvcore::flush::FlushDomain::local": FlushDomain::<16>::local;
        "hvcore::flush::FlushDomain::new": FlushDomain::<16>::new;
        "hvcore::flush::FlushDomain::vps": FlushDomain::<16>::vps;
        "hvcore::flush::LocalFlush::context": LocalFlush::<16>::context;
        "hvcore::flush::LocalFlush::enter": LocalFlush::<16>::enter;
        "hvcore::flush::LocalFlush::entry_failed": LocalFlush::<16>::entry_failed;
        "hvcore::flush::LocalFlush::exit": LocalFlush::<16>::exit;
        "hvcore::flush::LocalFlush::flush_gva": LocalFlush::<16>::flush_gva;
        "hvcore::flush::LocalFlush::flush_all": LocalFlush::<16>::flush_all;
        "hvcore::flush::LocalFlush::forget_context": LocalFlush::<16>::forget_context;
        "hvcore::flush::LocalFlush::retired": LocalFlush::<16>::retired;
        "hvcore::flush::LocalFlush::set_context": LocalFlush::<16>::set_context;
        "hvcore::flush::LocalFlush::shared": LocalFlush::<16>::shared;
        "hvcore::flush::LocalFlush::slot": LocalFlush::<16>::slot;
        "hvcore::flush::Ranges::is_empty": Ranges::<16>::is_empty;
        "hvcore::flush::Ranges::len": Ranges::<16>::len;
        "hvcore::flush::Ranges::spans": queued_spans;
        "hvcore::flush::Shootdown::kicks": kicks;
        "hvcore::flush::Shootdown::poll": Shootdown::poll::<16>;
        "hvcore::flush::VpFlush::inhibit": VpFlush::<16>::inhibit;
        "hvcore::flush::VpFlush::new": VpFlush::<16>::new;
        "hvcore::flush::VpFlush::runs": VpFlush::<16>::runs;
        "hvcore::flush::VpFlush::uninhibit": VpFlush::<16>::uninhibit;
    }
}

fn partition() {
    keep_named! {
        "hvcore::pv::PreemptedByte::scheduled_in": PreemptedByte::scheduled_in::<Memory, 16>;
        "hvcore::pv::PreemptedByte::scheduled_out": PreemptedByte::scheduled_out::<Memory>;
        "hvcore::direct::authorise": hvcore::direct::authorise::<Memory>;
        "hvcore::partition::OverlayMemory as GuestMemory": <Overlaid as GuestMemory>::read;
        "hvcore::partition::OverlayMemory as GuestMemory": <Overlaid as GuestMemory>::write;
        "hvcore::partition::OverlayMemory as GuestMemory": <Overlaid as GuestMemory>::compare_exchange_u8;
        "hvcore::partition::OverlayMemory as GuestMemory": <Overlaid as GuestMemory>::compare_exchange_u32;
        "hvcore::partition::OverlayMemory as GuestMemory": <Overlaid as GuestMemory>::compare_exchange_u64;
        "hvcore::partition::OverlayMemory::beneath": Overlaid::beneath;
        "hvcore::partition::OverlayMemory::new": Overlaid::new;
        "hvcore::partition::PartitionConfig::offer": PartitionConfig::offer::<Calls>;
    }
}

fn shadow() {
    keep_named! {
        "hvcore::shadow::PagePool::new": pool;
        "hvcore::shadow::Tables::translate": Tables::translate;
        "hvcore::shadow::Tables::activate": Tables::activate;
        "hvcore::shadow::Tables::active_key": Tables::active_key;
        "hvcore::shadow::Tables::deactivate": Tables::deactivate;
        "hvcore::shadow::Tables::free_pages": Tables::free_pages;
        "hvcore::shadow::Tables::install": Tables::install;
        "hvcore::shadow::Tables::invalidate": invalidate;
        "hvcore::shadow::Tables::invalidate_l2": invalidate_l2;
        "hvcore::shadow::Tables::l1_gpa_changed": Tables::l1_gpa_changed;
        "hvcore::shadow::Tables::lookup": Tables::lookup;
        "hvcore::shadow::Tables::new": Tables::new;
        "hvcore::shadow::Tables::tag_retired": Tables::tag_retired;
        "hvcore::shadow::Tables::tag_stale": Tables::tag_stale;
    }
}
