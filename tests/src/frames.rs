//! Frames with a recognisable payload.

/// A frame of `len` bytes (at least 14): an Ethernet header for IPv4, then bytes that depend on `seed` and position.
#[must_use]
pub fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut frame = Vec::with_capacity(len);
    frame.extend([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff]);
    frame.extend([0x00, 0x16, 0x3e, 0x5e, 0x6c, 0x00, 0x08, 0x00]);
    let mut state = seed.wrapping_mul(2_654_435_761) ^ 0x9e37_79b9;
    while frame.len() < len {
        // Numerical Recipes' generator; its high bits are random enough to find a byte in the wrong place.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        frame.push((state >> 24) as u8 | 1);
    }
    frame.truncate(len);
    frame
}

/// Cuts a frame into pieces of `lens`, in order; the last takes what is left.
#[must_use]
pub fn cut(frame: &[u8], lens: &[usize]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut rest = frame;
    for len in lens {
        let (piece, more) = rest.split_at((*len).min(rest.len()));
        pieces.push(piece.to_vec());
        rest = more;
    }
    if !rest.is_empty() {
        pieces.push(rest.to_vec());
    }
    pieces
}
