//! seccomp: what a broker never does is refused by the kernel. No program is started, no other
//! process is read or traced, no mount, module, namespace or key is touched.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter_all_threads};

const PROGRAMS: &[libc::c_long] = &[libc::SYS_execve, libc::SYS_execveat];

const REFUSED: &[libc::c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_open_by_handle_at,
    libc::SYS_swapon,
    libc::SYS_reboot,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
];

pub(super) fn install() -> io::Result<()> {
    refuse(&[PROGRAMS, REFUSED])
}

/// For the keeper. What it starts inherits the filter.
pub(super) fn install_but_for_programs() -> io::Result<()> {
    refuse(&[REFUSED])
}

fn refuse(calls: &[&[libc::c_long]]) -> io::Result<()> {
    apply_filter_all_threads(&program(calls)?).map_err(io::Error::other)
}

fn program(calls: &[&[libc::c_long]]) -> io::Result<BpfProgram> {
    let rules: BTreeMap<i64, Vec<_>> =
        calls.iter().copied().flatten().map(|call| (*call, Vec::new())).collect();
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let filter =
        SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).map_err(io::Error::other)?;
    BpfProgram::try_from(filter).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// On a thread of its own: the filter stays for as long as that lives.
    fn behind(calls: &'static [&'static [libc::c_long]], program_to_run: &'static str) -> String {
        let thread = std::thread::spawn(move || {
            seccompiler::apply_filter(&program(calls).unwrap()).unwrap();
            match Command::new(program_to_run).arg("--help").output() {
                Ok(output) => format!("ran: {}", output.status),
                Err(error) => format!("refused: {:?}", error.kind()),
            }
        });
        thread.join().unwrap()
    }

    #[test]
    fn the_broker_starts_no_program_and_the_keeper_does() {
        assert_eq!(behind(&[PROGRAMS, REFUSED], "/bin/true"), "refused: PermissionDenied");
        assert_eq!(behind(&[REFUSED], "/bin/true"), "ran: exit status: 0");
    }

    #[test]
    fn what_the_keeper_starts_is_refused_the_rest_too() {
        let script = "unshare --user true 2>/dev/null && echo unshared";
        let thread = std::thread::spawn(move || {
            seccompiler::apply_filter(&program(&[REFUSED]).unwrap()).unwrap();
            Command::new("/bin/sh").args(["-c", script]).output().unwrap()
        });
        let output = thread.join().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "");
    }
}
