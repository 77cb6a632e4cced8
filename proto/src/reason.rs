//! The names of refusal reasons on the wire.

use crate::v1::Reason;

const PREFIX: &str = "REASON_";

impl Reason {
    /// The reason as `google.rpc.ErrorInfo.reason` carries it: `ACCESS_DENIED`, without prefix.
    #[must_use]
    pub fn wire_name(self) -> &'static str {
        let name = self.as_str_name();
        name.strip_prefix(PREFIX).unwrap_or(name)
    }

    /// The reverse of [`Reason::wire_name`]. `None` for a name that this version does not know.
    #[must_use]
    pub fn from_wire_name(name: &str) -> Option<Self> {
        Self::from_str_name(&format!("{PREFIX}{name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_names_have_no_prefix_and_come_back() {
        assert_eq!(Reason::AccessDenied.wire_name(), "ACCESS_DENIED");
        assert_eq!(Reason::from_wire_name("HANDLE_INVALID"), Some(Reason::HandleInvalid));
        assert_eq!(Reason::from_wire_name("REASON_HANDLE_INVALID"), None);
    }
}
