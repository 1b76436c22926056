//! `memcpy`, `memmove`, `memset`, `memcmp` and `bcmp`, which compiled code calls and no library brings here.
//!
//! Written in assembly, so that the compiler cannot recognise a loop here as one of these functions and make it call
//! itself. Copies of up to 64 bytes are done with overlapping moves and no loop; longer ones go 64 bytes at a time
//! through SSE registers. `rep movsb` is avoided: emulators do it byte by byte, and for the
//! sizes that matter here (headers, slots, structures) its start-up costs more than the copy. There are no payload
//! copies on the data path.
//!
//! C calling convention; the direction flag is clear.

use core::arch::naked_asm;

/// Copies `len` bytes that do not overlap. Returns `dest`.
///
/// # Safety
///
/// 1. `src` is readable and `dest` writable for `len` bytes, and the two do not overlap.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn memcpy(dest: *mut u8, src: *const u8, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "cmp rdx, 16",
        "ja 3f",
        // 0..=16 bytes: two moves of the largest size that fits, overlapping in the middle.
        "cmp edx, 8",
        "jae 2f",
        "cmp edx, 4",
        "jae 8f",
        "test edx, edx",
        "jz 9f",
        "movzx ecx, byte ptr [rsi]",
        "movzx r8d, byte ptr [rsi + rdx - 1]",
        "cmp edx, 3",
        "jne 7f",
        "movzx r9d, byte ptr [rsi + 1]",
        "mov byte ptr [rdi + 1], r9b",
        "7: mov byte ptr [rdi], cl",
        "mov byte ptr [rdi + rdx - 1], r8b",
        "9: ret",
        "8: mov ecx, dword ptr [rsi]",
        "mov r8d, dword ptr [rsi + rdx - 4]",
        "mov dword ptr [rdi], ecx",
        "mov dword ptr [rdi + rdx - 4], r8d",
        "ret",
        "2: mov rcx, qword ptr [rsi]",
        "mov r8, qword ptr [rsi + rdx - 8]",
        "mov qword ptr [rdi], rcx",
        "mov qword ptr [rdi + rdx - 8], r8",
        "ret",
        // 17..=64 bytes: two or four moves of 16.
        "3: movups xmm0, [rsi]",
        "movups xmm1, [rsi + rdx - 16]",
        "cmp rdx, 32",
        "jbe 4f",
        "cmp rdx, 64",
        "ja 5f",
        "movups xmm2, [rsi + 16]",
        "movups xmm3, [rsi + rdx - 32]",
        "movups [rdi + 16], xmm2",
        "movups [rdi + rdx - 32], xmm3",
        "4: movups [rdi], xmm0",
        "movups [rdi + rdx - 16], xmm1",
        "ret",
        // More: 64 at a time, then the last 64 once more from the end.
        "5: lea rcx, [rdi + rdx - 64]",
        "lea r8, [rsi + rdx - 64]",
        "6: movups xmm0, [rsi]",
        "movups xmm1, [rsi + 16]",
        "movups xmm2, [rsi + 32]",
        "movups xmm3, [rsi + 48]",
        "movups [rdi], xmm0",
        "movups [rdi + 16], xmm1",
        "movups [rdi + 32], xmm2",
        "movups [rdi + 48], xmm3",
        "add rsi, 64",
        "add rdi, 64",
        "cmp rdi, rcx",
        "jb 6b",
        "movups xmm0, [r8]",
        "movups xmm1, [r8 + 16]",
        "movups xmm2, [r8 + 32]",
        "movups xmm3, [r8 + 48]",
        "movups [rcx], xmm0",
        "movups [rcx + 16], xmm1",
        "movups [rcx + 32], xmm2",
        "movups [rcx + 48], xmm3",
        "ret",
    )
}

/// Copies `len` bytes that may overlap. Returns `dest`.
///
/// # Safety
///
/// 1. `src` is readable and `dest` writable for `len` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn memmove(dest: *mut u8, src: *const u8, len: usize) -> *mut u8 {
    naked_asm!(
        // Up to 64 bytes, `memcpy` reads everything before it writes anything.
        "cmp rdx, 64",
        "jbe {memcpy}",
        "mov rax, rdi",
        "mov rcx, rdi",
        "sub rcx, rsi",
        // As an unsigned distance: at least `len` means that ascending order never writes what it has yet to read.
        "cmp rcx, rdx",
        "jb 5f",
        // Ascending, 16 at a time, then single bytes. The 16 are read whole before they are written.
        "2: cmp rdx, 16",
        "jb 3f",
        "movups xmm0, [rsi]",
        "movups [rdi], xmm0",
        "add rsi, 16",
        "add rdi, 16",
        "sub rdx, 16",
        "jmp 2b",
        "3: test rdx, rdx",
        "jz 9f",
        "4: movzx ecx, byte ptr [rsi]",
        "mov byte ptr [rdi], cl",
        "inc rsi",
        "inc rdi",
        "dec rdx",
        "jnz 4b",
        "9: ret",
        // Descending, from the end.
        "5: cmp rdx, 16",
        "jb 6f",
        "movups xmm0, [rsi + rdx - 16]",
        "movups [rdi + rdx - 16], xmm0",
        "sub rdx, 16",
        "jmp 5b",
        "6: test rdx, rdx",
        "jz 9b",
        "7: movzx ecx, byte ptr [rsi + rdx - 1]",
        "mov byte ptr [rdi + rdx - 1], cl",
        "dec rdx",
        "jnz 7b",
        "ret",
        memcpy = sym memcpy,
    )
}

/// Fills `len` bytes with the low byte of `value`. Returns `dest`.
///
/// # Safety
///
/// 1. `dest` is writable for `len` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn memset(dest: *mut u8, value: i32, len: usize) -> *mut u8 {
    naked_asm!(
        "mov rax, rdi",
        "movzx esi, sil",
        "mov rcx, 0x0101010101010101",
        "imul rsi, rcx",
        "cmp rdx, 16",
        "jae 3f",
        "cmp edx, 8",
        "jae 2f",
        "cmp edx, 4",
        "jae 8f",
        "test edx, edx",
        "jz 9f",
        "mov byte ptr [rdi], sil",
        "mov byte ptr [rdi + rdx - 1], sil",
        "shr edx",
        "mov byte ptr [rdi + rdx], sil",
        "9: ret",
        "8: mov dword ptr [rdi], esi",
        "mov dword ptr [rdi + rdx - 4], esi",
        "ret",
        "2: mov qword ptr [rdi], rsi",
        "mov qword ptr [rdi + rdx - 8], rsi",
        "ret",
        // 16 at a time, and the last 16 once more from the end.
        "3: movq xmm0, rsi",
        "punpcklqdq xmm0, xmm0",
        "lea rcx, [rdi + rdx - 16]",
        "4: movups [rdi], xmm0",
        "add rdi, 16",
        "cmp rdi, rcx",
        "jb 4b",
        "movups [rcx], xmm0",
        "ret",
    )
}

/// Compares `len` bytes as unsigned numbers: negative, zero or positive as `left` is less, equal or greater.
///
/// # Safety
///
/// 1. Both are readable for `len` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    naked_asm!(
        "2: cmp rdx, 8",
        "jb 4f",
        "mov rax, qword ptr [rdi]",
        "mov rcx, qword ptr [rsi]",
        "cmp rax, rcx",
        "jne 3f",
        "add rdi, 8",
        "add rsi, 8",
        "sub rdx, 8",
        "jmp 2b",
        // The first differing byte is the lowest one: compare in big-endian order.
        "3: bswap rax",
        "bswap rcx",
        "cmp rax, rcx",
        "sbb eax, eax",
        "or eax, 1",
        "ret",
        "4: test rdx, rdx",
        "jz 6f",
        "5: movzx eax, byte ptr [rdi]",
        "movzx ecx, byte ptr [rsi]",
        "sub eax, ecx",
        "jne 7f",
        "inc rdi",
        "inc rsi",
        "dec rdx",
        "jnz 5b",
        "6: xor eax, eax",
        "7: ret",
    )
}

/// Compares `len` bytes: zero when equal.
///
/// # Safety
///
/// 1. Both are readable for `len` bytes.
#[unsafe(naked)]
#[cfg_attr(not(test), unsafe(no_mangle))]
pub(crate) unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    naked_asm!("jmp {}", sym memcmp)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 700;

    fn pattern() -> [u8; SIZE] {
        core::array::from_fn(|index| ((index * 7 + index / 256 + 1) % 256).try_into().unwrap())
    }

    #[test]
    fn memcpy_copies_exactly_len_bytes_at_any_alignment() {
        let source = pattern();
        for len in (0..=200).chain([255, 256, 257, 511, 600]) {
            for (from, to) in [(0, 0), (1, 0), (0, 3), (5, 9), (16, 31)] {
                let mut dest = [0xCC; SIZE];
                let (target, origin) = (dest[to..].as_mut_ptr(), source[from..].as_ptr());
                // SAFETY: both offsets plus `len` are below the arrays' length.
                let returned = unsafe { memcpy(target, origin, len) };
                assert_eq!(returned, &raw mut dest[to]);
                assert_eq!(dest[to..to + len], source[from..from + len], "{len}");
                assert!(dest[..to].iter().all(|byte| *byte == 0xCC), "{len}");
                assert!(dest[to + len..].iter().all(|byte| *byte == 0xCC), "{len}");
            }
        }
    }

    #[test]
    fn memmove_is_right_for_every_overlap() {
        for len in (0..=70).chain([128, 129, 300]) {
            for to in 20usize..=180 {
                let mut bytes = pattern();
                let from = 100;
                let mut expected = bytes;
                expected.copy_within(from..from + len, to);
                let base = bytes.as_mut_ptr();
                let (target, origin) = (base.wrapping_add(to), base.wrapping_add(from));
                // SAFETY: both ranges lie in the array.
                let returned = unsafe { memmove(target, origin, len) };
                assert_eq!(returned, target);
                assert_eq!(bytes, expected, "{len} bytes from {from} to {to}");
            }
        }
    }

    #[test]
    fn memset_fills_exactly_len_bytes() {
        for len in (0..=100).chain([255, 256, 400]) {
            for at in [0, 1, 7] {
                let mut bytes = pattern();
                let mut expected = bytes;
                expected[at..at + len].fill(0xA5);
                let target = bytes[at..].as_mut_ptr();
                // SAFETY: the range lies in the array. Only the low byte of the value counts.
                unsafe { memset(target, 0x7A5, len) };
                assert_eq!(bytes, expected, "{len}");
            }
        }
    }

    #[test]
    fn memcmp_orders_by_the_first_differing_byte() {
        for len in 0..=40 {
            let left = pattern();
            // SAFETY: `len` bytes of both arrays.
            assert_eq!(unsafe { memcmp(left.as_ptr(), pattern().as_ptr(), len) }, 0);
            for at in 0..len {
                let mut right = left;
                right[at] = 0xFF;
                right[at + 1..].fill(0);
                let expected = left[at].cmp(&right[at]) as i32;
                // SAFETY: as above.
                let result = unsafe { memcmp(left.as_ptr(), right.as_ptr(), len) };
                assert_eq!(result.signum(), expected, "{at} of {len}");
                // SAFETY: as above.
                let equal = unsafe { bcmp(left.as_ptr(), right.as_ptr(), len) } == 0;
                assert_eq!(equal, expected == 0);
            }
        }
    }
}
