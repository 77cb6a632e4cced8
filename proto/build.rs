//! Compiles the contract with protox, so that no protoc is needed.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use prost::Message as _;

const FILES: &[&str] = &[
    "proto/credbroker/v1/handles.proto",
    "proto/credbroker/v1/packet.proto",
    "proto/credbroker/v1/admin.proto",
];

/// What another process than the broker serves: described in a set of its own, so that nobody's
/// reflection names a service that is not there.
const SQL_FILE: &str = "proto/credbroker/v1/sql.proto";

/// Messages whose `Debug` would print a bearer token; `redact.rs` writes it by hand.
const TOKEN_BEARING: &[&str] = &[
    "credbroker.v1.IssueHandleResponse",
    "credbroker.v1.RenewHandleRequest",
    "credbroker.v1.RevokeHandleRequest",
    "credbroker.v1.RevokeHandleRequest.handle",
    "credbroker.v1.DescribeHandleRequest",
    "credbroker.v1.WatchHandleRequest",
    "credbroker.v1.OpenRequest",
    "credbroker.v1.RevealRequest",
    "credbroker.v1.ExecuteQueryRequest",
    "credbroker.v1.CreateCredentialTokenResponse",
    "credbroker.v1.RevokeCredentialTokenRequest",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let descriptors = protox::compile(FILES, ["proto"])?;
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    let descriptors = protox::compile([SQL_FILE], ["proto"])?;
    fs::write(out.join("sql_descriptors.bin"), descriptors.encode_to_vec())?;
    let all = FILES.iter().chain([&SQL_FILE]);
    let descriptors = protox::compile(all, ["proto"])?;

    // The code of both halves is always generated; features decide what is compiled, because
    // a build script that looked at features would run once for each set of them.
    tonic_prost_build::configure()
        .build_transport(false)
        .skip_debug(TOKEN_BEARING)
        .server_mod_attribute(".", "#[cfg(feature = \"server\")]")
        .client_mod_attribute(".", "#[cfg(feature = \"client\")]")
        .compile_fds(descriptors)?;

    for file in FILES.iter().chain([&SQL_FILE]) {
        println!("cargo:rerun-if-changed={file}");
    }
    Ok(())
}
