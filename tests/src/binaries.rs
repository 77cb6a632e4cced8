//! Where the programs under test are, built from the sources as they stand.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::identity;
use crate::shared;

/// Names a directory of ready-built programs; then nothing is built here.
pub const BIN_DIR_ENV: &str = "CREDBROKER_E2E_BIN_DIR";

/// The daemon.
#[must_use]
pub fn credbrokerd() -> PathBuf {
    installed("credbrokerd")
}

/// The command line.
#[must_use]
pub fn credbroker() -> PathBuf {
    installed("credbroker")
}

/// The SQL worker.
#[must_use]
pub fn sql_worker() -> PathBuf {
    installed("credbroker-sql-worker")
}

/// The harness' own helper program.
#[must_use]
pub fn helper() -> PathBuf {
    installed("credbroker-e2e-helper")
}

/// The root of the source tree.
///
/// # Panics
/// Never: the package lies one folder below it.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent")
}

/// The directory with the programs as cargo built them. Cargo does not build the programs of
/// other packages for a test, so this asks it to, once a test run.
///
/// # Panics
/// When they cannot be built.
pub fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(given) = std::env::var_os(BIN_DIR_ENV) {
            return PathBuf::from(given);
        }
        let own = std::env::current_exe().expect("a process knows its executable");
        let directory = own
            .ancestors()
            .skip(1)
            .find(|path| !path.ends_with("deps"))
            .expect("the target directory is above the executable")
            .to_path_buf();
        // A program of this package was built together with the others.
        if own.ancestors().nth(1).is_some_and(|parent| parent.ends_with("deps")) {
            build(&directory);
        }
        directory
    })
}

/// Whether everybody may execute a file, or pass through a directory.
fn open_to_all(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o005 == 0o005)
}

fn build(directory: &Path) {
    let marker =
        std::env::var("NEXTEST_RUN_ID").ok().map(|run| directory.join(format!(".e2e-built-{run}")));
    let lock = fs::File::create(directory.join(".e2e-build.lock")).expect("a lock file");
    lock.lock().expect("the build lock");
    if marker.as_ref().is_some_and(|marker| marker.exists()) {
        return;
    }
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace())
        .args(["build", "--quiet", "--locked", "--workspace", "--bins", "--target-dir"])
        .arg(directory.parent().expect("a profile directory has a parent"));
    if directory.ends_with("release") {
        command.arg("--release");
    }
    let status = command.status().expect("cargo can be run");
    assert!(status.success(), "cargo build of the programs under test failed: {status}");
    for old in fs::read_dir(directory).expect("the target directory is readable").flatten() {
        if old.file_name().to_string_lossy().starts_with(".e2e-built-") {
            let _stale = fs::remove_file(old.path());
        }
    }
    if let Some(marker) = marker {
        fs::write(marker, "").expect("a marker beside the programs");
    }
}

/// The program where every uid may execute it: as it was built, or a copy of it, for a source
/// tree may lie where only its owner may look.
fn installed(name: &str) -> PathBuf {
    let source = built().join(name);
    let original = fs::metadata(&source).unwrap_or_else(|error| {
        panic!("{} is missing ({error}); run: cargo build --workspace --bins", source.display())
    });
    if !identity::several() || source.ancestors().all(open_to_all) {
        return source;
    }
    let _one_at_a_time = {
        let lock = shared::lock_file("bin.lock");
        lock.lock().expect("the copy lock");
        lock
    };
    let directory = shared::directory().join("bin");
    fs::create_dir_all(&directory).expect("a directory for copies");
    let target = directory.join(name);
    let current = fs::metadata(&target).is_ok_and(|copy| {
        copy.len() == original.len() && copy.modified().ok() == original.modified().ok()
    });
    if !current {
        let fresh = directory.join(format!(".{name}.new"));
        let _left_over = fs::remove_file(&fresh);
        fs::copy(&source, &fresh).expect("the program can be copied");
        let copy = fs::File::options().append(true).open(&fresh).expect("the copy opens");
        let modified = original.modified().expect("Linux keeps modification times");
        copy.set_modified(modified).expect("the copy keeps the time of the original");
        drop(copy);
        fs::rename(&fresh, &target).expect("the copy can be put into place");
    }
    target
}
