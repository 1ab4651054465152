//! Messages, events and the extended calls (TLFS, "Inter-Partition Communication", "Extended Hypercalls").

use super::super::{Answer, Declaration, Hypercall, Input, Output, Privileges};
use super::INVALID_PARAMETER;
use crate::memory::CallerMemory;
use tlfs_abi::hypercall::CallCode;
use tlfs_abi::inputs::{self, ExtendedCapabilities};

/// Serves HvCallPostMessage.
pub trait Messages {
    /// Posts `payload` (at most 240 bytes) with `message_type` (not 0, bit 31 clear) to the port behind
    /// `connection_id`.
    fn post_message(&mut self, connection_id: u32, message_type: u32, payload: &[u8]) -> Answer;
}

/// Serves HvCallSignalEvent.
pub trait Events {
    /// Sets `flag_number`, relative to the base flag, of the event port behind `connection_id`.
    fn signal_event(&mut self, connection_id: u32, flag_number: u16) -> Answer;
}

/// Serves HvExtCallQueryCapabilities.
pub trait ExtendedCalls {
    /// Which extended calls exist.
    fn extended_capabilities(&mut self) -> ExtendedCapabilities;
}

/// HvCallPostMessage, 0x005C. Too long for a fast call.
#[derive(Clone, Copy, Debug)]
pub struct PostMessage;

/// HvCallSignalEvent, 0x005D.
#[derive(Clone, Copy, Debug)]
pub struct SignalEvent;

/// HvExtCallQueryCapabilities, 0x8001.
#[derive(Clone, Copy, Debug)]
pub struct ExtQueryCapabilities;

impl Declaration for PostMessage {
    const CODE: CallCode = CallCode::POST_MESSAGE;
    const NEEDS: Privileges = Privileges::POST_MESSAGES;
    type Header = inputs::PostMessage;
    type Element = u64;
}

impl Declaration for SignalEvent {
    const CODE: CallCode = CallCode::SIGNAL_EVENT;
    const NEEDS: Privileges = Privileges::SIGNAL_EVENTS;
    type Header = inputs::SignalEvent;
    type Element = u64;
}

impl Declaration for ExtQueryCapabilities {
    const CODE: CallCode = CallCode::EXT_QUERY_CAPABILITIES;
    const NEEDS: Privileges = Privileges::EXTENDED_HYPERCALLS;
    const OUTPUT: usize = size_of::<ExtendedCapabilities>();
    type Header = [u64; 0];
    type Element = u64;
}

impl<H: Messages + ?Sized> Hypercall<H> for PostMessage {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        let header = input.header();
        let hypervisors = header.message_type >> 31 != 0;
        match header.message.get(..header.payload_size as usize) {
            Some(payload) if header.message_type != 0 && !hypervisors => {
                host.post_message(header.connection_id, header.message_type, payload)
            }
            _ => INVALID_PARAMETER,
        }
    }
}

impl<H: Events + ?Sized> Hypercall<H> for SignalEvent {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, input: &Input<'_, Self>, _: &mut Output<'_, C>) -> Answer {
        host.signal_event(input.header().connection_id, input.header().flag_number)
    }
}

impl<H: ExtendedCalls + ?Sized> Hypercall<H> for ExtQueryCapabilities {
    fn serve<C: CallerMemory + ?Sized>(host: &mut H, _: &Input<'_, Self>, output: &mut Output<'_, C>) -> Answer {
        match output.push(&host.extended_capabilities()) {
            Ok(()) => Answer::Done,
            Err(status) => status.into(),
        }
    }
}
