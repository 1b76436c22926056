//! Finding Xen by CPUID, and what follows from it: the call instruction, our domain id, the hypercall-page MSR.
//!
//! Trusts the processor and Xen. All decisions are pure functions over a CPUID reader, so that the host can test them.
//!
//! Source: Xen `public/arch-x86/cpuid.h`, `xen/arch/x86/traps.c`.

use crate::abi::cpuid::{
    XEN_CPUID_CANDIDATES, XEN_CPUID_FIRST_LEAF, XEN_CPUID_LEAVES, XEN_CPUID_SIGNATURE,
    XEN_CPUID_STEP, XEN_CPUID_TSC_EMULATED, XEN_HVM_CPUID_DOMID_PRESENT,
};
use crate::cpu::CpuidLeaf;
use crate::types::DomId;

/// The instruction that enters Xen. The wrong one faults.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallInstruction {
    /// Intel's, `0F 01 C1`.
    Vmcall,
    /// AMD's, `0F 01 D9`.
    Vmmcall,
}

impl CallInstruction {
    /// Chooses by the processor's vendor string (CPUID leaf 0). `None` for a vendor that we do not know.
    #[must_use]
    pub const fn for_vendor(vendor: &[u8; 12]) -> Option<Self> {
        match vendor {
            b"GenuineIntel" | b"CentaurHauls" | b"  Shanghai  " => Some(Self::Vmcall),
            b"AuthenticAMD" | b"HygonGenuine" => Some(Self::Vmmcall),
            _ => None,
        }
    }
}

/// Why we cannot talk to Xen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiscoveryError {
    /// No hypervisor leaf carries Xen's signature.
    NoXen,
    /// Xen is there, but the processor's vendor, and so the call instruction, is unknown.
    UnknownVendor([u8; 12]),
}

/// What CPUID tells about Xen and about us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Discovery {
    /// How to enter Xen.
    pub instruction: CallInstruction,
    /// Xen's major version.
    pub major: u16,
    /// Xen's minor version.
    pub minor: u16,
    /// Our own domain id, when this Xen tells it.
    pub domid: Option<DomId>,
    /// The model specific register of the hypercall page.
    pub hypercall_msr: u32,
    /// Reading the time stamp counter traps.
    pub tsc_emulated: bool,
}

/// Reads everything that we want to know, each leaf once (each read traps).
///
/// # Errors
///
/// [`DiscoveryError`], in which case no hypercall may be made.
pub(crate) fn discover(
    mut cpuid: impl FnMut(u32, u32) -> CpuidLeaf,
) -> Result<Discovery, DiscoveryError> {
    let base = find_base(&mut cpuid).ok_or(DiscoveryError::NoXen)?;
    let [_, ebx, ecx, edx] = cpuid(0, 0);
    let vendor = vendor_string(ebx, ecx, edx);
    let instruction =
        CallInstruction::for_vendor(&vendor).ok_or(DiscoveryError::UnknownVendor(vendor))?;
    let [version, ..] = cpuid(base + 1, 0);
    let [_, hypercall_msr, ..] = cpuid(base + 2, 0);
    let [tsc_flags, ..] = cpuid(base + 3, 0);
    let [hvm_flags, _, domid, _] = cpuid(base + 4, 0);
    let [minor_low, minor_high, major_low, major_high] = version.to_le_bytes();
    Ok(Discovery {
        instruction,
        major: u16::from_le_bytes([major_low, major_high]),
        minor: u16::from_le_bytes([minor_low, minor_high]),
        domid: (hvm_flags & XEN_HVM_CPUID_DOMID_PRESENT != 0)
            .then(|| u16::try_from(domid).ok().map(DomId))
            .flatten(),
        hypercall_msr,
        tsc_emulated: tsc_flags & XEN_CPUID_TSC_EMULATED != 0,
    })
}

/// Scans the candidate bases for Xen's signature.
fn find_base(cpuid: &mut impl FnMut(u32, u32) -> CpuidLeaf) -> Option<u32> {
    (0..XEN_CPUID_CANDIDATES)
        .map(|candidate| XEN_CPUID_FIRST_LEAF + candidate * XEN_CPUID_STEP)
        .find(|base| {
            let [highest, ebx, ecx, edx] = cpuid(*base, 0);
            [ebx, ecx, edx] == XEN_CPUID_SIGNATURE
                && highest
                    .checked_sub(*base)
                    .is_some_and(|leaves| (XEN_CPUID_LEAVES..XEN_CPUID_STEP).contains(&leaves))
        })
}

/// The vendor string of leaf 0: EBX, EDX, ECX in this order.
fn vendor_string(ebx: u32, ecx: u32, edx: u32) -> [u8; 12] {
    let mut vendor = [0; 12];
    let bytes = [ebx, edx, ecx].into_iter().flat_map(u32::to_le_bytes);
    for (to, from) in vendor.iter_mut().zip(bytes) {
        *to = from;
    }
    vendor
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor of `vendor` with Xen 4.17 at `base`, domain 7.
    fn machine(vendor: [u8; 12], base: Option<u32>) -> impl FnMut(u32, u32) -> CpuidLeaf {
        let word = move |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
        move |leaf, _| match (leaf, base) {
            (0, _) => [0x16, word(0), word(8), word(4)],
            (leaf, Some(base)) if leaf == base => {
                [base + 5, 0x566E_6558, 0x6558_4D4D, 0x4D4D_566E]
            }
            (leaf, Some(base)) if leaf == base + 1 => [4 << 16 | 17, 0, 0, 0],
            (leaf, Some(base)) if leaf == base + 2 => [1, 0x4000_0000, 0, 0],
            (leaf, Some(base)) if leaf == base + 3 => [0b110, 2, 2_000_000, 0],
            (leaf, Some(base)) if leaf == base + 4 => [1 << 3 | 1 << 4, 0, 7, 0],
            // What Viridian enlightenments put at the first base.
            (0x4000_0000, Some(_)) => [0x4000_0006, 0x7263_694D, 0x666F_736F, 0x7648_2074],
            _ => [0; 4],
        }
    }

    #[test]
    fn xen_is_found_at_the_first_base() {
        let found = discover(machine(*b"GenuineIntel", Some(0x4000_0000))).unwrap();
        assert_eq!((found.major, found.minor), (4, 17));
        assert_eq!(found.domid, Some(DomId(7)));
        assert_eq!(found.hypercall_msr, 0x4000_0000);
        assert_eq!(found.instruction, CallInstruction::Vmcall);
        assert!(!found.tsc_emulated);
    }

    #[test]
    fn xen_behind_viridian_leaves_is_found() {
        for candidate in [1, 2, 255] {
            let base = 0x4000_0000 + candidate * 0x100;
            let found = discover(machine(*b"AuthenticAMD", Some(base))).unwrap();
            assert_eq!(found.domid, Some(DomId(7)));
            assert_eq!(found.instruction, CallInstruction::Vmmcall);
        }
    }

    #[test]
    fn no_signature_means_no_xen() {
        assert_eq!(
            discover(machine(*b"GenuineIntel", None)),
            Err(DiscoveryError::NoXen)
        );
    }

    #[test]
    fn every_known_vendor_gets_its_instruction_and_an_unknown_one_none() {
        use CallInstruction::{Vmcall, Vmmcall};
        let table: [(&[u8; 12], Option<CallInstruction>); 6] = [
            (b"GenuineIntel", Some(Vmcall)),
            (b"CentaurHauls", Some(Vmcall)),
            (b"  Shanghai  ", Some(Vmcall)),
            (b"AuthenticAMD", Some(Vmmcall)),
            (b"HygonGenuine", Some(Vmmcall)),
            (b"TransmetaCPU", None),
        ];
        for (vendor, instruction) in table {
            assert_eq!(CallInstruction::for_vendor(vendor), instruction);
        }
        assert_eq!(
            discover(machine(*b"TransmetaCPU", Some(0x4000_0000))),
            Err(DiscoveryError::UnknownVendor(*b"TransmetaCPU"))
        );
    }

    #[test]
    fn a_signature_with_too_few_leaves_is_not_taken() {
        let mut short = machine(*b"GenuineIntel", Some(0x4000_0000));
        let result = discover(|leaf, subleaf| {
            let mut registers = short(leaf, subleaf);
            if leaf == 0x4000_0000 {
                registers[0] = 0x4000_0002;
            }
            registers
        });
        assert_eq!(result, Err(DiscoveryError::NoXen));
    }
}
