//! The fuzzer: libFuzzer around one target, which the variable `FUZZ_TARGET` names. Built by
//! `tests/fuzz/build`, run by `tests/fuzz/run`.

#![cfg_attr(fuzzing, no_main)]

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    use std::io::Write as _;
    // Without instrumentation there is nothing to guide it.
    let _ = writeln!(std::io::stderr(), "the fuzzer is built by tests/fuzz/build");
    std::process::ExitCode::from(64)
}

#[cfg(fuzzing)]
mod fuzzing {
    #![allow(unsafe_code, reason = "the entry points that libFuzzer calls by name")]

    use std::sync::OnceLock;

    use credbroker_broker::fuzzing::{TARGETS, Target};

    static TARGET: OnceLock<Target> = OnceLock::new();

    libfuzzer_sys::fuzz_target!(init: {
        let wanted = std::env::var("FUZZ_TARGET").unwrap_or_default();
        let outside: (&str, Target) = ("audit_verify", credbroker_fuzz::audit_verify);
        let mut all = TARGETS.into_iter().chain([outside]);
        let Some((_, target)) = all.find(|(name, _)| *name == wanted) else {
            panic!("FUZZ_TARGET names no target: {wanted:?}");
        };
        let _ = TARGET.set(target);
    }, |bytes: &[u8]| {
        if let Some(target) = TARGET.get() {
            let _ = target(bytes);
        }
    });
}
