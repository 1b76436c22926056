//! The hypervisor's CPUID leaves.
//!
//! Source: Xen `public/arch-x86/cpuid.h`.

/// The lowest leaf at which Xen may report itself.
pub(crate) const XEN_CPUID_FIRST_LEAF: u32 = 0x4000_0000;
/// The distance between candidate bases: other interfaces (Viridian) may come first.
pub(crate) const XEN_CPUID_STEP: u32 = 0x100;
/// How many candidate bases there are.
pub(crate) const XEN_CPUID_CANDIDATES: u32 = 256;
/// EBX, ECX and EDX of the base leaf: "XenVMMXenVMM".
pub(crate) const XEN_CPUID_SIGNATURE: [u32; 3] = [0x566E_6558, 0x6558_4D4D, 0x4D4D_566E];
/// The leaves that we use end at base + 4.
pub(crate) const XEN_CPUID_LEAVES: u32 = 4;
/// Leaf +3.0 EAX: RDTSC traps and is emulated.
pub(crate) const XEN_CPUID_TSC_EMULATED: u32 = 1 << 0;
/// Leaf +4 EAX: ECX holds the domain id.
pub(crate) const XEN_HVM_CPUID_DOMID_PRESENT: u32 = 1 << 4;

/// CPUID.1:ECX: RDRAND exists.
pub(crate) const CPUID_1_ECX_RDRAND: u32 = 1 << 30;
/// CPUID.7.0:EBX: RDSEED exists.
pub(crate) const CPUID_7_EBX_RDSEED: u32 = 1 << 18;
