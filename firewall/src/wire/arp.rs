//! ARP for IPv4 over Ethernet.
//!
//! Source: RFC 826, RFC 5227 (probes).

use crate::frame::Mac;

/// Bytes of an ARP packet for IPv4 over Ethernet.
pub(crate) const LEN: usize = 28;

const OP_REQUEST: u16 = 1;
const OP_REPLY: u16 = 2;

/// A request for the link address of an IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) sender_mac: Mac,
    pub(crate) sender: u32,
    pub(crate) target: u32,
}

/// Reads a request; `None` for anything else, replies included.
pub(crate) fn parse(packet: &[u8]) -> Option<Request> {
    let p = packet.first_chunk::<LEN>()?;
    // Ethernet, IPv4, address lengths 6 and 4.
    if p.first_chunk() != Some(&[0, 1, 8, 0, 6, 4])
        || u16::from_be_bytes([p[6], p[7]]) != OP_REQUEST
    {
        return None;
    }
    Some(Request {
        sender_mac: [p[8], p[9], p[10], p[11], p[12], p[13]],
        sender: u32::from_be_bytes([p[14], p[15], p[16], p[17]]),
        target: u32::from_be_bytes([p[24], p[25], p[26], p[27]]),
    })
}

/// The reply that says that `request.target` is at `mac`.
pub(crate) fn reply(request: &Request, mac: Mac) -> [u8; LEN] {
    let mut p = [0; LEN];
    let fields: [&[u8]; 6] = [
        &[0, 1, 8, 0, 6, 4],
        &OP_REPLY.to_be_bytes(),
        &mac,
        &request.target.to_be_bytes(),
        &request.sender_mac,
        &request.sender.to_be_bytes(),
    ];
    for (to, from) in p.iter_mut().zip(fields.into_iter().flatten()) {
        *to = *from;
    }
    p
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: [u8; LEN] = [
        0, 1, 8, 0, 6, 4, 0, 1, 0, 0x16, 0x3e, 0x5e, 0x6c, 0, 10, 137, 0, 10, 0, 0, 0, 0, 0, 0, 10,
        137, 0, 6,
    ];

    #[test]
    fn request_is_read_and_answered() {
        let request = parse(&REQUEST).unwrap();
        assert_eq!(request.sender, 0x0a89_000a);
        assert_eq!(request.target, 0x0a89_0006);
        let reply = reply(&request, [0xfe, 255, 255, 255, 255, 255]);
        let expected = [
            0, 1, 8, 0, 6, 4, 0, 2, 0xfe, 255, 255, 255, 255, 255, 10, 137, 0, 6, 0, 0x16, 0x3e,
            0x5e, 0x6c, 0, 10, 137, 0, 10,
        ];
        assert_eq!(reply, expected);
        assert_eq!(parse(&reply), None);
    }

    #[test]
    fn short_or_foreign_packets_are_no_requests() {
        assert_eq!(parse(&REQUEST[..27]), None);
        let mut token_ring = REQUEST;
        token_ring[1] = 6;
        assert_eq!(parse(&token_ring), None);
    }
}
