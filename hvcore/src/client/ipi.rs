//! Sending a fixed interrupt to other processors.

use super::{Banks, Convention, HostOffer, HypercallPort, TargetSet, Targets, UseNative, issue};
use tlfs_abi::hypercall::{CallCode, HypercallInput};
use tlfs_abi::status::HvStatus;
use tlfs_abi::vp_set::VpSetFormat;

/// Sends the fixed interrupt `vector` (0x10 to 0xFF) to `targets`.
///
/// [`Targets::All`] includes the caller. With no targets at all nothing is sent.
pub fn send_ipi<P, I>(port: &mut P, offer: &HostOffer, vector: u8, targets: Targets<I>) -> Result<(), UseNative>
where
    P: HypercallPort + ?Sized,
    I: Iterator<Item = Option<u32>>,
{
    if !offer.cluster_ipi {
        return Err(UseNative::NotOffered);
    }
    if vector < 0x10 {
        return Err(UseNative::Refused(HvStatus::INVALID_PARAMETER));
    }
    let vector = u64::from(vector);
    let mut banks = Banks::new();
    match TargetSet::collect(targets, offer.ex_sets, &mut banks)? {
        None => Ok(()),
        Some(TargetSet::Mask(mask)) => {
            let input = HypercallInput::new(CallCode::SEND_SYNTHETIC_CLUSTER_IPI);
            issue(port, Convention::Fast, input, |out| {
                out.push(vector);
                out.push(mask);
            })
        }
        Some(TargetSet::All) if !offer.ex_sets => Err(UseNative::NotOffered),
        Some(TargetSet::All) => {
            let input = HypercallInput::new(CallCode::SEND_SYNTHETIC_CLUSTER_IPI_EX);
            issue(port, Convention::for_words(offer, 3), input, |out| {
                out.push(vector);
                out.push(VpSetFormat::ALL.0);
                out.push(0);
            })
        }
        Some(TargetSet::Sparse(banks)) => {
            let input = HypercallInput::new(CallCode::SEND_SYNTHETIC_CLUSTER_IPI_EX)
                .with_variable_header_size(banks.len() as u16);
            issue(port, Convention::for_words(offer, banks.len().wrapping_add(3)), input, |out| {
                out.push(vector);
                out.push(VpSetFormat::SPARSE_4K.0);
                out.push(banks.mask);
                banks.words().for_each(|word| out.push(word));
            })
        }
    }
}
