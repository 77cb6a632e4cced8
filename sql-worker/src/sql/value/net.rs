//! Network addresses: inet, cidr, macaddr, macaddr8.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Malformed, fixed, take};

/// PGSQL_AF_INET and PGSQL_AF_INET6 on Linux servers; the numbers are PostgreSQL's own.
const IPV4: u8 = 2;
const IPV6: u8 = 3;

/// `address` or `address/bits`: bits stand in every cidr, in an inet unless they are all.
pub(super) fn inet(bytes: &[u8]) -> Result<String, Malformed> {
    let ([family, bits, is_cidr, _size], address) = take::<4>(bytes)?;
    let (address, all) = match family {
        IPV4 => (Ipv4Addr::from(fixed::<4>(address)?).to_string(), 32),
        IPV6 => (Ipv6Addr::from(fixed::<16>(address)?).to_string(), 128),
        _ => return Err(Malformed),
    };
    Ok(if is_cidr != 0 || bits != all { format!("{address}/{bits}") } else { address })
}

/// Bytes in hexadecimal between colons.
pub(super) fn mac(bytes: &[u8]) -> String {
    let parts: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(inet(&[2, 32, 0, 4, 10, 0, 0, 1]).unwrap(), "10.0.0.1");
        assert_eq!(inet(&[2, 8, 0, 4, 10, 0, 0, 1]).unwrap(), "10.0.0.1/8");
        assert_eq!(inet(&[2, 32, 1, 4, 10, 0, 0, 1]).unwrap(), "10.0.0.1/32");
        let mut six = vec![3, 128, 0, 16];
        six.extend(Ipv6Addr::LOCALHOST.octets());
        assert_eq!(inet(&six).unwrap(), "::1");
        assert!(inet(&[9, 32, 0, 4, 10, 0, 0, 1]).is_err());
        assert!(inet(&[2, 32, 0, 4, 10]).is_err());
        assert_eq!(mac(&[8, 0, 0x2b, 1, 2, 0xff]), "08:00:2b:01:02:ff");
    }
}
