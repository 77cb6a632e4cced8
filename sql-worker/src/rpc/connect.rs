//! `Connect`: opens the connection that leads to a destination.
//!
//! The destination is only looked up: the broker compares it with its own configuration and
//! gives a connection's name, or none.

use credbroker_proto::v1::{ConnectRequest, ConnectResponse};

use crate::app::{App, Principal};
use crate::broker::Destination;
use crate::error::{Code, Failure};

/// Bytes of one field.
const MAX_FIELD: usize = 1024;

pub(super) async fn run(
    app: &App,
    caller: &Principal,
    request: ConnectRequest,
) -> Result<ConnectResponse, Failure> {
    let destination = destination(request)?;
    let (connection_id, connection) = app.connect_to(caller, &destination, None).await?;
    Ok(ConnectResponse { connection_id, connection_string: connection.target })
}

fn destination(request: ConnectRequest) -> Result<Destination, Failure> {
    let ConnectRequest { storage_type, host, database, port } = request;
    if storage_type != "postgresql" {
        return Err(Failure::new(Code::Unsupported, "storage_type must be postgresql"));
    }
    for (field, text) in [("host", &host), ("database", &database)] {
        if !(1..=MAX_FIELD).contains(&text.len()) {
            return Err(Failure::invalid(format!("{field} must have 1 to {MAX_FIELD} bytes")));
        }
    }
    let port = port.map(u16::try_from).transpose();
    let port = port.map_err(|_too_large| Failure::invalid("port must be below 65536"))?;
    Ok(Destination { host, port, database })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_said_without_values() {
        let good = ConnectRequest {
            storage_type: "postgresql".into(),
            host: "canary".into(),
            database: "canary".into(),
            port: Some(6432),
        };
        assert_eq!(destination(good.clone()).unwrap().port, Some(6432));
        let wrong = [
            ConnectRequest { storage_type: "canary".into(), ..good.clone() },
            ConnectRequest { host: String::new(), ..good.clone() },
            ConnectRequest { database: "canary".repeat(200), ..good.clone() },
            ConnectRequest { port: Some(70_000), ..good },
        ];
        for request in wrong {
            let refused = destination(request).unwrap_err();
            assert!(!refused.to_string().contains("canary"), "{refused}");
        }
    }
}
